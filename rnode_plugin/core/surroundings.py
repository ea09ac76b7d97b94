"""Surroundings: what an evaluation of a net reads and changes in addition to its arguments."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .modes import exporting

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()  # pyright: ignore[reportInvalidTypeForm]
_making = threading.Lock()


def lock_of(module: nn.Module | None) -> AbstractContextManager[object]:
    """The lock of a net, shared by all models that hold the net; without a net, a context that does nothing.

    It is the lock of the net's first layer, which the wrappers of a net share. It is not an attribute, because a
    deepcopy of the layer would fail. A call of the net holds it, or one evaluation, but not a whole solve: on a
    GPU torch runs the backward passes of all threads in one thread, which may wait for the lock while a solve that
    holds it waits for that thread.
    """
    # torch.compile cannot trace a lock, and what it compiles runs after the tracing
    if module is None or torch.compiler.is_compiling():
        return nullcontext()
    while (layer := next(module.children(), None)) is not None:
        module = layer
    with _making:
        return _locks.setdefault(module, threading.RLock())


def module_of(function: object) -> nn.Module | None:
    """The module that a call of ``function`` runs; None if it is not known.

    If ``function`` is not a module itself, this is the owner of a bound method, or a module that the function or
    callable object holds (in its closure, its defaults, its attributes or the arguments of a partial, also of
    functions and callable objects that are held there), or one that it reads from global names. Several modules
    become one ModuleList.
    """
    modules = list({id(module): module for module in _modules_of(function, set())}.values())
    return modules[0] if len(modules) == 1 else nn.ModuleList(modules) if modules else None


def _modules_of(value: object, seen: set[int]) -> Iterator[nn.Module]:
    """The modules that a callable holds. ``seen`` has the identities of what was looked at."""
    if isinstance(value, nn.Module):
        yield value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    held: list[object] = []
    if isinstance(value, functools.partial):
        held = [value.func, *value.args, *value.keywords.values()]
    elif inspect.ismethod(value):
        owner = value.__self__
        held = [owner]
        if not isinstance(owner, nn.Module):
            held = [value.__func__, *getattr(owner, "__dict__", {}).values()]
    elif inspect.isfunction(value):
        held = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # a cell is empty until its name has a value
                held.append(cell.cell_contents)
        # not of functions with global names, which would lead into whole libraries
        read = (value.__globals__.get(name) for name in value.__code__.co_names)
        held += [each for each in read if isinstance(each, nn.Module)]
    elif callable(value) and inspect.isfunction(call := type(value).__call__):
        held = [call, *getattr(value, "__dict__", {}).values()]
    for each in held:
        yield from _modules_of(each, seen)


class Surroundings:
    """The buffers of a net and the state of the random generators, in one solve.

    The running statistics of batch norm, the vectors of spectral norm and the masks of dropout are neither
    arguments nor results of a vector field. An extra evaluation, which the solver did not ask for, must not change
    the buffers, and it must draw the same masks, because with others the field is another function.

    Args:
        net: the module that the field calls; None: none is known.
        repeats: whether evaluations may be repeated, so that the generators' state has to be noted.

    Attributes:
        exclusive: the lock to hold during an evaluation that writes into buffers, while another thread may have
            replaced them by copies; None if that cannot happen.
    """

    __slots__ = ("_draws", "_modules", "exclusive", "net", "repeats")

    def __init__(self, net: nn.Module | None = None, *, repeats: bool = False) -> None:
        self.net, self.repeats = net, repeats
        self._draws: _States | None = None
        self._modules: list[nn.Module] | None = None
        shared = repeats and net is not None and net.training and next(net.buffers(), None) is not None
        self.exclusive = lock_of(net) if shared else None

    def mark(self, z: Tensor) -> None:
        """Note the state of the generators that the next evaluation, on the device of ``z``, will draw from."""
        self._draws = random_states(z) or self._draws

    @contextmanager
    def repeated(self, z: Tensor) -> Iterator[None]:
        """Context for evaluations that repeat the draws of the last marked one and have no side effects.

        Raises:
            ConfigError: for a field that draws, if its evaluations are not marked.
        """
        with self.aside(z) as before:
            if self._draws is not None:
                _restore(self._draws)
            yield
            # nothing was marked, so draws inside were new ones
            if before is not None and not self.repeats and not same_states(before, random_states(z)):
                raise ConfigError(
                    "a regularizer evaluates the vector field again, which draws random numbers (dropout), so the "
                    "two evaluations would have different masks: declare `repeats=True` of the regularizer, or "
                    "leave out the velocity= of penalties_at."
                )

    @contextmanager
    def aside(self, z: Tensor) -> Iterator[_States | None]:
        """Context for evaluations that change neither buffers nor generators. Consecutive blocks draw the same."""
        with self.kept():
            before = random_states(z)
            try:
                yield before
            finally:
                if before is not None:
                    _restore(before)

    def repeating(self, others: Iterable[object] = ()) -> Callable[[], AbstractContextManager[None]]:
        """Note the parameters and buffers of the net and of ``others``, and return what makes contexts with them.

        A backward pass may find different ones: ``torch.func.functional_call`` replaces them during one call, and a
        caller may set a buffer, such as a context, before each of several solves.
        """
        modules = [part for each in (self.net, *others) if isinstance(each, nn.Module) for part in each.modules()]
        noted = [(held, dict(held)) for part in modules for held in (part._parameters, part._buffers) if held]
        return functools.partial(self._as_noted, noted)

    @contextmanager
    def _as_noted(self, noted: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> Iterator[None]:
        """Context for evaluations with the ``noted`` parameters and buffers, which they leave as they are."""
        others = [
            (held, name, x)
            for held, known in noted
            for name, x in known.items()
            if name in held and held[name] is not x
        ]
        with lock_of(self.net) if others else nullcontext(), _replaced(others), self.kept():
            yield

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Context for evaluations that write into copies of the buffers of layers in training mode."""
        if self._modules is None:
            modules = () if self.net is None else self.net.modules()
            self._modules = [part for part in modules if part._buffers]
        changing = [part for part in self._modules if part.training]
        if not changing:
            yield
            return
        # Copies during the block, not restored values after it: the graph of an earlier evaluation may hold the
        # original buffers, and a write into them would invalidate it. Other threads must not see the copies.
        with lock_of(self.net):
            copies = [
                (part._buffers, name, x.clone())
                for part in changing
                for name, x in part._buffers.items()
                if x is not None and not x.requires_grad  # else a net computed it, and a copy would lose its graph
            ]
            with _replaced(copies):
                yield


@contextmanager
def _replaced(entries: Sequence[tuple[dict[str, Any], str, Any]]) -> Iterator[None]:
    """Context in which each dictionary has the value of its entry, ``(dictionary, key, value)``."""
    before = [(held, name, held[name]) for held, name, _ in entries]
    for held, name, x in entries:
        held[name] = x
    try:
        yield
    finally:
        for held, name, x in before:
            held[name] = x


class _States(NamedTuple):
    """The states of the random generators that an evaluation may draw from."""

    cpu: Tensor
    cuda: Tensor | None
    device: torch.device


def random_states(z: Tensor) -> _States | None:
    """The states of the generators that an evaluation on the device of ``z`` draws from.

    They are None where they cannot be read, as in a captured program and on the device meta.
    """
    if torch.compiler.is_compiling() or exporting() or z.is_meta:
        return None
    if z.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    return _States(torch.get_rng_state(), torch.cuda.get_rng_state(z.device) if z.is_cuda else None, z.device)


def same_states(one: _States, other: _States | None) -> bool:
    """Whether nothing was drawn between two states of the generators."""
    if other is None or not torch.equal(one.cpu, other.cpu):
        return False
    return one.cuda is None or other.cuda is None or torch.equal(one.cuda, other.cuda)


def _restore(states: _States) -> None:
    torch.set_rng_state(states.cpu)
    if states.cuda is not None:
        torch.cuda.set_rng_state(states.cuda, states.device)
