"""get_solver and solver_of: make a solver from a method whose kind the caller does not know."""

from __future__ import annotations

import inspect
from typing import Any

from ..errors import ConfigError
from .adaptive import Adaptive
from .checks import Tolerance, refuse_worst
from .fixed import FixedGrid
from .solver import Solver
from .tableaus import Method, get_method

_LACKS = {
    "step": "chooses its own steps and takes no step=: give atol= and rtol=",
    "atol": "controls no error and takes no atol=: give step=",
    "rtol": "controls no error and takes no rtol=: give step=",
    "first_step": "controls no error and takes no first_step=: give step=",
}


def get_solver(method: str | Method, **options: Any) -> Solver:
    """Make the solver for a method, a :class:`FixedGrid` or an :class:`Adaptive` solver.

    Args:
        method: a name such as ``"rk4_38"`` or ``"dopri5"``, or a :class:`~rnode_plugin.solvers.Method`.
        options: keyword arguments of the class that the method belongs to.

    Raises:
        ConfigError: for an unknown name, an option that this class does not take, and as its constructor.

    Example:
        >>> from rnode_plugin.solvers import get_solver
        >>> get_solver("dopri5", atol=1e-6).tolerances
        (1e-06, 1e-05)
    """
    found = get_method(method)
    kind = Adaptive if found.adaptive else FixedGrid
    known = inspect.signature(kind).parameters
    for name in options:
        if name not in known:
            raise ConfigError(f"{found.name} {_LACKS.get(name, f'takes no {name}=')}.")
    return kind(method, **options)


def solver_of(
    method: str | Method,
    *,
    step: float | None,
    atol: Tolerance,
    rtol: Tolerance,
    first_step: float | None = None,
    error_norm: str = "rms",
    **shared: Any,
) -> Solver:
    """Make the solver for a method from the options of both kinds, of which it uses its own.

    Args:
        method: as for :func:`get_solver`.
        step: option of a fixed grid.
        atol, rtol, first_step, error_norm: options of an adaptive solver.
        shared: options of both kinds.

    Raises:
        ConfigError: as :func:`get_solver`, and for the error norm ``worst`` with a fixed grid.
    """
    found = get_method(method)
    if found.adaptive:
        return Adaptive(method, atol=atol, rtol=rtol, first_step=first_step, error_norm=error_norm, **shared)
    refuse_worst(error_norm, found.name)
    return FixedGrid(method, step=step, **shared)
