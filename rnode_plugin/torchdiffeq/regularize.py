"""Penalties in code that cannot be changed: a block in which torchdiffeq's functions integrate them."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torchdiffeq
from torch import Tensor

from ..core.history import History
from ..core.part import State
from ..core.trace_estimators import TraceEstimator
from ..errors import ConfigError
from .augmented import here
from .integrate import PLAIN, Given, Penalized, is_sampled, solve, system_of

_NOT_SEEN = (
    "this regularize() block saw no solve by torchdiffeq that came to its end. It sees calls of odeint and "
    "odeint_adjoint in its own thread and process, except solves that end by event_fn. An object that keeps the "
    "function (self.odeint = odeint, functools.partial), and a module that is not in sys.modules, have to be made "
    "inside of a block. Other solvers: NeuralODE of this package takes regularizers= itself, and "
    "rnode_plugin.penalties_along integrates penalties along the states from torchdyn.numerics.odeint, ODEProblem "
    "or any solver."
)


def _replacement(name: str) -> Callable[..., Any]:
    """The replacement for torchdiffeq's function ``name``, which only calls that one outside of blocks."""
    plain: Any = PLAIN[name]

    @functools.wraps(plain)
    def replacement(func: Callable[..., State], y0: State, t: Tensor, **given: Any) -> Any:
        if here.penalized_solve is None or here.evaluating:  # a solve inside a field is part of the field
            return plain(func, y0, t, **given)
        return here.penalized_solve(name, func, y0, t, {**plain.__kwdefaults__, **given})

    # pickle finds a function by these names, also outside of blocks
    replacement.__module__, replacement.__qualname__ = __name__, name
    return replacement


# made once, because an object that is made inside of one block keeps the function for the next
odeint = _replacement("odeint")
odeint_adjoint = _replacement("odeint_adjoint")


@contextmanager
def regularize(
    *regularizers: Any,
    penalized: Penalized | None = None,
    batch_dim: int | None = 0,
    trace_estimator: str | TraceEstimator = "rademacher",
    quadrature: str = "full",
) -> Iterator[History]:
    """Integrate penalties in all solves by torchdiffeq within a block, for code that cannot be changed.

    The block does not affect solves in other threads, nor solves that a field runs inside a solve. Solves that end
    by ``event_fn`` are not penalized, with a warning. Solves under ``torch.no_grad()`` count if no solve in the
    block has gradients, so a block can also measure an evaluation.

    At its entry the block rebinds every name that a loaded module has for torchdiffeq's ``odeint`` or
    ``odeint_adjoint``, and at its exit it restores them. An object that keeps the function as an attribute, and a
    module that is not in ``sys.modules``, have to be made inside of a block. What they keep calls torchdiffeq
    outside of blocks, and integrates the penalties of every later block.

    Args:
        regularizers: names, objects or functions, or one mapping from these to lambda, as for
            :func:`~rnode_plugin.torchdiffeq.odeint`.
        penalized, batch_dim, trace_estimator, quadrature: as there.

    Yields:
        The penalties by name, ``(B,)``, summed over the solves, with the weighted sum in eq. 17 as ``loss()``.

    Raises:
        ConfigError: while another such block is open, and as :func:`~rnode_plugin.torchdiffeq.odeint` does.

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
    spec = regularizers[0] if len(regularizers) == 1 else list(regularizers)
    system = system_of(spec, penalized=penalized, batch_dim=batch_dim, trace_estimator=trace_estimator)
    sampled = is_sampled(quadrature)
    history = History(system.regularizers, absent=_NOT_SEEN)
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
            history.discard()
        history.add(integrals)
        return solution

    names = _bind()
    here.penalized_solve = collect
    try:
        with history.collecting():
            yield history
    finally:
        here.penalized_solve = None
        for namespace, key, value in names:
            namespace[key] = value


def _ends_by_event(given: Given) -> bool:
    """Whether an event ends a solve. It is then not penalized, which a warning says."""
    if given["event_fn"] is None:
        return False
    warnings.warn("solves that end by event_fn are not penalized.", stacklevel=4)  # Python shows it once
    return True


def _bind() -> list[tuple[dict[str, object], str, object]]:
    """Rebind the names that loaded modules have for torchdiffeq's functions to the replacements.

    Returns:
        The namespace, name and former value of each.
    """
    if torchdiffeq.odeint is odeint:
        raise ConfigError("another regularize() block is open: give all penalties to one of them.")
    by_id = {id(PLAIN["odeint"]): odeint, id(PLAIN["odeint_adjoint"]): odeint_adjoint}
    modules = [(getattr(m, "__name__", ""), getattr(m, "__dict__", None)) for m in list(sys.modules.values())]
    # leave out this package and the module whose odeint_adjoint calls `odeint`, which would add penalties twice
    own = (__package__ or "rnode_plugin", "torchdiffeq._impl.adjoint")
    namespaces = [names for name, names in modules if isinstance(names, dict) and not str(name).startswith(own)]
    defaults: Any = torchdiffeq.odeint_event.__kwdefaults__  # odeint_event has odeint as a default argument
    rebound: list[tuple[dict[str, object], str, object]] = []
    for namespace in (*namespaces, defaults):
        if not by_id.keys().isdisjoint(map(id, list(namespace.values()))):
            for key, value in list(namespace.items()):
                if id(value) in by_id:
                    rebound.append((namespace, key, value))
                    namespace[key] = by_id[id(value)]
    return rebound
