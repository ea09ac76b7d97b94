"""Pointwise activations with the derivatives that a hand-written backward pass needs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import check_name

_aten = torch.ops.aten


class Activation(ABC):
    """A pointwise function s with its first two derivatives, in the symbols of :mod:`.fused`.

    A pass keeps one tensor ``y`` per activation. This is the output ``u = s(a)`` if the slope ``d = s'(a)`` is
    cheap to compute from it, and otherwise the input ``a``. ``value`` and ``backward`` can be differentiated and
    transformed. The other methods are for passes without a graph.

    Attributes:
        name: its name in recipes and options.
        keeps_output: whether ``y`` is the output.
    """

    name: str
    keeps_output: bool = False

    def __repr__(self) -> str:
        return f"Activation({self.name!r})"

    @abstractmethod
    def value(self, a: Tensor) -> Tensor:
        """``u = s(a)``."""

    @abstractmethod
    def slope(self, y: Tensor) -> Tensor:
        """``d = s'(a)``."""

    @abstractmethod
    def slope_derivative(self, y: Tensor, d: Tensor) -> Tensor:
        """The derivative of the slope ``d`` with respect to ``y``."""

    def output(self, y: Tensor) -> Tensor:
        """``u = s(a)`` from the tensor that was kept."""
        return y if self.keeps_output else self.value(y)

    def backward(self, g: Tensor, y: Tensor) -> Tensor:
        """``v = d g`` for cotangents ``g`` of ``u``, which may have a dimension of products in front."""
        return g * self.slope(y)

    def backward_over(self, g: Tensor, a: Tensor, y: Tensor) -> Tensor:
        """``v = d g`` while ``a`` still exists. It may be written over ``a`` if ``y`` is not ``a``."""
        return self.backward(g, y)

    def second_order(self, y: Tensor, d: Tensor, g: Tensor, v: Tensor, p: Tensor) -> Tensor:
        """``c = s''(a) g p`` in the shape of ``y``, summed over the products. It is written over ``v = d g``."""
        # If y is u, the chain rule gives s'' = (dd/du) d, and v is d g already. On a CPU, fresh memory costs more
        # than this arithmetic, so the result goes into v, which is not read after this.
        c = torch.mul(v if self.keeps_output else g, p, out=v)
        c = c.sum(0) if c.dim() > y.dim() else c
        return c.mul_(self.slope_derivative(y, d))


class _Softplus(Activation):
    name = "softplus"
    # With the output y = log(1 + e^a), s'(a) = 1 - e^-y, so the logarithm, which is slow on a CPU, is taken once.
    keeps_output = True
    # at torch's default threshold of 20 the value jumps by 2e-9; beyond 40 the linear branch is exact in float64
    # too
    _threshold = 40.0

    def value(self, a: Tensor) -> Tensor:
        return F.softplus(a, threshold=self._threshold)

    def slope(self, y: Tensor) -> Tensor:
        return torch.neg(y).exp_().neg_().add_(1)

    def backward(self, g: Tensor, y: Tensor) -> Tensor:
        return torch.addcmul(g, g, torch.neg(y).exp_(), value=-1)

    def backward_over(self, g: Tensor, a: Tensor, y: Tensor) -> Tensor:
        # One operation instead of three. If shape and layout are the same, the result goes into `a`, which is not
        # read after this, because on a CPU fresh memory costs more than the arithmetic.
        over = {"grad_input": a} if g.shape == a.shape and g.stride() == a.stride() else {}
        if g.shape != a.shape:  # on XLA the operation does not broadcast
            g, a = torch.broadcast_tensors(g, a)
        return _aten.softplus_backward(g, a, 1, self._threshold, **over)

    def slope_derivative(self, y: Tensor, d: Tensor) -> Tensor:
        return 1 - d


class _Tanh(Activation):
    name = "tanh"
    keeps_output = True

    def value(self, a: Tensor) -> Tensor:
        return torch.tanh(a)

    def slope(self, y: Tensor) -> Tensor:
        return torch.addcmul(y.new_ones(()), y, y, value=-1)

    def backward(self, g: Tensor, y: Tensor) -> Tensor:
        return _aten.tanh_backward(g, y)

    def slope_derivative(self, y: Tensor, d: Tensor) -> Tensor:
        return y * -2


class _Elu(Activation):
    name = "elu"
    keeps_output = True

    def value(self, a: Tensor) -> Tensor:
        return F.elu(a)

    def slope(self, y: Tensor) -> Tensor:
        return y.clamp(max=0) + 1  # the output is e^a - 1 for a < 0

    def slope_derivative(self, y: Tensor, d: Tensor) -> Tensor:
        return (y < 0).to(y.dtype)


class _Silu(Activation):
    name = "silu"

    def value(self, a: Tensor) -> Tensor:
        return F.silu(a)

    def slope(self, y: Tensor) -> Tensor:
        s = torch.sigmoid(y)
        return s * (1 + y * (1 - s))

    def slope_derivative(self, y: Tensor, d: Tensor) -> Tensor:
        s = torch.sigmoid(y)
        return s * (1 - s) * (2 + y * (1 - 2 * s))


class _Gelu(Activation):
    name = "gelu"

    def value(self, a: Tensor) -> Tensor:
        return F.gelu(a)

    def slope(self, y: Tensor) -> Tensor:
        return 0.5 * (1 + torch.erf(y / math.sqrt(2))) + y * self._density(y)

    def backward(self, g: Tensor, y: Tensor) -> Tensor:
        if g.shape != y.shape:  # on a CPU the operation does not broadcast
            g, y = torch.broadcast_tensors(g, y)
        return _aten.gelu_backward(g, y)

    def slope_derivative(self, y: Tensor, d: Tensor) -> Tensor:
        return self._density(y) * (2 - y * y)

    @staticmethod
    def _density(a: Tensor) -> Tensor:
        return torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)


ACTIVATIONS: dict[str, Activation] = {each.name: each for each in (_Softplus(), _Tanh(), _Elu(), _Silu(), _Gelu())}


def get_activation(name: str) -> Activation:
    """Look up an activation by its name.

    Raises:
        ConfigError: for an unknown name; the message lists the known ones.
    """
    check_name(name, ACTIVATIONS, "activation")
    return ACTIVATIONS[name]
