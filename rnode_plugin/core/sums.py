"""Sums over an event."""

from __future__ import annotations

from torch import Tensor


def sum_event(x: Tensor) -> Tensor:
    """Sum over all but the first dimension, ``(B, *event)`` to ``(B,)``. ``(B,)`` is returned unchanged."""
    return x if x.ndim == 1 else x.flatten(1).sum(1)


def sum_products(x: Tensor, y: Tensor) -> Tensor:
    """``sum x y`` over all but the first dimension, for two ``(B, *event)``; the result is ``(B,)``."""
    return sum_event(x * y)


def sum_squares(x: Tensor) -> Tensor:
    """``sum x^2`` over all but the first dimension, ``(B, *event)`` to ``(B,)``."""
    return sum_event(x.square())
