"""Small fields in torchdyn's style."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WithTime(nn.Module):
    def __init__(self, dims: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(dims, dims)

    def forward(self, t: Tensor, x: Tensor, args: object = None) -> Tensor:
        return torch.tanh(self.linear(x)) * torch.cos(3 * t)


def mlp(*sizes: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(sizes[0], sizes[1]), nn.Tanh(), nn.Linear(sizes[1], sizes[2]))
