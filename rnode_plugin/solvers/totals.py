"""What a solve adds up on its way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import Solution, SolveStats
from .step import Step

__all__ = ["Totals"]


class Totals:
    """Running integrals: the log-determinant at each output, the penalties in total."""

    def __init__(self) -> None:
        self.logdet: Tensor | None = None
        self.penalties: dict[str, Tensor] = {}
        self.nfe = self.steps = self.rejected = 0

    def add(self, step: Step) -> None:
        self.logdet = self.logdet_after(step)
        for name, value in step.penalties.items():
            self.penalties[name] = self.penalties[name] + value if name in self.penalties else value
        self.steps += 1

    def logdet_after(self, step: Step) -> Tensor | None:
        if step.dlogdet is None or self.logdet is None:
            return step.dlogdet
        return self.logdet + step.dlogdet

    def solution(self, t: Sequence[Tensor], z: Sequence[Tensor], logdet: Sequence[Tensor | None]) -> Solution:
        total = self.logdet
        path = None
        if total is not None:
            path = torch.stack([torch.zeros_like(total) if x is None else x for x in logdet])
        times = torch.stack([x.reshape(()) for x in t])
        stats = SolveStats(self.nfe, self.steps, self.rejected)
        return Solution(times, torch.stack(list(z)), path, self.penalties, stats)
