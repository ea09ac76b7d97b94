"""A stack's velocity, alone or with its product with the Jacobian, as one graph node with a backward by hand.

The noise of a product is the same in a whole solve, and so is ``g_{L-1} = W_L^T e`` (see ``sweeps``): here it is an
input. Several noises at once, for the whole Jacobian, are a dimension in front of the batch.

A pass keeps one tensor for each hidden layer's activation and one for its part of the product. An evaluation and
its gradient take six times the convolutions of a forward pass, without a double backward; the velocity alone takes
three. What is kept of the activations is an output of the node, so that products along a direction
(:mod:`~rnode_plugin.fields.passes.tangents`), each three more, start from there and send their gradients there.

All parameters are one row (:attr:`~rnode_plugin.fields.prepared.FastParts.packed`), so an evaluation has one
gradient for them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.ops import needs_plain_pass
from ..autocast import without_autocast
from ..prepared import Stack, keep_activations, run_jvp, run_stack, run_vjp
from .sweeps import Fixed, Kept, Needs, ascend, backward, by_autograd, descend, pull_through
from .tangents import run_tangent

__all__ = ["Pass", "linearize", "pull_noise"]


def pull_noise(stack: Stack, noise: Tensor) -> Tensor:
    """``W_L^T noise``, from which :func:`linearize` starts its products: the same at all times of a solve.

    It has the noise's dtype, in which the gradients of many evaluations add up, whatever the layers compute in.
    """
    products, dtype = stack.structure.products, stack.structure.dtype
    v = products.layout(noise.to(dtype))
    return products.layout(products.transpose(v, stack.last_weight.to(dtype))).to(noise.dtype)


class Pass(NamedTuple):
    """Velocity, products if there was noise, and ``(v, dt)`` to ``df/dz v + df/dt dt``."""

    dz: Tensor
    products: Tensor | None
    jvp: Callable[..., Tensor]


def linearize(stack: Stack, t: Tensor | float, z: Tensor, pulled: Tensor | None = None) -> Pass:
    """Velocity, products and derivatives along any direction, from one pass.

    Args:
        stack, t, z: as for :func:`~rnode_plugin.fields.prepared.run_stack`.
        pulled: the noise as :func:`pull_noise` made it; for ``(K, B, ...)`` or ``(K, 1, ...)`` of linear layers
            there are K products, ``(K, B, ...)``. None: no product.
    """
    t = t if isinstance(t, Tensor) else z.new_tensor(t)
    fast, given = stack.fast, () if pulled is None else (pulled,)
    constant = len(stack.structure.shapes) == 1 and pulled is not None  # a linear map's product
    if constant or fast is None or needs_plain_pass(t, z, *given, fast.packed):
        return _plain(stack, t, z, pulled)
    fixed = Fixed(stack.structure, fast)
    if pulled is None:
        dz, *kept = _Velocity.apply(fixed, t, z, fast.packed)  # pyright: ignore[reportGeneralTypeIssues]
        product = None
    else:
        dz, product, *kept = _FieldAndProduct.apply(fixed, t, z, pulled, fast.packed)  # pyright: ignore[reportGeneralTypeIssues]
    activations = kept[: fixed.hidden]
    return Pass(dz, product, lambda v, dt=0.0: run_tangent(fixed, activations, v, dt))


def _plain(stack: Stack, t: Tensor, z: Tensor, pulled: Tensor | None) -> Pass:
    """The same in operations that autograd and torch.func know."""
    with without_autocast(z):
        if pulled is None:
            dz, product = run_stack(stack, t, z), None
        else:
            dz, product = run_vjp(stack, t, z, pulled)
            product = product.expand(*pulled.shape[: pulled.dim() - z.dim()], *z.shape)

    def jvp(v: Tensor, dt: Tensor | float = 0.0) -> Tensor:
        with without_autocast(z):
            return run_jvp(stack, t, z, v, dt)[1]

    return Pass(dz, product, jvp)


def _keep(ctx: Any, inputs: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *kept)


class _Velocity(torch.autograd.Function):
    @staticmethod
    def forward(fixed: Fixed, t: Tensor, z: Tensor, packed: Tensor) -> tuple[Tensor, ...]:
        with without_autocast(z):
            a, activations = ascend(fixed, t, z)
        return a.to(z.dtype), *activations

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.fixed, *tensors = inputs
        _keep(ctx, tensors, output[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        fixed: Fixed = ctx.fixed
        t, z, packed, *activations = ctx.saved_tensors
        if all(each is None for each in cotangents):
            return None, None, None, None
        dz, *turned = cotangents
        with without_autocast(z):
            if torch.is_grad_enabled():  # somebody wants to differentiate the gradient: autograd must see it
                plain = fixed.plain(packed)
                outputs = (run_stack(plain, t, z), *keep_activations(plain, t, z))
                return None, *by_autograd(outputs, cotangents, (t, z, packed))
            _, needs_t, needs_z, needs_packed = ctx.needs_input_grad
            needs = Needs(needs_t, needs_z, False, needs_packed)
            a = fixed.cotangent(dz, z)
            return None, *descend(fixed, t, z, a, activations, turned, needs, packed.dtype)


class _FieldAndProduct(torch.autograd.Function):
    @staticmethod
    def forward(fixed: Fixed, t: Tensor, z: Tensor, pulled: Tensor, packed: Tensor) -> tuple[Tensor, ...]:
        with without_autocast(z):
            pre: list[tuple[Tensor, Tensor]] = []
            a, activations = ascend(fixed, t, z, pre=pre)
            g, products = pull_through(fixed, pulled, pre)
        return a.to(z.dtype), g.to(z.dtype), *activations, *products

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.fixed, *tensors = inputs
        ctx.mark_non_differentiable(*output[2 + ctx.fixed.hidden :])
        _keep(ctx, tensors, output[2:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        fixed: Fixed = ctx.fixed
        t, z, pulled, packed, *rest = ctx.saved_tensors
        kept = Kept(rest[: fixed.hidden], rest[fixed.hidden :])
        given = cotangents[: 2 + fixed.hidden]
        with without_autocast(z):
            if torch.is_grad_enabled():
                plain = fixed.plain(packed)
                outputs = (*run_vjp(plain, t, z, pulled), *keep_activations(plain, t, z))
                return None, *by_autograd(outputs, given, (t, z, pulled, packed))
            needs = Needs(*ctx.needs_input_grad[1:])
            return None, *backward(fixed, t, z, pulled, kept, given, needs, packed.dtype)


for each in (_Velocity, _FieldAndProduct):  # Function.apply asks for the signature at every call: 40 us
    each.forward.__signature__ = inspect.signature(each.forward)  # pyright: ignore[reportFunctionMemberAccess]
