"""The solver gap, the scores by a coarse solver minus the scores by an accurate solver."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import SolverError
from ...solvers import Solver


def measure_solver_gap(scores: Callable[[Solver], Tensor], solver: Solver, accurate: Tensor) -> Tensor:
    """Measure scores by ``solver`` minus ``accurate`` scores.

    Args:
        scores: computes the score of each sample, ``(B,)``, such as bits/dim, with a given solver and its full
            quadrature, because the noise of a sampled one is not an error of the solver. The noise of the samples
            is the same at each call.
        solver: the solver to measure.
        accurate: the scores ``(B,)`` by an accurate solver.

    Returns:
        The gap of each sample, ``(B,)``, in double precision on the CPU; infinite if the solver fails.
    """
    try:
        return scores(solver).cpu().double() - accurate.cpu().double()
    except SolverError:
        return torch.full((len(accurate),), math.inf, dtype=torch.float64)
