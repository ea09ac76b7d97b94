"""Penalties in code that cannot be changed: replaces torchdiffeq's functions in a block or until ``uninstall``."""

from __future__ import annotations

import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torchdiffeq
from torch import Tensor

from ..core.history import History, SolveCounter
from ..core.integrals import attach
from ..core.part import State
from ..core.regularizers import RegularizersLike
from ..errors import ConfigError
from . import integrate
from .augmented import here
from .integrate import PLAIN, Given, Penalized, is_sampled, solve, system_of

PenalizedSolve = Callable[[str, Callable[..., State], State, Tensor, Given], Any]
"""``(name, func, y0, t, given)`` to the result of torchdiffeq's function ``name``; it integrates penalties too."""

_OURS = ("regularizers", "penalized", "batch_dim", "trace_noise", "quadrature")

_NOT_SEEN = (
    "this regularize() block saw no solve by torchdiffeq that came to its end. It sees calls of odeint and "
    "odeint_adjoint in its own thread and process, except solves that end by event_fn. A model that kept the "
    "function before the first block (self.odeint = odeint, functools.partial), and a module that is not in "
    "sys.modules, have to be made after rnode_plugin.torchdiffeq.install(). Other solvers: NeuralODE and ODESolver "
    "of this package take regularizers= themselves, and rnode_plugin.penalties_along integrates penalties along "
    "the states from torchdyn.numerics.odeint, ODEProblem or any solver."
)

_installed: PenalizedSolve | None = None


def _replacement(name: str) -> Callable[..., Any]:
    """The replacement for torchdiffeq's function ``name``. Outside of blocks and ``install`` it only calls that."""
    plain, with_penalties = PLAIN[name], getattr(integrate, name)
    defaults = {key: value for key, value in with_penalties.__kwdefaults__.items() if key not in _OURS}

    @functools.wraps(plain)
    def replacement(func: Callable[..., State], y0: State, t: Tensor, **given: Any) -> Any:
        if given.get("regularizers") is not None:
            return with_penalties(func, y0, t, **given)
        given = {key: value for key, value in given.items() if key not in _OURS}
        penalized_solve = here.penalized_solve or _installed
        if penalized_solve is None or here.evaluating:  # a solve inside a field is part of the field
            return plain(func, y0, t, **given)
        return penalized_solve(name, func, y0, t, {**defaults, **given})

    return replacement


# made once, so that uninstall() can recognize them
_REPLACEMENTS = {name: _replacement(name) for name in PLAIN}


@contextmanager
def regularize(
    *regularizers: Any,
    penalized: Penalized | None = None,
    batch_dim: int | None = 0,
    trace_noise: str = "rademacher",
    quadrature: str = "full",
) -> Iterator[History]:
    """Integrate penalties in all solves by torchdiffeq within a block, for code that cannot be changed.

    The block does not affect solves in other threads, nor solves that a field runs inside a solve. Solves that end
    by ``event_fn`` are not penalized, with a warning. Solves under ``torch.no_grad()`` count if no solve in the
    block has gradients, so a block can also measure an evaluation.

    The first block rebinds every name that a loaded module has for torchdiffeq's ``odeint`` or ``odeint_adjoint``
    to a function that only calls torchdiffeq outside of blocks; :func:`uninstall` restores the names. A model that
    keeps the function as an attribute, and a module that is not in ``sys.modules``, have to be made after the first
    block, or after :func:`install`.

    Args:
        regularizers: names, objects or functions, or one mapping from these to lambda, as for
            :func:`~rnode_plugin.torchdiffeq.odeint`.
        penalized, batch_dim, trace_noise, quadrature: as there.

    Yields:
        The penalties by name, ``(B,)``, summed over the solves, with the weighted sum in eq. 17 as ``loss()``.

    Raises:
        ConfigError: inside another such block, and as :func:`~rnode_plugin.torchdiffeq.odeint` does.

    Example:
        >>> import torch
        >>> from rnode_plugin.torchdiffeq import regularize
        >>> import torchdiffeq
        >>> a = torch.tensor(1.0, requires_grad=True)
        >>> with regularize("kinetic") as penalties:
        ...     y = torchdiffeq.odeint(lambda t, y: -a * y, torch.ones(4, 2), torch.tensor([0.0, 1.0]))
        >>> round(penalties["kinetic"][0].item(), 4)
        0.8647
    """
    if here.penalized_solve is not None:
        raise ConfigError("regularize() inside of another regularize() block: give all penalties to one of them.")
    spec = regularizers[0] if len(regularizers) == 1 else list(regularizers)
    system = system_of(spec, penalized=penalized, batch_dim=batch_dim, trace_noise=trace_noise)
    sampled = is_sampled(quadrature)
    history = History(system.regularizers, absent=_NOT_SEEN, of_one_thread=False)
    trains = False

    def collect(name: str, func: Callable[..., State], y0: State, t: Tensor, given: Given) -> Any:
        nonlocal trains
        if _ends_by_event(given):
            return PLAIN[name](func, y0, t, **given)
        with_gradients = torch.is_grad_enabled()
        if trains and not with_gradients:
            return PLAIN[name](func, y0, t, **given)
        solution, integrals = solve(name, func, y0, t, given, system, sampled=sampled)
        if with_gradients and not trains:  # the first solve with gradients discards the solves without
            trains = True
            history.begin()
        history.add(integrals)
        return solution

    _bind()
    here.penalized_solve = collect
    try:
        yield history
    finally:
        here.penalized_solve = None


def install(
    regularizers: RegularizersLike = None, *, counter: SolveCounter | None = None, **options: Any
) -> SolveCounter:
    """Give torchdiffeq's ``odeint`` and ``odeint_adjoint`` the arguments of the functions in this module's package.

    With ``regularizers`` every solve with gradients enabled integrates them, and the gradient of the weighted sum
    in eq. 17 is added whenever backward passes through the solution. The loss that the code prints does not contain
    the penalties, but its gradient does. Blocks of :func:`regularize` take precedence. A solve that ends by
    ``event_fn`` is not penalized, with a warning.

    Each backward pass adds the gradient once, so the effective lambda depends on how the code scales its loss. With
    k accumulated batches of ``loss / k`` it is k lambda (give lambda / k), with two backward passes through one
    solution 2 lambda, and with a loss that is multiplied by s, for example by a ``GradScaler``, lambda / s (use
    bf16, or add ``penalties.loss()`` to the loss). A gradient with respect to the input that passes through a
    solution contains the gradient of the penalties too.

    Args:
        regularizers: as for :func:`~rnode_plugin.torchdiffeq.odeint`; None: only the arguments are added.
        counter: counts the solves; None for a new one.
        options: ``penalized``, ``batch_dim``, ``trace_noise`` and ``quadrature``, as for
            :func:`~rnode_plugin.torchdiffeq.odeint`.

    Returns:
        SolveCounter: the number of solves that were penalized so far, ``solves``, and the mean of each penalty,
            ``means``.

    Raises:
        ConfigError: for a regularizer or an option that :func:`~rnode_plugin.torchdiffeq.odeint` refuses, and for a
            lambda that is a function of the step.
    """
    global _installed
    sampled = is_sampled(options.pop("quadrature", "full"))
    system, counter = system_of(regularizers, **options), SolveCounter() if counter is None else counter
    system.regularizers.refuse_schedules()

    def add_gradient(name: str, func: Callable[..., State], y0: State, t: Tensor, given: Given) -> Any:
        if not system.regularizers or not torch.is_grad_enabled() or _ends_by_event(given):
            return PLAIN[name](func, y0, t, **given)
        solution, integrals = solve(name, func, y0, t, given, system, sampled=sampled)
        return _with_cost(solution, counter.count(integrals))

    _bind()
    _installed = add_gradient
    return counter


def uninstall() -> None:
    """Restore torchdiffeq's own functions."""
    global _installed
    _installed = None
    with _lock:
        for place, key, value in _bound:
            if place.get(key) in _REPLACEMENTS.values():
                place[key] = value
        _bound.clear()


def _with_cost(solution: Any, cost: Tensor) -> Any:
    """The solution, tied to ``cost``, which gets a gradient of 1 when backward passes through the solution."""
    if isinstance(solution, Tensor):
        return attach(solution, {}, cost)[0]
    first, *rest = solution
    first, others = attach(first, {str(i): x for i, x in enumerate(rest)}, cost)
    return (first, *others.values())


def _ends_by_event(given: Given) -> bool:
    """Whether an event ends a solve. It is then not penalized, which a warning says."""
    if given["event_fn"] is None:
        return False
    warnings.warn("solves that end by event_fn are not penalized.", stacklevel=4)  # Python shows it once
    return True


_lock = threading.Lock()
_bound: list[tuple[dict[str, object], str, object]] = []


def _bind() -> None:
    """Rebind the names that loaded modules have for torchdiffeq's functions to the replacements, until `uninstall`.

    Once is enough, because modules that are loaded later find the replacements in torchdiffeq.
    """
    with _lock:
        if _bound:
            return
        of = {id(PLAIN[name]): replacement for name, replacement in _REPLACEMENTS.items()}
        modules = [(getattr(m, "__name__", ""), getattr(m, "__dict__", None)) for m in list(sys.modules.values())]
        # leave out this package and the module whose odeint_adjoint calls `odeint`, which would add penalties twice
        own = (__package__ or "rnode_plugin", "torchdiffeq._impl.adjoint")
        places = [place for name, place in modules if isinstance(place, dict) and not str(name).startswith(own)]
        defaults: Any = torchdiffeq.odeint_event.__kwdefaults__  # odeint_event has odeint as a default argument
        for place in (*places, defaults):
            if not of.keys().isdisjoint(map(id, list(place.values()))):
                for key, value in list(place.items()):
                    if id(value) in of:
                        _bound.append((place, key, value))
                        place[key] = of[id(value)]
