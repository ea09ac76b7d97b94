"""What happens between the layers of a stack: activations, and the operations of a hand-written pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


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


class Layer(Protocol):
    """The linear part of a layer."""

    def apply(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """``W x``, plus a ``shift`` for all samples."""
        ...


@dataclass(eq=False)
class BetweenLayers:
    """The operations between the layers in one solve: bias and time, the activation, and pulling back through it.

    The methods from :meth:`slope` on are for passes without a graph.

    Attributes:
        activation: the function between two layers.
        bias: the biases of all layers, concatenated to one row.
        response: how much a unit of time adds to each bias, as a row of the same kind; None if no layer takes time.
    """

    activation: Activation
    bias: Tensor
    response: Tensor | None

    def shifts(self, t: Tensor, maps_of: Callable[..., list[Tensor]]) -> list[Any]:
        """The shift of each layer at time ``t``, as :meth:`add` and :meth:`enter` take it.

        ``maps_of`` cuts a row into one piece per layer, in the layers' dtype or in a given one.
        """
        bias, response = self.bias, self.response
        return maps_of(bias if response is None else torch.addcmul(bias, response, t.to(bias.dtype)))

    def add(self, layer: Layer, x: Tensor, shift: Any) -> Tensor:
        """``W x + shift``."""
        return layer.apply(x, shift)

    def enter(self, layer: Layer, x: Tensor, shift: Any) -> tuple[Tensor | None, Tensor, Tensor]:
        """``a = W x + shift`` (None if a kernel does not write it), ``s(a)``, and what is kept."""
        a = self.add(layer, x, shift)
        u = self.activation.value(a)
        return a, u, u if self.activation.keeps_output else a

    def times_slope(self, x: Tensor, kept: Tensor, a: Tensor | None = None) -> Tensor:
        """``s'(a) x``. If ``a`` is given, it may be overwritten."""
        if a is None:
            return self.activation.times_slope(x, kept)
        return self.activation.times_slope_at(x, a, kept)

    def slope(self, kept: Tensor) -> Tensor:
        """``s'(a)``, in the form that the methods below take."""
        return self.activation.slope(kept)

    def scale(self, x: Tensor, slope: Tensor) -> Tensor:
        """``slope x``."""
        return slope * x

    def bend(
        self, p: Tensor, slope: Tensor, kept: Tensor, x: Tensor, *, scratch: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``x p s''`` summed over the noise vectors, and ``slope p``; overwrites ``p``.

        ``s''`` stands for :meth:`Activation.slope_derivative`.
        """
        x = torch.mul(x, p, out=scratch)
        x = x.sum(0) if x.dim() > kept.dim() else x
        return x.mul_(self.activation.slope_derivative(kept, slope)), p.mul_(slope)

    def pull(self, below: Tensor, slope: Tensor, added: Tensor) -> Tensor:
        """``slope below + added``; overwrites ``added``."""
        return added.addcmul_(below, slope)
