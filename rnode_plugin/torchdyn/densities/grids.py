"""The times of a fixed grid between the ends of a solve."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...errors import ConfigError
from ...solvers.config import FIXED_METHODS
from ..solver_names import resolve_solver

__all__ = ["grid_times"]


def grid_times(t_span: Tensor, solver: str, step: float | None) -> Tensor:
    """Times from the first to the last of ``t_span``, evenly and at most ``step`` apart; None: ``t_span`` itself.

    Raises:
        ConfigError: for a solver that chooses its steps, and a step that is not a positive number.
    """
    if resolve_solver(solver).stepping_class == "adaptive":
        raise ConfigError(f"{solver!r} chooses its steps: a grid needs one of {', '.join(FIXED_METHODS)}.")
    if step is None:
        return t_span
    if isinstance(step, bool) or not (isinstance(step, (int, float)) and math.isfinite(step) and step > 0):
        raise ConfigError(f"step must be a number > 0 or None, not {step!r}.")
    first, last = float(t_span[0]), float(t_span[-1])
    count = max(1, math.ceil(abs(last - first) / step - 1e-6))  # forgives rounding
    return torch.linspace(first, last, count + 1, dtype=t_span.dtype, device=t_span.device)
