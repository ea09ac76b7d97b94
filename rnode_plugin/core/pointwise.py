"""What stands between the layers of a stack: the contract of an activation, and the steps of a pass by hand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


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


class Layer(Protocol):
    """The linear part of a layer."""

    def apply(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """``W x``, plus a ``shift`` for all samples."""
        ...


@dataclass(eq=False)
class BetweenLayers:
    """The steps between the layers of one solve: bias and time come in, the activation acts, cotangents pass it.

    The methods from :meth:`slope` on are for passes without a graph.

    Attributes:
        activation: between each two layers.
        bias: of all layers, as one row in the order of memory.
        response: what a unit of time adds, as such a row; None if no layer takes the time.
    """

    activation: Activation
    bias: Tensor
    response: Tensor | None

    def shifts(self, t: Tensor, maps_of: Callable[..., list[Tensor]]) -> list[Any]:
        """What :meth:`add` and :meth:`enter` take for each layer at time ``t``.

        ``maps_of`` cuts a row into the layers' maps, in the layers' dtype or in a given one.
        """
        bias, response = self.bias, self.response
        return maps_of(bias if response is None else torch.addcmul(bias, response, t.to(bias.dtype)))

    def add(self, layer: Layer, x: Tensor, shift: Any) -> Tensor:
        """``W x + shift``."""
        return layer.apply(x, shift)

    def enter(self, layer: Layer, x: Tensor, shift: Any) -> tuple[Tensor | None, Tensor, Tensor]:
        """``a = W x + shift`` if it is at hand, ``s(a)``, and what is kept."""
        a = self.add(layer, x, shift)
        u = self.activation.value(a)
        return a, u, u if self.activation.keeps_output else a

    def times_slope(self, x: Tensor, kept: Tensor, a: Tensor | None = None) -> Tensor:
        """``s'(a) x``. If ``a`` is given, it may be overwritten."""
        if a is None:
            return self.activation.times_slope(x, kept)
        return self.activation.times_slope_at(x, a, kept)

    def slope(self, kept: Tensor) -> Tensor:
        """``s'(a)`` in the form in which the methods below take it."""
        return self.activation.slope(kept)

    def scale(self, x: Tensor, slope: Tensor) -> Tensor:
        """``slope x``."""
        return slope * x

    def bend(
        self, p: Tensor, slope: Tensor, kept: Tensor, x: Tensor, *, scratch: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``x p`` times the slope's derivative, summed over several noises, and ``slope p``; overwrites ``p``."""
        x = torch.mul(x, p, out=scratch)
        x = x.sum(0) if x.dim() > kept.dim() else x
        return x.mul_(self.activation.slope_derivative(kept, slope)), p.mul_(slope)

    def pull(self, below: Tensor, slope: Tensor, added: Tensor) -> Tensor:
        """``slope below + added``; overwrites ``added``."""
        return added.addcmul_(below, slope)
