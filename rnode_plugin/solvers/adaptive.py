"""Adaptive: a solve whose steps are as long as their error allows, by torchdyn's rules to the bit.

First step, controller and a stop at every output time are torchdyn's, so that a torchdyn model keeps its numbers.
What torchdyn leaves to chance (NaN, a vanishing step) ends in an error.

Times and step sizes stay on the CPU. For each step that is tried the host reads one number from the device, its
error's size.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..errors import ConfigError
from ..types import BoundDynamics, Rates, Solution
from .config import FIXED_METHODS
from .health import fail_integrals, fail_max_nfe, fail_nonfinite, fail_underflow, health
from .host import read
from .plan import SolvePlan
from .steps.step import Step, StepTaker
from .steps.step_control import Controller, error_ratio, guess_first_step
from .steps.step_memory import StepMemory
from .totals import Totals

__all__ = ["Adaptive"]


class _Attempt(NamedTuple):
    """A step to try.

    Attributes:
        dt: its length, cut off at the next time that must be met.
        uncut: its length before it was cut off at an output time; None if it was not.
    """

    dt: Tensor
    uncut: Tensor | None


class Adaptive:
    """One adaptive solve; the errors of the state and of the log-determinant decide on a step."""

    def __init__(
        self,
        dynamics: BoundDynamics,
        plan: SolvePlan,
        take: StepTaker,
        z: Tensor,
        t_span: Tensor,
        trace: list[tuple[Tensor, Tensor]] | None,
        memory: StepMemory | None = None,
    ) -> None:
        _check_precision(plan, z.dtype)
        self.dynamics, self.plan, self.take, self.trace, self.memory = dynamics, plan, take, trace, memory
        self.t_span = t_span.cpu()
        self.sign = 1.0 if bool(self.t_span[-1] >= self.t_span[0]) else -1.0
        self.z, self.t, self.dt = z, self.t_span[:1], self.t_span[:1]
        self.rates: Rates | None = None  # at (t, z)
        self.upcoming = 1  # of the output times
        self.controller = Controller.of(plan.method, self.t_span)
        self.totals = Totals()
        self.times, self.states = [self._there(self.t)], [z]
        self.logdets: list[Tensor | None] = [None]

    def run(self) -> Solution:
        """Step from the first time to the last."""
        self._start()
        while self._before(self.t, self.t_span[-1]):
            attempt = self._next_attempt()
            self._check_attempt(attempt)
            step = self.take(self.z, self._there(self.t), self._there(attempt.dt), self.rates, None)
            self.totals.nfe += step.nfe
            ratio = self._error_ratio(step)
            if bool(ratio <= 1):
                self._accept(step, attempt)
            else:
                self.totals.rejected += 1
            self._choose_next(attempt, ratio)
        self._check_penalties()
        if self.memory is not None:
            self.memory.keep()
        return self.totals.solution(self.times, self.states, self.logdets)

    # the start ---------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self.rates = self.dynamics(self._there(self.t_span[0]), self.z)
        self.totals.nfe += 1
        self.dt = self._evenly(self._first_step(self.rates))
        self._trace()

    @torch.no_grad()
    def _first_step(self, first: Rates) -> Tensor:
        like = self.t_span[0].detach()
        known = self.plan.first_step
        remembered = None if self.memory is None else self.memory.begin()
        if remembered is not None:
            known = min(remembered, float((self.t_span[-1] - self.t_span[0]).detach().abs()))
        if known is not None:
            return torch.full_like(like, self.sign * known)
        if self.z.numel() == 0:
            return self.t_span[-1].detach() - like
        z, velocity = self.z.detach(), self.sign * first.dz.detach()
        plan, t0 = self.plan, self.sign * like
        options: dict[str, Any] = {"order": plan.method.order, "atol": plan.atol, "rtol": plan.rtol}

        # Backward in time torchdyn asks the field itself, not its mirror image. That only guesses a step, and the
        # same guess gives the same numbers. If the guess is of no use, the mirror image is asked.
        def field(t: Tensor, z: Tensor) -> Tensor:
            self.totals.nfe += 1
            return self.dynamics(self._there(t), z, products=False).dz

        guess = guess_first_step(field, velocity, z, t0, **options)
        if guess is not None and self.sign < 0 and not (0 < float(guess) < math.inf):
            guess = guess_first_step(lambda t, z: -field(-t, z), velocity, z, t0, **options)
        if guess is None:
            self._refuse_values()
        if not math.isfinite(float(guess)):
            fail_nonfinite(float(like), 0, self.totals.nfe)
        return self.sign * guess

    # one step ----------------------------------------------------------------------------------------------------

    def _next_attempt(self) -> _Attempt:
        """The step that the controller chose, cut off at the end and, if it has to stop there, at an output."""
        dt, end, output = self.dt, self.t_span[-1], self.t_span[self.upcoming]
        if self._before(end, self.t + dt):
            dt = end - self.t
        if self.plan.interpolator is None and self._before(output, self.t + dt):
            return _Attempt(output - self.t, dt.detach())
        return _Attempt(dt, None)

    def _check_attempt(self, attempt: _Attempt) -> None:
        if bool(self.t + attempt.dt == self.t):
            fail_underflow(*self._where(), abs(float(attempt.dt.detach())))
        limit = self.plan.budget
        if limit is not None and self.totals.nfe + self.plan.method.stages - 1 > limit:
            fail_max_nfe(*self._where(), limit)

    @torch.no_grad()
    def _error_ratio(self, step: Step) -> Tensor:
        """The step's error over what the tolerances allow, on the CPU: the one number read from the device."""
        if self.z.numel() == 0:
            return torch.zeros((), dtype=self.t_span.dtype)
        assert step.error is not None
        parts: list[tuple[Tensor, Tensor | None, Tensor]] = [(step.error, self.z, step.z)]
        logdet = self.totals.logdet_after(step)
        if step.dlogdet_error is not None and logdet is not None:
            parts.append((step.dlogdet_error, self.totals.logdet, logdet))
        ratio = error_ratio(parts, self.plan.atol, self.plan.rtol)
        value = read(ratio)
        if value is None:
            self._refuse_values()
        if not math.isfinite(value):
            fail_nonfinite(*self._where())
        return torch.tensor(value, dtype=ratio.dtype)

    def _accept(self, step: Step, attempt: _Attempt) -> None:
        t = self.t + attempt.dt
        if self.plan.interpolator is not None:
            self._interpolate(step, attempt.dt)
        # not equality: rounding may have carried a step that was cut off at this time just past it
        arrived = not self._before(t, self.t_span[self.upcoming])
        self.totals.add(step)
        if arrived or self.plan.every_step:
            self._output(t, step.z, self.totals.logdet)
        if arrived:
            self.upcoming = min(self.upcoming + 1, len(self.t_span) - 1)
        self.t, self.z, self.rates = t, step.z, step.last
        self._trace()

    def _choose_next(self, attempt: _Attempt, ratio: Tensor) -> None:
        dt = attempt.dt.detach()
        if attempt.uncut is not None:
            rest = attempt.uncut - dt
            dt = rest if bool(self.t + rest != self.t) else attempt.uncut
        self.dt = self._evenly(self.controller.next_step(dt, ratio))
        if self.memory is not None:
            self.memory.note(abs(float(attempt.dt.detach())), float(ratio), self.plan.method.order)

    @torch.no_grad()
    def _evenly(self, dt: Tensor) -> Tensor:
        """With ``plan.even_steps``: a step no longer than ``dt`` that divides what is left evenly.

        So no sliver is left at the end, which would cost as many evaluations as any step.
        """
        goal = self.t_span[self.upcoming if self.plan.interpolator is None else -1]
        rest = goal - self.t
        if not self.plan.even_steps or not bool(rest):
            return dt
        count = math.ceil(float(rest / dt) - 1e-6)
        # the last step is cut off at its end, by which a gradient for the time finds its way
        return rest / count if count > 1 else torch.maximum(dt * self.sign, 2 * rest * self.sign) * self.sign

    # outputs -----------------------------------------------------------------------------------------------------

    def _interpolate(self, step: Step, dt: Tensor) -> None:
        """Outputs inside the step just accepted, by torchdyn's fourth-order interpolant."""
        interpolator, coefficients, first = self.plan.interpolator, None, self.rates
        assert first is not None
        assert step.last is not None
        assert step.stages is not None
        t0, h = self._there(self.t), self._there(dt)
        while self.upcoming < len(self.t_span) - 1 and self._before(self.t_span[self.upcoming], self.t + dt):
            if coefficients is None:
                middle = self.z + h * sum(w * k for w, k in zip(interpolator.bmid, step.stages, strict=True))
                coefficients = interpolator.fit(h, first.dz, step.last.dz, self.z, step.z, middle)
            goal = self.t_span[self.upcoming]
            self._output(goal[None], interpolator.evaluate(coefficients, t0, t0 + h, self._there(goal)), None)
            self.upcoming += 1

    def _output(self, t: Tensor, z: Tensor, logdet: Tensor | None) -> None:
        self.times.append(self._there(t))
        self.states.append(z)
        self.logdets.append(logdet)

    def _trace(self) -> None:
        if self.trace is not None:
            self.trace.append((self._there(self.t), self.z))

    def _check_penalties(self) -> None:
        penalties = self.totals.penalties
        if penalties and not math.isfinite(read(health(*penalties.values()))):
            fail_integrals(self.z, None, penalties, *self._where())

    # small things ------------------------------------------------------------------------------------------------

    def _before(self, a: Tensor, b: Tensor) -> bool:
        return bool((b - a) * self.sign > 0)

    def _there(self, t: Tensor) -> Tensor:
        """A time on the state's device."""
        return t.to(self.z.device)

    def _where(self) -> tuple[float, int, int]:
        """Time, accepted steps and evaluations so far, for messages."""
        return float(self.t.detach()), self.totals.steps, self.totals.nfe

    def _refuse_values(self) -> NoReturn:
        raise ConfigError(
            f"{self.plan.method.name} chooses its steps by the size of their errors, which cannot be read inside "
            f"torch.func.vmap or on the device meta: use a fixed grid ({', '.join(FIXED_METHODS)}) there."
        )


def _check_precision(plan: SolvePlan, dtype: torch.dtype) -> None:
    """Refuse tolerances that are finer than half precision is.

    Raises:
        ConfigError: with what to do.
    """
    if not dtype.is_floating_point or dtype.itemsize >= 4:
        return
    precision = torch.finfo(dtype).eps
    loosest = max(float(torch.as_tensor(x).max()) for x in (plan.atol, plan.rtol))
    if loosest < precision:
        raise ConfigError(
            f"{plan.method.name} cannot meet a tolerance of {loosest:g} with a state in {dtype}, whose precision "
            f"is {precision:.1g}: solve in float32 (autocast leaves the state in it), loosen atol or rtol, or use "
            f"a fixed grid ({', '.join(FIXED_METHODS)})."
        )
