"""Buffers of a vector field, such as running statistics, that must not see an evaluation twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

__all__ = ["buffers_kept"]


@contextmanager
def buffers_kept(module: nn.Module | None) -> Iterator[None]:
    """Evaluations inside leave the buffers of ``module`` as they are: layers in training mode write into copies."""
    kept: list[tuple[nn.Module, str, Tensor]] = []
    for part in () if module is None else module.modules():
        if part.training:
            kept += [(part, name, buffer) for name, buffer in part.named_buffers(recurse=False)]
    for part, name, buffer in kept:
        setattr(part, name, buffer.clone())
    try:
        yield
    finally:
        for part, name, buffer in kept:
            setattr(part, name, buffer)
