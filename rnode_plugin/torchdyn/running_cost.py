"""A running cost, ``integral_loss``, beside the rates of a solve: a column of the state or a hidden penalty."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.dynamics import BoundDynamics, Rates

__all__ = ["INTEGRAL_LOSS", "Cost", "with_cost_column", "with_hidden_cost"]

INTEGRAL_LOSS = "<integral_loss>"
"""Key under which the rate of a hidden ``integral_loss`` travels; no regularizer can have this name."""

Cost = Callable[[Tensor, Tensor], Tensor]


def with_cost_column(rates: BoundDynamics, cost: Cost) -> BoundDynamics:
    """``integral_loss`` in the first column of the state, as torchdyn has it with gradients through the steps."""

    def with_cost(t: Tensor, z: Tensor, *, products: bool = True) -> Rates:
        state = z[:, 1:]
        running = cost(t, state)
        if running.ndim == 1:
            running = running[:, None]
        dz, _, penalties = rates(t, state, products=products)
        return Rates(torch.cat([running, dz], 1).to(dz), None, penalties)

    return with_cost


def with_hidden_cost(rates: BoundDynamics, cost: Cost) -> BoundDynamics:
    """``integral_loss`` as a penalty, for an adjoint, whose state has no column for it."""

    def with_cost(t: Tensor, z: Tensor, *, products: bool = True) -> Rates:
        dz, _, penalties = rates(t, z, products=products)
        return Rates(dz, None, {**penalties, INTEGRAL_LOSS: cost(t, z).sum()})

    return with_cost
