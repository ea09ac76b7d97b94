"""Penalties of the path and of its times: of the solver's steps, of the states at some times, and span policies.

Step penalties are ``(B,)`` and not divided by D: norms over the event are root mean squares, as in a solver's own
error norm. They need a gradient mode that differentiates through the steps (``autograd``, ``checkpointed``). The
local ones work in every mode.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import ConfigError, check_count
from ..chains import sum_squares
from .base import Regularizer, Source, StepRecord, Trajectory, regularizer
from .rates import kinetic

_PAL = Source("", "Pal et al.", 2021, "pal2021opening")
_LOCAL = Source("", "Pal et al.", 2023, "pal2023locally")
_EXTRA = "one extra step of `tsit5`"


@regularizer(
    "error", kind="step", formula="Σ E h over the steps, E the norm of the embedded error estimate",
    cost="an adaptive method", source=_PAL.at("", method="ERNODE"), uses={"error"}, divided_by_dims=False,
)  # fmt: skip
def error(step: StepRecord) -> Tensor:
    """``sum_j E_j h_j`` over the accepted steps (ERNODE; Pal et al., 2021). Needs an adaptive method.

    ``E`` is the root mean square of the embedded error estimate, ``h`` the step's length. The authors' code divides
    the estimate by ``atol + rtol |z|`` first, as their solver's norm does. At an estimate of 0 the gradient of the
    root is 0.
    """
    assert step.error is not None
    return _rms(step.error) * step.h


@regularizer(
    "stiffness", kind="step", formula="mean over the steps of ‖f(b) − f(a)‖ / ‖b − a‖ for two stages at one time",
    cost="`dopri5`, `tsit5` or `rk4`", source=_PAL.at("", method="SRNODE"), uses={"pair"}, reduction="mean",
    divided_by_dims=False,
)  # fmt: skip
def stiffness(step: StepRecord) -> Tensor:
    """The mean over the accepted steps, of all blocks of a flow, of an estimate of the Jacobian's norm.

    ``||f(b) - f(a)|| / ||b - a||`` of two stages a, b at one time (SRNODE; Pal et al., 2021): the last two of
    dopri5 and tsit5, the two at the midpoint of rk4. torchdyn's rk4 has its last two at its midpoint, so its value
    differs. Safe form: 0 with the gradient 0 where the stages coincide, as at f = 0.
    """
    assert step.pair is not None
    a, b = step.pair
    apart = _rms(step.states[b] - step.states[a])
    change = _rms(step.velocities[b] - step.velocities[a])
    same = apart == 0
    return torch.where(same, torch.zeros_like(apart), change / torch.where(same, torch.ones_like(apart), apart))


@regularizer(
    "local_error", kind="step", formula="E h of one extra step from a random time", cost=_EXTRA, source=_LOCAL,
    uses={"error"}, local=True, divided_by_dims=False,
)  # fmt: skip
def local_error(step: StepRecord) -> Tensor:
    """``E h`` of one extra step of tsit5 from a uniformly random time, with a detached start (Pal et al., 2023)."""
    return error(step)


@regularizer(
    "local_stiffness", kind="step", formula="the stiffness of one extra step from a random time", cost=_EXTRA,
    source=_LOCAL, uses={"pair"}, local=True, reduction="mean", divided_by_dims=False,
)  # fmt: skip
def local_stiffness(step: StepRecord) -> Tensor:
    """``||f(b) - f(a)|| / ||b - a||`` of one extra step of tsit5 from a uniformly random time (Pal et al., 2023).

    Its start is detached, a and b are as in :func:`stiffness`; of several blocks it is the mean over the blocks.
    """
    return stiffness(step)


def _rms(x: Tensor) -> Tensor:
    """The root mean square over the event, ``(B,)``: 0 with the gradient 0 for ``x = 0``."""
    square = x.reshape(x.shape[0], -1).square().mean(1)
    zero = square == 0
    return torch.where(zero, torch.zeros_like(square), torch.where(zero, torch.ones_like(square), square).sqrt())


@regularizer(
    "straightness", kind="trajectory", cost="nothing",
    formula="∫‖f‖² dt − ‖z(T) − z(0)‖²/T; 0 for straight paths at constant speed",
    source=Source("rectified flow", "Liu et al.", 2023, "liu2023flow"), rates=(kinetic,),
)  # fmt: skip
@dataclass(frozen=True)
class Straightness(Regularizer):
    """``int ||f||^2 dt - ||z(T) - z(0)||^2 / T``: 0 for straight paths at constant speed, summed over the event.

    Rectified flow's measure. By Cauchy and Schwarz it is never negative in the limit of small steps; on a grid
    that is guaranteed only for methods without negative weights (dopri5 and tsit5 have some). No product.
    """

    name: str = "straightness"

    def times(self, t0: Tensor, t1: Tensor, /) -> Tensor:
        return t0.new_empty(0)

    def __call__(self, trajectory: Trajectory, /) -> Tensor:
        length = (trajectory.t[-1] - trajectory.t[0]).abs()
        distance = sum_squares(trajectory.z[-1] - trajectory.z[0])
        return trajectory.integrals["kinetic"] - distance / length


@regularizer(
    "trajectory_polynomial", kind="trajectory", cost="stops at the random times",
    formula="squared residual of the least-squares polynomial through both ends and random times",
    source=Source("TPR", "Huang and Yeh", 2021, "huang2021accelerating"), rates=(),
)  # fmt: skip
@dataclass(frozen=True)
class TrajectoryPolynomial(Regularizer):
    """Squared residual of the least-squares polynomial in time through both ends and random times between them.

    TPR (Huang and Yeh, 2021), summed over the times and the event; lambda 5 and order 1 in the paper. The random
    times become stops of the solve. No product.

    Args:
        order: of the polynomial.
        points: random times; at least ``order``, for otherwise the polynomial goes through all of them.
        name: the key of its penalty; ``"trajectory_polynomial"`` if left out.

    Raises:
        ConfigError: for an order below 1 or too few points.
    """

    order: int = 1
    points: int = 2
    name: str = "trajectory_polynomial"

    def __post_init__(self) -> None:
        for what, value in (("order", self.order), ("points", self.points)):
            check_count(value, f"trajectory_polynomial's {what}")
        if self.points < self.order:
            raise ConfigError(
                f"trajectory_polynomial: a polynomial of order {self.order} goes through both ends and "
                f"{self.order - 1} times between them; give at least points={self.order}."
            )

    def times(self, t0: Tensor, t1: Tensor, /) -> Tensor:
        # drawn on the CPU, so that one seed gives the same times on every device
        return t0 + (t1 - t0) * torch.rand(self.points, dtype=torch.float64).to(t0)

    def __call__(self, trajectory: Trajectory, /) -> Tensor:
        t, z = trajectory.t.double(), trajectory.z
        x = 2 * (t - t[0]) / (t[-1] - t[0]) - 1
        q = torch.linalg.qr(torch.stack([x**k for k in range(self.order + 1)], 1))[0]
        project = (torch.eye(len(t), dtype=q.dtype, device=q.device) - q @ q.mT).to(z.dtype)
        residual = torch.tensordot(project, z, dims=1)
        return sum_squares(residual.transpose(0, 1))


def with_end_time(t_span: Tensor, end: Tensor) -> Tensor:
    """``t_span (T,)`` stretched so that its later end lies at ``end``; its earlier end stays.

    A solve backward in time, as for samples, starts there.
    """
    backward = bool(t_span[-1] < t_span[0])
    first, last = (t_span[-1], t_span[0]) if backward else (t_span[0], t_span[-1])
    end = end.to(t_span)
    stretched = first + (t_span - first) * ((end - first) / (last - first))
    # the two ends to the bit
    if backward:
        return torch.cat([end[None], stretched[1:-1], first[None]])
    return torch.cat([first[None], stretched[1:-1], end[None]])


@regularizer(
    "steer", kind="span", cost="no penalty, and no λ",
    formula="in training, the end time is drawn from U(T − b, T + b): `steer:0.25`",
    source=Source("STEER", "Ghosh et al.", 2020, "ghosh2020steer"), penalized=False, divided_by_dims=False,
)  # fmt: skip
@dataclass(frozen=True)
class Steer(Regularizer):
    """STEER (Ghosh et al., 2020): in training the end time T is drawn from U(T - b, T + b) for each solve.

    Times between the ends move in proportion. Evaluation and sampling end at T. It has no penalty and takes no
    lambda; its strength is the width.

    Args:
        width: b, smaller than the length of the solve.
        name: its key; ``"steer"`` if left out.

    Raises:
        ConfigError: for a width that is not a positive number; when solving, for one that is not smaller than the
            length of the solve.
    """

    width: float = 0.25
    name: str = "steer"

    def __post_init__(self) -> None:
        width = self.width
        if isinstance(width, bool) or not (isinstance(width, (int, float)) and math.isfinite(width) and width > 0):
            raise ConfigError(f"steer: the width must be a number > 0, not {width!r}: 'steer:0.25'.")

    def times(self, t_span: Tensor, /, *, training: bool) -> Tensor:
        if not training:
            return t_span
        last, first = t_span.detach().max(), t_span.detach().min()
        if bool(last - first <= self.width):
            raise ConfigError(
                f"steer: the width {self.width} must be smaller than the solve's length, {float(last - first):.6g}."
            )
        shift = (2 * torch.rand((), dtype=torch.float64) - 1) * self.width
        return with_end_time(t_span, t_span.max() + shift.to(t_span))

    def __call__(self, z: Tensor, /) -> Tensor:
        return z.new_zeros(len(z))


@regularizer(
    "learned_end_time", kind="span", cost="penalty T²/2, not divided by D",
    formula="the end time T is a parameter, also in evaluation",
    source=Source("SNOpt", "Liu et al.", 2021, "liu2021second"), penalized=True, divided_by_dims=False,
)  # fmt: skip
class LearnedEndTime(nn.Module, Regularizer):
    """The end time T is a parameter, in evaluation too, with penalty ``T^2 / 2`` (SNOpt; Liu et al., 2021).

    Lambda is the paper's c. Times between the ends move in proportion. Every solve, with any ``t_span``, ends at
    T, or starts there if it goes backward. Not divided by D.

    Args:
        end: the first value of T.
        name: its key; ``"learned_end_time"`` if left out.

    Raises:
        ConfigError: for an end that is not a finite number; when solving, for a T that has fallen to the start.
    """

    def __init__(self, end: float = 1.0, *, name: str = "learned_end_time") -> None:
        super().__init__()
        if isinstance(end, bool) or not isinstance(end, (int, float)) or not math.isfinite(end):
            raise ConfigError(f"learned_end_time: the first end time must be a finite number, not {end!r}.")
        self.name = name
        self.end = nn.Parameter(torch.tensor(float(end)))

    def times(self, t_span: Tensor, /, *, training: bool) -> Tensor:
        if bool(self.end.detach() <= t_span.detach().min()):
            raise ConfigError(
                f"learned_end_time: the end time has fallen to {self.end.item():.6g}, the start of the solve; "
                "lower its lambda or its learning rate."
            )
        return with_end_time(t_span, self.end)

    def forward(self, z: Tensor) -> Tensor:
        """``T^2 / 2`` for each sample, ``(B,)``."""
        return (self.end.square() / 2).to(z).expand(len(z))
