"""Layers that take time as one more input.

A layer's weight has the time input first: ``(out, 1 + in, 3, 3)`` for a convolution, ``(out, 1 + in)`` for a linear
map. Nothing is concatenated, though. The layer is affine, so time adds ``t * response``. The response is the output
for a time input of constant one. For a convolution it is a map of shape ``(1, out, H, W)``, which differs from a
constant only at the border, because of the zero padding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .kernels import Convolution, Dense, LayerMap


class _Concat(nn.Module):
    kind: type[LayerMap]

    def __init__(self, weight_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(weight_shape))
        self.bias = nn.Parameter(torch.empty(weight_shape[0]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as torch does by default, for a layer whose inputs include the time."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, t: Tensor | float, x: Tensor) -> Tensor:
        """``layer([t, x])``, from a scalar time and inputs ``(B, in, ...)`` to outputs ``(B, out, ...)``."""
        kind, event = self.kind, x.shape[2:]
        time, weight = kind.split(self.weight)
        bias, response = kind.bias_rows(time, self.bias, event)
        return kind.product(x, weight) + kind.unflat_bias(bias + t * response, len(self.bias), event)

    def extra_repr(self) -> str:
        return f"1 + {self.weight.shape[1] - 1}, {self.weight.shape[0]}"


class ConcatConv2d(_Concat):
    """A 3x3 convolution of the image with time as a constant channel 0, with zero padding 1 for both.

    Args:
        in_channels: number of channels of the image, without the time.
        out_channels: number of channels of the result.

    The weight is ``(out_channels, 1 + in_channels, 3, 3)``.
    """

    kind = Convolution

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__((out_channels, 1 + in_channels, 3, 3))
        # torch convolves fastest in this layout, and a checkpoint does not store the layout
        self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)


class ConcatLinear(_Concat):
    """A linear map of the state with time as input 0; the weight is ``(out_features, 1 + in_features)``.

    Args:
        in_features: size of the state, without the time.
        out_features: size of the result.
    """

    kind = Dense

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__((out_features, 1 + in_features))
