"""make_optimizer: the optimizer of a recipe."""

from __future__ import annotations

import torch
from torch import nn

from ..recipes.schema import Optimizer

__all__ = ["make_optimizer"]


def make_optimizer(flow: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """The optimizer that ``settings`` describes, for all parameters of ``flow``."""
    return torch.optim.Adam(
        flow.parameters(),
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
    )
