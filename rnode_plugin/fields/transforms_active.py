"""Whether somebody transforms or forward-differentiates an evaluation: then the plain passes have to serve."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["needs_plain_pass"]

# torch has no public name for this; it is the question that autograd.Function itself asks
_transforms_active = torch._C._are_functorch_transforms_active


def needs_plain_pass(*tensors: Tensor) -> bool:
    """Whether a transform of torch.func is active, or one of the tensors has a tangent of forward-mode AD."""
    return _transforms_active() or any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
