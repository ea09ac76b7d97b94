"""Constants and numbers of tensors, and the modes of torch in which a call runs: autocast and inference mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .noted import map_leaves


@lru_cache(maxsize=512)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor, cached because every step needs them. Do not write into the result."""
    # a tensor made in inference mode could not serve a later backward pass
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def read(x: Tensor) -> Any:
    """The numbers in ``x``, as ``x.tolist()`` gives them, for which the host waits; None on the device ``meta``."""
    return None if x.is_meta else x.detach().tolist()


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """A time ``x``, one number, on a device. From the CPU it gets there without a copy unless it has a graph.

    A copy waits for the device.
    """
    if x.device == device:
        return x
    known = None if x.requires_grad or x.device.type != "cpu" else read(x)
    if known is None:
        return x.to(device)
    return torch.full(x.shape, known if x.ndim == 0 else known[0], dtype=x.dtype, device=device)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is enabled on the device of ``x``."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def autocast_of(x: Tensor) -> Callable[[], AbstractContextManager[object]]:
    """A function that makes a context with the present autocast settings for the device of ``x``."""
    kind = x.device.type
    if x.is_meta:
        return nullcontext
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)


@contextmanager
def without_kept_casts() -> Iterator[None]:
    """Context without autocast's cache of cast weights, where evaluations with and without gradients alternate."""
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)


@contextmanager
def outside_inference(*values: Any) -> Iterator[tuple[Any, ...]]:
    """Leave inference mode within a block, for solves of fields that differentiate. The block gets ``values``.

    If inference mode was enabled, gradients stay disabled, and the tensors in ``values`` are cloned, because
    tensors made in inference mode cannot be differentiated.
    """
    if not torch.is_inference_mode_enabled():
        yield values
        return
    with torch.inference_mode(False), torch.no_grad():
        yield map_leaves(lambda x: x.clone() if isinstance(x, Tensor) else x, values)
