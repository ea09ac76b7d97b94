"""Sums of products and of squares over an event, with few device kernels.

On a CPU torch's own operations are the fast ones. Elsewhere a launch costs more than the arithmetic of a rate:
there a sum is one product of matrices forward and one or two operations backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .transforms_active import needs_plain_pass

__all__ = ["sum_event", "sum_products", "sum_squares"]


def sum_event(x: Tensor) -> Tensor:
    """Sum over all but the first dimension: ``(B, *event)`` to ``(B,)``; of ``(B,)`` each entry is its own sum."""
    return x.flatten(1).sum(1) if x.ndim > 1 else x


def sum_products(x: Tensor, y: Tensor) -> Tensor:
    """``sum x y`` over all but the first dimension: two ``(B, *event)`` to ``(B,)``."""
    if x.device.type == "cpu" or x.ndim == 1 or needs_plain_pass(x, y):
        return sum_event(x * y)
    return _Products.apply(x, y)  # pyright: ignore[reportReturnType]


def sum_squares(x: Tensor) -> Tensor:
    """``sum x^2`` over all but the first dimension: ``(B, *event)`` to ``(B,)``."""
    if x.device.type == "cpu" or x.ndim == 1 or needs_plain_pass(x):
        return sum_event(x.square())
    return _Squares.apply(x)  # pyright: ignore[reportReturnType]


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return _inner(x, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, y = ctx.saved_tensors
        each = gradient.view(-1, *[1] * (x.dim() - 1))
        return each * y if ctx.needs_input_grad[0] else None, each * x if ctx.needs_input_grad[1] else None


class _Squares(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _inner(x, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        each = gradient.view(-1, 1, 1)
        rows, shape = _rows(x)
        product = torch.baddbmm(each, rows.unsqueeze(2), each, beta=0, alpha=2)  # 2 g x as one operation
        return product.view(shape).permute(0, 3, 1, 2) if len(shape) == 4 else product.view(shape)


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """By one product of matrices per sample."""
    (rows, _), (columns, _) = _rows(x), _rows(y)
    return torch.bmm(rows.unsqueeze(1), columns.unsqueeze(2)).view(-1)


def _rows(x: Tensor) -> tuple[Tensor, torch.Size]:
    """``(B, D)``, of images with their channels last, and the shape before flattening."""
    last = x.permute(0, 2, 3, 1) if x.dim() == 4 else x
    return last.flatten(1), last.shape
