"""The linear part of a layer without the time input: linear maps and 3x3 convolutions.

All layers of a kind share its static methods. An instance is one layer prepared for the evaluations in one solve,
without a graph.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


class LayerMap(ABC):
    """``x -> W x`` for one weight, its transpose, and the gradient of ``v^T W x`` with respect to the weight.

    It is made from the current weight, without a graph.
    """

    @abstractmethod
    def __init__(self, weight: Tensor) -> None: ...

    @abstractmethod
    def apply(self, x: Tensor, b: Tensor | None = None) -> Tensor:
        """``W x + b``, from inputs ``x (B, in, ...)`` to outputs ``(B, out, ...)``, with ``b (1, out, ...)``."""

    @abstractmethod
    def transpose(self, v: Tensor) -> Tensor:
        """``W^T v``, from cotangents ``v (B, out, ...)`` of outputs to cotangents ``(B, in, ...)`` of inputs."""

    @abstractmethod
    def gradient(self, x: Tensor, v: Tensor) -> Tensor:
        """``v x^T`` in the shape of W, summed over samples, for inputs ``x`` and cotangents ``v`` of outputs."""

    @staticmethod
    @abstractmethod
    def product(x: Tensor, weight: Tensor) -> Tensor:
        """``W x`` in operations that autograd can differentiate."""

    @staticmethod
    @abstractmethod
    def transposed(v: Tensor, weight: Tensor) -> Tensor:
        """``W^T v`` in such operations."""

    @staticmethod
    def split(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Split a weight into the weight of time, with an input of size 1, and the weight of the state."""
        time, state = weight.split([1, weight.shape[1] - 1], dim=1)
        return time, state

    @staticmethod
    def layout(x: Tensor) -> Tensor:
        """``x`` in the memory layout in which the products are fast."""
        return x

    @staticmethod
    def flat(weight: Tensor) -> Tensor:
        """A weight as one row, in the order in which its entries lie in memory."""
        return weight.reshape(-1)

    @staticmethod
    def unflat(row: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of :meth:`flat`, as a view of the row."""
        return row.view(*shape)

    @staticmethod
    def sum_batch(v: Tensor) -> Tensor:
        """Sum over the samples, as one row in the order of memory."""
        # the gradient with respect to a row of unflat_bias, pixel by pixel, since a response varies over the image
        return v.sum(0)

    @staticmethod
    def bias_rows(time: Tensor, bias: Tensor, event: Sequence[int]) -> Tensor:
        """The terms that bias and time, at 1, add for a state with these spatial dimensions, ``(2, out * ...)``.

        Both rows are in the order of memory.
        """
        return torch.stack([bias, time.squeeze(1)])

    @staticmethod
    def unflat_bias(row: Tensor, outputs: int, event: Sequence[int]) -> Tensor:
        """A row in the order of memory as ``(1, out, ...)``; a view."""
        return row.view(1, outputs)


class Dense(LayerMap):
    """A linear map with ``weight (out, in)`` on ``(..., in)``, with samples, or probes and samples, in front."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.detach()
        self._transposed = self._weight.t().contiguous()  # four times as fast where the result is narrow

    def apply(self, x: Tensor, b: Tensor | None = None) -> Tensor:
        return F.linear(x, self._weight, None if b is None else b[0])

    def transpose(self, v: Tensor) -> Tensor:
        return F.linear(v, self._transposed)

    def gradient(self, x: Tensor, v: Tensor) -> Tensor:
        v, x = v.flatten(0, -2), x.flatten(0, -2)
        # a product with few rows and many columns is up to six times as fast as one with many rows and few columns
        return (x.t() @ v).t() if x.shape[1] < v.shape[1] else v.t() @ x

    @staticmethod
    def product(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    @staticmethod
    def transposed(v: Tensor, weight: Tensor) -> Tensor:
        return v @ weight


class Convolution(LayerMap):
    """A 3x3 convolution with ``weight (out, in, 3, 3)`` and zero padding 1."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.detach()

    def apply(self, x: Tensor, b: Tensor | None = None) -> Tensor:
        y = F.conv2d(x, self._weight, padding=1)
        return y if b is None else y.add_(b)

    def transpose(self, v: Tensor) -> Tensor:
        return F.conv_transpose2d(v, self._weight, padding=1)

    def gradient(self, x: Tensor, v: Tensor) -> Tensor:
        return torch.ops.aten.convolution_backward(
            v, x, self._weight, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (False, True, False)
        )[1]

    @staticmethod
    def product(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, padding=1)

    @staticmethod
    def transposed(v: Tensor, weight: Tensor) -> Tensor:
        return F.conv_transpose2d(Convolution.layout(v), weight, padding=1)

    @staticmethod
    def split(weight: Tensor) -> tuple[Tensor, Tensor]:
        # split the channels_last view, so that gradients have that memory layout too
        time, state = weight.permute(0, 2, 3, 1).split([1, weight.shape[1] - 1], dim=3)
        return time.permute(0, 3, 1, 2), state.permute(0, 3, 1, 2)

    @staticmethod
    def layout(x: Tensor) -> Tensor:
        if x.shape[1] > 1:
            return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        # a single channel is in both layouts, but torch decides by the strides, so set the strides of the fast
        # layout
        batch, _, h, w = x.shape
        return x.reshape(batch, h, w, 1).permute(0, 3, 1, 2)

    @staticmethod
    def flat(weight: Tensor) -> Tensor:
        return weight.permute(0, 2, 3, 1).reshape(-1)

    @staticmethod
    def unflat(row: Tensor, shape: Sequence[int]) -> Tensor:
        outputs, inputs, h, w = shape
        return row.view(outputs, h, w, inputs).permute(0, 3, 1, 2)

    @staticmethod
    def sum_batch(v: Tensor) -> Tensor:
        rows = v.permute(0, 2, 3, 1)
        if v.is_cpu:  # torch's sum over channels_last is twenty times slower than this product
            return (v.new_ones(1, len(v)) @ rows.reshape(len(v), -1)).view(-1)
        return rows.sum(0).view(-1)

    @staticmethod
    def bias_rows(time: Tensor, bias: Tensor, event: Sequence[int]) -> Tensor:
        h, w = event
        rows = torch.cat([bias.unsqueeze(0), time.flatten(1).t()])  # (1 + 9, out)
        # a layer is affine, so time adds t times a fixed map, which zero padding changes only near the border
        return (_bias_basis(h, w, bias.dtype, bias.device) @ rows).view(2, -1)

    @staticmethod
    def unflat_bias(row: Tensor, outputs: int, event: Sequence[int]) -> Tensor:
        return row.view(1, *event, outputs).permute(0, 3, 1, 2)


@lru_cache(maxsize=64)
def _bias_basis(h: int, w: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``(2 H W, 10)``: the map that a bias of 1 adds, and below it the maps that the nine taps add at time 1."""
    with torch.inference_mode(False), torch.no_grad():
        patches = F.unfold(torch.ones(1, 1, h, w, dtype=dtype, device=device), 3, padding=1)[0].t()
        one, zero = torch.ones_like(patches[:, :1]), torch.zeros_like(patches)
        return torch.cat([torch.cat([one, zero], 1), torch.cat([zero[:, :1], patches], 1)])
