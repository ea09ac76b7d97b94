"""Pointwise activations with the derivatives that a backward pass by hand needs.

Write s for the activation, a for a pre-activation, u = s(a), and g for the cotangent of u in a product with the
Jacobian, which goes on as v = s'(a) g. A backward pass meets a cotangent p of v. It needs ``h = s' p``, the next
cotangent upward, and ``s'' g p + s' b``, the cotangent of a, where b is the cotangent of u from the layers above.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, suggest

__all__ = ["ACTIVATIONS", "Activation", "get_activation"]

_aten = torch.ops.aten


class Activation(ABC):
    """A pointwise function s and what a backward pass by hand needs of it.

    ``value`` and ``slope`` can be differentiated and transformed. The other methods are for passes without a graph;
    they may overwrite what their docstrings name.

    Attributes:
        name: what a user calls it.
        keeps_output: whether a pass keeps s(a), which the weights' gradients need anyway, instead of a.
        keeps_pulled: whether a pass keeps v instead of g.
    """

    name: ClassVar[str]
    keeps_output: ClassVar[bool] = True
    keeps_pulled: ClassVar[bool] = True

    def __repr__(self) -> str:
        return f"Activation({self.name!r})"

    def on(self, device: torch.device) -> Activation:
        """The form of this activation that is fast on a device."""
        return self

    @abstractmethod
    def value(self, a: Tensor) -> Tensor:
        """``s(a)``."""

    @abstractmethod
    def slope(self, a: Tensor) -> Tensor:
        """``s'(a)``."""

    def value_over(self, a: Tensor) -> Tensor:
        """``s(a)``; may overwrite ``a`` if :meth:`pull` does not need it. New memory costs more than the sums."""
        return self.value(a)

    @abstractmethod
    def pull(self, a: Tensor, u: Tensor, g: Tensor, *, over: bool) -> Tensor:
        """``s'(a) g`` from both a and u = s(a); may overwrite ``a`` unless it is kept, and ``g`` if ``over``."""

    @abstractmethod
    def kept_slope(self, kept: Tensor) -> Tensor:
        """What ``follow``, ``join`` and ``pull_kept`` need of s', from what was kept of the activation."""

    def slope_of_kept(self, kept: Tensor) -> Tensor:
        """``s'(a)`` from what was kept of the activation; it can be differentiated and transformed."""
        return self.slope(kept)  # of one that keeps a

    def output(self, kept: Tensor) -> Tensor:
        """``s(a)`` from what was kept of it."""
        return kept if self.keeps_output else self.value(kept)

    def pulled(self, saved: Tensor, slope: Tensor) -> Tensor:
        """``v`` from what was kept of the product."""
        return saved if self.keeps_pulled else slope * saved

    @abstractmethod
    def bend(self, kept: Tensor, kept_p: Tensor) -> Tensor:
        """The part of the cotangent of a that the product adds, in the form that :meth:`join` takes.

        ``kept_p``, which may be overwritten, is p times what was kept of the product, v or g.
        """

    def follow(self, slope: Tensor, p: Tensor) -> Tensor:
        """``s' p``, which overwrites ``p``."""
        return p.mul_(slope)

    def scale(self, slope: Tensor, y: Tensor) -> Tensor:
        """``s' y``, from what :meth:`kept_slope` gives for s'."""
        return y * slope

    def turn(self, kept: Tensor, slope: Tensor, kept_p: Tensor) -> Tensor:
        """``kept_p``, which may be overwritten, times the derivative of s' with respect to what was kept."""
        return self.bend(kept, kept_p)  # as s''/s' or s'' is that derivative

    def join(self, bent: Tensor, below: Tensor, slope: Tensor) -> Tensor:
        """``s'' g p + s' below``, which overwrites ``bent`` or ``below``."""
        return bent.addcmul_(below, slope)

    def pull_kept(self, below: Tensor, kept: Tensor) -> Tensor:
        """``s' below``, which overwrites ``below``."""
        return below.mul_(self.kept_slope(kept))


class _Softplus(Activation):
    """``log(1 + exp(a))``, kept by its input: one operation for everything that is needed of it."""

    name = "softplus"
    keeps_output = False
    # torch's default of 20 has a kink of 2e-9 there; beyond 40 the linear branch is exact in float64 too
    _threshold = 40.0

    def on(self, device: torch.device) -> Activation:
        return _SOFTPLUS_BY_OUTPUT if device.type == "cpu" else self

    def value(self, a: Tensor) -> Tensor:
        return F.softplus(a, threshold=self._threshold)

    def slope(self, a: Tensor) -> Tensor:
        return torch.sigmoid(a)

    def pull(self, a: Tensor, u: Tensor, g: Tensor, *, over: bool) -> Tensor:
        return _aten.softplus_backward(g, a, 1, self._threshold)

    def kept_slope(self, kept: Tensor) -> Tensor:
        return torch.sigmoid(kept)

    def bend(self, kept: Tensor, kept_p: Tensor) -> Tensor:
        return kept_p  # s'' g p = (1 - s') v p; join brings the factor

    def turn(self, kept: Tensor, slope: Tensor, kept_p: Tensor) -> Tensor:
        return kept_p.mul_(slope).addcmul_(kept_p, slope, value=-1)  # s'' = s' (1 - s')

    def join(self, bent: Tensor, below: Tensor, slope: Tensor) -> Tensor:
        return bent.lerp_(below, slope)

    def pull_kept(self, below: Tensor, kept: Tensor) -> Tensor:
        return _aten.softplus_backward(below, kept, 1, self._threshold)


class _SoftplusByOutput(_Softplus):
    """The same for processors, where the logarithm takes longest: kept by its output, it is taken once.

    ``q = 1 - s' = exp(-u)`` stands for the slope.
    """

    keeps_output = True

    def pull(self, a: Tensor, u: Tensor, g: Tensor, *, over: bool) -> Tensor:
        # torch.compile takes no such output, and needs none
        if torch.compiler.is_compiling() or g.shape != a.shape or g.stride() != a.stride():
            return super().pull(a, u, g, over=over)
        return _aten.softplus_backward(
            g, a, 1, self._threshold, grad_input=a
        )  # new memory costs more than the sums

    def kept_slope(self, kept: Tensor) -> Tensor:
        return torch.neg(kept).exp_()

    def slope_of_kept(self, kept: Tensor) -> Tensor:
        return -torch.expm1(-kept)

    def follow(self, slope: Tensor, p: Tensor) -> Tensor:
        return p.addcmul_(p, slope, value=-1)

    def scale(self, slope: Tensor, y: Tensor) -> Tensor:
        return torch.addcmul(y, y, slope, value=-1)

    def turn(self, kept: Tensor, slope: Tensor, kept_p: Tensor) -> Tensor:
        return kept_p.mul_(slope)  # ds'/du = 1 - s'

    def join(self, bent: Tensor, below: Tensor, slope: Tensor) -> Tensor:
        return below.lerp_(bent, slope)

    def pull_kept(self, below: Tensor, kept: Tensor) -> Tensor:
        return below.addcmul_(below, self.kept_slope(kept), value=-1)


class _Tanh(Activation):
    name = "tanh"

    def value(self, a: Tensor) -> Tensor:
        return torch.tanh(a)

    def slope(self, a: Tensor) -> Tensor:
        return 1 - torch.tanh(a).square()

    def value_over(self, a: Tensor) -> Tensor:
        return a.tanh_()

    def pull(self, a: Tensor, u: Tensor, g: Tensor, *, over: bool) -> Tensor:
        if over and not torch.compiler.is_compiling():
            return _aten.tanh_backward(g, u, grad_input=g)
        return _aten.tanh_backward(g, u)

    def kept_slope(self, kept: Tensor) -> Tensor:
        return torch.addcmul(kept.new_ones(()), kept, kept, value=-1)

    def slope_of_kept(self, kept: Tensor) -> Tensor:
        return 1 - kept.square()

    def bend(self, kept: Tensor, kept_p: Tensor) -> Tensor:
        return kept_p.mul_(kept).mul_(-2)  # s'' = -2 u s'

    def pull_kept(self, below: Tensor, kept: Tensor) -> Tensor:
        return _aten.tanh_backward(below, kept)


class _Elu(Activation):
    name = "elu"

    def value(self, a: Tensor) -> Tensor:
        return F.elu(a)

    def slope(self, a: Tensor) -> Tensor:
        return a.clamp(max=0).exp()

    def pull(self, a: Tensor, u: Tensor, g: Tensor, *, over: bool) -> Tensor:
        return _aten.elu_backward(g, 1.0, 1, 1, True, u)

    def kept_slope(self, kept: Tensor) -> Tensor:
        return kept.clamp(max=0).add_(1)

    def slope_of_kept(self, kept: Tensor) -> Tensor:
        return kept.clamp(max=0) + 1

    def bend(self, kept: Tensor, kept_p: Tensor) -> Tensor:
        return kept_p.mul_(kept < 0)  # s'' = s' there, else 0


class _FromInput(Activation):
    """An activation whose derivatives need a; its slope may vanish where its curvature does not."""

    keeps_output = False
    keeps_pulled = False

    def kept_slope(self, kept: Tensor) -> Tensor:
        return self.slope(kept)

    def bend(self, kept: Tensor, kept_p: Tensor) -> Tensor:
        return kept_p.mul_(self._curvature(kept))

    @abstractmethod
    def _curvature(self, a: Tensor) -> Tensor:
        """``s''(a)``."""


class _Silu(_FromInput):
    name = "silu"

    def value(self, a: Tensor) -> Tensor:
        return F.silu(a)

    def slope(self, a: Tensor) -> Tensor:
        s = torch.sigmoid(a)
        return s * (1 + a * (1 - s))

    def pull(self, a: Tensor, u: Tensor, g: Tensor, *, over: bool) -> Tensor:
        return _aten.silu_backward(g, a)

    def _curvature(self, a: Tensor) -> Tensor:
        s = torch.sigmoid(a)
        return s * (1 - s) * (2 + a * (1 - 2 * s))


class _Gelu(_FromInput):
    name = "gelu"

    def value(self, a: Tensor) -> Tensor:
        return F.gelu(a)

    def slope(self, a: Tensor) -> Tensor:
        return 0.5 * (1 + torch.erf(a / math.sqrt(2))) + a * self._density(a)

    def pull(self, a: Tensor, u: Tensor, g: Tensor, *, over: bool) -> Tensor:
        return _aten.gelu_backward(g, a)

    def _curvature(self, a: Tensor) -> Tensor:
        return self._density(a) * (2 - a * a)

    @staticmethod
    def _density(a: Tensor) -> Tensor:
        return torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)


_SOFTPLUS_BY_OUTPUT = _SoftplusByOutput()
ACTIVATIONS: dict[str, Activation] = {each.name: each for each in (_Softplus(), _Tanh(), _Elu(), _Silu(), _Gelu())}


def get_activation(name: str) -> Activation:
    """The activation of that name.

    Raises:
        ConfigError: there is none; the message lists the known ones.
    """
    try:
        return ACTIVATIONS[name]
    except (KeyError, TypeError):
        raise ConfigError(suggest(name, ACTIVATIONS, "activation")) from None
