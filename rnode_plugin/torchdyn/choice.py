"""Choice: turns torchdyn's names, solver objects and options into a :class:`~rnode_plugin.Solver`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeGuard

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
from ..core.modes import on_host, transforms_active
from ..errors import ConfigError, suggest
from ..solvers import Adjoint, Method, Solution, Solver, get_gradient, get_method
from ..solvers.checks import Tolerance, check_tolerance
from ..solvers.named import solver_of
from ..solvers.tableaus import StepResult

_FAMILIES = {
    Euler: "euler",
    Midpoint: "midpoint",
    RungeKutta4: "rk4",
    DormandPrince45: "dopri5",
    Tsitouras45: "tsit5",
}


class SolverObject(Protocol):
    """What every solver object has, torchdyn's or a user's. Other attributes are optional."""

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
            f"{role}={solver!r} is not a solver: give a name, or an object with `step(f, x, t, dt, k1, args)` and "
            "`stepping_class` ('fixed' or 'adaptive')."
        )
    return _build(solver, torch.float32, role)


def _is_solver(solver: object) -> TypeGuard[SolverObject]:
    return callable(getattr(solver, "step", None)) and hasattr(solver, "stepping_class")


def _build(name: str, dtype: torch.dtype, role: str = "solver") -> SolverObject:
    # torchdyn builds the tableau of a name in single precision and only then converts it to the type of the state
    if name == "rk4_38":
        return RungeKutta38(dtype)
    if name not in SOLVER_DICT:
        raise ConfigError(suggest(name, (*SOLVER_DICT, "rk4_38"), role))
    return str_to_solver(name, dtype)


def refuse_leapfrog(solver: object) -> None:
    """Refuse a solver that evaluates the field on half of the state's columns only, the positions."""
    if isinstance(solver, AsynchronousLeapfrog):
        raise ConfigError(
            "torchdyn's leapfrog evaluates the field on half of the state, so that no penalties can be followed: "
            "use a Runge-Kutta method such as 'dopri5' or 'rk4'."
        )


def _tableau_of(solver: object) -> list[Tensor]:
    """The tableau of a solver object as a list of nodes, rows, weights and error weights; empty without one."""
    tableau = getattr(solver, "tableau", None)
    if tableau is None:
        return []
    nodes, rows, weights, errors = tableau
    return [nodes, *rows, weights, errors]


def solver_name(solver: SolverObject) -> str:
    """The name of a solver object's family; for a user's solver ``"dopri5"`` if adaptive, else ``"euler"``."""
    for kind, name in _FAMILIES.items():
        if isinstance(solver, kind):
            return name
    if isinstance(solver, RungeKutta38):
        return "rk4_38"
    return "dopri5" if solver.stepping_class == "adaptive" else "euler"


def kept_times(t_span: Tensor, save_at: Tensor | Sequence[float]) -> list[int]:
    """The indices of ``save_at`` in ``t_span``; a ConfigError unless each time occurs there exactly once."""
    save_at = save_at.to(t_span) if isinstance(save_at, Tensor) else torch.tensor(save_at).to(t_span)
    matches = torch.isclose(t_span[:, None], save_at[None])
    if not bool((matches.sum(0) == 1).all()):
        raise ConfigError("each time of save_at must be one of t_span, once and only once.")
    return matches.any(1).nonzero().flatten().tolist()


# --- the solver of a model ---


class Chooser(Protocol):
    """The attributes of a NeuralODE that choose its solver; all but the last four are torchdyn's."""

    solver: SolverObject
    solver_adjoint: SolverObject
    sensalg: str
    atol: float
    rtol: float
    atol_adjoint: float
    rtol_adjoint: float
    interpolator: str | Callable[..., object] | None
    _max_nfe: int | None
    _quadrature: str
    _error_norm: str
    _named: Sequence[tuple[SolverObject, str]]


@dataclass(frozen=True, eq=False)
class Choice:
    """The solver that the attributes of a NeuralODE describe, resolved once.

    torchdyn reads its attributes, and the constants and the tableau of a solver object, at each solve. So users may
    change them between two solves, also in place. A stale copy would give wrong numbers silently, and a setter does
    not see a change in place. So each solve compares what :func:`_read` gives, which reads them all, with what it
    gave when the choice was made. This takes less than a hundredth of the time of a small solve.

    Attributes:
        solver: the solver.
        made_of: what :func:`_read` gave when the solver was made.
    """

    solver: Solver
    made_of: Sequence[object]

    @classmethod
    def of(cls, model: Chooser) -> Choice:
        """Resolve what the attributes of a model describe now.

        Raises:
            ConfigError: for an unknown sensitivity, a number out of range, and options that the method cannot have.
        """
        solver = solver_from_torchdyn(
            model.solver, model.solver_adjoint, model.sensalg,
            names=[_name_of(model.solver, model._named), _name_of(model.solver_adjoint, model._named)],
            atol=model.atol, rtol=model.rtol, atol_adjoint=model.atol_adjoint, rtol_adjoint=model.rtol_adjoint,
            max_nfe=model._max_nfe, quadrature=model._quadrature, error_norm=model._error_norm,
            interpolator=model.interpolator, interpolated=StepwiseAdjoint,
        )  # fmt: skip
        return cls(solver, _read(model))

    def is_current(self, model: Chooser) -> bool:
        """Whether everything that the choice was made of is unchanged."""
        # Identity, because tensors cannot be compared by ==. A new object with the same value only resolves again.
        return all(map(operator.is_, self.made_of, _read(model)))

    def solver_for(self, args: object) -> Solver:
        """The solver for a call, whose solver objects receive the ``args`` of the call."""
        solver, gradient = self.solver, self.solver.gradient
        if isinstance(gradient, Adjoint) and isinstance(gradient.backward, Solver):
            gradient = replace(gradient, backward=_handing_on(gradient.backward, args))
        return replace(_handing_on(solver, args), gradient=gradient)


_CONSTANTS = ("order", "stepping_class", "weights", "safety", "min_factor", "max_factor")


def _read(model: Chooser) -> list[object]:
    """Everything that a choice is made of and that a user may change between two solves."""
    found: list[object] = [
        model.solver, model.solver_adjoint, model.sensalg, model.atol, model.rtol, model.atol_adjoint,
        model.rtol_adjoint, model.interpolator,
    ]  # fmt: skip
    for solver in found[:1] if model.solver_adjoint is model.solver else found[:2]:
        for name in _CONSTANTS:
            found.append(getattr(solver, name, None))
        if type(solver) in _FAMILIES:  # the tableau of another class may hold anything, and nothing here reads it
            found += _tableau_of(solver)
    for each in found[:]:
        if isinstance(each, Tensor) and not each.is_inference():  # a tensor counts writes into it in its version
            found.append(each._version)
    return found


def _name_of(solver: SolverObject, named: Sequence[tuple[SolverObject, str]]) -> str | None:
    """The name from which a solver object was made; None for a user's object or a changed tableau."""
    for made, name in named:
        if made is solver:
            fresh, own = _tableau_of(_build(name, torch.float32)), _tableau_of(made)
            return name if [x.tolist() for x in own] == [x.tolist() for x in fresh] else None
    return None


def _handing_on(solver: Solver, args: object) -> Solver:
    """The solver, with ``args`` handed to its solver object. torchdyn's own methods do not read ``args``."""
    step = solver.method.advance
    if not isinstance(step, _Step) or step.known:
        return solver
    return replace(solver, method=replace(solver.method, advance=_Step(step.solver, step.name, args)))


def solver_from_torchdyn(
    solver: SolverObject,
    adjoint: SolverObject,
    sensitivity: str,
    *,
    names: Sequence[str | None],
    atol: Tolerance,
    rtol: Tolerance,
    atol_adjoint: Tolerance,
    rtol_adjoint: Tolerance,
    max_nfe: int | None = None,
    quadrature: str = "full",
    error_norm: str = "rms",
    interpolator: str | Callable[..., object] | None = None,
    interpolated: type[Adjoint] = Adjoint,
) -> Solver:
    """Make a solver that steps as torchdyn's solver objects do.

    Args:
        solver, adjoint: the objects for the solve and for a continuous adjoint.
        sensitivity: as in :class:`~rnode_plugin.NeuralODE`.
        names: the names from which the two objects were made; None for a user's object.
        atol, rtol: tolerances of the solve.
        atol_adjoint, rtol_adjoint: tolerances of the adjoint.
        max_nfe, quadrature, error_norm: see :class:`~rnode_plugin.Solver`.
        interpolator: as in :func:`method_from_torchdyn`.
        interpolated: the class of an interpolated adjoint.

    Raises:
        ConfigError: for an unknown sensitivity, a number out of range, and options that the method cannot have.
    """
    method = method_from_torchdyn(solver, names[0], interpolator=interpolator)
    gradient = get_gradient(sensitivity)
    if isinstance(gradient, Adjoint):
        check_tolerance(atol_adjoint, "atol of the adjoint")
        check_tolerance(rtol_adjoint, "rtol of the adjoint")
        # The adjoint system depends on time if the path is interpolated. Its values need not match torchdyn's, so
        # take the rk4 that evaluates at the right times.
        ours = type(adjoint) is RungeKutta4
        backward = get_method("rk4") if ours else method_from_torchdyn(adjoint, names[1])
        kind = interpolated if gradient.interpolated else Adjoint
        gradient = kind(
            # without a step, since torchdyn takes one step per interval of the times
            solver_of(backward, step=None, atol=atol_adjoint, rtol=rtol_adjoint, max_nfe=max_nfe),
            interpolated=gradient.interpolated,
        )
    return solver_of(
        method, step=None, atol=atol, rtol=rtol, max_nfe=max_nfe, gradient=gradient, quadrature=quadrature,
        error_norm=error_norm,
    )  # fmt: skip


def method_from_torchdyn(
    solver: SolverObject, name: str | None = None, *, interpolator: str | Callable[..., object] | None = None
) -> Method:
    """A method that takes exactly the steps of a torchdyn solver object, a hypersolver's or a user's included.

    A solver of a known family, or of a subclass, has the family's quadrature weights, unless its tableau was
    changed. (A hypersolver is a subclass that adds a correction to the same stages.) Another solver may have an
    attribute ``weights``, one number per evaluation in a step, with the sum 1. Without it, a penalty's rate is
    taken at the start of a step.

    Args:
        solver: the object.
        name: the name from which it was made; None for a user's object or a changed tableau.
        interpolator: torchdyn's, for output times inside a step of an adaptive solver. torchdyn's tsit5 ignores it.
    """
    if type(solver) is RungeKutta38:
        return get_method("rk4_38")
    family = get_method(solver_name(solver)) if isinstance(solver, tuple(_FAMILIES)) else None
    weights, error_weights, draws = None, None, None
    if family is not None:
        weights, error_weights, draws = family.weights, family.error_weights, family.draws
        changed = _changed_weights(solver, family)
        if changed is not None:
            (weights, error_weights), draws = changed, None
    weights = getattr(solver, "weights", weights)
    weights = None if weights is None else tuple(map(float, weights))
    # non-negative weights are probabilities; among adaptive solvers only the known families have draws
    if draws is None and weights is not None and min(weights) >= 0 and solver.stepping_class == "fixed":
        draws = weights
    adaptive = solver.stepping_class == "adaptive"
    interpolate = None
    if adaptive and interpolator is not None and not isinstance(solver, Tsitouras45):
        interpolate = _Interpolate(interpolator)
    return Method(
        name=family.name if family else type(solver).__name__,
        advance=_Step(solver, name, {}),
        order=getattr(solver, "order", 1),
        adaptive=adaptive,
        weights=weights,
        error_weights=error_weights,
        draws=draws,
        safety=float(getattr(solver, "safety", 0.9)),
        min_factor=float(getattr(solver, "min_factor", 0.2)),
        max_factor=float(getattr(solver, "max_factor", 10.0)),
        nodes=_nodes(solver, family),
        fit=None,  # torchdyn does not fit steps to the next stop
        interpolate=interpolate,
    )


def _nodes(solver: SolverObject, family: Method | None) -> tuple[float, ...] | None:
    """The times of the stages of a known family as fractions of the step; None if they are not known."""
    if not isinstance(solver, RungeKutta4):
        return family.nodes if family else None
    # torchdyn's rk4 takes the first three of the four nodes in its tableau, (0, 1/2, 1/2, 1), for stages 2 to 4
    tableau: object = solver.tableau
    if isinstance(tableau, tuple) and isinstance(tableau[0], Tensor) and tableau[0].ndim == 1:
        return (0.0, *tableau[0].tolist()[:3])
    return None  # a subclass may keep anything there


def _changed_weights(
    solver: SolverObject, family: Method
) -> tuple[tuple[float, ...], tuple[float, ...] | None] | None:
    """The weights in a tableau that a user changed, and the weights of its error; None for unchanged weights."""
    tableau = _tableau_of(solver) if type(solver) in _FAMILIES else []  # a subclass may keep anything there
    if not tableau or family.weights is None:
        return None
    weights, errors = (x.tolist() for x in tableau[-2:])
    rounding = 1e-6  # torchdyn builds a tableau in single precision
    close = (abs(a - b) < rounding for a, b in zip(weights, family.weights, strict=False))
    same = len(weights) == len(family.weights) and all(close)
    return None if same else (tuple(weights), tuple(errors) if family.adaptive else None)


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
        like, solver = self._ready
        if like != (x.dtype, x.device):
            solver = self._solver_like(x, t)
        if isinstance(solver, ImplicitEuler) and torch.is_grad_enabled():
            raise ConfigError(
                "the steps of torchdyn's implicit Euler have no gradient, because an optimizer finds each new "
                "state: use sensitivity='adjoint', or torch.no_grad() for values alone."
            )
        if not self.known:
            with on_host():
                backward = not bool(dt > 0)
            if backward:
                mirrored = _Mirrored(f)
                k1 = None if k1 is None else -k1
                new_velocity, new, error, *_ = solver.step(mirrored, x, -t, -dt, k1=k1, args=self.args)
                return mirrored.original(new_velocity), new, error
        return solver.step(f, x, t, dt, k1=k1, args=self.args)

    def _solver_like(self, x: Tensor, t: Tensor) -> SolverObject:
        """The solver object for states like ``x``. One with a name is built here, so no other model moves it."""
        with on_host():
            solver = self.solver
            if self.name is not None:
                solver = _build(self.name, torch.float64 if x.dtype is torch.float64 else torch.float32)
            if sync := getattr(solver, "sync_device_dtype", None):
                sync(x, t)
        if self.name is not None and not transforms_active():  # tensors made in a transform must not outlive it
            self._ready = (x.dtype, x.device), solver
        return solver


class _Mirrored:
    """A field with time reversed, ``-f(-t, x)``, which remembers the original velocities."""

    def __init__(self, field: Velocity) -> None:
        self._field = field
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        velocity = self._field(-t, x)
        self._pairs.append((-velocity, velocity))
        return self._pairs[-1][0]

    def original(self, mirrored: Tensor | None) -> Tensor | None:
        """The original of a mirrored velocity; None for any other tensor."""
        return next((velocity for opposite, velocity in self._pairs if opposite is mirrored), None)


class _Interpolate:
    """torchdyn's fourth-order interpolant as a function of one of our steps."""

    def __init__(self, interpolator: str | Callable[..., object]) -> None:
        self._interpolator = interpolator

    def __call__(
        self, step: Any, z: Tensor, first: Any, t: Tensor, dt: Tensor, times: Sequence[Tensor]
    ) -> list[Tensor]:
        if not times:
            return []
        given = self._interpolator
        by: Any = str_to_interp(given, z.dtype) if isinstance(given, str) else given
        by.sync_device_dtype(z, t)
        # the state in the middle of the step, by torchdyn's weights for it
        middle = z + dt * sum(w * k for w, k in zip(by.bmid, step.stages, strict=True))
        coefficients = by.fit(dt, first.dz, step.last.dz, z, step.z, middle)
        return [by.evaluate(coefficients, t, t + dt, time) for time in times]


class StepwiseAdjoint(Adjoint):
    """torchdyn's interpolated adjoint, in which each accepted step of an adaptive solver is also an output."""

    def outputs(self, solution: Solution) -> tuple[Tensor, Tensor]:
        if solution.longest_safe_step is None or solution.steps is None:  # a fixed grid
            return solution.t, solution.z
        t, z = (torch.cat(pair) for pair in zip((solution.t, solution.z), solution.steps, strict=True))
        times = t.detach()
        # merge both in the order of time; of equal times the stable sort keeps the output before the step
        order = times.argsort(stable=True, descending=bool(times[0] > solution.t[-1]))
        times = times[order]
        order = order[torch.cat([times[:1] == times[:1], times[1:] != times[:-1]])]
        return t[order], z[order]
