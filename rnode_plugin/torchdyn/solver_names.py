"""Solver names and solver objects as torchdyn's classes take them, and the 3/8 rule as one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torchdyn.numerics.solvers.ode import (
    MS_SOLVER_DICT,
    SOLVER_DICT,
    DormandPrince45,
    Euler,
    Midpoint,
    RungeKutta4,
    Tsitouras45,
    str_to_solver,
)
from torchdyn.numerics.solvers.templates import DiffEqSolver, MultipleShootingDiffeqSolver

from ..core.ops import on_host, transforms_active
from ..errors import ConfigError, suggest
from ..solvers import Adjoint, Gradient, Method, Solution, Solver, get_method, gradient_of
from ..solvers.config import check_tolerance
from ..solvers.tableaus import Field, Interpolate, StepResult


class RungeKutta38(DiffEqSolver):
    """Kutta's 3/8 rule (order 4, fixed steps), the paper's training solver, which torchdyn does not have.

    Unlike torchdyn's ``rk4`` it evaluates a time-dependent field at the times of its stages, t, t + h/3, t + 2h/3
    and t + h.
    """

    weights = (1 / 8, 3 / 8, 3 / 8, 1 / 8)

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(order=4)
        self.dtype = dtype

    def step(
        self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Tensor | None = None, args: Any = None
    ) -> tuple[None, Tensor, None]:
        return None, get_method("rk4_38").advance(f, x, t, dt, k1)[1], None


def resolve_solver(solver: str | nn.Module, role: str = "solver") -> nn.Module:
    """torchdyn's solver object for a name, or the object itself.

    Raises:
        ConfigError: for an unknown name, or a multiple-shooting solver, whose iterates are not a trajectory that a
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
            f"{role}={solver!r} is not a solver: give a name, or an object with `step(f, x, t, dt, k1, args)` and "
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
        named: solver objects that stand for a name; in double precision they have coefficients of that precision.
        x, t_span: state and times, whose type and device the solver is brought to.
        args: for its ``step``.
        backward: whether an adjoint takes the steps. It depends on time if the path is interpolated, and it
            need not match torchdyn's values, so ``rk4`` evaluates at the right times here.
    """
    if backward and type(solver) is RungeKutta4:
        return get_method("rk4")
    if x.dtype is torch.float64:
        # a solver that is made inside a transform belongs to it, and no later call may find it
        make = _shared.__wrapped__ if transforms_active() else _shared
        solver = next((make(name, x.dtype) for built, name in named if built is solver), solver)
    if hasattr(solver, "sync_device_dtype"):
        with on_host():
            solver.sync_device_dtype(x, t_span)
    return method_from_torchdyn(solver, args)


class SolverObjects(nn.Module):
    """torchdyn's objects for a solve and for its continuous adjoint.

    Args:
        solver: a name or an object.
        adjoint: the same for the adjoint; None: ``solver``.
    """

    def __init__(self, solver: str | nn.Module, adjoint: str | nn.Module | None = None) -> None:
        super().__init__()
        self.solver = resolve_solver(solver)
        self.adjoint = self.solver if adjoint is None else resolve_solver(adjoint, "solver_adjoint")
        self._named = [
            (made, name) for made, name in ((self.solver, solver), (self.adjoint, adjoint)) if isinstance(name, str)
        ]

    def at(self, solver: Solver, z: Tensor, t_span: Tensor) -> Solver:
        """``solver`` with the steps of these objects for states like ``z`` and times like ``t_span``."""
        forward = step_method(self.solver, self._named, z, t_span, None)
        backward = step_method(self.adjoint, self._named, z, t_span, None, backward=True)
        return replace(solver, method=forward, gradient=gradient_of(solver).with_method(backward))


def solver_of(
    solver: str | nn.Module,
    *,
    atol: float | None = None,
    rtol: float | None = None,
    sensitivity: str = "autograd",
    solver_adjoint: str | nn.Module | None = None,
    atol_adjoint: float = 1e-4,
    rtol_adjoint: float = 1e-4,
    max_nfe: int | None = None,
    **others: Any,
) -> tuple[Solver, SolverObjects]:
    """The :class:`~rnode_plugin.Solver` and the steps of a solver given as torchdyn's classes take it.

    Args:
        solver, sensitivity, solver_adjoint, atol_adjoint, rtol_adjoint, max_nfe: as in
            :class:`~rnode_plugin.NeuralODE`.
        atol, rtol: tolerances; None: 1e-5.

    Raises:
        ConfigError: for a name, an object or a number that :class:`~rnode_plugin.NeuralODE` refuses, and for an
            option that has no meaning for a density.
    """
    for name in others:
        raise ConfigError(f"{name}= has no meaning for a density: NeuralODE and CNF may take it.")
    objects = SolverObjects(solver, solver_adjoint)
    made = Solver(
        solver_name(objects.solver), step=None, max_nfe=max_nfe,
        gradient=gradient_from_torchdyn(sensitivity, atol=atol_adjoint, rtol=rtol_adjoint),
        atol=1e-5 if atol is None else atol, rtol=1e-5 if rtol is None else rtol,
    )  # fmt: skip
    return made, objects


def kept_times(t_span: Tensor, save_at: Any) -> list[int]:
    """The places of ``save_at`` in ``t_span``; a ConfigError unless each of these times is one of them, once."""
    save_at = save_at.to(t_span) if isinstance(save_at, Tensor) else torch.tensor(save_at).to(t_span)
    matches = torch.isclose(t_span[:, None], save_at[None])
    if not bool((matches.sum(0) == 1).all()):
        raise ConfigError("each time of save_at must be one of t_span, once and only once.")
    return matches.any(1).nonzero().flatten().tolist()


_FAMILIES = {
    Euler: "euler",
    Midpoint: "midpoint",
    RungeKutta4: "rk4",
    DormandPrince45: "dopri5",
    Tsitouras45: "tsit5",
}


_RK4_NODES = (0.0, 0.0, 0.5, 0.5)  # the times at which torchdyn's rk4 evaluates, see NeuralODE


class _Mirrored:
    """A field with time reversed, ``-f(-t, x)``, which remembers the velocities whose sign it has changed."""

    def __init__(self, field: Field) -> None:
        self._field = field
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        velocity = self._field(-t, x)
        self._pairs.append((-velocity, velocity))
        return self._pairs[-1][0]

    def original(self, mirrored: Tensor | None) -> Tensor | None:
        """The field's velocity of which this is the mirror image; None for a tensor that is not one of them."""
        return next((velocity for opposite, velocity in self._pairs if opposite is mirrored), None)


def _as_it_is(dt: Tensor, rest: Tensor, sign: float) -> Tensor:
    """torchdyn divides no interval evenly."""
    return dt


def interpolate_by(interpolator: Any) -> Interpolate:
    """torchdyn's fourth-order interpolant as a function of one of our steps."""

    def interpolate(
        step: Any, z: Tensor, first: Any, t: Tensor, dt: Tensor, times: Sequence[Tensor]
    ) -> list[Tensor]:
        if not times:
            return []
        middle = z + dt * sum(w * k for w, k in zip(interpolator.bmid, step.stages, strict=True))
        coefficients = interpolator.fit(dt, first.dz, step.last.dz, z, step.z, middle)
        return [interpolator.evaluate(coefficients, t, t + dt, time) for time in times]

    return interpolate


class StepwiseAdjoint(Adjoint):
    """torchdyn's interpolated adjoint, for which each accepted step of an adaptive solver is an output too."""

    def outputs(self, solution: Solution) -> tuple[Tensor, Tensor]:
        if solution.next_step is None or solution.steps is None:  # of a fixed grid
            return solution.t, solution.z
        t, z = (torch.cat(pair) for pair in zip((solution.t, solution.z), solution.steps, strict=True))
        times = t.detach()
        order = times.argsort(stable=True, descending=bool(times[0] > solution.t[-1]))
        times = times[order]
        order = order[torch.cat([times[:1] == times[:1], times[1:] != times[:-1]])]
        return t[order], z[order]


def gradient_from_torchdyn(
    sensitivity: str, *, atol: Any, rtol: Any, interpolated: type[Adjoint] = Adjoint
) -> Gradient:
    """The gradient that ``sensitivity=`` names.

    Args:
        sensitivity: as in :class:`~rnode_plugin.NeuralODE`.
        atol, rtol: tolerances of an adjoint.
        interpolated: the class of an interpolated one.
    """
    for name, tolerance in (("atol_adjoint", atol), ("rtol_adjoint", rtol)):
        check_tolerance(tolerance, name)
    if sensitivity == "adjoint":
        return Adjoint(atol, rtol)
    if sensitivity == "interpolated_adjoint":
        return interpolated(atol, rtol, interpolated=True)
    return gradient_of(Solver(gradient=sensitivity))


def method_from_torchdyn(solver: Any, args: Any = None) -> Method:
    """A torchdyn solver object (hypersolvers and a user's own included), stepping exactly as in torchdyn.

    ``args`` is handed to its ``step``.

    A solver of a known family (or a subclass: a hypersolver adds its correction to the same stages) brings that
    family's quadrature weights. Another solver may have an attribute ``weights``, one number per evaluation in a
    step; without it, a penalty's rate counts with its value at the start of each step.
    """
    args = {} if args is None else args

    def advance_either_way(f: Field, x: Tensor, t: Tensor, dt: Tensor, k1: Tensor | None) -> StepResult:
        with on_host():
            forward = bool(dt > 0)
        if forward:
            return solver.step(f, x, t, dt, k1=k1, args=args)
        # torchdyn never shows a solver a negative step: it mirrors time and the field. The same happens here
        # for solvers that may do more with dt than scale velocities.
        mirrored = _Mirrored(f)
        k1 = None if k1 is None else -k1
        new_velocity, new, error, *_ = solver.step(mirrored, x, -t, -dt, k1=k1, args=args)
        return mirrored.original(new_velocity), new, error

    known = isinstance(solver, tuple(_FAMILIES))
    family = get_method(solver_name(solver)) if known else None
    weights = getattr(solver, "weights", family.weights if family else None)
    weights = None if weights is None else tuple(map(float, weights))
    draws = family.draws if family else None
    if draws is None and weights is not None and min(weights) >= 0 and solver.stepping_class == "fixed":
        draws = weights
    return Method(
        type(solver).__name__,
        partial(solver.step, args=args) if type(solver) in _FAMILIES else advance_either_way,
        getattr(solver, "order", 1),
        solver.stepping_class == "adaptive",
        weights,
        error_weights=family.error_weights if family else None,
        draws=draws,
        safety=float(getattr(solver, "safety", 0.9)),
        min_factor=float(getattr(solver, "min_factor", 0.2)),
        max_factor=float(getattr(solver, "max_factor", 10.0)),
        nodes=_RK4_NODES if type(solver) is RungeKutta4 else family.nodes if family else None,
        fit=_as_it_is,
    )


def solver_name(solver: Any) -> str:
    """The name of a solver object's family; for a user's solver, ``"dopri5"`` or ``"euler"``."""
    for kind, name in _FAMILIES.items():
        if isinstance(solver, kind):
            return name
    if isinstance(solver, RungeKutta38):
        return "rk4_38"
    return "dopri5" if solver.stepping_class == "adaptive" else "euler"
