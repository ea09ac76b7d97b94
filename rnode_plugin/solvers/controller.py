"""The lengths of the steps of an adaptive solve, bitwise by torchdyn's rules.

Times and lengths stay on the CPU. For each step that is tried the host reads one number from the device, the size
of its error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.modes import on_device, read
from ..core.system import RightHandSide
from ..errors import ConfigError
from .step import Step, Tolerance, fail_nonfinite
from .tableaus import FIXED_METHODS, Method

_LEAST = 1e-37  # allowed error for an entry whose size is 0 if atol is 0 too, to avoid 0 / 0


class Trial(NamedTuple):
    """The length of a step that is tried, negative backward in time.

    Attributes:
        dt: length of the step. If it ends at a stop or at the end of the solve, it has the graph of that time.
        wanted: length before it was cut off.
        uncut: length that was cut off at an output time, with which the solve continues; None if none was.
    """

    dt: Tensor
    wanted: Tensor
    uncut: Tensor | None


@dataclass(frozen=True, eq=False)
class StepController:
    """Chooses the lengths of steps. It has no state: all quantities that it needs are arguments.

    Attributes:
        method: has the constants of the rules, and fits a length to the time left to the next stop.
        atol, rtol: see :class:`~rnode_plugin.Adaptive`.
        sign: 1 forward in time, -1 backward.
    """

    method: Method
    atol: Tolerance
    rtol: Tolerance
    sign: float

    def before(self, a: Tensor, b: Tensor) -> bool:
        """Whether the solve comes to the time ``a`` before it comes to ``b``."""
        return bool((b - a) * self.sign > 0)

    def trial(self, dt: Tensor, t: Tensor, end: Tensor, stop: Tensor | None) -> Trial:
        """Fit the length ``dt`` of a step from ``t``, and cut it off at the ``end`` of the solve and at a ``stop``.

        ``stop`` is the next output time, or None if an interpolant gives the outputs.
        """
        if self.method.fit is not None:
            dt = self.method.fit(dt, (end if stop is None else stop) - t, self.sign)
        wanted, uncut = dt, None
        if not self.before(t + dt, end):
            dt = self._ending(dt, t, end)
        if stop is not None and not self.before(t + dt, stop):
            uncut = dt.detach() if self.before(stop, t + dt) else None
            dt = self._ending(dt.detach(), t, stop)
        return Trial(dt, wanted, uncut)

    def _ending(self, dt: Tensor, t: Tensor, goal: Tensor) -> Tensor:
        """The length ``dt``, which reaches the time ``goal`` from ``t``, with the graph of that time."""
        rest = goal - t
        # A step that ends there without being cut off, as a warm start's, keeps its value. The one that is left
        # may differ in the last digit, and a repeated call would then take other steps.
        return rest if self.before(goal, t + dt) else dt + (rest - rest.detach())

    @torch.no_grad()
    def next_length(self, trial: Trial, t: Tensor, error_ratio: Tensor) -> Tensor:
        """The length to try from ``t``, after a trial with this error ratio, accepted or rejected."""
        method, dt = self.method, trial.dt.detach()
        if trial.uncut is not None:  # after a stop, torchdyn continues with the part that was cut off
            rest = trial.uncut - dt
            dt = rest if bool(t + rest != t) else trial.uncut
        factors = [[method.safety], [method.min_factor], [method.max_factor]]
        safety, least, most = torch.tensor(factors, dtype=dt.dtype)
        if error_ratio == 0:
            return dt * most
        if error_ratio < 1:  # the safety factor alone must not shorten the step after an accepted one
            least = torch.ones_like(dt)
        exponent = torch.tensor(method.order, dtype=dt.dtype).reciprocal()
        return dt * torch.min(most, torch.max(safety / error_ratio**exponent, least))

    def safe_length(self, trial: Trial, error_ratio: Tensor, longest: float) -> float:
        """The longest step whose error would have been accepted in all trials.

        Args:
            trial: the last of them.
            error_ratio: its error ratio.
            longest: the longest safe step of the trials before; infinite if there were none.
        """
        length = trial.dt.detach()
        # the error of a short step that was cut off is mostly rounding, so it does not show that longer steps fail
        cut_off = length.abs() < 0.1 * trial.wanted.detach().abs()
        ignored = longest < math.inf and bool((error_ratio <= 1) & cut_off)
        if error_ratio > 0 and not ignored:  # the error grows with the order-th power of a step's length
            longest = min(longest, abs(float(length)) * float(error_ratio) ** (-1 / self.method.order))
        return longest

    @torch.no_grad()
    def error_ratio(self, step: Step, z: Tensor, logdet: Tensor | None) -> Tensor:
        """The error of a step from ``z``, divided by the allowed error.

        It is a root mean square over the entries of state and log-determinant, and 0 for an empty batch. The result
        is a scalar on the CPU, the only number that a step reads from the device.
        """
        assert step.error is not None
        if z.numel() == 0:
            return torch.zeros(())
        size = torch.max(z.abs(), step.z.abs())
        scaled = step.error / (self.atol + self.rtol * size).clamp(min=_LEAST)
        if step.dlogdet_error is not None and step.dlogdet is not None:
            size = step.dlogdet.abs()
            if logdet is not None:
                size = torch.max(logdet.abs(), (logdet + step.dlogdet).abs())
            of_logdet = step.dlogdet_error / (self.atol + self.rtol * size).clamp(min=_LEAST)
            # the log-determinant is one more entry of each sample's state, as in torchdyn's CNF
            scaled = torch.cat([scaled.flatten(), of_logdet.flatten()])
        return self._on_host(_rms(scaled))[0]

    def warm_start(self, safe: float, times: Tensor) -> float:
        """The size of the first step of a solve through ``times``, from the longest ``safe`` step of another solve.

        A step that reaches the end is not made shorter. Any other step has the margin of every next step, since the
        field has changed a little: without it, training on two moons at 1e-3 took 37 to 39 evaluations, where
        guesses took 35 to 36 and this takes 32 to 33.
        """
        whole = float((times[-1] - times[0]).detach().abs())
        return whole if safe >= whole else self.method.safety * safe

    def first_length(
        self, rhs: RightHandSide, z: Tensor, velocity: Tensor, times: Tensor, nfe: int, *, known: float | None
    ) -> tuple[Tensor, int]:
        """The length of the first step to try at ``times[0]``, without a graph: ``known``, or else a guess.

        The evaluations run in the grad mode of the solve, since a field may differentiate inside.

        Args:
            rhs: the right-hand side, which a guess evaluates once or twice.
            z, velocity: state and velocity at ``times[0]``.
            times: the times of the solve, ``(T,)``, on the CPU.
            nfe: the number of evaluations so far.
            known: the size of the step; None guesses it.

        Returns:
            The length, and the number of evaluations, which includes the guess.

        Raises:
            SolverError: if no guess is positive and finite, since the field is not.
        """
        z, velocity, times = z.detach(), velocity.detach(), times.detach()
        if known is not None:
            return torch.full_like(times[0], self.sign * known), nfe
        if z.numel() == 0:
            return times[-1] - times[0], nfe
        # Backward in time the correct guess uses the mirrored field -f(-t, z), but torchdyn uses f. To take
        # torchdyn's steps we try f first, and the mirrored field only if that guess is not positive and finite.
        for mirrored in (False, True) if self.sign < 0 else (False,):
            guess = self._guess(rhs, self.sign * velocity, z, self.sign * times[0], mirrored=mirrored)
            nfe += 1
            if 0 < float(guess) < math.inf:  # an infinite velocity makes it 0
                return self.sign * guess, nfe
        fail_nonfinite(float(times[0]), 0, nfe)

    def _guess(self, rhs: RightHandSide, velocity: Tensor, z: Tensor, t: Tensor, *, mirrored: bool) -> Tensor:
        """A first step whose error should be about as large as the tolerances, a scalar on the CPU.

        This is the rule of Hairer, Norsett and Wanner (1993, section II.4). A small Euler step forward in time,
        with one evaluation of the field ``f``, shows how fast the ``velocity``, ``f(t, z)``, changes. With
        ``mirrored`` the field is the mirror image ``-f(-t, z)`` of the right-hand side.
        """
        scale = self.atol + torch.abs(z) * self.rtol
        scale = torch.where(scale == 0, math.inf, scale)  # an entry of size 0 does not count without atol
        size, speed = self._on_host(_rms(z / scale), _rms(velocity / scale))
        t = t.cpu()
        tiny = torch.tensor(1e-6, dtype=t.dtype)
        probe = tiny if size < 1e-5 or speed < 1e-5 else 0.01 * size / speed
        time, state = t + probe, z + probe * velocity
        there = rhs(on_device(-time if mirrored else time, z.device), state, products=False).dz
        there = (-there if mirrored else there).detach()
        (change,) = self._on_host(_rms((there - velocity) / scale) / probe)
        if speed <= 1e-15 and change <= 1e-15:  # a field at rest gives no scale
            step = torch.max(tiny, probe * 1e-3)
        else:
            step = (0.01 / max(speed, change)) ** (1.0 / float(self.method.order + 1))
        return torch.min(100 * probe, step).to(t)

    def _on_host(self, *norms: Tensor) -> Sequence[Tensor]:
        """Copy scalars to the CPU with a single read from the device."""
        together = torch.stack(norms)
        values = read(together)
        if values is None:
            raise ConfigError(
                f"{self.method.name} chooses its steps by the size of their errors, which cannot be read on "
                f"the device meta: use a fixed grid ({', '.join(FIXED_METHODS)}) there."
            )
        return torch.tensor(values, dtype=together.dtype).unbind()


def _rms(x: Tensor) -> Tensor:
    """The root mean square over all entries (Hairer, Norsett and Wanner, 1993, eq. II.4.11)."""
    return (x.abs() if x.is_complex() else x).pow(2).mean().sqrt()
