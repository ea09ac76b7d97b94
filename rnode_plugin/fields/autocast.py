"""Which dtype the layers compute in under torch.autocast, also on devices that have none."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["compute_dtype", "without_autocast"]


def compute_dtype(z: Tensor) -> torch.dtype:
    """Autocast's dtype for float32 states, else the state's own."""
    device = z.device.type
    if z.dtype is torch.float32 and _available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return z.dtype


def without_autocast(z: Tensor) -> AbstractContextManager[object]:
    """No autocast on the device of ``z``: what runs inside chooses its dtypes itself."""
    device = z.device.type
    enabled = _available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else nullcontext()


def _available(device: str) -> bool:
    return torch.amp.is_autocast_available(device)  # not on "meta"
