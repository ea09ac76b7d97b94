"""The sweeps up and down a stack that the passes are made of, without a graph.

With layers ``a_k = W_k u_{k-1} + b_k + t r_k``, ``u_k = s(a_k)``, ``u_0 = z`` and ``dz = a_L``, the product
``e^T df/dz`` runs backward through the stack: ``g_{L-1} = W_L^T e``, ``v_k = s'(a_k) g_k``,
``g_{k-1} = W_k^T v_k``, and ends as ``g_0``.

Given cotangents D of the velocity and P of the product, their gradients are two sweeps. Upward, the product's own
transpose, ``h_0 = P``, ``p_k = W_k h_{k-1}``, ``h_k = s'(a_k) p_k``, with ``s''(a_k) g_k p_k`` as what the product
adds to the cotangent of ``a_k``, and ``h_{L-1}`` at its end as the cotangent of ``g_{L-1}``. Downward, ordinary
backpropagation from D picks those up, and whatever products along a direction add (see ``tangents``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.ops import add_each, multiply_each
from ..prepared import FastParts, Stack, Structure, shift_maps, unpack
from . import pieces
from .pieces import piece

__all__ = [
    "Fixed",
    "Kept",
    "Needs",
    "ascend",
    "backward",
    "by_autograd",
    "descend",
    "pull_through",
    "time_gradient",
]


class Fixed(NamedTuple):
    """What autograd does not see of an evaluation."""

    structure: Structure
    fast: FastParts

    @property
    def hidden(self) -> int:
        """The number of activations."""
        return len(self.structure.shapes) - 1

    def cotangent(self, dz: Tensor | None, z: Tensor) -> Tensor:
        """The velocity's cotangent as the layers compute; zero if nobody asked for its gradient."""
        if dz is None:
            dz = z.new_zeros(len(z), self.structure.outputs[-1], *self.structure.event)
        return self.structure.products.layout(dz.to(self.structure.dtype))

    def plain(self, packed: Tensor) -> Stack:
        """The same stack with a graph that leads to ``packed``."""
        parts = unpack(self.structure, packed)
        return Stack(self.structure, parts.weights[-1], parts)


class Kept(NamedTuple):
    """What a pass keeps of each hidden layer, first layer first."""

    activations: Sequence[Tensor]
    products: Sequence[Tensor] = ()


class Needs(NamedTuple):
    """Whose gradients are asked for."""

    t: bool
    z: bool
    pulled: bool
    packed: bool


class _Up(NamedTuple):
    """What the sweep upward leaves for the one downward, for each hidden layer."""

    bends: Sequence[Tensor]
    slopes: Sequence[Tensor]
    gradients: Sequence[Tensor]  # of the weights


def ascend(
    fixed: Fixed, t: Tensor, z: Tensor, *, pre: list[tuple[Tensor, Tensor]] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Velocity and what is kept of each activation; ``pre`` receives each pre-activation with its activation."""
    structure, fast = fixed
    kept: list[Tensor] = []
    u = structure.products.layout(z.to(structure.dtype))
    *inner, (last, last_shift) = zip(fast.maps, _shifts(fixed, t), strict=True)
    for layer, shift in inner:
        if fast.compiled:
            a, u = piece(fast, pieces.activate)(structure.activation, layer.apply(u), shift)
        else:
            a = layer.shifted(u, shift)
            u = structure.activation.value_over(a)
        kept.append(u if structure.activation.keeps_output else a)
        if pre is not None:
            pre.append((a, u))
    return last.shifted(u, last_shift), kept


def _shifts(fixed: Fixed, t: Tensor) -> Sequence[Tensor]:
    """What bias and time add to the pre-activations of each layer, ``(1, out, ...)``."""
    structure, fast = fixed
    if fast.still is not None:
        return fast.still
    row = torch.addcmul(fast.bias, fast.response, t.to(fast.bias.dtype)).to(structure.dtype)
    return shift_maps(structure, row)


def pull_through(
    fixed: Fixed, pulled: Tensor, pre: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The product, and what is kept of it at each hidden layer."""
    structure, fast = fixed
    activation = structure.activation
    pull = piece(fast, pieces.pull)
    g = start = pulled.to(structure.dtype)
    kept: list[Tensor] = []
    for layer in fast.maps[-2::-1]:
        v = pull(activation, *pre.pop(), g, g is not start)
        kept.append(v if activation.keeps_pulled else g)
        g = layer.transpose(v)
    # the last g is an input, which autograd keeps already
    return g, tuple(kept[::-1] if _keeps_last(fixed, start) else kept[:0:-1])


def _keeps_last(fixed: Fixed, pulled: Tensor) -> bool:
    """Whether a pass keeps what it makes of ``pulled``; for several noises it is cheaper to make again."""
    return fixed.structure.activation.keeps_pulled and not _several(pulled)


def _several(pulled: Tensor) -> bool:
    return pulled.dim() == 3  # (K, B, hidden); else (B, hidden) or (B, hidden, H, W)


def backward(
    fixed: Fixed,
    t: Tensor,
    z: Tensor,
    pulled: Tensor,
    kept: Kept,
    cotangents: Sequence[Tensor | None],
    needs: Needs,
    dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """Gradients with respect to time, state, pulled noise and parameters (of ``dtype``).

    The cotangents are those of the velocity, of the product and of what is kept of each activation.
    """
    products, compute = fixed.structure.products, fixed.structure.dtype
    dz, product, *turned = cotangents
    a = fixed.cotangent(dz, z)
    if product is None:  # nobody asked for the product's gradient
        t_grad, z_grad, packed_grad = descend(fixed, t, z, a, kept.activations, turned, needs, dtype)
        return t_grad, z_grad, None, packed_grad
    saved, activation = kept.products, fixed.structure.activation
    if not activation.keeps_pulled:
        saved = [*saved, pulled.to(compute)]
    elif _several(pulled):
        last = pulled.to(compute).expand(-1, len(z), -1).clone()
        saved = [*saved, activation.pull_kept(last, kept.activations[-1])]
    h, up = _climb(fixed, products.layout(product.to(compute)), kept.activations, saved, needs)
    t_grad, z_grad, packed_grad = descend(fixed, t, z, a, kept.activations, turned, needs, dtype, up=up)
    pulled_grad = h.sum_to_size(pulled.shape).to(pulled.dtype) if needs.pulled else None
    return t_grad, z_grad, pulled_grad, packed_grad


def _climb(
    fixed: Fixed, h: Tensor, activations: Sequence[Tensor], saved: Sequence[Tensor], needs: Needs
) -> tuple[Tensor, _Up]:
    """The transpose of the product, from its cotangent ``h`` up to that of the pulled noise."""
    structure, fast = fixed
    activation = structure.activation
    bend, follow = piece(fast, pieces.bend), piece(fast, pieces.follow)
    bends, slopes, gradients = [], [], []
    for layer, kept, g in zip(fast.maps, activations, saved, strict=False):
        slope, v = bend(activation, kept, g)
        if needs.packed:
            p, gradient = layer.apply_with_gradient(h, v)
            gradients.append(gradient)
        else:
            p = layer.apply(h)
        bent, h = follow(activation, kept, g, slope, p)
        bends.append(bent)
        slopes.append(slope)
    return h, _Up(bends, slopes, gradients)


def descend(
    fixed: Fixed,
    t: Tensor,
    z: Tensor,
    a: Tensor,
    activations: Sequence[Tensor],
    turned: Sequence[Tensor | None],
    needs: Needs,
    dtype: torch.dtype,
    *,
    up: _Up | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Backpropagation through the velocity from its cotangent ``a``: gradients of time, state and parameters.

    ``turned`` are the cotangents of what was kept of each activation, ``up`` is what the product adds.
    """
    structure, fast = fixed
    products, activation = structure.products, structure.activation
    pull, join = piece(fast, pieces.pull_kept), piece(fast, pieces.join)
    gradients: list[Tensor] = []
    sums: list[Tensor] = []
    below: Tensor | None = None
    for k in range(fixed.hidden, -1, -1):
        layer = fast.maps[k]
        if needs.t or needs.packed:
            sums.append(products.sum_batch(a))
        goes_on = k > 0 or needs.z
        if needs.packed:
            u = activation.output(activations[k - 1]) if k else products.layout(z.to(structure.dtype))
            if goes_on:
                below, gradient = layer.transpose_with_gradient(a, u)
            else:
                gradient = layer.gradient(u, a)
            gradients.append(gradient)
        elif goes_on:
            below = layer.transpose(a)
        if k:
            assert below is not None
            more = turned[k - 1]
            if more is not None and activation.keeps_output:
                below = below.add_(more)
            if up is None:
                a = pull(activation, activations[k - 1], below)
            else:
                a = join(activation, up.bends[k - 1], below, up.slopes[k - 1])
            if more is not None and not activation.keeps_output:
                a = a.add_(more)
    sums.reverse()
    gradients.reverse()
    if up is not None and up.gradients:
        add_each(gradients[:-1], list(up.gradients))
    z_grad = below.to(z.dtype) if needs.z and below is not None else None
    t_grad = time_gradient(fast, sums, t) if needs.t else None
    if not needs.packed:
        return t_grad, z_grad, None
    if fast.still is not None:
        return t_grad, z_grad, torch.cat([*map(products.flatten, gradients), *sums]).to(dtype)
    # biases and responses of time act alike on all samples: one sum over the batch serves both
    rows = [products.flatten(gradient) for gradient in gradients]
    timed = multiply_each(sums, t.reshape(()).to(sums[0].dtype))
    return t_grad, z_grad, torch.cat([*rows, *sums, *timed]).to(dtype)


def time_gradient(fast: FastParts, sums: Sequence[Tensor], t: Tensor) -> Tensor:
    """The gradient of a scalar ``t`` that adds ``t response``, from the sums of those cotangents over the batch."""
    if fast.still is not None:
        return torch.zeros_like(t)
    return (torch.cat(list(sums)).to(fast.response.dtype) * fast.response).sum().to(t.dtype).reshape(t.shape)


def by_autograd(
    outputs: Sequence[Tensor], cotangents: Sequence[Tensor | None], arguments: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The same gradients by automatic differentiation, for ``create_graph=True``: slow, but with a graph."""
    given = [(x, c) for x, c in zip(outputs, cotangents, strict=True) if c is not None and x.requires_grad]
    inputs = [x for x in arguments if x is not None and x.requires_grad]
    ends, seeds = zip(*given, strict=True)
    found = iter(torch.autograd.grad(ends, inputs, seeds, create_graph=True, allow_unused=True))
    return [None if x is None or not x.requires_grad else next(found) for x in arguments]
