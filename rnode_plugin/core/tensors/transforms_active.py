"""Whether a transform of torch.func or forward-mode AD is at work: then plain operations have to serve."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["needs_plain_pass", "transforms_active"]


def transforms_active() -> bool:
    """Whether a transform of torch.func is active."""
    # torch has no public name for this; it is the question that autograd.Function itself asks
    return torch._C._are_functorch_transforms_active()


def needs_plain_pass(*tensors: Tensor) -> bool:
    """Whether a transform of torch.func is active, or one of the tensors has a tangent of forward-mode AD."""
    return transforms_active() or any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
