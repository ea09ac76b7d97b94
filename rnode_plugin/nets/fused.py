r"""A stack's velocity and its product with the Jacobian in one node of the graph, with a backward by hand.

With layers ``a_k = W_k u_{k-1} + b_k + t r_k``, ``u_k = s(a_k)``, ``u_0 = z`` and ``dz = a_L``, the product
``e^T df/dz`` runs backward through the stack: ``v_L = e``, ``g_k = W_{k+1}^T v_{k+1}``, ``v_k = s'(a_k) g_k``,
and ends as ``W_1^T v_1``.

Given cotangents D of the velocity and P of the product, their gradients are two sweeps. Upward, the product's own
transpose, ``h_0 = P``, ``p_k = W_k h_{k-1}``, ``h_k = s'(a_k) p_k``, with ``s''(a_k) g_k p_k`` as what the product
adds to the cotangent of ``a_k``; downward, ordinary backpropagation from D that picks those up. Saved are one
tensor for ``a_k`` and one for ``g_k`` a layer, and all in all an evaluation and its gradient take six times the
convolutions of a forward pass, without the detour of a double backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .activations import Activation
from .layers import Products

__all__ = ["Stack", "make_stack", "run_fused", "run_stack"]


Kind = tuple[Products, Activation, torch.dtype]  # what a stack is apart from its tensors


class Stack(NamedTuple):
    """A stack for states of one shape, its parameters in the form in which evaluations use them.

    It is made anew for each solve, with a graph that leads to the parameters: nothing in it can go stale, and what
    is done here is not done again at each evaluation.

    Attributes:
        products: the kind of its layers.
        activation: the function between them.
        dtype: what the layers compute in; the state's dtype unless autocast says otherwise.
        bias: of all layers, one behind the other.
        response: what a unit of time adds to the pre-activations of all layers, ``(1, sum of outputs, ...)``.
        weights: of the state, for each layer.
    """

    products: Products
    activation: Activation
    dtype: torch.dtype
    bias: Tensor
    response: Tensor
    weights: tuple[Tensor, ...]

    @property
    def sizes(self) -> list[int]:
        """Number of outputs of each layer."""
        return [w.shape[0] for w in self.weights]


def make_stack(
    products: Products,
    activation: Activation,
    dtype: torch.dtype,
    parameters: Sequence[tuple[Tensor, Tensor]],
    z: Tensor,
) -> Stack:
    """A :class:`Stack` for states like ``z`` from the weight and the bias of each layer."""
    times, weights = zip(*(products.split(weight) for weight, _ in parameters), strict=True)
    response = products.response(torch.cat(times), z)
    return Stack(products, activation, dtype, torch.cat([b for _, b in parameters]), response, weights)


def run_stack(stack: Stack, t: Tensor | float, z: Tensor) -> Tensor:
    """The velocity alone, in operations that autograd differentiates as often as one likes.

    Args:
        stack: the field.
        t: time, a scalar.
        z: state ``(B, *event)``.
    """
    products = stack.products
    u = products.layout(z.to(stack.dtype))
    for k, (weight, shift) in enumerate(zip(stack.weights, _shifts(stack, t), strict=True)):
        if k:
            u = stack.activation.value(u)
        u = products.apply(u, weight.to(stack.dtype)) + shift
    return u.to(z.dtype)


def run_fused(stack: Stack, t: Tensor | float, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """``(f(t, z), noise^T df/dz)``; arguments as for :func:`run_stack`, ``noise`` of the state's shape."""
    if not isinstance(t, Tensor):
        t = z.new_tensor(t)
    return _FieldAndProduct.apply(stack[:3], t, z, noise, stack.bias, stack.response, *stack.weights)


def _shifts(stack: Stack, t: Tensor | float) -> tuple[Tensor, ...]:
    """What bias and time add to the pre-activations of each layer, ``(1, out, ...)``."""
    bias = stack.bias.view(1, -1, *[1] * (stack.response.dim() - 2))
    return (bias + stack.response * t).to(stack.dtype).split(stack.sizes, dim=1)


class _FieldAndProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kind: Kind, t: Tensor, z: Tensor, noise: Tensor, bias: Tensor, response: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        stack = Stack(*kind, bias, response, weights)
        products, activation, dtype = stack.products, stack.activation, stack.dtype
        with torch.autocast(z.device.type, enabled=False):
            u = products.layout(z.to(dtype))
            v = products.layout(noise.to(dtype))
            low = [w.to(dtype) for w in weights]
            *hidden, last = zip(low, _shifts(stack, t), strict=True)
            slopes: list[Tensor] = []
            kept: list[Tensor] = []
            for weight, shift in hidden:
                a = products.apply(u, weight).add_(shift)
                u = activation.value(a)
                slopes.append(activation.slope(a))
                kept.append(u if activation.keeps_output else a)
            dz = products.apply(u, last[0]).add_(last[1])
            pulled: list[Tensor] = []  # the g_k, the last one first
            for weight in low[:0:-1]:
                pulled.append(products.transpose(v, weight))
                v = slopes.pop().mul_(pulled[-1])
            product = products.transpose(v, low[0])
        ctx.kind = kind
        ctx.save_for_backward(t, z, noise, bias, response, *weights, *kept, *reversed(pulled))
        return dz.to(z.dtype), product.to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        t, z, noise, bias, response, *rest = ctx.saved_tensors
        count = (len(rest) + 2) // 3  # L weights, L - 1 kept activations, L - 1 of the product
        kind: Kind = ctx.kind
        stack = Stack(*kind, bias, response, tuple(rest[:count]))
        if torch.is_grad_enabled():  # somebody wants to differentiate the gradient: autograd must see it
            return None, *_differentiable_backward(stack, t, z, noise, cotangents)
        kept, pulled = rest[count : 2 * count - 1], rest[2 * count - 1 :]
        with torch.autocast(z.device.type, enabled=False):
            return None, *_backward(stack, t, z, noise, kept, pulled, cotangents, ctx.needs_input_grad[1:])


def _backward(
    stack: Stack,
    t: Tensor,
    z: Tensor,
    noise: Tensor,
    kept: Sequence[Tensor],
    pulled: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    products, activation, dtype = stack.products, stack.activation, stack.dtype
    needs_t, needs_z, needs_noise, needs_bias, needs_response, *needs_weights = needs
    weights = [w.to(dtype) for w in stack.weights]
    last = len(weights) - 1
    a, h = (products.layout(c.to(dtype)) for c in cotangents)

    # upward: the transpose of the product
    inputs, slopes, bends = [products.layout(z.to(dtype))], [], []
    grads: list[Tensor | None] = []
    for k in range(last):
        slope, curvature = activation.derivatives(kept[k])
        inputs.append(kept[k] if activation.keeps_output else activation.value(kept[k]))
        slopes.append(slope)
        v = pulled[k] * slope if needs_weights[k] else pulled[k]
        grads.append(products.gradients(h, v, weights[k], (False, True))[1] if needs_weights[k] else None)
        p = products.apply(h, weights[k])
        bends.append(curvature.mul_(p).mul_(pulled[k]))
        h = p.mul_(slope)
    v = products.layout(noise.to(dtype))
    grads.append(products.gradients(h, v, weights[last], (False, True))[1] if needs_weights[last] else None)
    noise_grad = products.apply(h, weights[last]).to(noise.dtype) if needs_noise else None

    # downward: backpropagation through the velocity
    sums: list[Tensor] = []
    below: Any = None
    for k in range(last, -1, -1):
        sums.append(a.sum(0, keepdim=True))
        below, grad = products.gradients(inputs[k], a, weights[k], (k > 0 or needs_z, needs_weights[k]))
        if grad is not None:
            grads[k] = grad.add_(grads[k]).to(stack.weights[k].dtype)
        if k:
            a = bends[k - 1].addcmul_(below, slopes[k - 1])

    # time and biases act alike on all samples: one sum over the batch serves them all
    total = torch.cat(sums[::-1], dim=1).to(stack.response.dtype)
    return [
        (total * stack.response).sum().to(t.dtype).reshape(t.shape) if needs_t else None,
        below.to(z.dtype) if needs_z else None,
        noise_grad,
        total.unflatten(1, (-1, 1)).flatten(2).sum((0, 2)) if needs_bias else None,
        total * t if needs_response else None,
        *grads,
    ]


def _differentiable_backward(
    stack: Stack, t: Tensor, z: Tensor, noise: Tensor, cotangents: Sequence[Tensor]
) -> list[Tensor | None]:
    """The same gradients by automatic differentiation, for ``create_graph=True``: slow, but with a graph."""
    with torch.autocast(z.device.type, enabled=False):
        # the product is taken with respect to a node of its own, so that the state's gradient is kept apart
        state = z.view_as(z) if z.requires_grad else z.detach().requires_grad_()
        dz = run_stack(stack, t, state)
        (product,) = torch.autograd.grad(dz, state, noise, create_graph=True)
        arguments = (t, z, noise, stack.bias, stack.response, *stack.weights)
        inputs = [x for x in arguments if x.requires_grad]
        grads = torch.autograd.grad((dz, product), inputs, cotangents, create_graph=True, allow_unused=True)
    found = iter(grads)
    return [next(found) if x.requires_grad else None for x in arguments]
