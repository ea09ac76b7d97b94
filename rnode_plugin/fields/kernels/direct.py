"""Layers' products in torch's own operations: convolutions and matrix products as the libraries do them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import LayerMap

__all__ = ["DirectConvolution", "DirectLinear"]


class DirectConvolution(LayerMap):
    """A 3x3 convolution with zero padding 1, by the library's convolutions.

    Args:
        weight: ``(out, in, 3, 3)``.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.detach()

    def apply(self, x: Tensor) -> Tensor:
        return _channels_last(F.conv2d(x, self._weight, padding=1))

    def transpose(self, v: Tensor) -> Tensor:
        return _channels_last(F.conv_transpose2d(v, self._weight, padding=1))

    def gradient(self, x: Tensor, v: Tensor) -> Tensor:
        return _channels_last(self._backward(v, x, (False, True, False))[1])

    def apply_with_gradient(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if x.device.type == "cpu":  # oneDNN is slower at the backward pass of a transposed convolution
            return super().apply_with_gradient(x, v)
        # v -> W^T v is a layer too, whose gradients for the cotangent x are these two
        result, gradient, _ = torch.ops.aten.convolution_backward(
            x, v, self._weight, None, (1, 1), (1, 1), (1, 1), True, (0, 0), 1, (True, True, False)
        )
        return _channels_last(result), _channels_last(gradient)

    def transpose_with_gradient(self, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        result, gradient, _ = self._backward(v, x, (True, True, False))
        return _channels_last(result), _channels_last(gradient)

    def _backward(self, v: Tensor, x: Tensor, wanted: tuple[bool, bool, bool]) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten.convolution_backward(
            v, x, self._weight, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, wanted
        )


class DirectLinear(LayerMap):
    """A linear map of ``(..., in)``; leading dimensions are samples, or probes and samples.

    Args:
        weight: ``(out, in)``.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.detach()
        self._transposed = self._weight.t().contiguous()  # a narrow result takes a quarter of the time from it

    def apply(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight)

    def shifted(self, x: Tensor, shift: Tensor) -> Tensor:
        return F.linear(x, self._weight, shift[0])

    def transpose(self, v: Tensor) -> Tensor:
        return F.linear(v, self._transposed)

    def gradient(self, x: Tensor, v: Tensor) -> Tensor:
        if v.dim() > 2:
            v, x = v.flatten(0, -2), x.flatten(0, -2)
        # few rows times many columns are up to six times as fast as the reverse
        return (x.t() @ v).t() if x.shape[1] < v.shape[1] else v.t() @ x


def _channels_last(y: Tensor) -> Tensor:
    """A convolution's result; on ``meta``, which forgets it, in the layout that a device's libraries give it."""
    if not y.is_meta:
        return y
    _, channels, h, w = y.shape
    return y.as_strided(y.shape, (h * w * channels, 1, w * channels, channels))
