"""A stack of layers prepared for one solve, and its passes in operations that autograd and torch.func know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .activations import Activation
from .kernels.base import LayerMap
from .layers import Products

__all__ = [
    "FastParts",
    "Parts",
    "Stack",
    "Structure",
    "keep_activations",
    "run_jvp",
    "run_stack",
    "run_vjp",
    "shift_maps",
    "unpack",
]


@dataclass(frozen=True, eq=False)
class Structure:
    """What a stack is, apart from its parameters.

    Attributes:
        products: the kind of its layers.
        activation: the function between them.
        dtype: what the layers compute in; the state's dtype unless autocast says otherwise.
        shapes: of the layers' weights, time left out.
        event: spatial shape of the state, ``(H, W)`` for images, ``()`` for flat states.
        timed: whether time is an input of any layer.
    """

    products: Products
    activation: Activation
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]
    event: tuple[int, ...]
    timed: bool

    @property
    def outputs(self) -> list[int]:
        """Outputs of each layer."""
        return [shape[0] for shape in self.shapes]

    @cached_property
    def row_sizes(self) -> list[int]:
        """Entries of each layer's weight and of each layer's map of pre-activations, in a packed row."""
        pixels = torch.Size(self.event).numel()
        return [torch.Size(s).numel() for s in self.shapes] + [n * pixels for n in self.outputs]


@dataclass(frozen=True, eq=False)
class Parts:
    """A stack's parameters in the form in which evaluations use them, with a graph.

    Attributes:
        weights: of the state, for each layer.
        bias: of all layers, one behind the other; of the shape of ``response``, or with spatial dimensions of 1.
        response: what a unit of time adds to the pre-activations of all layers, ``(1, sum of outputs, ...)``.
    """

    weights: tuple[Tensor, ...]
    bias: Tensor
    response: Tensor


@dataclass(frozen=True, eq=False)
class FastParts:
    """What the passes with a backward by hand need besides.

    Attributes:
        packed: all :class:`Parts` in one row, with their graph: an evaluation has one gradient for all of them.
        maps: the layers' products; no graph.
        bias, response: maps of all layers as rows in the order of memory; no graph. Without time as an input the
            response is empty.
        still: what is added to the pre-activations of each layer if time is not an input; None if it is.
        compiled: whether the passes go through torch.compile, piece by piece.
    """

    packed: Tensor
    maps: tuple[LayerMap, ...]
    bias: Tensor
    response: Tensor
    still: tuple[Tensor, ...] | None
    compiled: bool


@dataclass(frozen=True, eq=False)
class Stack:
    """A stack for states of one shape.

    It is made for one solve, with a graph that leads to the parameters: nothing in it can go stale, and what is
    done here is not done again at each evaluation.

    Attributes:
        structure: what it is.
        last_weight: of the last layer, with its graph.
        given: the parameters; None if they come from ``fast``.
        fast: for passes with a backward by hand; None if there are none.
    """

    structure: Structure
    last_weight: Tensor
    given: Parts | None
    fast: FastParts | None = None

    @cached_property
    def parts(self) -> Parts:
        """The parameters with their graph, for the passes in this module."""
        if self.given is not None:
            return self.given
        assert self.fast is not None
        return unpack(self.structure, self.fast.packed)

    @classmethod
    def make(
        cls,
        products: Products,
        activation: Activation,
        dtype: torch.dtype,
        layers: Sequence[tuple[Tensor | None, Tensor, Tensor | None]],
        z: Tensor,
        *,
        fast: bool = False,
        compiled: bool = False,
    ) -> Stack:
        """A stack for states like ``z`` from each layer's weights of time and state, and its bias.

        ``fast`` makes it one for the passes with a backward by hand, ``compiled`` one for torch.compile.
        """
        weights = tuple(weight for _, weight, _ in layers)
        activation = activation.on(z.device)
        biases = [w.new_zeros(w.shape[0]) if b is None else b for _, w, b in layers]
        times = [w.new_zeros(w.shape[0], 1, *w.shape[2:]) if time is None else time for time, w, _ in layers]
        event = tuple(z.shape[2:])
        shapes = tuple(tuple(w.shape) for w in weights)
        timed = any(time is not None for time, _, _ in layers)
        structure = Structure(products, activation, dtype, shapes, event, timed)
        if not fast:
            bias = torch.cat(biases).view(1, -1, *[1] * len(event))
            return cls(structure, weights[-1], Parts(weights, bias, products.response(torch.cat(times), z)))
        rows = [products.shift_rows(time, bias, event) for time, bias in zip(times, biases, strict=True)]
        packed = _pack(structure, weights, rows)
        return cls(structure, weights[-1], None, _fast(structure, packed, compiled=compiled))


def _fast(structure: Structure, packed: Tensor, *, compiled: bool) -> FastParts:
    parts, products = _cut(structure, packed.detach()), structure.products
    weights = map(products.unflatten, parts, structure.shapes)
    maps = [products.prepare(w.to(structure.dtype), compiled=compiled) for w in weights]
    count, sizes = len(maps), structure.row_sizes
    first, shifts = sum(sizes[:count]), sum(sizes[count:])
    bias, response = packed.detach()[first : first + shifts], packed.detach()[first + shifts :]
    still = None if structure.timed else tuple(shift_maps(structure, bias.to(structure.dtype)))
    return FastParts(packed, tuple(maps), bias, response, still, compiled)


def _pack(structure: Structure, weights: Sequence[Tensor], shift_rows: Sequence[Tensor]) -> Tensor:
    """All parameters in one row: weights, biases, responses, each layer by layer and in the order of memory."""
    biases, responses = zip(*(row.unbind() for row in shift_rows), strict=True)
    timed = responses if structure.timed else ()
    return torch.cat([*(structure.products.flatten(w) for w in weights), *biases, *timed])


def _cut(structure: Structure, packed: Tensor) -> tuple[Tensor, ...]:
    sizes = structure.row_sizes
    return packed.split([*sizes, *sizes[len(structure.shapes) :]] if structure.timed else sizes)


def shift_maps(structure: Structure, row: Tensor) -> list[Tensor]:
    """What a row adds to the pre-activations of each layer, ``(1, out, ...)``; views."""
    rows = row.split(structure.row_sizes[len(structure.shapes) :])
    return [_as_map(structure, r, n) for r, n in zip(rows, structure.outputs, strict=True)]


def unpack(structure: Structure, packed: Tensor) -> Parts:
    """The parts of a packed row, with a graph that leads to it."""
    rows, count = _cut(structure, packed), len(structure.shapes)
    flat = [structure.products.unflatten(r, s) for r, s in zip(rows, structure.shapes, strict=False)]
    maps = [_as_map(structure, r, n) for r, n in zip(rows[count:], structure.outputs * 2, strict=False)]
    bias = torch.cat(maps[:count], dim=1)
    response = torch.cat(maps[count:], dim=1) if structure.timed else torch.zeros_like(bias)
    return Parts(tuple(flat), bias, response)


def _as_map(structure: Structure, row: Tensor, outputs: int) -> Tensor:
    return structure.products.unflatten(row, (1, outputs, *structure.event))


def _shifts(stack: Stack, t: Tensor | float) -> tuple[Tensor, ...]:
    """What bias and time add to the pre-activations of each layer, ``(1, out, ...)``."""
    structure, parts = stack.structure, stack.parts
    return (parts.bias + parts.response * t).to(structure.dtype).split(structure.outputs, dim=1)


def run_stack(stack: Stack, t: Tensor | float, z: Tensor) -> Tensor:
    """The velocity ``(B, *event)``, as often differentiable as one likes.

    Args:
        stack: the field.
        t: time, a scalar.
        z: state ``(B, *event)``.
    """
    return _pre_activations(stack, t, z)[-1].to(z.dtype)


def keep_activations(stack: Stack, t: Tensor | float, z: Tensor) -> list[Tensor]:
    """What a pass with a backward by hand keeps of each activation, as often differentiable as one likes."""
    activation = stack.structure.activation
    inner = _pre_activations(stack, t, z)[:-1]
    return [activation.value(a) for a in inner] if activation.keeps_output else inner


def run_vjp(stack: Stack, t: Tensor | float, z: Tensor, pulled: Tensor) -> tuple[Tensor, Tensor]:
    """The velocity and its product ``e^T df/dz``, as often differentiable as one likes.

    Args:
        stack, t, z: as for :func:`run_stack`.
        pulled: ``W_L^T e``, of the shape of the last layer's input, or ``(K, B, ...)`` for K products.
    """
    structure = stack.structure
    *inner, dz = _pre_activations(stack, t, z)
    g = pulled.to(structure.dtype)
    for a, weight in zip(inner[::-1], stack.parts.weights[-2::-1], strict=True):
        v = structure.products.layout(structure.activation.slope(a) * g)
        g = structure.products.transpose(v, weight.to(structure.dtype))
    return dz.to(z.dtype), g.to(z.dtype)


def run_jvp(stack: Stack, t: Tensor | float, z: Tensor, v: Tensor, dt: Tensor | float) -> tuple[Tensor, Tensor]:
    """The velocity and ``df/dz v + df/dt dt``, as often differentiable as one likes.

    Args:
        stack, t, z: as for :func:`run_stack`.
        v: direction, of the shape of ``z``.
        dt: tangent of time, a scalar.
    """
    structure, products = stack.structure, stack.structure.products
    *inner, dz = _pre_activations(stack, t, z)
    turns = (stack.parts.response * dt).to(structure.dtype).split(structure.outputs, dim=1)
    y = products.layout(v.to(structure.dtype))
    for k, (weight, turn) in enumerate(zip(stack.parts.weights, turns, strict=True)):
        y = products.apply(y, weight.to(structure.dtype)) + turn
        if k < len(inner):
            y = structure.activation.slope(inner[k]) * y
    return dz.to(z.dtype), y.to(z.dtype)


def _pre_activations(stack: Stack, t: Tensor | float, z: Tensor) -> list[Tensor]:
    structure, products = stack.structure, stack.structure.products
    found: list[Tensor] = []
    u = products.layout(z.to(structure.dtype))
    for weight, shift in zip(stack.parts.weights, _shifts(stack, t), strict=True):
        if found:
            u = structure.activation.value(found[-1])
        found.append(products.apply(u, weight.to(structure.dtype)) + shift)
    return found
