"""Which columns of a state the penalties are about: a slice or a mask of booleans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError

Columns = slice | Tensor
"""A slice of the first dimension of a sample, or a mask of booleans over its first dimensions."""


def as_columns(penalized: Any) -> Columns | None:
    """``penalized`` as a slice or a mask, on the CPU; None if it is neither."""
    if isinstance(penalized, slice):
        return penalized
    if (
        isinstance(penalized, (list, tuple))
        and penalized
        and all(isinstance(x, (bool, np.bool_)) for x in penalized)
    ):
        return torch.tensor(penalized)
    if isinstance(penalized, Tensor) and penalized.dtype == torch.bool and penalized.ndim > 0:
        return penalized.detach().clone().cpu()
    return None


def places_of(columns: Columns, event: Sequence[int]) -> tuple[Tensor, int]:
    """The entries of a sample of shape ``event`` that ``columns`` selects.

    Returns:
        Their places among the entries of the first dimensions, rising, and how many of these dimensions are one.

    Raises:
        ConfigError: if they select nothing, or a mask has another shape.
    """
    if isinstance(columns, slice):
        size = event[0] if event else 0
        mask = torch.zeros(size, dtype=torch.bool)
        mask[list(range(size)[columns])] = True
    else:
        mask = columns
    if tuple(mask.shape) != tuple(event[: mask.ndim]) or not mask.any():
        raise ConfigError(f"penalized={columns} selects nothing of a sample of shape {tuple(event)}.")
    return mask.flatten().nonzero().flatten(), mask.ndim
