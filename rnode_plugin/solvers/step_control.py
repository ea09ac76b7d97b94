"""Step sizes of adaptive methods: error norm, first step and next step, as torchdyn computes them, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Controller", "guess_first_step", "rms_norm"]


def rms_norm(x: Tensor) -> Tensor:
    """The root of the mean square of all entries (Hairer, Norsett and Wanner, 1993, eq. II.4.11)."""
    return x.abs().pow(2).mean().sqrt()


def guess_first_step(
    f: Callable[[Tensor, Tensor], Tensor],
    velocity: Tensor,
    z: Tensor,
    t: Tensor,
    *,
    order: int,
    atol: float,
    rtol: float,
) -> Tensor:
    """A first step whose error should be about the tolerances, for one evaluation of ``f``.

    The rule of Hairer, Norsett and Wanner (1993, section II.4): an Euler step a hundred times smaller than the
    state allows shows how fast the velocity changes.

    Args:
        f: the field ``(t, z) -> dz``, forward in time.
        velocity: ``f(t, z)``.
        z: state.
        t: time, a scalar.
        order: of the method.
        atol, rtol: tolerances.
    """
    scale = atol + torch.abs(z) * rtol
    size, speed = rms_norm(z / scale), rms_norm(velocity / scale)
    tiny = torch.tensor(1e-6, dtype=t.dtype, device=t.device)
    probe = tiny if size < 1e-5 or speed < 1e-5 else 0.01 * size / speed
    change = rms_norm((f(t + probe, z + probe * velocity) - velocity) / scale) / probe
    if speed <= 1e-15 and change <= 1e-15:
        step = torch.max(tiny, probe * 1e-3)
    else:
        step = (0.01 / max(speed, change)) ** (1.0 / float(order + 1))
    return torch.min(100 * probe, step).to(t)


class Controller(NamedTuple):
    """The next step from the error of this one.

    Attributes:
        safety: factor that keeps the next step a little smaller than the error allows.
        min_factor, max_factor: bounds of the change from one step to the next.
        order: of the method.
    """

    safety: Tensor
    min_factor: Tensor
    max_factor: Tensor
    order: int

    @torch.no_grad()
    def next_step(self, dt: Tensor, error_ratio: Tensor) -> Tensor:
        """The step after ``dt``, whose error was ``error_ratio`` times what the tolerances allow."""
        if error_ratio == 0:
            return dt * self.max_factor
        # an accepted step is not followed by a smaller one
        least = torch.ones_like(dt) if error_ratio < 1 else self.min_factor
        exponent = torch.tensor(self.order, dtype=dt.dtype, device=dt.device).reciprocal()
        return dt * torch.min(self.max_factor, torch.max(self.safety / error_ratio**exponent, least))
