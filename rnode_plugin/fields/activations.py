"""Pointwise activations and the derivatives of them that a backward pass by hand needs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.pointwise import Activation
from ..errors import ConfigError, suggest

_aten = torch.ops.aten


class _Softplus(Activation):
    name = "softplus"
    keeps_output = True  # its logarithm takes longest on a processor: it is taken once
    # torch's default of 20 has a kink of 2e-9 there; beyond 40 the linear branch is exact in float64 too
    _threshold = 40.0

    def value(self, a: Tensor) -> Tensor:
        return F.softplus(a, threshold=self._threshold)

    def slope(self, kept: Tensor) -> Tensor:
        return torch.neg(kept).exp_().neg_().add_(1)

    def times_slope(self, x: Tensor, kept: Tensor) -> Tensor:
        return torch.addcmul(x, x, torch.neg(kept).exp_(), value=-1)

    def times_slope_at(self, x: Tensor, a: Tensor, kept: Tensor) -> Tensor:
        # one operation for three, into memory that is there if it has the shape
        over = {"grad_input": a} if x.shape == a.shape and x.stride() == a.stride() else {}
        return _aten.softplus_backward(x, a, 1, self._threshold, **over)

    def slope_derivative(self, kept: Tensor, slope: Tensor) -> Tensor:
        return 1 - slope


class _Tanh(Activation):
    name = "tanh"
    keeps_output = True

    def value(self, a: Tensor) -> Tensor:
        return torch.tanh(a)

    def slope(self, kept: Tensor) -> Tensor:
        return torch.addcmul(kept.new_ones(()), kept, kept, value=-1)

    def times_slope(self, x: Tensor, kept: Tensor) -> Tensor:
        return _aten.tanh_backward(x, kept)

    def slope_derivative(self, kept: Tensor, slope: Tensor) -> Tensor:
        return kept * -2


class _Elu(Activation):
    name = "elu"
    keeps_output = True

    def value(self, a: Tensor) -> Tensor:
        return F.elu(a)

    def slope(self, kept: Tensor) -> Tensor:
        return kept.clamp(max=0) + 1

    def slope_derivative(self, kept: Tensor, slope: Tensor) -> Tensor:
        return (kept < 0).to(kept.dtype)


class _Silu(Activation):
    name = "silu"

    def value(self, a: Tensor) -> Tensor:
        return F.silu(a)

    def slope(self, kept: Tensor) -> Tensor:
        s = torch.sigmoid(kept)
        return s * (1 + kept * (1 - s))

    def slope_derivative(self, kept: Tensor, slope: Tensor) -> Tensor:
        s = torch.sigmoid(kept)
        return s * (1 - s) * (2 + kept * (1 - 2 * s))


class _Gelu(Activation):
    name = "gelu"

    def value(self, a: Tensor) -> Tensor:
        return F.gelu(a)

    def slope(self, kept: Tensor) -> Tensor:
        return 0.5 * (1 + torch.erf(kept / math.sqrt(2))) + kept * self._density(kept)

    def times_slope(self, x: Tensor, kept: Tensor) -> Tensor:
        return _aten.gelu_backward(x, kept)

    def slope_derivative(self, kept: Tensor, slope: Tensor) -> Tensor:
        return self._density(kept) * (2 - kept * kept)

    @staticmethod
    def _density(a: Tensor) -> Tensor:
        return torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)


ACTIVATIONS: dict[str, Activation] = {each.name: each for each in (_Softplus(), _Tanh(), _Elu(), _Silu(), _Gelu())}


def get_activation(name: str) -> Activation:
    """The activation of that name; an error lists the known ones."""
    try:
        return ACTIVATIONS[name]
    except (KeyError, TypeError):
        raise ConfigError(suggest(name, ACTIVATIONS, "activation")) from None
