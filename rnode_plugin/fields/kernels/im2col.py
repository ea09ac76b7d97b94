"""3x3 convolutions between few channels and many on a CPU, as one product of two matrices.

The nine neighbours of each pixel of the few channels side by side are a matrix, and the convolution is its product
with the weights. Libraries made for many channels on both sides are slow where one side has a few.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import LayerMap

__all__ = ["Columns"]


class Columns(LayerMap):
    """A 3x3 convolution with zero padding 1, fast where the inputs or the outputs have few channels.

    Args:
        weight: ``(out, in, 3, 3)``.

    Results with many channels are ``channels_last``, and arguments with many had better be.
    """

    def __init__(self, weight: Tensor) -> None:
        self._outputs_are_few = weight.shape[0] < weight.shape[1]
        # with few outputs it is their cotangents whose neighbours are taken, and a transposed kernel is flipped
        taps = weight.detach().flip(2, 3).transpose(0, 1) if self._outputs_are_few else weight.detach()
        self._few = taps.shape[1]
        self._weight = taps.permute(2, 3, 1, 0).flatten(0, 2).contiguous()  # (9 * few, many)

    def apply(self, x: Tensor) -> Tensor:
        return self._narrow(x) if self._outputs_are_few else self._widen(_neighbours(x), x)

    def transpose(self, v: Tensor) -> Tensor:
        return self._widen(_neighbours(v), v) if self._outputs_are_few else self._narrow(v)

    def gradient(self, x: Tensor, v: Tensor) -> Tensor:
        few, many = (v, x) if self._outputs_are_few else (x, v)
        return self._gradient(_neighbours(few), many)

    def apply_with_gradient(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self._outputs_are_few:
            return super().apply_with_gradient(x, v)
        neighbours = _neighbours(x)
        return self._widen(neighbours, x), self._gradient(neighbours, v)

    def transpose_with_gradient(self, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self._outputs_are_few:
            return super().transpose_with_gradient(v, x)
        neighbours = _neighbours(v)
        return self._widen(neighbours, v), self._gradient(neighbours, x)

    def _widen(self, neighbours: Tensor, few: Tensor) -> Tensor:
        batch, _, h, w = few.shape
        return (neighbours.t() @ self._weight).view(batch, h, w, -1).permute(0, 3, 1, 2)

    def _narrow(self, many: Tensor) -> Tensor:
        batch, _, h, w = many.shape
        parts = self._weight @ _rows(many).t()
        if parts.dtype is torch.bfloat16:  # nine roundings are enough: the sums are made in float32
            parts = parts.float()
        parts = parts.view(3, 3, self._few, batch, h, w)
        # to each pixel what its neighbours have for it: first along rows, then along columns
        before, out, after = parts.unbind(1)
        out[..., :-1].add_(before[..., 1:])
        out[..., 1:].add_(after[..., :-1])
        above, out, below = out.unbind(0)
        out[..., :-1, :].add_(above[..., 1:, :])
        out[..., 1:, :].add_(below[..., :-1, :])
        return out.transpose(0, 1).to(many.dtype).contiguous()

    def _gradient(self, neighbours: Tensor, many: Tensor) -> Tensor:
        taps = (neighbours @ _rows(many)).unflatten(0, (3, 3, self._few)).permute(3, 2, 0, 1)
        return taps.transpose(0, 1).flip(2, 3) if self._outputs_are_few else taps


def _neighbours(few: Tensor) -> Tensor:
    """``(9 * channels, B * H * W)`` of ``few (B, channels, H, W)``."""
    windows = F.pad(few.transpose(0, 1), (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)  # (channels, B, H, W, 3, 3)
    return windows.permute(4, 5, 0, 1, 2, 3).reshape(9 * few.shape[1], -1)


def _rows(many: Tensor) -> Tensor:
    """``(B * H * W, channels)`` of ``many (B, channels, H, W)``."""
    return many.permute(0, 2, 3, 1).reshape(-1, many.shape[1])
