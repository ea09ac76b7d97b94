"""Whether a transform of torch.func, forward-mode AD or an export is at work: they need plain operations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .exporting import exporting

__all__ = ["needs_plain_pass", "transforms_active"]


def transforms_active() -> bool:
    """Whether a transform of torch.func is active."""
    # torch has no public name for this; it is the question that autograd.Function itself asks
    return torch._C._are_functorch_transforms_active()


def needs_plain_pass(*tensors: Tensor) -> bool:
    """Whether a transform of torch.func or an export is active, or a tensor has a tangent of forward-mode AD."""
    return transforms_active() or exporting() or any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
