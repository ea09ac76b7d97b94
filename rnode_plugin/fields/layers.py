"""Layers that see time as one more input.

A layer's weight holds the time input first: ``(out, 1 + in, 3, 3)`` for a convolution, ``(out, 1 + in)`` for a
linear map. Nothing is concatenated, though. The layer is affine, so time adds ``t * response``, where the response
is what the layer makes of a constant one: a map of shape ``(1, out, H, W)`` that differs from a constant only where
the convolution's zero padding is felt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.ops import on_host, transforms_active
from .kernels import Dense, LayerMap, convolution


class Products:
    """The linear parts of layers of one kind, here of linear ones (``weight`` is without the time input)."""

    def __reduce__(self) -> str:  # a copied or unpickled field has the one of this module
        return "LINEAR"

    def split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The weight of time, with an input of size 1, and the weight of the state."""
        time, state = weight.split([1, weight.shape[1] - 1], dim=1)
        return time, state

    def layout(self, x: Tensor) -> Tensor:
        """``x`` in the memory layout in which the products are fast."""
        return x

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer: inputs to outputs."""
        return F.linear(x, weight, bias)

    def transpose(self, v: Tensor, weight: Tensor) -> Tensor:
        """Outputs' cotangents to inputs' cotangents."""
        return v @ weight

    def prepare(self, weight: Tensor) -> LayerMap:
        """A layer's products without a graph, for the evaluations of one solve."""
        return Dense(weight)

    def sum_batch(self, v: Tensor) -> Tensor:
        """Sum over the samples, as one row in the order of memory."""
        return v.sum(0)

    def shift_rows(self, time: Tensor, bias: Tensor, event: Sequence[int]) -> Tensor:
        """What the bias and a unit of time add for a state with these spatial dimensions, ``(2, out * ...)``.

        Both are rows in the order of memory.
        """
        return torch.stack([bias, time.squeeze(1)])

    def as_map(self, row: Tensor, outputs: int, event: Sequence[int]) -> Tensor:
        """A row in the order of memory as ``(1, out, ...)``; a view."""
        return row.view(1, outputs)


class _Convolution(Products):
    def __reduce__(self) -> str:
        return "CONVOLUTION"

    def split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        # in the order of memory, so that gradients come in it too
        time, state = weight.permute(0, 2, 3, 1).split([1, weight.shape[1] - 1], dim=3)
        return time.permute(0, 3, 1, 2), state.contiguous().permute(0, 3, 1, 2)

    def layout(self, x: Tensor) -> Tensor:
        if x.shape[1] > 1:
            return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # vmap knows no other way to say it
        # one channel is in both layouts, but torch goes by strides: give it those of the fast one
        batch, _, h, w = x.shape
        return x.reshape(batch, h, w, 1).permute(0, 3, 1, 2)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, weight, bias, padding=1)

    def transpose(self, v: Tensor, weight: Tensor) -> Tensor:
        return F.conv_transpose2d(v, weight, padding=1)

    def prepare(self, weight: Tensor) -> LayerMap:
        return convolution(weight)

    def sum_batch(self, v: Tensor) -> Tensor:
        rows = v.permute(0, 2, 3, 1)
        if v.device.type == "cpu":  # torch sums channels last twenty times as slowly as this
            return (v.new_ones(1, len(v)) @ rows.reshape(len(v), -1)).view(-1)
        return rows.sum(0).view(-1)

    def shift_rows(self, time: Tensor, bias: Tensor, event: Sequence[int]) -> Tensor:
        h, w = event
        rows = torch.cat([bias.unsqueeze(0), time.flatten(1).t()])  # (1 + 9, out)
        # what is made inside a transform of torch.func must not outlive it
        basis = _shift_basis.__wrapped__ if transforms_active() else _shift_basis
        return (basis(h, w, bias.dtype, bias.device) @ rows).view(2, -1)

    def as_map(self, row: Tensor, outputs: int, event: Sequence[int]) -> Tensor:
        return row.view(1, *event, outputs).permute(0, 3, 1, 2)


@lru_cache(maxsize=64)
def _shift_basis(h: int, w: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``(2 H W, 10)``: the maps that a bias of 1 makes, then those of each tap of a constant image of 1."""
    with on_host(), torch.inference_mode(False), torch.no_grad():
        patches = F.unfold(torch.ones(1, 1, h, w, dtype=dtype, device=device), 3, padding=1)[0].t()
        one, zero = torch.ones_like(patches[:, :1]), torch.zeros_like(patches)
        return torch.cat([torch.cat([one, zero], 1), torch.cat([zero[:, :1], patches], 1)])


LINEAR = Products()
CONVOLUTION = _Convolution()


class _Concat(nn.Module):
    products: Products

    def __init__(self, weight_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(weight_shape))
        self.bias = nn.Parameter(torch.empty(weight_shape[0]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch's own default draw for a layer with the time input among its inputs."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, t: Tensor | float, x: Tensor) -> Tensor:
        """``layer([t, x])``: time, a scalar, and inputs ``(B, in, ...)`` to outputs ``(B, out, ...)``."""
        products, event = self.products, x.shape[2:]
        time, weight = products.split(self.weight)
        response = products.as_map(products.shift_rows(time, self.bias, event)[1], len(self.bias), event)
        return products.apply(x, weight, self.bias) + t * response

    def extra_repr(self) -> str:
        return f"1 + {self.weight.shape[1] - 1}, {self.weight.shape[0]}"


class ConcatConv2d(_Concat):
    """A 3x3 convolution of the image with time as a constant channel 0, zero padding 1 on both.

    Args:
        in_channels: channels of the image, time not counted.
        out_channels: channels of the result.

    The weight is ``(out_channels, 1 + in_channels, 3, 3)``.
    """

    products = CONVOLUTION

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__((out_channels, 1 + in_channels, 3, 3))
        # the layout in which torch convolves fastest; a checkpoint knows nothing of it
        self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)


class ConcatLinear(_Concat):
    """A linear map of the state with time as input 0; the weight is ``(out_features, 1 + in_features)``.

    Args:
        in_features: size of the state, time not counted.
        out_features: size of the result.
    """

    products = LINEAR

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__((out_features, 1 + in_features))
