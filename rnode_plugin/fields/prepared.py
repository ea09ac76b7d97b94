"""A stack of layers made ready for one solve, and its velocity in operations that autograd knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .activations import Activation
from .kernels.base import LayerMap
from .layers import Products

__all__ = ["Kind", "Stack", "make_stack", "run_layers", "run_stack", "shifts"]


Kind = tuple[Products, Activation, torch.dtype, bool, tuple[LayerMap, ...]]  # what autograd does not see of a stack


class Stack(NamedTuple):
    """A stack for states of one shape, its parameters in the form in which evaluations use them.

    It is made anew for each solve, with a graph that leads to the parameters: nothing in it can go stale, and what
    is done here is not done again at each evaluation.

    Attributes:
        products: the kind of its layers.
        activation: the function between them.
        dtype: what the layers compute in; the state's dtype unless autocast says otherwise.
        compiled: whether the passes with a backward by hand go through torch.compile, piece by piece.
        maps: the layers' products for passes with a backward by hand; none where there are no such passes.
        bias: of all layers, one behind the other.
        response: what a unit of time adds to the pre-activations of all layers, ``(1, sum of outputs, ...)``.
        weights: of the state, for each layer.
    """

    products: Products
    activation: Activation
    dtype: torch.dtype
    compiled: bool
    maps: tuple[LayerMap, ...]
    bias: Tensor
    response: Tensor
    weights: tuple[Tensor, ...]

    @property
    def kind(self) -> Kind:
        return self.products, self.activation, self.dtype, self.compiled, self.maps


def make_stack(
    products: Products,
    activation: Activation,
    dtype: torch.dtype,
    parameters: Sequence[tuple[Tensor, Tensor]],
    z: Tensor,
    *,
    fast: bool = False,
    compiled: bool = False,
) -> Stack:
    """A :class:`Stack` for states like ``z`` from the weight and the bias of each layer.

    ``fast`` makes it one for the passes with a backward by hand, ``compiled`` one for torch.compile.
    """
    times, weights = zip(*(products.split(weight) for weight, _ in parameters), strict=True)
    response = products.response(torch.cat(times), z)
    bias = torch.cat([b for _, b in parameters])
    maps: tuple[LayerMap, ...] = ()
    if fast:
        maps = tuple(products.prepare(weight.detach().to(dtype), compiled=compiled) for weight in weights)
    return Stack(products, activation, dtype, compiled, maps, bias, response, weights)


def run_stack(stack: Stack, t: Tensor | float, z: Tensor) -> Tensor:
    """The velocity ``(B, *event)``, as often differentiable as one likes.

    Args:
        stack: the field.
        t: time, a scalar.
        z: state ``(B, *event)``.
    """
    return run_layers(stack, t, z)[0]


def run_layers(stack: Stack, t: Tensor | float, z: Tensor) -> tuple[Tensor, Tensor]:
    """The velocity, and the input of the last layer; arguments as for :func:`run_stack`."""
    products = stack.products
    a = u = products.layout(z.to(stack.dtype))
    for k, (weight, shift) in enumerate(zip(stack.weights, shifts(stack, t), strict=True)):
        u = stack.activation.value(a) if k else a
        a = products.apply(u, weight.to(stack.dtype)) + shift
    return a.to(z.dtype), u


def shifts(stack: Stack, t: Tensor | float) -> tuple[Tensor, ...]:
    """What bias and time add to the pre-activations of each layer, ``(1, out, ...)``."""
    bias = stack.bias.view(1, -1, *[1] * (stack.response.dim() - 2))
    sizes = [w.shape[0] for w in stack.weights]
    return (bias + stack.response * t).to(stack.dtype).split(sizes, dim=1)
