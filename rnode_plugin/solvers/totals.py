"""Totals: the running integrals of a solve, and the reduction of step penalties over its accepted steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import Solution, SolveStats
from .steps.step import Step

__all__ = ["Totals"]


class Totals:
    """Running integrals: the log-determinant at each output, the penalties in total."""

    def __init__(self) -> None:
        self.logdet: Tensor | None = None
        self.penalties: dict[str, Tensor] = {}
        self._means: set[str] = set()  # penalties that are sums until the number of steps is known
        self.nfe = self.steps = self.rejected = 0

    def add(self, step: Step) -> None:
        self.logdet = self.logdet_after(step)
        for name, value in step.penalties.items():
            self.penalties[name] = self.penalties[name] + value if name in self.penalties else value
        for name, (reduction, value) in step.path.items():
            before = self.penalties.get(name)
            if before is not None:
                value = torch.maximum(before, value) if reduction == "max" else before + value
            self.penalties[name] = value
            if reduction == "mean":
                self._means.add(name)
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
        penalties = {k: v / self.steps if k in self._means else v for k, v in self.penalties.items()}
        return Solution(times, torch.stack(list(z)), path, penalties, stats)
