"""Trajectory penalties, which measure the states at chosen times along the path."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.regularizer import Source, Trajectory, TrajectoryPenalty
from ..core.sums import sum_squares, without_part
from ..errors import ConfigError, check_count
from .rates import kinetic


@dataclass(frozen=True)
class Straightness(TrajectoryPenalty):
    """``int ||f||^2 dt - ||z(T) - z(0)||^2 / T``, summed over the event: 0 for straight paths at constant speed.

    This is rectified flow's measure of straightness. By the Cauchy-Schwarz inequality it is never negative in the
    limit of small steps. On a grid this is guaranteed only for methods without negative weights (dopri5 and tsit5
    have some). It needs no product with the Jacobian.
    """

    formula = "∫‖f‖² dt − ‖z(T) − z(0)‖²/T; 0 for straight paths at constant speed"
    cost = "nothing"
    source = Source("rectified flow", "Liu et al.", 2023, "liu2023flow")
    rates = (kinetic,)

    name: str = "straightness"

    def times(self, t0: Tensor, t1: Tensor, /) -> Tensor:
        return t0.new_empty(0)  # it reads both ends only, which every trajectory has

    def __call__(self, trajectory: Trajectory, /) -> Tensor:
        length = (trajectory.t[-1] - trajectory.t[0]).abs()
        distance = sum_squares(trajectory.z[-1] - trajectory.z[0])
        return trajectory.integrals["kinetic"] - distance / length


@dataclass(frozen=True)
class TrajectoryPolynomial(TrajectoryPenalty):
    """Squared residual of the least-squares polynomial in time through both ends and random times between them.

    It is TPR (Huang and Yeh, 2021), summed over the times and the event. The paper takes lambda 5 and order 1. The
    solver stops at the random times. It needs no product with the Jacobian.

    Args:
        order: degree of the polynomial.
        points: number of random times, at least ``order``, because with fewer the polynomial would pass through all
            states and the residual would be 0.
        name: the key of its penalty; ``"trajectory_polynomial"`` if left out.

    Raises:
        ConfigError: for an order below 1 or too few points.
    """

    formula = "squared residual of the least-squares polynomial through both ends and random times"
    cost = "stops at the random times"
    source = Source("TPR", "Huang and Yeh", 2021, "huang2021accelerating")

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
        # times on [-1, 1], where powers are well conditioned; the columns of Q span the polynomials
        x = 2 * (t - t[0]) / (t[-1] - t[0]) - 1
        q = torch.linalg.qr(torch.stack([x**k for k in range(self.order + 1)], 1))[0]
        columns = q.to(z.dtype).reshape(*q.shape, *[1] * (z.ndim - 1)).unbind(1)
        return sum_squares(without_part(z, columns, 0).transpose(0, 1))
