"""Step sizes of adaptive methods: error norm, first step and next step, as torchdyn computes them, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..host import read
from .tableaus import Method

__all__ = ["Controller", "error_ratio", "guess_first_step", "rms_norm"]


def rms_norm(x: Tensor) -> Tensor:
    """The root of the mean square of all entries (Hairer, Norsett and Wanner, 1993, eq. II.4.11)."""
    return (x.abs() if x.is_complex() else x).pow(2).mean().sqrt()


def error_ratio(parts: Sequence[tuple[Tensor, Tensor | None, Tensor]], atol: float, rtol: float) -> Tensor:
    """The error of a step over what the tolerances allow, over all entries of all parts; a scalar.

    Args:
        parts: error, value before and value after the step, of the same shape. None for a value of zero.
        atol, rtol: tolerances.
    """
    scaled: list[Tensor] = []
    for error, before, after in parts:
        size = after.abs() if before is None else torch.max(before.abs(), after.abs())
        scaled.append(_at_least_single(error) / (atol + rtol * _at_least_single(size)))
    return rms_norm(scaled[0] if len(scaled) == 1 else torch.cat([x.flatten() for x in scaled]))


def guess_first_step(
    f: Callable[[Tensor, Tensor], Tensor],
    velocity: Tensor,
    z: Tensor,
    t: Tensor,
    *,
    order: int,
    atol: float,
    rtol: float,
) -> Tensor | None:
    """A first step whose error should be about as large as the tolerances; it takes one evaluation of ``f``.

    The rule of Hairer, Norsett and Wanner (1993, section II.4): a small Euler step shows how fast the velocity
    changes.

    Args:
        f: the field ``(t, z) -> dz``, forward in time.
        velocity: ``f(t, z)``.
        z: state.
        t: time, a scalar.
        order: of the method.
        atol, rtol: tolerances.

    Returns:
        The step, a scalar on the CPU; None if values cannot be read (see :func:`~rnode_plugin.solvers.host.read`).
    """
    scale = atol + torch.abs(_at_least_single(z)) * rtol
    size, speed = _on_host(rms_norm(z / scale), rms_norm(velocity / scale))
    if size is None or speed is None:
        return None
    t = t.cpu()
    tiny = torch.tensor(1e-6, dtype=t.dtype)
    probe = tiny if size < 1e-5 or speed < 1e-5 else 0.01 * size / speed
    (change,) = _on_host(rms_norm((f(t + probe, z + probe * velocity) - velocity) / scale) / probe)
    if change is None:
        return None
    if speed <= 1e-15 and change <= 1e-15:
        step = torch.max(tiny, probe * 1e-3)
    else:
        step = (0.01 / max(speed, change)) ** (1.0 / float(order + 1))
    return torch.min(100 * probe, step).to(t)


def _at_least_single(x: Tensor) -> Tensor:
    """Half precision cannot hold the square of an error over a tolerance."""
    return x.float() if x.dtype.itemsize < 4 else x


def _on_host(*norms: Tensor) -> Sequence[Tensor | None]:
    """Scalars as scalars on the CPU, by one read from the device; None if nothing can be read."""
    values = read(torch.stack(norms))
    if values is None:
        return [None] * len(norms)
    return [torch.tensor(value, dtype=x.dtype) for value, x in zip(values, norms, strict=True)]


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

    @classmethod
    def of(cls, method: Method, t_span: Tensor) -> Controller:
        """The controller of a method for times of the type of ``t_span``."""
        factors = (method.safety, method.min_factor, method.max_factor)
        safety, least, most = (torch.tensor([x], dtype=t_span.dtype) for x in factors)
        return cls(safety, least, most, method.order)

    @torch.no_grad()
    def next_step(self, dt: Tensor, error_ratio: Tensor) -> Tensor:
        """The step after ``dt``, whose error was ``error_ratio`` times what the tolerances allow."""
        if error_ratio == 0:
            return dt * self.max_factor
        # an accepted step is not followed by a smaller one
        least = torch.ones_like(dt) if error_ratio < 1 else self.min_factor
        exponent = torch.tensor(self.order, dtype=dt.dtype, device=dt.device).reciprocal()
        return dt * torch.min(self.max_factor, torch.max(self.safety / error_ratio**exponent, least))
