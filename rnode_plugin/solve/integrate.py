"""The one integrator: fixed grid or adaptive steps, forward or backward in time, penalties outside the error norm.

Adaptive steps follow torchdyn's rules to the bit (first step, controller, a stop at every output time), so that
a torchdyn model keeps its numbers; what torchdyn leaves to chance (NaN, a vanishing step) ends in an error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torchdyn.numerics.utils import adapt_step, hairer_norm, init_step

from ..errors import ConfigError
from ..types import BoundDynamics, Rates, Solution, SolveStats
from .config import Solver
from .guards import HealthCheck, check_health, fail_max_nfe, fail_nonfinite, fail_underflow, health
from .methods import Method, get_method
from .step import Step, StepTaker, step_taker, weight_row

__all__ = ["Plan", "integrate"]


@dataclass(frozen=True)
class Plan:
    """A :class:`Solver` made concrete; see there for the meaning of the fields.

    ``keep`` says for each time of ``t_span`` whether its state is an output (fixed grids; None: all are).
    ``interpolator`` is torchdyn's: output times between steps are interpolated instead of stepped to.
    ``every_step`` makes each accepted step of an adaptive method an output, next to the times of ``t_span``.
    ``adjoint`` says how a continuous adjoint goes back; None: as the solve itself.
    """

    method: Method
    step: float | None = None
    atol: float = 1e-5
    rtol: float = 1e-5
    first_step: float | None = None
    max_nfe: int | None = None
    gradient: str = "autograd"
    trace_quadrature: str = "full"
    keep: Sequence[bool] | None = None
    interpolator: Any = None
    every_step: bool = False
    adjoint: Plan | None = None

    @classmethod
    def of(cls, solver: Solver) -> Plan:
        """The plan of a :class:`Solver`.

        Raises:
            ConfigError: its step is still to be found.
        """
        if solver.step == "auto":
            raise ConfigError(
                "solver.step='auto' is a step that is found while a recipe trains: everywhere else give a number; "
                "rnode-cli tune-step finds one for a trained flow."
            )
        method = get_method(solver.method)
        shared: dict[str, Any] = {
            "method": method,
            "step": solver.step,
            "first_step": solver.first_step,
            "max_nfe": solver.max_nfe,
        }
        backward = cls(
            **shared,
            atol=solver.atol if solver.atol_adjoint is None else solver.atol_adjoint,
            rtol=solver.rtol if solver.rtol_adjoint is None else solver.rtol_adjoint,
        )
        return cls(
            **shared,
            atol=solver.atol,
            rtol=solver.rtol,
            gradient=solver.gradient,
            trace_quadrature=solver.trace_quadrature,
            adjoint=backward,
        )


def integrate(
    dynamics: BoundDynamics,
    z0: Tensor,
    t_span: Tensor,
    plan: Plan,
    *,
    generator: torch.Generator | None = None,
    trace: list[tuple[Tensor, Tensor]] | None = None,
    checks: list[HealthCheck] | None = None,
) -> Solution:
    """Integrate from ``t_span[0]`` through all of ``t_span``; differentiable through the steps taken.

    Args:
        dynamics: the augmented system, its noise fixed.
        z0: state ``(B, *event)`` at ``t_span[0]``.
        t_span: times ``(T,)``, increasing or decreasing.
        plan: method, accuracy and gradient.
        generator: draws the stages of a sampled quadrature.
        trace: a list that receives the time and state of every accepted step, the initial one first.
        checks: see :func:`~rnode_plugin.solve.solve`.

    Raises:
        SolverError: non-finite state, step-size underflow, or the budget of evaluations used up.
    """
    counts = [] if plan.method.adaptive else _substeps(t_span, plan.step)
    t_span = t_span.to(z0.device)
    keep_inputs_at = (z0, t_span[0]) if plan.gradient == "checkpointed" else None
    take = step_taker(dynamics, plan.method, keep_inputs_at=keep_inputs_at)
    if plan.method.adaptive:
        return _Adaptive(dynamics, plan, take, z0, t_span, trace).run()
    solution, check = _fixed(plan, take, z0, t_span, counts, generator, trace)
    if checks is None:
        check_health([check])
    else:
        checks.append(check)
    return solution


class _Totals:
    """Running integrals: the log-determinant at each output, the penalties in total."""

    def __init__(self) -> None:
        self.logdet: Tensor | None = None
        self.penalties: dict[str, Tensor] = {}
        self.nfe = self.steps = self.rejected = 0

    def add(self, step: Step) -> None:
        self.logdet = self.logdet_after(step)
        for name, value in step.penalties.items():
            self.penalties[name] = self.penalties[name] + value if name in self.penalties else value
        self.steps += 1

    def logdet_after(self, step: Step) -> Tensor | None:
        if step.dlogdet is None or self.logdet is None:
            return step.dlogdet
        return self.logdet + step.dlogdet

    def solution(self, t: Sequence[Tensor], z: Sequence[Tensor], logdet: Sequence[Tensor | None]) -> Solution:
        total = self.logdet
        path = None
        if total is not None:
            path = torch.stack([torch.zeros_like(total) if x is None else x for x in logdet])
        times = torch.stack([x.reshape(()) for x in t])
        stats = SolveStats(self.nfe, self.steps, self.rejected)
        return Solution(times, torch.stack(list(z)), path, self.penalties, stats)


def _fixed(
    plan: Plan,
    take: StepTaker,
    z: Tensor,
    t_span: Tensor,
    counts: Sequence[int],
    generator: torch.Generator | None,
    trace: list[tuple[Tensor, Tensor]] | None,
) -> tuple[Solution, HealthCheck]:
    keep = [True] * len(t_span) if plan.keep is None else list(plan.keep)
    totals, checks = _Totals(), []
    times, states = ([t_span[0]], [z]) if keep[0] else ([], [])
    logdets: list[Tensor | None] = [None] * len(states)
    t = t_span[0]
    if trace is not None:
        trace.append((t, z))
    for k in range(1, len(t_span)):
        count, start = counts[k - 1], t
        for i in range(1, count + 1):
            # with one step an interval this is torchdyn's grid to the bit: dt is what is left to the next time
            goal = t_span[k] if i == count else start + (t_span[k] - start) * (i / count)
            dt = goal - t
            step = take(z, t, dt, None, _draw_stage(plan, generator))
            totals.add(step)
            totals.nfe += step.nfe
            z, t = step.z, t + dt
            if trace is not None:
                trace.append((t, z))
            checks.append(health(z))
            if plan.max_nfe is not None and totals.nfe > plan.max_nfe:
                fail_max_nfe(float(t.detach()), totals.steps, totals.nfe, plan.max_nfe)
        if keep[k]:
            times.append(t_span[k])
            states.append(z)
            logdets.append(totals.logdet)
    # what is not finite stays so, and of the integrals the end will do
    checks[-1] = health(z, totals.logdet, *totals.penalties.values())

    def fail(bad: int) -> NoReturn:
        fail_nonfinite(_grid_time(t_span, counts, bad), bad, (bad + 1) * totals.nfe // totals.steps)

    return totals.solution(times, states, logdets), HealthCheck(torch.isfinite(torch.stack(checks)), fail)


def _substeps(t_span: Tensor, step: float | None) -> list[int]:
    """How many steps each interval of the grid is divided into."""
    if step is None:
        return [1] * (len(t_span) - 1)
    times = t_span.detach().tolist()
    # forgiving rounding: 1 / 0.1 is ten steps, not eleven
    return [max(1, math.ceil(abs(b - a) / step - 1e-6)) for a, b in itertools.pairwise(times)]


def _grid_time(t_span: Tensor, counts: Sequence[int], index: int) -> float:
    """The time at which step ``index`` of a fixed grid began."""
    k = 0
    while index >= counts[k]:
        index -= counts[k]
        k += 1
    t0, t1 = t_span[k : k + 2].detach().tolist()
    return t0 + (t1 - t0) * (index / counts[k])


def _draw_stage(plan: Plan, generator: torch.Generator | None) -> int | None:
    """The stage that stands for the step in a sampled quadrature, drawn with its weight as probability."""
    if plan.trace_quadrature != "sampled":
        return None
    assert plan.method.weights is not None  # a sampled quadrature is for the methods known by name
    weights = weight_row(plan.method.weights, torch.float64, torch.device("cpu"))
    return int(torch.multinomial(weights, 1, generator=generator))


class _Adaptive:
    """torchdyn's adaptive loop with guards; the state's error and the log-determinant's decide on a step."""

    def __init__(
        self,
        dynamics: BoundDynamics,
        plan: Plan,
        take: StepTaker,
        z: Tensor,
        t_span: Tensor,
        trace: list[tuple[Tensor, Tensor]] | None,
    ) -> None:
        self.dynamics, self.plan, self.take, self.t_span = dynamics, plan, take, t_span
        self.trace = trace
        self.sign = 1.0 if bool(t_span[-1] >= t_span[0]) else -1.0
        self.z, self.t = z, t_span[:1]
        self.totals = _Totals()
        like = {"dtype": t_span.dtype, "device": t_span.device}
        method = plan.method
        self.controller = (
            torch.tensor([method.safety], **like),
            torch.tensor([method.min_factor], **like),
            torch.tensor([method.max_factor], **like),
            method.order,
        )
        self.times, self.states = [t_span[:1]], [z]
        self.logdets: list[Tensor | None] = [None]

    def run(self) -> Solution:
        first: Rates | None = self.dynamics(self.t_span[0], self.z)
        self.totals.nfe += 1
        dt = self._first_step(first)
        end, upcoming = self.t_span[-1], 1
        self._trace()
        while self._before(self.t, end):
            if self._before(end, self.t + dt):
                dt = end - self.t
            resume = None
            if self.plan.interpolator is None and self._before(self.t_span[upcoming], self.t + dt):
                resume, dt = dt.detach(), self.t_span[upcoming] - self.t
            self._guard(dt)
            step = self.take(self.z, self.t, dt, first, None)
            self.totals.nfe += step.nfe
            ratio = self._error_ratio(step)
            if bool(ratio <= 1):
                t_new = self.t + dt
                if self.plan.interpolator is not None:
                    upcoming = self._interpolate(upcoming, first, step, dt)
                # not equality: rounding may have carried a step that was clipped to this time just past it
                arrived = not self._before(t_new, self.t_span[upcoming])
                self.totals.add(step)
                if arrived or self.plan.every_step:
                    self._output(t_new, step.z, self.totals.logdet)
                if arrived:
                    upcoming = min(upcoming + 1, len(self.t_span) - 1)
                self.t, self.z, first = t_new, step.z, step.last
                self._trace()
            else:
                self.totals.rejected += 1
            if resume is not None:
                rest = resume - dt.detach()
                dt = rest if bool(self.t + rest != self.t) else resume
            dt = adapt_step(dt.detach(), ratio, *self.controller)
        if self.totals.penalties and not bool(torch.isfinite(health(*self.totals.penalties.values()))):
            fail_nonfinite(float(self.t.detach()), self.totals.steps, self.totals.nfe)
        return self.totals.solution(self.times, self.states, self.logdets)

    def _before(self, a: Tensor, b: Tensor) -> bool:
        return bool((b - a) * self.sign > 0)

    def _trace(self) -> None:
        if self.trace is not None:
            self.trace.append((self.t, self.z))

    def _output(self, t: Tensor, z: Tensor, logdet: Tensor | None) -> None:
        self.times.append(t)
        self.states.append(z)
        self.logdets.append(logdet)

    @torch.no_grad()
    def _first_step(self, first: Rates) -> Tensor:
        like = self.t_span[0].detach()
        if self.plan.first_step is not None:
            return torch.full_like(like, self.sign * self.plan.first_step)
        z, order, t0 = self.z.detach(), self.plan.method.order, self.sign * like
        velocity = self.sign * first.dz.detach()

        # Where time runs backward torchdyn asks the field itself, not its mirror image. It only guesses a step, and
        # the same guess gives the same numbers; where that guess is of no use, the mirror image is asked.
        def asked(t: Tensor, z: Tensor) -> Tensor:
            self.totals.nfe += 1
            return self.dynamics(t, z, products=False).dz

        guess = init_step(asked, velocity, z, t0, order, self.plan.atol, self.plan.rtol)
        if not bool(torch.isfinite(guess) & (guess > 0)) and self.sign < 0:
            guess = init_step(lambda t, z: -asked(-t, z), velocity, z, t0, order, self.plan.atol, self.plan.rtol)
        if not bool(torch.isfinite(guess)):
            fail_nonfinite(float(like), 0, self.totals.nfe)
        return self.sign * guess

    @torch.no_grad()
    def _error_ratio(self, step: Step) -> Tensor:
        plan, error = self.plan, step.error
        assert error is not None
        scaled = error / (plan.atol + plan.rtol * torch.max(self.z.abs(), step.z.abs()))
        if step.dlogdet_error is not None:
            before, after = self.totals.logdet, self.totals.logdet_after(step)
            assert after is not None
            size = after.abs() if before is None else torch.max(before.abs(), after.abs())
            scaled = torch.cat([scaled.flatten(), step.dlogdet_error / (plan.atol + plan.rtol * size)])
        ratio = hairer_norm(scaled)
        if not bool(torch.isfinite(ratio)):
            fail_nonfinite(float(self.t.detach()), self.totals.steps, self.totals.nfe)
        return ratio

    def _guard(self, dt: Tensor) -> None:
        if bool(self.t + dt == self.t):
            fail_underflow(float(self.t.detach()), self.totals.steps, self.totals.nfe, abs(float(dt.detach())))
        limit = self.plan.max_nfe
        if limit is not None and self.totals.nfe + self.plan.method.stages - 1 > limit:
            fail_max_nfe(float(self.t.detach()), self.totals.steps, self.totals.nfe, limit)

    def _interpolate(self, upcoming: int, first: Rates | None, step: Step, dt: Tensor) -> int:
        """Outputs inside the step just accepted, by torchdyn's fourth-order interpolant."""
        interpolator, stages, coefficients = self.plan.interpolator, step.stages, None
        assert first is not None
        assert step.last is not None
        assert stages is not None
        while upcoming < len(self.t_span) - 1 and self._before(self.t_span[upcoming], self.t + dt):
            if coefficients is None:
                middle = self.z + dt * sum(w * k for w, k in zip(interpolator.bmid, stages, strict=True))
                coefficients = interpolator.fit(dt, first.dz, step.last.dz, self.z, step.z, middle)
            goal = self.t_span[upcoming]
            self._output(goal[None], interpolator.evaluate(coefficients, self.t, self.t + dt, goal), None)
            upcoming += 1
        return upcoming
