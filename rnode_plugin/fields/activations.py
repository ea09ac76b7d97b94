"""Pointwise activations with the derivatives that a hand-written backward pass needs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, suggest

_aten = torch.ops.aten


class Activation(ABC):
    """A pointwise function s with its first two derivatives.

    A pass keeps one tensor per activation. This is the output ``s(a)`` if the slope follows cheaply from it, and
    otherwise the input ``a``. The derivatives take what was kept. ``value`` and ``times_slope`` can be
    differentiated and transformed. The other methods are for passes without a graph.

    Attributes:
        name: its name in recipes and options.
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
        """``s'(a) x`` while ``a`` is still available; may overwrite ``a`` if it is not kept."""
        return self.times_slope(x, kept)

    @abstractmethod
    def slope_derivative(self, kept: Tensor, slope: Tensor) -> Tensor:
        """The derivative of ``slope``, which is ``s'(a)``, with respect to what was kept."""

    def output(self, kept: Tensor) -> Tensor:
        """``s(a)`` from what was kept."""
        return kept if self.keeps_output else self.value(kept)


class _Softplus(Activation):
    name = "softplus"
    # With the output y = log(1 + e^a), s'(a) = 1 - e^-y, so the logarithm, which is slow on a CPU, is taken once.
    keeps_output = True
    # at torch's default threshold of 20 the value jumps by 2e-9; beyond 40 the linear branch is exact in float64
    # too
    _threshold = 40.0

    def value(self, a: Tensor) -> Tensor:
        return F.softplus(a, threshold=self._threshold)

    def slope(self, kept: Tensor) -> Tensor:
        return torch.neg(kept).exp_().neg_().add_(1)

    def times_slope(self, x: Tensor, kept: Tensor) -> Tensor:
        return torch.addcmul(x, x, torch.neg(kept).exp_(), value=-1)

    def times_slope_at(self, x: Tensor, a: Tensor, kept: Tensor) -> Tensor:
        # one operation instead of three, written into `a` if it has the same shape and layout
        over = {"grad_input": a} if x.shape == a.shape and x.stride() == a.stride() else {}
        if x.shape != a.shape and x.device.type not in ("cpu", "cuda"):  # on XLA the operation does not broadcast
            x, a = torch.broadcast_tensors(x, a)
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
        return kept.clamp(max=0) + 1  # the output is e^a - 1 for a < 0

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
        if x.shape != kept.shape:  # on a CPU the operation does not broadcast
            x, kept = torch.broadcast_tensors(x, kept)
        return _aten.gelu_backward(x, kept)

    def slope_derivative(self, kept: Tensor, slope: Tensor) -> Tensor:
        return self._density(kept) * (2 - kept * kept)

    @staticmethod
    def _density(a: Tensor) -> Tensor:
        return torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)


ACTIVATIONS: dict[str, Activation] = {each.name: each for each in (_Softplus(), _Tanh(), _Elu(), _Silu(), _Gelu())}


def get_activation(name: str) -> Activation:
    """Look up an activation by its name.

    Raises:
        ConfigError: for an unknown name; the message lists the known ones.
    """
    try:
        return ACTIVATIONS[name]
    except (KeyError, TypeError):
        raise ConfigError(suggest(name, ACTIVATIONS, "activation")) from None
