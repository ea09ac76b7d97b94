"""The solver gap, the scores by a coarse solver minus the scores by an accurate solver."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..errors import SolverError
from ..solvers import Solver

Output = TypeVar("Output")


@dataclass(frozen=True)
class SolverGap(Generic[Output]):
    """The solver gap of some samples.

    Attributes:
        values: the gap for each sample, ``(B,)``, in double precision on the CPU; infinite if the solver fails.
        output: the result of the solve; None if the solver fails.
        failure: the error if the solver fails, else None.
    """

    values: Tensor
    output: Output | None
    failure: SolverError | None

    @property
    def mean(self) -> float:
        """The mean over the samples."""
        return float(self.values.mean())

    @property
    def typical(self) -> float:
        """The mean of the absolute values."""
        return float(self.values.abs().mean())

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return standard_error(self.values)


def standard_error(values: Tensor) -> float:
    """The standard error of the mean of ``values (B,)``; NaN for a single value."""
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.nan


def measure_solver_gap(
    solve: Callable[[Solver], Output],
    scores: Callable[[Output], Tensor],
    solver: Solver,
    accurate: Tensor,
) -> SolverGap[Output]:
    """Measure scores by ``solver`` minus ``accurate`` scores.

    Args:
        solve: solves the samples with a given solver and its full quadrature, because the noise of a sampled one
            is not an error of the solver. The noise of the samples is the same at each call.
        scores: computes the score of each sample, ``(B,)``, such as bits/dim, from the result of ``solve``.
        solver: the solver to measure.
        accurate: the scores ``(B,)`` by an accurate solver.
    """
    try:
        output = solve(solver)
    except SolverError as error:
        return SolverGap(torch.full((len(accurate),), math.inf, dtype=torch.float64), None, error)
    return SolverGap(scores(output).cpu().double() - accurate.cpu().double(), output, None)
