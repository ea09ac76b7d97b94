"""One step of the augmented system, the sums over steps, and the errors of a solve.

The state steps by a Runge-Kutta method. Everything else, the log-determinant and the penalties, is integrated by
the quadrature of the step's stages. This costs no evaluation, and no penalty enters the error of an adaptive step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor

from ..core.health import HealthCheck
from ..core.modes import constant, on_device, read
from ..core.regularizer import StepRecord
from ..core.system import Derivative, RightHandSide
from ..errors import ConfigError, SolverError
from .solution import Solution, SolveStats, Steps
from .tableaus import Method

Tolerance: TypeAlias = "float | Tensor"

_CPU = torch.device("cpu")


class Step(NamedTuple):
    """The result of one step.

    Attributes:
        z: new state.
        error: error estimate of the new state; None for a fixed grid.
        last: derivative at the new state if the method has evaluated it (first same as last).
        dlogdet: increment ``(B,)`` of the log-determinant in nats; None without a density.
        dlogdet_error: error estimate of this increment.
        penalties: increment of the integral of each rate by name, ``(B,)``.
        path: reduction and value of each step penalty by name.
        stages: stage velocities, which an interpolant reads; None for a method without one.
        nfe: number of evaluations in this step.
    """

    z: Tensor
    error: Tensor | None
    last: Derivative | None
    dlogdet: Tensor | None
    dlogdet_error: Tensor | None
    penalties: dict[str, Tensor]
    path: dict[str, tuple[str, Tensor]]
    stages: Sequence[Tensor] | None
    nfe: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Problem:
    """An initial value problem with the options of :meth:`Solver.solve`, which explains them.

    Attributes:
        z: the state at the first time.
        save_steps: whether the solution contains the accepted steps.
        compiled: makes a graph of the steps that a :class:`Stepper` takes; None: it takes them itself.
    """

    rhs: RightHandSide
    z: Tensor
    t_span: Tensor
    save_steps: bool = False
    safe_step: float | None = None
    adjoint_safe_step: float | None = None
    keep_adjoint_step: Callable[[float], None] | None = None
    compiled: Callable[[Stepper], Callable[..., Step]] | None = None

    def stepper(self, method: Method, tolerances: tuple[Tolerance, Tolerance] | None) -> Callable[..., Step]:
        """The function that takes the steps: a :class:`Stepper` with these arguments, or its graph."""
        times = read(self.t_span) if self.t_span.is_cpu else None
        forward = times is not None and times[-1] > times[0]
        plain = Stepper(self.rhs, method, tolerances, forward=forward)
        return plain if self.compiled is None else self.compiled(plain)


def check_times(t_span: Tensor, name: str = "t_span") -> None:
    """Refuse times, by this name, that are not a finite, strictly monotonic row of two or more (ConfigError)."""
    good = t_span.ndim == 1 and len(t_span) >= 2 and t_span.is_floating_point()
    if good:
        steps = t_span.detach().diff()
        good = bool(((steps > 0).all() | (steps < 0).all()) & torch.isfinite(t_span.detach()).all())
    if not good:
        raise ConfigError(
            f"{name} must be finite and strictly increasing or decreasing, a row of at least two floating-point "
            f"times, not {t_span.tolist()}: where it turns back or stands still, start another solve from the last "
            "state."
        )


def inside(t_span: Tensor, device: torch.device) -> Tensor:
    """A time inside of a solve, on a device, for a check of the field, whose gates may be closed at both ends."""
    first, last = t_span[0], t_span[-1]
    return on_device(first + 0.618 * (last - first), device)


Draw = dict[int, float]
"""The stages of a step that compute products with the Jacobian in a sampled quadrature. The value of a stage is the
weight of its rates, relative to the length of the step."""


@dataclass(frozen=True, eq=False)
class Stepper:
    """Takes steps of a method on a system, and integrates the rates of each step by the quadrature of its stages.

    Attributes:
        rhs: the right-hand side.
        method: the method of a step.
        tolerances: absolute and relative tolerance, which step penalties read; None for a fixed grid.
        local: whether a step computes the local step penalties. Any other step computes the penalties on accepted
            steps.
        forward: whether the steps are known to go forward in time, which saves a product with the sign.
    """

    rhs: RightHandSide
    method: Method
    tolerances: tuple[Tolerance, Tolerance] | None
    local: bool = False
    forward: bool = False

    def __call__(
        self,
        z: Tensor,
        t: Tensor,
        dt: Tensor,
        first: Derivative | None,
        draw: Draw | None,
    ) -> Step:
        """Take one step.

        Args:
            z: state ``(B, *event)`` at the time ``t``.
            t, dt: start and length of the step; the length is negative backward in time.
            first: derivative at ``(t, z)`` if the previous step has evaluated it.
            draw: the stages that compute products with the Jacobian; all others compute the velocity alone. None:
                all stages compute everything.

        Raises:
            ConfigError: for quadrature weights that do not belong to the evaluations of the step.
        """
        regularizers = self.rhs.regularizers
        watched = bool(regularizers.steps) and any(each.local == self.local for each in regularizers.steps)
        stages = _Stages(self.rhs, z, t, first, draw, keep_places=watched)
        k1 = None if first is None else first.dz
        new_velocity, new, error, *velocities = self.method.advance(stages, z, t, dt, k1)
        derivatives = stages.derivatives
        dlogdet, dlogdet_error, penalties = self._integrate(derivatives, dt, draw, with_error=error is not None)
        # first same as last: the method returns the very tensor of the last stage
        last = None
        for each in derivatives:  # torch.compile of torch 2.6 cannot trace next()
            last = each if each.dz is new_velocity else last
        of_path: dict[str, tuple[str, Tensor]] = {}
        if watched:
            atol, rtol = self.tolerances or (None, None)
            times, states = zip(*stages.places, strict=True)
            record = StepRecord(
                t=t, h=dt.abs(), z0=z, z1=new, times=times, states=states, velocities=[d.dz for d in derivatives],
                error=error, pair=self.method.pair, atol=atol, rtol=rtol,
            )  # fmt: skip
            of_path = regularizers.of_step(record, self.rhs.z_of, local=self.local)
        return Step(
            z=new, error=error, last=last, dlogdet=dlogdet, dlogdet_error=dlogdet_error, penalties=penalties,
            path=of_path, nfe=len(derivatives) - stages.given,
            # only an interpolant reads them, and a graph would compute the gradient of each of its outputs
            stages=velocities[0] if velocities and self.method.interpolate is not None else None,
        )  # fmt: skip

    def _integrate(
        self, derivatives: Sequence[Derivative], dt: Tensor, draw: Draw | None, *, with_error: bool
    ) -> tuple[Tensor | None, Tensor | None, dict[str, Tensor]]:
        """The increments of log-determinant and penalties in a step, and the error estimate of the former."""
        method, weights = self.method, self.method.weights or (1.0,)
        source = derivatives[min(draw) if draw else 0]  # a stage that has every rate of this step
        rows: list[Sequence[Any]] = []
        for name in source.penalties:
            rows.append([each.penalties.get(name) for each in derivatives])
        dlogdet = dlogdet_error = None
        if source.dlogdet is not None:
            traces = [each.dlogdet for each in derivatives]
            rows.append(traces)  # integrated together with the penalties, to save operations
            if with_error and method.error_weights is not None:
                dlogdet_error = _integrate_rows([traces], method.error_weights, dt.detach())[0]
        if rows and (len(derivatives) < len(weights) or abs(sum(weights) - 1) > 1e-3):
            raise ConfigError(  # a user's method, whose integrals would be wrong
                f"a step of {method.name} evaluates the field {len(derivatives)} times, and its {len(weights)} "
                f"quadrature weights sum to {sum(weights):g}: give the solver `weights`, one for each evaluation "
                "in a step, that sum to 1."
            )
        # penalties are integrated over |dt|, so that they are not negative backward in time; the trace over dt
        integrals = _integrate_rows(rows, weights, dt.abs(), draw)
        if source.dlogdet is not None:
            dlogdet = integrals.pop() if self.forward else integrals.pop() * dt.sign().to(source.dlogdet.dtype)
        return dlogdet, dlogdet_error, dict(zip(source.penalties, integrals, strict=True))


class _Stages:
    """The field as a method calls it in one step from ``(t, z)``, recording the stages in order of evaluation.

    Attributes:
        derivatives: the derivative at each stage. The first one may have been given.
        places: time and state of each stage, which step penalties read; empty unless they are kept.
        given: whether the first stage was given and is not evaluated in this step.
    """

    def __init__(
        self,
        rhs: RightHandSide,
        z: Tensor,
        t: Tensor,
        first: Derivative | None,
        draw: Draw | None,
        *,
        keep_places: bool,
    ) -> None:
        self.rhs, self.z, self.t, self.draw, self.keep_places = rhs, z, t, draw, keep_places
        self.given = first is not None
        self.derivatives: list[Derivative] = [] if first is None else [first]
        self.places: list[tuple[Tensor, Tensor]] = [(t, z)] if keep_places and self.given else []

    def __call__(self, time: Tensor, state: Tensor, args: object = None) -> Tensor:
        """The velocity. A user's solver passes on its ``args``, which the field has received already."""
        derivatives = self.derivatives
        if self.given and state is self.z and len(derivatives) == 1 and bool(time == self.t):
            # a user's method evaluates its first stage although it was given, so this one takes its place
            self.given = False
            derivatives.clear()
            self.places.clear()
        if self.keep_places:
            self.places.append((time, state))
        derivatives.append(self.rhs(time, state, products=self.draw is None or len(derivatives) in self.draw))
        return derivatives[-1].dz


def draw_stage(method: Method) -> Draw | None:
    """Draw one stage to represent its step, by the weights of a quadrature; None if they are not known."""
    if method.draws is None:
        return None
    weights = constant(method.draws, torch.float64, _CPU)
    return {int(torch.multinomial(weights, 1)): 1.0}


def _integrate_rows(
    rows: Sequence[Sequence[Any]], weights: Sequence[float], dt: Tensor, draw: Draw | None = None
) -> list[Tensor]:
    """``dt`` times the weighted sum over the stages in each row.

    If a row has stages without a value (None), it is the weighted sum over the drawn stages instead.
    """
    integrals: dict[int, Tensor] = {}
    together: list[int] = []
    like: Tensor | None = None
    for place, values in enumerate(rows):
        if draw is not None and any(value is None for value in values[: len(weights)]):
            parts = [values[stage] * (dt * share) for stage, share in draw.items()]
            integrals[place] = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        elif values[0].ndim == 1:
            # rows of another dtype or shape are integrated one by one
            first: Tensor = values[0]
            like = first if like is None else like
            if first.dtype is like.dtype and first.shape == like.shape:
                together.append(place)
    # Launching operations dominates the time of small problems, so all rows of one shape are one matrix.
    # torch.compile fuses the operations by itself.
    if like is not None and not torch.compiler.is_compiling():
        count = min(len(weights), len(rows[together[0]]))
        table = torch.stack([rows[place][k] for k in range(count) for place in together])
        row = constant(tuple(weights[:count]), like.dtype, like.device) * dt.to(like.dtype)
        alone = len(together) == 1
        if like.is_cpu:
            product = row @ (table if alone else table.view(count, len(together) * like.shape[0]))
        else:  # a matrix product on a GPU may round to TF32, too coarse for a log-determinant
            product = (row[:, None] * table.view(count, len(together) * like.shape[0])).sum(0)
        if product.dtype is like.dtype:  # else autocast has rounded it
            parts = (product,) if alone else product.view(len(together), like.shape[0]).unbind()
            integrals |= zip(together, parts, strict=True)
    return [
        integrals[k] if k in integrals else _integrate_row(values, weights, dt) for k, values in enumerate(rows)
    ]


def _integrate_row(values: Sequence[Tensor], weights: Sequence[float], dt: Tensor) -> Tensor:
    total: Tensor | None = None
    for value, weight in zip(values, weights, strict=False):
        if weight:
            total = value * weight if total is None else total.add(value, alpha=weight)
    assert total is not None
    return total * dt.to(total.dtype)


@dataclass(eq=False)
class Totals:
    """A solve so far: its outputs, and the integrals, step penalties and cost of its accepted steps.

    Attributes:
        t: output times so far, at first the start of the solve.
        z: states ``(B, *event)`` at these times.
        knots: times and states between the accepted steps, the start included; None if they are not saved.
        nfe: evaluations so far, those of rejected steps included.
        logdet: log-determinant ``(B,)`` in nats from the start; None before the first step and without a density.
        penalties: integral of each rate, and each step penalty by its reduction, ``(B,)``.
        steps, rejected: numbers of steps.
    """

    t: list[Tensor]
    z: list[Tensor]
    knots: list[tuple[Tensor, Tensor]] | None = None
    nfe: int = 0
    logdet: Tensor | None = None
    penalties: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    steps: int = 0
    rejected: int = 0
    _logdets: list[Tensor] = field(default_factory=list[Tensor])  # at the output times after the first
    _means: set[str] = field(default_factory=set[str])  # penalties that are sums until the number of steps is known

    def add(self, step: Step, end: Tensor) -> None:
        """Add an accepted step that ends at the time ``end``. Its evaluations are counted where it is tried."""
        self.logdet = step.dlogdet if self.logdet is None or step.dlogdet is None else self.logdet + step.dlogdet
        for name, value in step.penalties.items():
            self.penalties[name] = self.penalties[name] + value if name in self.penalties else value
        for name, (reduction, value) in step.path.items():
            before = self.penalties.get(name)
            if before is not None:
                value = torch.maximum(before, value) if reduction == "max" else before + value
            self.penalties[name] = value
            if reduction == "mean":
                self._means.add(name)
        self.steps += 1
        if self.knots is not None:
            self.knots.append((on_device(end, step.z.device), step.z))

    def save(self, t: Tensor, z: Tensor) -> None:
        """Add an output, with the log-determinant up to here."""
        self.t.append(on_device(t, z.device))
        self.z.append(z)
        if self.logdet is not None:
            self._logdets.append(self.logdet)

    def solution(self, *, health: tuple[HealthCheck, ...] = (), longest_safe_step: float | None = None) -> Solution:
        """Make the solution, in which the log-determinant begins with 0."""
        logdet = None if self.logdet is None else torch.stack([torch.zeros_like(self.logdet), *self._logdets])
        for name in self._means:
            self.penalties[name] = self.penalties[name] / self.steps
        steps = None
        if self.knots is not None:
            steps = Steps(*(torch.stack(row) for row in zip(*self.knots, strict=True)))
        return Solution(
            t=torch.stack(self.t), z=torch.stack(self.z), logdet=logdet, penalties=self.penalties,
            stats=SolveStats(self.nfe, self.steps, self.rejected), health=health,
            longest_safe_step=longest_safe_step, steps=steps,
        )  # fmt: skip


# errors of a solve -----------------------------------------------------------------------------------------------


_SINGULAR = "give times a little inside, such as data_time=1e-3 or noise_time=0.999 of RegularizedCNF.from_velocity"


def fail_nonfinite(t: float, step: int, nfe: int) -> NoReturn:
    advice = (
        "The dynamics have exploded: lower the learning rate, raise lambda of 'jacfrob' or 'kinetic', shorten the "
        f"step or tighten the tolerances. If the field is singular at an end of the times, {_SINGULAR}."
    )
    if step == 0:  # no earlier step can have exploded
        advice = (
            "The solve failed in its first step. Check the input and the parameters for NaN, and the field at this "
            f"time: if it is singular there, {_SINGULAR}. If all are finite, the step is too long for this field: "
            "shorten it, tighten the tolerances, or train with a lower learning rate."
        )
    raise SolverError(
        "nonfinite",
        "the state or its log-determinant is no longer finite",
        advice,
        t=t, step=step, nfe=nfe,
    )  # fmt: skip


def fail_integrals(
    z: Tensor, logdet: Tensor | None, penalties: Mapping[str, Tensor], t: float, step: int, nfe: int
) -> NoReturn:
    """Fail with the name of the first penalty that is not finite, unless the state or the logdet is not."""

    def finite(x: Tensor | None) -> bool:
        return x is None or bool(torch.isfinite(x.detach()).all())

    name = next((name for name, x in penalties.items() if not finite(x)), None)
    if name is None or not finite(z) or not finite(logdet):
        fail_nonfinite(t, step, nfe)
    raise SolverError(
        "nonfinite",
        f"the penalty {name!r} is no longer finite, but the state is",
        "What it computes must be finite at every state on the way: look for a division by zero, a root or a "
        "logarithm of zero, and for numbers too large for the state's precision.",
        t=t, step=step, nfe=nfe,
    )  # fmt: skip


def fail_max_nfe(t: float, step: int, nfe: int, limit: int) -> NoReturn:
    raise SolverError(
        "max_nfe",
        f"the budget of {limit} evaluations is used up",
        f"Raise it, for example to max_nfe={10 * limit}, loosen atol and rtol, or raise lambda of 'jacfrob' or "
        "'kinetic' so that the dynamics stay simple. A stiff field may need a fixed grid.",
        t=t, step=step, nfe=nfe,
    )  # fmt: skip
