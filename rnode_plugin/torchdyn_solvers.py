"""Solver names and solver objects as torchdyn's classes take them, and the 3/8 rule in the same dress."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torchdyn.numerics.solvers.ode import MS_SOLVER_DICT, SOLVER_DICT, RungeKutta4, str_to_solver
from torchdyn.numerics.solvers.templates import DiffEqSolver, MultipleShootingDiffeqSolver

from .errors import ConfigError, suggest
from .solve.methods import Method, get_method, method_from_torchdyn

__all__ = ["RungeKutta38", "as_times", "kept_times", "resolve_solver", "step_method"]


class RungeKutta38(DiffEqSolver):
    """Kutta's 3/8 rule (order 4, fixed steps), the paper's training solver; torchdyn's name for it: none.

    Unlike torchdyn's ``rk4`` it asks a time-dependent field at the times of its stages, t, t + h/3, t + 2h/3 and
    t + h.
    """

    weights = (1 / 8, 3 / 8, 3 / 8, 1 / 8)

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(order=4)
        self.dtype = dtype

    def step(
        self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Tensor | None = None, args: Any = None
    ) -> tuple[None, Tensor, None]:
        _, new, _, _ = get_method("rk4_38").advance(f, x, t, dt, k1)
        return None, new, None


def resolve_solver(solver: str | nn.Module, role: str = "solver") -> nn.Module:
    """torchdyn's solver object for a name, or the object itself.

    Raises:
        ConfigError: for an unknown name, or a multiple-shooting solver, whose iterates are no trajectory that a
            penalty could be integrated along.
    """
    if isinstance(solver, MultipleShootingDiffeqSolver) or (
        isinstance(solver, str) and solver in MS_SOLVER_DICT and solver not in SOLVER_DICT
    ):
        raise ConfigError(
            f"{role}={solver!r} is a multiple-shooting solver, which works on all times at once and has no steps "
            "to integrate penalties along. Use a sequential one such as 'dopri5', 'tsit5' or 'rk4' here, or "
            "torchdyn's MultipleShootingLayer, which takes no regularizers."
        )
    if not isinstance(solver, str):
        if callable(getattr(solver, "step", None)) and hasattr(solver, "stepping_class"):
            return solver
        raise ConfigError(
            f"{role}={solver!r} is no solver: give a name, or an object with `step(f, x, t, dt, k1, args)` and "
            "`stepping_class` ('fixed' or 'adaptive')."
        )
    return _build(solver, torch.float32, role)


def _build(name: str, dtype: torch.dtype, role: str) -> nn.Module:
    # torchdyn builds the tableau of a name in single precision and only then converts it to the type of the state
    if name == "rk4_38":
        return RungeKutta38(dtype)
    if name not in SOLVER_DICT:
        raise ConfigError(suggest(name, (*SOLVER_DICT, "rk4_38"), role))
    return str_to_solver(name, dtype)


@cache
def _shared(name: str, dtype: torch.dtype) -> nn.Module:
    return _build(name, dtype, "solver")


def step_method(
    solver: Any,
    named: Sequence[tuple[nn.Module, str]],
    x: Tensor,
    t_span: Tensor,
    args: Any,
    *,
    backward: bool = False,
) -> Method:
    """How ``solver`` steps on states like ``x``.

    Args:
        solver: torchdyn's or a user's solver object.
        named: solver objects that stand for a name, which in double precision means coefficients of its own.
        x, t_span: state and times, whose type and device the solver is brought to.
        args: for its ``step``.
        backward: whether the steps are those of an adjoint. It depends on time where the path is interpolated, and
            owes torchdyn no values: there ``rk4`` asks at the right times.
    """
    if backward and type(solver) is RungeKutta4:
        return get_method("rk4")
    if x.dtype is torch.float64:
        solver = next((_shared(name, x.dtype) for built, name in named if built is solver), solver)
    if hasattr(solver, "sync_device_dtype"):
        solver.sync_device_dtype(x, t_span)
    return method_from_torchdyn(solver, args)


def as_times(t_span: Any, x: Tensor) -> Tensor:
    """``t_span``, a tensor or a list of numbers or tensors, as a tensor on the device of ``x``."""
    if isinstance(t_span, Tensor):
        return t_span.to(x.device)
    if all(isinstance(t, Tensor) for t in t_span):
        return torch.cat([t.reshape(1) for t in t_span]).to(x.device)
    return torch.tensor(t_span, dtype=x.real.dtype, device=x.device)


def kept_times(t_span: Tensor, save_at: Any) -> list[bool]:
    """Which times of ``t_span`` are in ``save_at``.

    Raises:
        ConfigError: unless each of ``save_at`` is one of them, once.
    """
    save_at = save_at.to(t_span) if isinstance(save_at, Tensor) else torch.tensor(save_at).to(t_span)
    matches = torch.isclose(t_span[:, None], save_at[None])
    if not bool((matches.sum(0) == 1).all()):
        raise ConfigError("each time of save_at must be one of t_span, once and only once.")
    return matches.any(1).tolist()
