"""Whether torch.func or forward mode is at work, where autograd Functions of our own cannot serve."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["in_transform", "is_transformed"]

# torch has no public name for this; it is the question that autograd.Function itself asks
_transforms_active = torch._C._are_functorch_transforms_active


def in_transform() -> bool:
    """Whether a transform of ``torch.func`` is running."""
    return _transforms_active()


def is_transformed(*tensors: Tensor) -> bool:
    """Whether a transform of ``torch.func`` is running, or one of the tensors has a tangent of forward mode."""
    return _transforms_active() or any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
