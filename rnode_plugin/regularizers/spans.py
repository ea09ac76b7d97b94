"""Span policies: rules that change the times of a solve."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.regularizer import About, Source, SpanPolicy
from ..errors import ConfigError, check_number


def with_end_time(t_span: Tensor, end: Tensor) -> Tensor:
    """Stretch ``t_span (T,)`` so that its later end lies at ``end``, a scalar; its earlier end stays.

    A solve backward in time, such as the one that draws samples, then starts at ``end``.
    """
    backward = bool(t_span[-1] < t_span[0])
    first, last = (t_span[-1], t_span[0]) if backward else (t_span[0], t_span[-1])
    end = end.to(t_span)
    stretched = first + (t_span - first) * ((end - first) / (last - first))
    # stretching rounds, and the two ends must be exact
    if backward:
        return torch.cat([end[None], stretched[1:-1], first[None]])
    return torch.cat([first[None], stretched[1:-1], end[None]])


@dataclass(frozen=True)
class Steer(SpanPolicy):
    """STEER (Ghosh et al., 2020): in training the end time T is drawn from U(T - b, T + b) for each solve.

    Times between the ends move in proportion. Evaluation and sampling end at T. STEER has no penalty and takes no
    lambda; its strength is the width.

    Args:
        width: b, smaller than the length of the solve.
        name: the policy's key; ``"steer"`` if left out.

    Raises:
        ConfigError: for a width that is not a positive number; when solving, for one that is not smaller than the
            length of the solve.
    """

    about = About(
        "in training, the end time is drawn from U(T − b, T + b): `steer:0.25`",
        cost="no penalty, and no λ",
        source=Source("STEER", "Ghosh et al.", 2020, "ghosh2020steer"),
    )
    penalized = False

    width: float = 0.25
    name: str = "steer"

    def __post_init__(self) -> None:
        check_number(self.width, "the width of steer, as in 'steer:0.25',", above=0)

    def times(self, t_span: Tensor, /, *, training: bool) -> Tensor:
        if not training:
            return t_span
        last, first = t_span.detach().max(), t_span.detach().min()
        if bool(last - first <= self.width):
            raise ConfigError(
                f"steer: the width {self.width} must be smaller than the solve's length, {float(last - first):.6g}."
            )
        # drawn on the CPU, so that one seed gives the same end on every device
        shift = (2 * torch.rand((), dtype=torch.float64) - 1) * self.width
        return with_end_time(t_span, t_span.max() + shift.to(t_span))

    def penalty(self, z: Tensor, /) -> Tensor:
        return z.new_zeros(len(z))
