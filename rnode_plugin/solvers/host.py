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
        if transforms_active():
            return None
        raise
