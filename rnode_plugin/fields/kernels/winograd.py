r"""3x3 convolutions on a CPU with a quarter of the multiplications: Winograd's F(4x4, 3x3).

An output tile of 4 values in a row depends on 6 inputs. Polynomials of that size are known from their values at six
points, where a convolution is a product value by value: transform the inputs to values at the points (36 for a tile
in two dimensions), multiply, transform back (Winograd 1980; Lavin & Gray, "Fast algorithms for convolutional neural
networks", 2016). Over channels each of the 36 products is a matrix product, and those are what is left to pay for.

The points here are 0, ±sqrt(1/2), ±sqrt(2) and infinity. With the usual 0, ±1, ±2 and infinity a float32 result of
64 channels is off by 1.9e-6, with these by 8e-7, and a direct convolution's by 4e-7. Rows are scaled such that the
transforms and their transposes are a few sums each.

All of it is linear, so the transposed convolution and the weight's gradient are the same steps transposed, in the
same transformed space: what is transformed for one serves the other.

The transforms are many small sums over the same data: fast where torch.compile makes one loop of them, slower than
an ordinary convolution where it does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import LayerMap
from .compile import compiled

__all__ = ["Winograd"]

_TILE, _VALUES = 4, 6  # outputs of a tile in a row, and values that they depend on
_LOW, _HIGH = math.sqrt(0.5), math.sqrt(2.0)  # the points, besides their negatives, 0 and infinity
_ONCE = torch.tensor(
    [
        [1, 0, 0],
        [-1 / 3, -_LOW / 3, -1 / 6],
        [-1 / 3, _LOW / 3, -1 / 6],
        [-1 / 6, -_HIGH / 6, -1 / 3],
        [-1 / 6, _HIGH / 6, -1 / 3],
        [0, 0, 1],
    ],
    dtype=torch.float64,
)  # three taps to their values, with the scales that the other transforms leave out
_TAPS = torch.kron(_ONCE, _ONCE)  # in two dimensions, (36, 9)


class Winograd(LayerMap):
    """A 3x3 convolution with zero padding 1, for passes that torch.compile compiles.

    Args:
        weight: ``(out, in, 3, 3)``.

    Results are ``channels_last``, and arguments had better be.
    """

    def __init__(self, weight: Tensor) -> None:
        weight = weight.detach()
        self._taps = _TAPS.to(weight)
        flat = weight.permute(2, 3, 1, 0).flatten(0, 1)
        self._values = (self._taps @ flat.flatten(1)).unflatten(1, flat.shape[1:])  # (36, in, out)

    def apply(self, x: Tensor) -> Tensor:
        return self._apply(x, compiled(_spread)(x))

    def transpose(self, v: Tensor) -> Tensor:
        return self._transpose(v, compiled(_gather_transposed)(v))

    def gradient(self, x: Tensor, v: Tensor) -> Tensor:
        return self._gradient(compiled(_spread)(x), compiled(_gather_transposed)(v))

    def apply_with_gradient(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        values = compiled(_spread)(x)
        return self._apply(x, values), self._gradient(values, compiled(_gather_transposed)(v))

    def transpose_with_gradient(self, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        values = compiled(_gather_transposed)(v)
        return self._transpose(v, values), self._gradient(compiled(_spread)(x), values)

    def _apply(self, x: Tensor, values: Tensor) -> Tensor:
        batch, _, h, w = x.shape
        return compiled(_gather)(torch.bmm(values, self._values), batch, h, w)

    def _transpose(self, v: Tensor, values: Tensor) -> Tensor:
        batch, _, h, w = v.shape
        return compiled(_spread_transposed)(torch.bmm(values, self._values.transpose(1, 2)), batch, h, w)

    def _gradient(self, inputs: Tensor, cotangents: Tensor) -> Tensor:
        total = torch.bmm(inputs.transpose(1, 2), cotangents)
        return (self._taps.t() @ total.flatten(1)).view(3, 3, *total.shape[1:]).permute(3, 2, 0, 1)


def _spread(x: Tensor) -> Tensor:
    """Inputs ``(B, C, H, W)`` to the values of all tiles, ``(36, B * tiles, C)``."""
    batch, channels, h, w = x.shape
    rows, columns = _tiles(h), _tiles(w)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, columns * _TILE + 1 - w, 1, rows * _TILE + 1 - h))
    last = _TILE * (rows - 1) + 1
    between = torch.stack(_values([padded[:, j : j + last : _TILE] for j in range(_VALUES)]))
    last = _TILE * (columns - 1) + 1
    values = torch.stack(_values([between[:, :, :, j : j + last : _TILE] for j in range(_VALUES)]), 1)
    return values.view(_VALUES**2, batch * rows * columns, channels)


def _gather(values: Tensor, batch: int, h: int, w: int) -> Tensor:
    """Values to outputs ``(B, C, H, W)``."""
    rows, columns = _tiles(h), _tiles(w)
    split = values.view(_VALUES, _VALUES, batch, rows, columns, -1)
    between = torch.stack(_outputs(split.unbind(1)), 4).flatten(3, 4)
    image = torch.stack(_outputs(between.unbind()), 2).flatten(1, 2)
    return image[:, :h, :w].permute(0, 3, 1, 2)


def _gather_transposed(v: Tensor) -> Tensor:
    """Outputs' cotangents ``(B, C, H, W)`` to values' cotangents ``(36, B * tiles, C)``."""
    batch, channels, h, w = v.shape
    rows, columns = _tiles(h), _tiles(w)
    padded = F.pad(v.permute(0, 2, 3, 1), (0, 0, 0, columns * _TILE - w, 0, rows * _TILE - h))
    between = torch.stack(_outputs_transposed([padded[:, j::_TILE] for j in range(_TILE)]))
    values = torch.stack(_outputs_transposed([between[:, :, :, j::_TILE] for j in range(_TILE)]), 1)
    return values.view(_VALUES**2, batch * rows * columns, channels)


def _spread_transposed(values: Tensor, batch: int, h: int, w: int) -> Tensor:
    """Values' cotangents to inputs' cotangents ``(B, C, H, W)``."""
    rows, columns = _tiles(h), _tiles(w)
    split = values.view(_VALUES, _VALUES, batch, rows, columns, -1)
    between = torch.stack(_overlap(_values_transposed(split.unbind(1)), 3), 4).flatten(3, 4)
    image = torch.stack(_overlap(_values_transposed(between.unbind()), 1), 2).flatten(1, 2)
    return image[:, :h, :w].permute(0, 3, 1, 2)


def _tiles(size: int) -> int:
    return -(-size // _TILE)


# One dimension. What is the same at a point and at its negative but for a sign is computed once for both: the even
# and the odd part of a polynomial.


def _values(d: Sequence[Tensor]) -> list[Tensor]:
    """Six inputs to six values."""
    even_low, odd_low = d[4] - 2 * d[2], d[3] - 2 * d[1]
    even_high, odd_high = d[2] - 2 * d[4], d[1] - 2 * d[3]
    return [
        d[0] - 2.5 * d[2] + d[4],
        odd_low + _HIGH * even_low,
        odd_low - _HIGH * even_low,
        even_high + _HIGH * odd_high,
        even_high - _HIGH * odd_high,
        d[1] - 2.5 * d[3] + d[5],
    ]


def _values_transposed(r: Sequence[Tensor]) -> list[Tensor]:
    odd_low, even_low = r[1] + r[2], r[1] - r[2]
    even_high, odd_high = r[3] + r[4], r[3] - r[4]
    return [
        r[0],
        r[5] - 2 * odd_low + _HIGH * odd_high,
        even_high - 2.5 * r[0] - 2 * _HIGH * even_low,
        odd_low - 2.5 * r[5] - 2 * _HIGH * odd_high,
        r[0] + _HIGH * even_low - 2 * even_high,
        r[5],
    ]


def _outputs(m: Sequence[Tensor]) -> list[Tensor]:
    """Six values to four outputs."""
    even_low, odd_low = m[1] - m[2], m[1] + m[2]
    even_high, odd_high = m[3] + m[4], m[3] - m[4]
    return [
        m[0] + _HIGH * even_low + 0.5 * even_high,
        odd_low + _LOW * odd_high,
        even_high + _LOW * even_low,
        m[5] + 0.5 * odd_low + _HIGH * odd_high,
    ]


def _outputs_transposed(y: Sequence[Tensor]) -> list[Tensor]:
    even_low, odd_low = y[0] + 0.5 * y[2], y[1] + 0.5 * y[3]
    even_high, odd_high = y[2] + 0.5 * y[0], y[3] + 0.5 * y[1]
    return [
        y[0],
        odd_low + _HIGH * even_low,
        odd_low - _HIGH * even_low,
        even_high + _HIGH * odd_high,
        even_high - _HIGH * odd_high,
        y[3],
    ]


def _overlap(d: Sequence[Tensor], dim: int) -> list[Tensor]:
    """What windows of six a tile of four apart add up to, in tiles that begin with each window's second element.

    The first of the first window and the last of the last fall onto the padding.
    """
    behind = [0, 0] * (d[0].dim() - 1 - dim)
    inner = d[0].shape[dim] - 1
    from_before = F.pad(d[5].narrow(dim, 0, inner), [*behind, 1, 0])
    from_after = F.pad(d[0].narrow(dim, 1, inner), [*behind, 0, 1])
    return [d[1] + from_before, d[2], d[3], d[4] + from_after]
