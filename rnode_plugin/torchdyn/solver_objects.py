"""torchdyn's names and solver objects as a :class:`~rnode_plugin.solvers.Method`.

An object takes its own steps. The fixed methods that torchdyn knows by name are run by tableaus of this package,
which takes less time: equal to torchdyn's up to rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torchdyn.numerics.interpolators import str_to_interp
from torchdyn.numerics.solvers.ode import (
    MS_SOLVER_DICT,
    SOLVER_DICT,
    AsynchronousLeapfrog,
    DormandPrince45,
    Euler,
    ImplicitEuler,
    Midpoint,
    RungeKutta4,
    Tsitouras45,
    str_to_solver,
)
from torchdyn.numerics.solvers.templates import DiffEqSolver, MultipleShootingDiffeqSolver

from ..core.derivatives import Velocity
from ..errors import ConfigError, check_name
from ..solvers import (
    Adaptive,
    Adjoint,
    FixedGrid,
    Method,
    Solution,
    Solver,
    get_gradient,
    get_method,
)
from ..solvers.step import Tolerance
from ..solvers.tableaus import explicit

if TYPE_CHECKING:
    from ..solvers.tableaus import StepResult

_FAMILIES = {
    Euler: "euler",
    Midpoint: "midpoint",
    RungeKutta4: "rk4",
    DormandPrince45: "dopri5",
    Tsitouras45: "tsit5",
}


_RK4 = explicit(
    "torchdyn's rk4",
    4,
    ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
    (1 / 6, 1 / 3, 1 / 3, 1 / 6),
    c=(0.0, 0.5, 0.5),
)
"""torchdyn's rk4, which by the times of its stages is of order 1 for a field that depends on time."""

_NAMED = {Euler: get_method("euler"), Midpoint: get_method("midpoint"), RungeKutta4: _RK4}


class SolverObject(Protocol):
    """The attributes of every solver object, torchdyn's or a user's. Others are optional."""

    stepping_class: str

    def step(
        self, f: Velocity, x: Tensor, t: Tensor, dt: Tensor, k1: Tensor | None = None, args: object = None
    ) -> StepResult: ...


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
        self, f: Velocity, x: Tensor, t: Tensor, dt: Tensor, k1: Tensor | None = None, args: object = None
    ) -> tuple[None, Tensor, None]:
        return None, get_method("rk4_38").advance(f, x, t, dt, k1)[1], None


def resolve_solver(solver: str | nn.Module, role: str = "solver") -> SolverObject:
    """Look up torchdyn's solver object by its name; an object is returned unchanged.

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
        if _is_solver(solver):
            return solver
        raise ConfigError(
            f"{role}={solver!r} is not a solver: give a name, a FixedGrid, an Adaptive, or an object with "
            "`step(f, x, t, dt, k1, args)` and `stepping_class` ('fixed' or 'adaptive')."
        )
    return _build(solver, torch.float32, role)


def _is_solver(solver: object) -> TypeGuard[SolverObject]:
    return callable(getattr(solver, "step", None)) and hasattr(solver, "stepping_class")


def _build(name: str, dtype: torch.dtype, role: str = "solver") -> SolverObject:
    # torchdyn builds the tableau of a name in single precision and only then converts it to the type of the state
    if name == "rk4_38":
        return RungeKutta38(dtype)
    check_name(name, (*SOLVER_DICT, "rk4_38"), role)
    return str_to_solver(name, dtype)


def refuse_leapfrog(solver: object) -> None:
    """Refuse a solver that evaluates the field on half of the state's columns only, the positions."""
    if isinstance(solver, AsynchronousLeapfrog):
        raise ConfigError(
            "torchdyn's leapfrog evaluates the field on half of the state, so that no penalties can be integrated: "
            "use a Runge-Kutta method such as 'dopri5' or 'rk4'."
        )


def kept_times(t_span: Tensor, save_at: Tensor | Sequence[float]) -> list[int]:
    """The indices of ``save_at`` in ``t_span``; a ConfigError unless each time occurs there exactly once."""
    save_at = save_at.to(t_span) if isinstance(save_at, Tensor) else torch.tensor(save_at).to(t_span)
    matches = torch.isclose(t_span[:, None], save_at[None])
    if not bool((matches.sum(0) == 1).all()):
        raise ConfigError("each time of save_at must be one of t_span, once and only once.")
    return matches.any(1).nonzero().flatten().tolist()


def solver_from(method: str | Method, *, atol: Tolerance, rtol: Tolerance, **shared: Any) -> Solver:
    """The solver of a method with torchdyn's arguments: a fixed grid takes one step for each interval of the times.

    Args:
        method: a name or a method.
        atol, rtol: options of an adaptive solver; a fixed grid has no tolerances.
        shared: options of both kinds.

    Raises:
        ConfigError: as the solver.
    """
    if get_method(method).adaptive:
        return Adaptive(method, atol=atol, rtol=rtol, **shared)
    return FixedGrid(method, step=None, **shared)


# --- the method of a solver object ---


_CONSTANTS = ("order", "stepping_class", "weights", "safety", "min_factor", "max_factor")


def constants_of(solver: SolverObject) -> list[object]:
    """The attributes of a solver object that a method reads. Users set them between two solves."""
    return [getattr(solver, name, None) for name in _CONSTANTS]


def with_args(solver: Solver, args: object) -> Solver:
    """The solver, with ``args`` passed to the solver objects that step in it and in its adjoint."""
    gradient, method = get_gradient(solver.gradient), get_method(solver.method)
    if isinstance(gradient, Adjoint) and gradient.backward is not None:
        gradient = replace(gradient, backward=with_args(gradient.backward, args))
    step = method.advance
    if not isinstance(step, _Step) or step.known:  # torchdyn's own methods do not read them
        return replace(solver, gradient=gradient)
    stepping = replace(method, advance=_Step(step.solver, step.name, args))
    return replace(solver, gradient=gradient, method=stepping)


def prepare(solver: Solver, x: Tensor, t: Tensor) -> None:
    """Build the solver object of a solve from ``(t, x)`` before torch.compile traces its steps."""
    step = get_method(solver.method).advance
    if solver.compile and isinstance(step, _Step):
        step.solver_like(x, t)


def method_from_torchdyn(
    solver: SolverObject, name: str | None, *, interpolator: str | Callable[..., object] | None
) -> Method:
    """The method of a torchdyn solver object, a hypersolver's or a user's included.

    A solver of a known family, or of a subclass, has the family's quadrature weights and stage times; its tableau
    is not read. (A hypersolver is a subclass that adds a correction to the same stages.) A solver may have an
    attribute ``weights``, one number per evaluation in a step, with the sum 1. Without it and without a family, a
    penalty's rate is taken at the start of a step.

    Args:
        solver: the object.
        name: the name from which it was made; None for a user's object.
        interpolator: torchdyn's, for output times inside a step of an adaptive solver. torchdyn's tsit5 ignores it.
    """
    if type(solver) is RungeKutta38:
        return get_method("rk4_38")
    if name is not None and type(solver) in _NAMED:
        return _NAMED[type(solver)]
    family = next((get_method(known) for kind, known in _FAMILIES.items() if isinstance(solver, kind)), None)
    weights, error_weights, draws, nodes = None, None, None, None
    if family is not None:
        weights, error_weights, draws, nodes = family.weights, family.error_weights, family.draws, family.nodes
    title = family.name if family else type(solver).__name__
    if isinstance(solver, RungeKutta4):
        title, nodes = _RK4.name, _RK4.nodes
    weights = getattr(solver, "weights", weights)
    weights = None if weights is None else tuple(map(float, weights))
    # non-negative weights are probabilities; among adaptive solvers only the known families have draws
    if draws is None and weights is not None and min(weights) >= 0 and solver.stepping_class == "fixed":
        draws = weights
    adaptive = solver.stepping_class == "adaptive"
    interpolate = None
    if adaptive and interpolator is not None and not isinstance(solver, Tsitouras45):
        interpolate = functools.partial(_interpolate, interpolator=interpolator)
    return Method(
        name=title,
        advance=_Step(solver, name, {}),
        order=getattr(solver, "order", 1),
        adaptive=adaptive,
        weights=weights,
        error_weights=error_weights,
        draws=draws,
        safety=float(getattr(solver, "safety", 0.9)),
        min_factor=float(getattr(solver, "min_factor", 0.2)),
        max_factor=float(getattr(solver, "max_factor", 10.0)),
        nodes=nodes,
        fit=None,  # torchdyn does not fit steps to the next stop
        interpolate=interpolate,
        traceable=type(solver) in _FAMILIES,
    )


class _Step:
    """The step of a solver object, for states of any dtype on any device.

    torchdyn never gives a solver a negative step. It mirrors time and the field instead. This class does the same
    for solvers that may do more with the step than scale velocities.
    """

    def __init__(self, solver: SolverObject, name: str | None, args: object) -> None:
        self.solver, self.name, self.args = solver, name, {} if args is None else args
        self.known = type(solver) in _FAMILIES
        self._ready: tuple[tuple[torch.dtype, torch.device] | None, SolverObject] = (None, solver)

    def __call__(self, f: Velocity, x: Tensor, t: Tensor, dt: Tensor, k1: Tensor | None) -> StepResult:
        solver = self.solver_like(x, t)
        if isinstance(solver, ImplicitEuler) and torch.is_grad_enabled():
            raise ConfigError(
                "the steps of torchdyn's implicit Euler have no gradient, because an optimizer finds each new "
                "state: use sensitivity='adjoint', or torch.no_grad() for values alone."
            )
        if not self.known and not bool(dt > 0):
            pairs: list[tuple[Tensor, Tensor]] = []  # each velocity of the mirrored field with the original

            def mirrored(t: Tensor, x: Tensor) -> Tensor:
                velocity = f(-t, x)
                pairs.append((-velocity, velocity))
                return pairs[-1][0]

            k1 = None if k1 is None else -k1
            last, new, error, *_ = solver.step(mirrored, x, -t, -dt, k1=k1, args=self.args)
            return next((velocity for opposite, velocity in pairs if opposite is last), None), new, error
        return solver.step(f, x, t, dt, k1=k1, args=self.args)

    def solver_like(self, x: Tensor, t: Tensor) -> SolverObject:
        """The solver object for states like ``x``. One with a name is built here, so no other model moves it."""
        like, solver = self._ready
        if like == (x.dtype, x.device):
            return solver
        solver = self.solver
        if self.name is not None:
            solver = _build(self.name, torch.float64 if x.dtype is torch.float64 else torch.float32)
        if sync := getattr(solver, "sync_device_dtype", None):
            sync(x, t)
        if self.name is not None:
            self._ready = (x.dtype, x.device), solver
        return solver


def _interpolate(
    step: Any,
    z: Tensor,
    first: Any,
    t: Tensor,
    dt: Tensor,
    times: Sequence[Tensor],
    *,
    interpolator: str | Callable[..., object],
) -> list[Tensor]:
    """torchdyn's fourth-order interpolant as a function of one of our steps."""
    if not times:
        return []
    interpolant: Any = str_to_interp(interpolator, z.dtype) if isinstance(interpolator, str) else interpolator
    interpolant.sync_device_dtype(z, t)
    # the state in the middle of the step, by torchdyn's weights for it
    middle = z + dt * sum(w * k for w, k in zip(interpolant.bmid, step.stages, strict=True))
    coefficients = interpolant.fit(dt, first.dz, step.last.dz, z, step.z, middle)
    return [interpolant.evaluate(coefficients, t, t + dt, time) for time in times]


class StepwiseAdjoint(Adjoint):
    """torchdyn's interpolated adjoint, in which each accepted step of an adaptive solver is also an output."""

    def outputs(self, solution: Solution, *, adaptive: bool) -> Solution:
        if not adaptive or solution.steps is None:
            return solution
        t, z = (torch.cat(pair) for pair in zip((solution.t, solution.z), solution.steps, strict=True))
        times = t.detach()
        # merge both in the order of time; of equal times the stable sort keeps the output before the step
        order = times.argsort(stable=True, descending=bool(times[0] > solution.t[-1]))
        times = times[order]
        order = order[torch.cat([times[:1] == times[:1], times[1:] != times[:-1]])]
        return replace(solution, t=t[order], z=z[order])
