"""Pointwise activations and the derivatives of them that a backward pass by hand needs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, suggest

_aten = torch.ops.aten


class Activation(ABC):
    """A pointwise function s with its first two derivatives.

    A pass keeps one tensor of each activation: its output ``s(a)`` if the slope is cheap to get from that,
    otherwise its input ``a``. The derivatives take what was kept. ``value`` and ``times_slope`` can be
    differentiated and transformed. The other methods are for passes without a graph.

    Attributes:
        name: what a user calls it.
        keeps_output: whether ``s(a)`` is kept.
    """

    name: str
    keeps_output: bool = False

    def __repr__(self) -> str:
        return f"Activation({self.name!r})"

    @abstractmethod
    def value(self, a: Tensor) -> Tensor:
        """``s(a)``."""

    @abstractmethod
    def slope(self, kept: Tensor) -> Tensor:
        """``s'(a)``."""

    def times_slope(self, x: Tensor, kept: Tensor) -> Tensor:
        """``s'(a) x``."""
        return x * self.slope(kept)

    def times_slope_at(self, x: Tensor, a: Tensor, kept: Tensor) -> Tensor:
        """``s'(a) x`` while ``a`` is still at hand; may overwrite ``a``, if not kept."""
        return self.times_slope(x, kept)

    @abstractmethod
    def slope_derivative(self, kept: Tensor, slope: Tensor) -> Tensor:
        """The derivative of ``s'(a)``, which is given, with respect to what was kept."""

    def output(self, kept: Tensor) -> Tensor:
        """``s(a)`` from what was kept."""
        return kept if self.keeps_output else self.value(kept)

    # between two layers, the first two with a graph too ----------------------------------------------------------

    def add(self, layer: Any, x: Tensor, shift: Any) -> Tensor:
        """``W x + shift``."""
        return layer.apply(x, shift)

    def enter(self, layer: Any, x: Tensor, shift: Any) -> tuple[Tensor | None, Tensor, Tensor]:
        """``a = W x + shift`` if it is at hand, ``s(a)``, and what is kept."""
        a = self.add(layer, x, shift)
        u = self.value(a)
        return a, u, u if self.keeps_output else a

    def scale(self, x: Tensor, slope: Tensor) -> Tensor:
        """``slope x``."""
        return slope * x

    def bend(
        self, p: Tensor, slope: Tensor, kept: Tensor, x: Tensor, *, scratch: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``x p`` times the slope's derivative, summed over several noises, and ``slope p``; overwrites ``p``."""
        x = torch.mul(x, p, out=scratch)
        x = x.sum(0) if x.dim() > kept.dim() else x
        return x.mul_(self.slope_derivative(kept, slope)), p.mul_(slope)

    def pull(self, below: Tensor, slope: Tensor, added: Tensor) -> Tensor:
        """``slope below + added``; overwrites ``added``."""
        return added.addcmul_(below, slope)


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
