"""What happens between two layers in the passes without a graph, as single kernels on a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.device import Chain, SingleKernels
from ..core.operations import operations_for
from .activations import Activation, get_activation


def chained(activation: Activation, like: Tensor) -> Activation:
    """The activation whose operations are single kernels on the device of ``like``; on a CPU the activation."""
    return _Chained(activation) if isinstance(operations_for(like), SingleKernels) else activation


class _Chained(Activation):
    """An activation between layers on a device. Its slope is computed in each kernel from what was kept."""

    def __init__(self, activation: Activation) -> None:
        self._activation = activation
        self.name, self.keeps_output = activation.name, activation.keeps_output

    def value(self, a: Tensor) -> Tensor:
        return self._activation.value(a)

    def slope(self, kept: Tensor) -> Tensor:
        return kept

    def slope_derivative(self, kept: Tensor, slope: Tensor) -> Tensor:
        return self._activation.slope_derivative(kept, slope)

    def add(self, layer: Any, x: Tensor, shift: Any) -> Tensor:
        return _VALUE(layer.apply(x), "", *shift)

    def enter(self, layer: Any, x: Tensor, shift: Any) -> tuple[Tensor | None, Tensor, Tensor]:
        if not self.keeps_output:
            return super().enter(layer, x, shift)
        u = _VALUE(layer.apply(x), self.name, *shift)
        return None, u, u

    def times_slope(self, x: Tensor, kept: Tensor) -> Tensor:
        return _TIMES_SLOPE(x, kept, self.name)

    def scale(self, x: Tensor, slope: Tensor) -> Tensor:
        return _TIMES_SLOPE(x, slope, self.name)

    def bend(
        self, p: Tensor, slope: Tensor, kept: Tensor, x: Tensor, *, scratch: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return _BEND(p, kept, x, self.name)

    def pull(self, below: Tensor, slope: Tensor, added: Tensor) -> Tensor:
        return _PULL(below, slope, added, self.name)


def activated(y: Tensor, name: str, t: Tensor, bias: Tensor, response: Tensor | None = None) -> Tensor:
    row = bias if response is None else torch.addcmul(bias, response, t.to(bias.dtype))
    a = y + row.to(y.dtype)
    return get_activation(name).value(a) if name else a


def times_slope(x: Tensor, kept: Tensor, name: str) -> Tensor:
    return get_activation(name).times_slope(x, kept)


def bend(p: Tensor, kept: Tensor, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    activation = get_activation(name)
    slope, x = activation.slope(kept), x * p
    x = x.sum(0) if x.dim() > kept.dim() else x
    return x * activation.slope_derivative(kept, slope), p * slope


def pull(below: Tensor, kept: Tensor, added: Tensor, name: str) -> Tensor:
    return torch.addcmul(added, below, get_activation(name).slope(kept))


_VALUE = Chain(activated, "(Tensor y, str name, Tensor t, Tensor bias, Tensor? response=None) -> Tensor")
_TIMES_SLOPE = Chain(times_slope, "(Tensor x, Tensor kept, str name) -> Tensor")
_BEND = Chain(bend, "(Tensor p, Tensor kept, Tensor x, str name) -> (Tensor, Tensor)")
_PULL = Chain(pull, "(Tensor below, Tensor kept, Tensor added, str name) -> Tensor")
