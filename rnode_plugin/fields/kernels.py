"""The linear part of a layer, of either kind: linear maps and 3x3 convolutions, without the time input.

The static methods are what all layers of a kind share. An instance is one layer prepared for the evaluations of one
solve, without a graph.

Between few channels and many, a 3x3 convolution on a CPU is one product of two matrices: the nine neighbors of
each pixel of the few channels side by side, times the weights. The libraries' own convolutions, made for many
channels on both sides, take up to ten times as long there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.modes import on_host, transforms_active
from ..core.operations import operations_for

# channels up to which a convolution is faster as one product of matrices
_FEW = {torch.float64: 8, torch.float32: 8, torch.bfloat16: 3}


class LayerMap(ABC):
    """``x -> W x`` for one weight, its transpose, and the gradient of ``v^T W x`` with respect to the weight.

    It is made from the weight of the moment, without a graph.
    """

    @abstractmethod
    def __init__(self, weight: Tensor) -> None: ...

    @abstractmethod
    def apply(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """Inputs ``(B, in, ...)`` to outputs ``(B, out, ...)``, plus a ``shift (1, out, ...)``."""

    @abstractmethod
    def transpose(self, v: Tensor) -> Tensor:
        """Outputs' cotangents ``(B, out, ...)`` to inputs' cotangents ``(B, in, ...)``."""

    @abstractmethod
    def gradient(self, x: Tensor, v: Tensor) -> Tensor:
        """Cotangent of the weight, in its shape, for inputs ``x`` and outputs' cotangents ``v``."""

    @staticmethod
    @abstractmethod
    def product(x: Tensor, weight: Tensor) -> Tensor:
        """``W x`` in operations that autograd and torch.func know."""

    @staticmethod
    @abstractmethod
    def transposed(v: Tensor, weight: Tensor) -> Tensor:
        """``W^T v`` in such operations."""

    @classmethod
    def prepared(cls, weight: Tensor) -> LayerMap:
        """The fastest map of this kind for a weight, its device and its dtype."""
        return cls(weight)

    @staticmethod
    def split(weight: Tensor) -> tuple[Tensor, Tensor]:
        """A weight as the weight of time, with an input of size 1, and the weight of the state."""
        time, state = weight.split([1, weight.shape[1] - 1], dim=1)
        return time, state

    @staticmethod
    def layout(x: Tensor) -> Tensor:
        """``x`` in the memory layout in which the products are fast."""
        return x

    @staticmethod
    def flat(weight: Tensor) -> Tensor:
        """A weight as one row in the order of memory."""
        return weight.reshape(-1)

    @staticmethod
    def unflat(row: Tensor, shape: Sequence[int]) -> Tensor:
        """The weight of a row; a view."""
        return row.view(*shape)

    @staticmethod
    def sum_batch(v: Tensor) -> Tensor:
        """Sum over the samples, as one row in the order of memory."""
        return v.sum(0)

    @staticmethod
    def shift_rows(time: Tensor, bias: Tensor, event: Sequence[int]) -> Tensor:
        """What the bias and a unit of time add for a state with these spatial dimensions, ``(2, out * ...)``.

        Both are rows in the order of memory.
        """
        return torch.stack([bias, time.squeeze(1)])

    @staticmethod
    def as_map(row: Tensor, outputs: int, event: Sequence[int]) -> Tensor:
        """A row in the order of memory as ``(1, out, ...)``; a view."""
        return row.view(1, outputs)


class Dense(LayerMap):
    """A linear map, ``weight (out, in)``, of ``(..., in)``, samples, or probes and samples, in front."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.detach()
        self._transposed = self._weight.t().contiguous()  # a narrow result takes a quarter of the time from it

    def apply(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return F.linear(x, self._weight, None if shift is None else shift[0])

    def transpose(self, v: Tensor) -> Tensor:
        return F.linear(v, self._transposed)

    def gradient(self, x: Tensor, v: Tensor) -> Tensor:
        v, x = v.flatten(0, -2), x.flatten(0, -2)
        # few rows times many columns are up to six times as fast as the reverse
        return (x.t() @ v).t() if x.shape[1] < v.shape[1] else v.t() @ x

    @staticmethod
    def product(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    @staticmethod
    def transposed(v: Tensor, weight: Tensor) -> Tensor:
        return v @ weight


class Convolution(LayerMap):
    """A 3x3 convolution, ``weight (out, in, 3, 3)``, with zero padding 1, by the library's convolutions."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.detach()
        self._convolved = operations_for(weight).convolved

    def apply(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        y = self._convolved(F.conv2d(x, self._weight, padding=1))
        return y if shift is None else y.add_(shift)

    def transpose(self, v: Tensor) -> Tensor:
        return self._convolved(F.conv_transpose2d(v, self._weight, padding=1))

    def gradient(self, x: Tensor, v: Tensor) -> Tensor:
        return self._convolved(
            torch.ops.aten.convolution_backward(
                v, x, self._weight, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (False, True, False)
            )[1]
        )

    @staticmethod
    def product(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, padding=1)

    @staticmethod
    def transposed(v: Tensor, weight: Tensor) -> Tensor:
        return F.conv_transpose2d(Convolution.layout(v), weight, padding=1)

    @classmethod
    def prepared(cls, weight: Tensor) -> LayerMap:
        few = min(weight.shape[:2]) <= _FEW.get(weight.dtype, 0)
        return Columns(weight) if few and weight.device.type == "cpu" else Convolution(weight)

    @staticmethod
    def split(weight: Tensor) -> tuple[Tensor, Tensor]:
        # in the order of memory, so that gradients come in it too
        time, state = weight.permute(0, 2, 3, 1).split([1, weight.shape[1] - 1], dim=3)
        return time.permute(0, 3, 1, 2), state.permute(0, 3, 1, 2)

    @staticmethod
    def layout(x: Tensor) -> Tensor:
        if x.shape[1] > 1:
            return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # vmap knows no other way to say it
        # one channel is in both layouts, but torch reads the strides, so take the strides of the fast layout
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
        if v.is_cpu:  # torch sums channels last twenty times as slowly as this
            return (v.new_ones(1, len(v)) @ rows.reshape(len(v), -1)).view(-1)
        return rows.sum(0).view(-1)

    @staticmethod
    def shift_rows(time: Tensor, bias: Tensor, event: Sequence[int]) -> Tensor:
        h, w = event
        rows = torch.cat([bias.unsqueeze(0), time.flatten(1).t()])  # (1 + 9, out)
        # what is made inside a transform of torch.func must not outlive it
        basis = _shift_basis.__wrapped__ if transforms_active() else _shift_basis
        return (basis(h, w, bias.dtype, bias.device) @ rows).view(2, -1)

    @staticmethod
    def as_map(row: Tensor, outputs: int, event: Sequence[int]) -> Tensor:
        return row.view(1, *event, outputs).permute(0, 3, 1, 2)


class Columns(Convolution):
    """The same map, fast where the inputs or the outputs have few channels.

    Results with many channels are ``channels_last``; arguments with many are fastest in that layout.
    """

    def __init__(self, weight: Tensor) -> None:
        self._outputs_are_few = weight.shape[0] < weight.shape[1]
        # with few outputs it is their cotangents whose neighbors are taken, and a transposed kernel is flipped
        taps = weight.detach().flip(2, 3).transpose(0, 1) if self._outputs_are_few else weight.detach()
        self._few = taps.shape[1]
        self._weight = taps.permute(2, 3, 1, 0).flatten(0, 2).contiguous()  # (9 * few, many)

    def apply(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        y = self._narrow(x) if self._outputs_are_few else self._widen(x)
        return y if shift is None else y.add_(shift)

    def transpose(self, v: Tensor) -> Tensor:
        return self._widen(v) if self._outputs_are_few else self._narrow(v)

    def gradient(self, x: Tensor, v: Tensor) -> Tensor:
        few, many = (v, x) if self._outputs_are_few else (x, v)
        taps = (_neighbours(few) @ _rows(many)).unflatten(0, (3, 3, self._few)).permute(3, 2, 0, 1)
        return taps.transpose(0, 1).flip(2, 3) if self._outputs_are_few else taps

    def _widen(self, few: Tensor) -> Tensor:
        batch, _, h, w = few.shape
        return (_neighbours(few).t() @ self._weight).view(batch, h, w, -1).permute(0, 3, 1, 2)

    def _narrow(self, many: Tensor) -> Tensor:
        batch, _, h, w = many.shape
        parts = self._weight @ _rows(many).t()
        if parts.dtype is torch.bfloat16:  # nine roundings are enough: the sums are made in float32
            parts = parts.float()
        parts = parts.view(3, 3, self._few, batch, h, w)
        # to each pixel what its neighbors have for it: first along rows, then along columns
        before, out, after = parts.unbind(1)
        out[..., :-1].add_(before[..., 1:])
        out[..., 1:].add_(after[..., :-1])
        above, out, below = out.unbind(0)
        out[..., :-1, :].add_(above[..., 1:, :])
        out[..., 1:, :].add_(below[..., :-1, :])
        return out.transpose(0, 1).to(many.dtype).contiguous()


def _neighbours(few: Tensor) -> Tensor:
    """``(9 * channels, B * H * W)`` of ``few (B, channels, H, W)``."""
    windows = F.pad(few.transpose(0, 1), (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)  # (channels, B, H, W, 3, 3)
    return windows.permute(4, 5, 0, 1, 2, 3).reshape(9 * few.shape[1], -1)


def _rows(many: Tensor) -> Tensor:
    """``(B * H * W, channels)`` of ``many (B, channels, H, W)``."""
    return many.permute(0, 2, 3, 1).reshape(-1, many.shape[1])


@lru_cache(maxsize=64)
def _shift_basis(h: int, w: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``(2 H W, 10)``: the maps that a bias of 1 makes, then the maps of each tap of a constant image."""
    with on_host(), torch.inference_mode(False), torch.no_grad():
        patches = F.unfold(torch.ones(1, 1, h, w, dtype=dtype, device=device), 3, padding=1)[0].t()
        one, zero = torch.ones_like(patches[:, :1]), torch.zeros_like(patches)
        return torch.cat([torch.cat([one, zero], 1), torch.cat([zero[:, :1], patches], 1)])
