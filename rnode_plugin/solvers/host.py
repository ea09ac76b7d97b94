"""What the host reads from the device while it solves, in one place: every call of :func:`read` is one wait."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core.tensors.exporting import exporting
from ..core.tensors.transforms_active import transforms_active

__all__ = ["numbers", "read"]


def read(x: Tensor) -> Any:
    """The numbers in ``x``, as ``x.tolist()`` gives them; None if nobody can know them.

    That is so on the device ``meta``, in an export, and inside ``torch.func.vmap``, where they differ from sample
    to sample.
    """
    if x.is_meta or exporting():
        return None
    try:
        return numbers(x.detach())
    except RuntimeError:
        if transforms_active():
            return None
        raise


def numbers(x: Tensor) -> Any:
    """The numbers in ``x``, as ``x.tolist()`` gives them.

    Raises:
        RuntimeError: nobody can know them.
    """
    try:
        return x.tolist()
    except RuntimeError:
        if not transforms_active():
            raise
        # in torch 2.6 `tolist` does not know the tensors of torch.func.grad
        return x.item() if x.ndim == 0 else [numbers(row) for row in x]
