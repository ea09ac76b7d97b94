"""The context of a conditional density: one for all samples or one for each, checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError

__all__ = ["batch_shape_of", "context_rows"]


def context_rows(context: Any, shape: torch.Size | None, like: Tensor) -> Tensor | None:
    """``context`` with one row for each sample of ``like``; None for a density without contexts.

    Args:
        context: one for all samples, of shape ``shape``, or one for each, ``(B, *shape)``.
        shape: the shape of one context; None: the density takes none.
        like: samples ``(B, *event_shape)``, whose precision and device a context gets.

    Raises:
        ConfigError: for a context that is missing, misshapen or not asked for.
    """
    batch_shape = batch_shape_of(context, shape)
    if shape is None:
        return None
    if not batch_shape:
        context = context.expand(like.shape[0], *shape)
    elif batch_shape != like.shape[:1]:
        raise ConfigError(
            f"context= has shape {tuple(context.shape)} for {like.shape[0]} samples: give one for all, "
            f"{tuple(shape)}, or one for each, {(like.shape[0], *shape)}."
        )
    return context.to(like) if context.is_floating_point() else context.to(like.device)


def batch_shape_of(context: Any, shape: torch.Size | None) -> torch.Size:
    """What stands before ``shape`` in the shape of ``context``.

    Raises:
        ConfigError: for a context that is missing, misshapen or not asked for.
    """
    if shape is None:
        if context is not None:
            raise ConfigError("this density takes no context: make it with context_shape=, the shape of one.")
        return torch.Size()
    if context is None:
        raise ConfigError(f"this density is conditional: give context=, {tuple(shape)} or (B, *{tuple(shape)}).")
    if not isinstance(context, Tensor) or context.shape[-len(shape) :] != shape:
        got = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
        raise ConfigError(f"context= must be a tensor of shape {tuple(shape)} or (B, *{tuple(shape)}), not {got}.")
    return context.shape[: -len(shape)]
