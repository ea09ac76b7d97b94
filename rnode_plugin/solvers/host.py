"""What the host reads from the device while it solves, in one place: every call of :func:`read` is one wait."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core.tensors.exporting import exporting
from ..core.tensors.transforms_active import transforms_active

__all__ = ["read"]


def read(x: Tensor) -> Any:
    """The numbers in ``x``, as ``x.tolist()`` gives them; None if nobody can know them.

    That is so on the device ``meta``, in an export, and inside ``torch.func.vmap``, where they differ from sample
    to sample.
    """
    if x.is_meta or exporting():
        return None
    try:
        return x.detach().tolist()
    except RuntimeError:
        if not transforms_active():
            raise
    try:
        return _one_by_one(x.detach())
    except RuntimeError:
        return None


def _one_by_one(x: Tensor) -> Any:
    # in torch 2.6 `tolist` does not know the tensors of torch.func.grad
    return x.item() if x.ndim == 0 else [_one_by_one(row) for row in x]
