"""A stack's product along a direction of state and time, ``df/dz v + df/dt dt``, with a backward by hand.

It starts from what an evaluation kept of its activations, ``c_k``: ``u_k``, or ``a_k`` (see ``sweeps``). With
``x_0 = v``, ``y_k = W_k x_{k-1} + dt r_k`` and ``x_k = s'(a_k) y_k``, the product is ``y_L``. Its gradients, for a
cotangent ``q_L`` of it, are one sweep downward: ``p_k = W_{k+1}^T q_{k+1}`` and ``q_k = s'(a_k) p_k``, with
``(ds'/dc_k) y_k p_k`` as the cotangent of ``c_k``, which the evaluation's own backward pass picks up. The direction
may be the velocity of that same evaluation. A product and its gradient take three times the convolutions of a
forward pass; it keeps two tensors for each hidden layer, ``y_k`` and what stands for the slope.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.ops import multiply_each, needs_plain_pass
from ..autocast import without_autocast
from ..prepared import shift_maps
from . import pieces
from .pieces import piece
from .sweeps import Fixed, by_autograd, time_gradient

__all__ = ["run_tangent"]


def run_tangent(fixed: Fixed, kept: Sequence[Tensor], v: Tensor, dt: Tensor | float) -> Tensor:
    """``df/dz v + df/dt dt`` of the shape and the dtype of ``v``, where an evaluation ``kept`` its activations.

    Args:
        fixed: the stack.
        kept: of each hidden layer, with their graph.
        v: direction, of the shape of the state.
        dt: tangent of time, a scalar.
    """
    turn = dt if isinstance(dt, Tensor) else v.new_tensor(dt) if dt else None
    packed = fixed.fast.packed
    if needs_plain_pass(v, packed, *kept):
        with without_autocast(v):
            return _plain(fixed, packed, turn, v, kept)
    return _Tangent.apply(fixed, packed, turn, v, *kept)[0]  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]


class _Tangent(torch.autograd.Function):
    @staticmethod
    def forward(fixed: Fixed, packed: Tensor, dt: Tensor | None, v: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        with without_autocast(v):
            y, inner, slopes = _push_through(fixed, dt, v, kept)
        return y.to(v.dtype), *inner, *slopes

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.fixed, *tensors = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        fixed: Fixed = ctx.fixed
        packed, dt, v, *rest = ctx.saved_tensors
        n = fixed.hidden
        kept, inner, slopes = rest[:n], rest[n : 2 * n], rest[2 * n :]
        (q,) = cotangents[:1]
        if q is None:
            return None, None, None, None, *[None] * n
        with without_autocast(v):
            if torch.is_grad_enabled():  # somebody wants to differentiate the gradient: autograd must see it
                arguments = (packed, dt, v, *kept)
                return None, *by_autograd((_plain(fixed, packed, dt, v, kept),), (q,), arguments)
            needs = ctx.needs_input_grad[1:4]
            return None, *_pull_back(fixed, packed, dt, v, kept, inner, slopes, q, needs)


_Tangent.forward.__signature__ = inspect.signature(_Tangent.forward)  # pyright: ignore[reportFunctionMemberAccess]


def _push_through(
    fixed: Fixed, dt: Tensor | None, v: Tensor, kept: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The product, the ``y`` of each hidden layer, and what the activation needs of its slope there."""
    structure, fast = fixed
    lean = piece(fast, pieces.lean)
    x, inner, slopes = structure.products.layout(v.to(structure.dtype)), [], []
    turns = [None] * len(fast.maps)
    if dt is not None and fast.still is None:
        turns = shift_maps(structure, (fast.response * dt.to(fast.response.dtype)).to(structure.dtype))
    for k, (layer, shift) in enumerate(zip(fast.maps, turns, strict=True)):
        y = layer.apply(x) if shift is None else layer.shifted(x, shift)
        if k == fixed.hidden:
            return y, inner, slopes
        inner.append(y)
        slope, x = lean(structure.activation, kept[k], y)
        slopes.append(slope)
    raise AssertionError("a stack has a last layer")


def _pull_back(
    fixed: Fixed,
    packed: Tensor,
    dt: Tensor | None,
    v: Tensor,
    kept: Sequence[Tensor],
    inner: Sequence[Tensor],
    slopes: Sequence[Tensor],
    q: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients with respect to parameters, tangent of time, direction and what was kept of the activations."""
    structure, fast = fixed
    products, activation = structure.products, structure.activation
    needs_packed, needs_dt, needs_v = needs
    turn = piece(fast, pieces.turn)
    gradients: list[Tensor] = []
    sums: list[Tensor] = []
    turned: list[Tensor] = []
    q = products.layout(q.to(structure.dtype))
    below: Tensor | None = None
    for k in range(fixed.hidden, -1, -1):
        layer = fast.maps[k]
        if dt is not None and (needs_packed or needs_dt):
            sums.append(products.sum_batch(q))
        x = activation.scale(slopes[k - 1], inner[k - 1]) if k else products.layout(v.to(structure.dtype))
        goes_on = k > 0 or needs_v
        if needs_packed and goes_on:
            below, gradient = layer.transpose_with_gradient(q, x)
            gradients.append(gradient)
        elif needs_packed:
            gradients.append(layer.gradient(x, q))
        elif goes_on:
            below = layer.transpose(q)
        if k:
            more, q = turn(activation, kept[k - 1], slopes[k - 1], inner[k - 1], below)
            turned.append(more)
    sums.reverse()
    v_grad = below.to(v.dtype) if needs_v and below is not None else None
    dt_grad = time_gradient(fast, sums, dt) if needs_dt and dt is not None else None
    packed_grad = None
    if needs_packed:
        rows = [products.flatten(gradient) for gradient in gradients[::-1]]
        rows.append(torch.zeros_like(fast.bias))  # a bias has its part in the activations alone
        if fast.still is None:
            rows += [torch.zeros_like(fast.response)] if dt is None else _scaled(sums, dt)
        packed_grad = torch.cat(rows).to(packed.dtype)
    return packed_grad, dt_grad, v_grad, *turned[::-1]


def _scaled(sums: Sequence[Tensor], dt: Tensor) -> Sequence[Tensor]:
    return multiply_each(list(sums), dt.reshape(()).to(sums[0].dtype))


def _plain(fixed: Fixed, packed: Tensor, dt: Tensor | None, v: Tensor, kept: Sequence[Tensor]) -> Tensor:
    """The same in operations that autograd and torch.func know."""
    structure, products, stack = fixed.structure, fixed.structure.products, fixed.plain(packed)
    y = products.layout(v.to(structure.dtype))
    turns = (stack.parts.response * (0.0 if dt is None else dt)).to(structure.dtype)
    layers = zip(stack.parts.weights, turns.split(structure.outputs, dim=1), strict=True)
    for k, (weight, shift) in enumerate(layers):
        x = structure.activation.slope_of_kept(kept[k - 1]) * y if k else y
        y = products.apply(x, weight.to(structure.dtype)) + shift
    return y.to(v.dtype)
