"""Steps of adaptive methods, by torchdyn's rules to the bit.

First step, controller and a stop at every output time are torchdyn's, so that a torchdyn model keeps its numbers;
what torchdyn leaves to chance (NaN, a vanishing step) ends in an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..types import BoundDynamics, Rates, Solution
from .health import fail_max_nfe, fail_nonfinite, fail_underflow, health
from .plan import SolvePlan
from .step import Step, StepTaker
from .step_control import Controller, guess_first_step, rms_norm
from .totals import Totals

__all__ = ["Adaptive"]


class Adaptive:
    """torchdyn's adaptive loop with guards; the state's error and the log-determinant's decide on a step."""

    def __init__(
        self,
        dynamics: BoundDynamics,
        plan: SolvePlan,
        take: StepTaker,
        z: Tensor,
        t_span: Tensor,
        trace: list[tuple[Tensor, Tensor]] | None,
    ) -> None:
        self.dynamics, self.plan, self.take, self.t_span = dynamics, plan, take, t_span
        self.trace = trace
        self.sign = 1.0 if bool(t_span[-1] >= t_span[0]) else -1.0
        self.z, self.t = z, t_span[:1]
        self.totals = Totals()
        like = {"dtype": t_span.dtype, "device": t_span.device}
        method = plan.method
        self.controller = Controller(
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
            dt = self.controller.next_step(dt.detach(), ratio)
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

        options: dict[str, Any] = {"order": order, "atol": self.plan.atol, "rtol": self.plan.rtol}
        guess = guess_first_step(asked, velocity, z, t0, **options)
        if not bool(torch.isfinite(guess) & (guess > 0)) and self.sign < 0:
            guess = guess_first_step(lambda t, z: -asked(-t, z), velocity, z, t0, **options)
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
        ratio = rms_norm(scaled)
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
