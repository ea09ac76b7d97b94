"""Sums of products and of squares over an event, with few device kernels.

On a CPU torch's own operations are the fast ones. Elsewhere a launch costs more than the arithmetic of a rate:
there a sum is one product of matrices forward and one or two operations backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["sum_event", "sum_products", "sum_squares"]


def sum_event(x: Tensor) -> Tensor:
    """Sum over all but the first dimension: ``(B, *event)`` to ``(B,)``; of ``(B,)`` each entry is its own sum."""
    return x.flatten(1).sum(1) if x.ndim > 1 else x


def sum_products(x: Tensor, y: Tensor) -> Tensor:
    """``sum x y`` over all but the first dimension: two ``(B, *event)`` to ``(B,)``."""
    if x.device.type == "cpu" or x.ndim == 1 or _is_transformed(x, y):
        return sum_event(x * y)
    return _Products.apply(x, y)  # pyright: ignore[reportReturnType]


def sum_squares(x: Tensor) -> Tensor:
    """``sum x^2`` over all but the first dimension: ``(B, *event)`` to ``(B,)``."""
    if x.device.type == "cpu" or x.ndim == 1 or _is_transformed(x):
        return sum_event(x.square())
    return _Squares.apply(x)  # pyright: ignore[reportReturnType]


def _is_transformed(*tensors: Tensor) -> bool:
    active = torch._C._are_functorch_transforms_active()
    return active or any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


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
        rows, each = x.flatten(1).unsqueeze(2), gradient.view(-1, 1, 1)
        if x.dim() == 4 and not x.is_contiguous():
            rows = x.permute(0, 2, 3, 1).flatten(1).unsqueeze(2)
        product = torch.baddbmm(each, rows, each, beta=0, alpha=2)  # 2 g x as one operation
        if x.dim() == 4 and not x.is_contiguous():
            batch, channels, h, w = x.shape
            return product.view(batch, h, w, channels).permute(0, 3, 1, 2)
        return product.view(x.shape)


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """By one product of matrices per sample, in the order of memory if both agree on one."""
    if x.dim() == 4 and not x.is_contiguous():
        x, y = x.permute(0, 2, 3, 1), y.permute(0, 2, 3, 1)
    return torch.bmm(x.flatten(1).unsqueeze(1), y.flatten(1).unsqueeze(2)).view(-1)
