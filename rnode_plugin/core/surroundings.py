"""Surroundings: what an evaluation of a net reads and changes in addition to its arguments."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .modes import exporting

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()  # pyright: ignore[reportInvalidTypeForm]
_making = threading.Lock()


def lock_of(module: nn.Module | None) -> AbstractContextManager[object]:
    """The lock of a net, which all models that hold the net share; without a net, nothing.

    The lock is not an attribute of the net, because a deepcopy of the net would fail.
    """
    # torch.compile cannot trace a lock, and what it compiles runs after the tracing
    if module is None or torch.compiler.is_compiling():
        return nullcontext()
    with _making:
        return _locks.setdefault(module, threading.RLock())


def module_of(function: object) -> nn.Module | None:
    """The module that a call of ``function`` runs; None if it is not known.

    For a function that is not a module itself: the module of its bound method, of its closure, or among the global
    names that it reads. Several become one ModuleList.
    """
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, nn.Module):
        return function
    owner = getattr(function, "__self__", None)  # of a bound method
    if isinstance(owner, nn.Module):
        return owner
    if not inspect.isfunction(function):
        return None
    held = [function.__globals__.get(name) for name in function.__code__.co_names]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # of a name that has no value yet
            held.append(cell.cell_contents)
    found = [value for value in held if isinstance(value, nn.Module)]
    return found[0] if len(found) == 1 else nn.ModuleList(found) if found else None


class Surroundings:
    """The buffers of a net and the state of the random generators, in one solve.

    Running statistics of batch norm, the vectors of an old spectral norm and the masks of dropout are neither
    arguments nor results of a vector field. An evaluation that a solve does not take must leave the buffers, and
    it must draw the same masks, or it is another function.

    Args:
        net: the module that the field calls; None: none is known.
        repeats: whether evaluations may be repeated, so that the generators' state is worth reading.

    Attributes:
        exclusive: a lock for an evaluation while another thread may replace the buffers that the evaluation writes
            into; None: no thread does.
    """

    __slots__ = ("_draws", "_modules", "exclusive", "net", "repeats")

    def __init__(self, net: nn.Module | None = None, *, repeats: bool = False) -> None:
        self.net, self.repeats = net, repeats
        self._draws: _States | None = None
        self._modules: list[nn.Module] | None = None
        shared = repeats and net is not None and net.training and next(net.buffers(), None) is not None
        self.exclusive = lock_of(net) if shared else None

    def mark(self, z: Tensor) -> None:
        """Note the random numbers that the next evaluation at a state like ``z`` will draw."""
        if not _unseen(z):
            self._draws = _states(z)

    @contextmanager
    def repeated(self, z: Tensor) -> Iterator[None]:
        """Evaluations inside repeat the draws of the last one that was marked, and leave no trace.

        Raises:
            ConfigError: for a field that draws, if its evaluations are not marked.
        """
        with self.aside(z) as before:
            if self._draws is not None:
                _restore(self._draws)
            yield
            if before is not None and not self.repeats and not torch.equal(before.cpu, torch.get_rng_state()):
                raise ConfigError(
                    "a regularizer evaluates the vector field again, which draws random numbers (dropout), so the "
                    "two evaluations would have different masks: declare `repeats = True` on the regularizer."
                )

    @contextmanager
    def aside(self, z: Tensor) -> Iterator[_States | None]:
        """Evaluations inside leave no trace in buffers and random numbers. Blocks in a row draw the same."""
        with self.kept():
            before = None if _unseen(z) else _states(z)
            try:
                yield before
            finally:
                if before is not None:
                    _restore(before)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Evaluations inside write into copies of the buffers of layers in training mode."""
        if self._modules is None:
            modules = () if self.net is None else self.net.modules()
            self._modules = [part for part in modules if part._buffers]
        changing = [part for part in self._modules if part.training]
        if not changing:
            yield
            return
        with lock_of(self.net):  # another thread that solves the same model must not see the copies
            kept = [
                (part._buffers, name, x) for part in changing for name, x in part._buffers.items() if x is not None
            ]
            for buffers, name, x in kept:
                buffers[name] = x.clone()
            try:
                yield
            finally:
                for buffers, name, x in kept:
                    buffers[name] = x


class _States(NamedTuple):
    """The states of the random generators that an evaluation may draw from."""

    cpu: Tensor
    cuda: Tensor | None
    device: torch.device


def _states(z: Tensor) -> _States:
    return _States(torch.get_rng_state(), torch.cuda.get_rng_state(z.device) if z.is_cuda else None, z.device)


def _restore(states: _States) -> None:
    torch.set_rng_state(states.cpu)
    if states.cuda is not None:
        torch.cuda.set_rng_state(states.cuda, states.device)


def _unseen(z: Tensor) -> bool:
    """Whether the generators' state does not exist here: in a program that is captured, and on the device meta."""
    if torch.compiler.is_compiling() or exporting() or z.is_meta:
        return True
    return z.is_cuda and torch.cuda.is_current_stream_capturing()
