"""One operation on many tensors in few kernels, as torch's optimizers do it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["add_each", "multiply_each"]


def add_each(tensors: list[Tensor], others: list[Tensor]) -> None:
    """Add to each tensor its counterpart among the others, in place."""
    # torch has no public name for these operations
    torch._foreach_add_(tensors, others)  # pyright: ignore[reportPrivateImportUsage]


def multiply_each(tensors: list[Tensor], factor: Tensor) -> Sequence[Tensor]:
    """Each tensor times the same factor, which has no dimensions."""
    return torch._foreach_mul(tensors, factor)  # pyright: ignore[reportPrivateImportUsage]
