r"""A stack's velocity, alone or with its product with the Jacobian, as one node of the graph: a backward by hand.

With layers ``a_k = W_k u_{k-1} + b_k + t r_k``, ``u_k = s(a_k)``, ``u_0 = z`` and ``dz = a_L``, the product
``e^T df/dz`` runs backward through the stack: ``g_{L-1} = W_L^T e``, ``v_k = s'(a_k) g_k``,
``g_{k-1} = W_k^T v_k``, and ends as ``g_0``. The noise e is the same in a whole solve, and so is ``g_{L-1}``: here
it is an input.

Given cotangents D of the velocity and P of the product, their gradients are two sweeps. Upward, the product's own
transpose, ``h_0 = P``, ``p_k = W_k h_{k-1}``, ``h_k = s'(a_k) p_k``, with ``s''(a_k) g_k p_k`` as what the product
adds to the cotangent of ``a_k``, and ``h_{L-1}`` at its end as the cotangent of ``g_{L-1}``; downward, ordinary
backpropagation from D that picks those up. Saved are one tensor for ``a_k`` and one for ``g_k`` a layer, the last
``g_k`` once a solve. All in all an evaluation and its gradient take six times the convolutions of a forward pass,
without the detour of a double backward; the velocity alone takes three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .activations import Activation
from .kernels.compile import compiled
from .prepared import Kind, Stack, run_layers, run_stack, shifts

__all__ = ["pull_noise", "run_fused", "run_velocity"]

Gradients = list[Tensor | None]


def pull_noise(stack: Stack, noise: Tensor) -> Tensor:
    """``W_L^T noise``, from which :func:`run_fused` starts its products: the same at all times of a solve.

    It has the noise's dtype, in which the gradients of many evaluations add up, whatever the layers compute in.
    """
    v = stack.products.layout(noise.to(stack.dtype))
    return stack.products.transpose(v, stack.weights[-1].to(stack.dtype)).to(noise.dtype)


def run_velocity(stack: Stack, t: Tensor | float, z: Tensor) -> Tensor:
    """As :func:`~.plain.run_stack`, saving half as much for the backward pass."""
    (dz,) = _Velocity.apply(stack.kind, _time(t, z), z, stack.bias, stack.response, *stack.weights)
    return dz


def run_fused(stack: Stack, t: Tensor | float, z: Tensor, pulled: Tensor) -> tuple[Tensor, Tensor]:
    """``(f(t, z), noise^T df/dz)`` for noise as :func:`pull_noise` made it; ``t`` and ``z`` as in ``run_stack``."""
    if len(stack.weights) == 1:  # a linear field: its Jacobian depends on nothing
        return run_stack(stack, t, z), pulled.to(z.dtype)
    return _FieldAndProduct.apply(stack.kind, _time(t, z), z, pulled, stack.bias, stack.response, *stack.weights)


def _time(t: Tensor | float, z: Tensor) -> Tensor:
    return t if isinstance(t, Tensor) else z.new_tensor(t)


class _Velocity(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kind: Kind, t: Tensor, z: Tensor, bias: Tensor, response: Tensor, *weights: Tensor
    ) -> tuple[Tensor]:
        stack = Stack(*kind, bias, response, weights)
        with torch.autocast(z.device.type, enabled=False):
            a, kept, _ = _ascend(stack, t, z, slopes=False)
        ctx.kind = kind
        ctx.save_for_backward(t, z, bias, response, *weights, *kept)
        return (a.to(z.dtype),)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        t, z, bias, response, *rest = ctx.saved_tensors
        count = (len(rest) + 1) // 2  # L weights, L - 1 kept activations
        kind: Kind = ctx.kind
        stack = Stack(*kind, bias, response, tuple(rest[:count]))
        with torch.autocast(z.device.type, enabled=False):
            if torch.is_grad_enabled():  # somebody wants to differentiate the gradient: autograd must see it
                outputs = (run_stack(stack, t, z),)
                return None, *_by_autograd(outputs, cotangents, (t, z, bias, response, *stack.weights))
            kept, needs = tuple(rest[count:]), ctx.needs_input_grad[1:]
            a = stack.products.layout(cotangents[0].to(stack.dtype))
            return None, *_descend(stack, t, z, a, kept, needs)


class _FieldAndProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kind: Kind, t: Tensor, z: Tensor, pulled: Tensor, bias: Tensor, response: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        stack = Stack(*kind, bias, response, weights)
        with torch.autocast(z.device.type, enabled=False):
            a, g, kept, between = _field_and_product(stack, t, z, pulled)
        ctx.kind = kind
        ctx.save_for_backward(t, z, pulled, bias, response, *weights, *kept, *between)
        return a.to(z.dtype), g.to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        t, z, pulled, bias, response, *rest = ctx.saved_tensors
        count = (len(rest) + 3) // 3  # L weights, L - 1 kept activations, L - 2 of the product
        kind: Kind = ctx.kind
        stack = Stack(*kind, bias, response, tuple(rest[:count]))
        with torch.autocast(z.device.type, enabled=False):
            if torch.is_grad_enabled():
                return None, *_differentiable_backward(stack, t, z, pulled, cotangents)
            kept, between = tuple(rest[count : 2 * count - 1]), tuple(rest[2 * count - 1 :])
            needs = ctx.needs_input_grad[1:]
            return None, *_backward(stack, t, z, kept, (*between, pulled), cotangents, needs)


def _field_and_product(
    stack: Stack, t: Tensor, z: Tensor, pulled: Tensor
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Velocity, product, what is kept of each activation, and the ``g_k`` between the first and the given one."""
    a, kept, slopes = _ascend(stack, t, z, slopes=True)
    g = pulled.to(stack.dtype)
    between: list[Tensor] = []
    for layer in stack.maps[-2::-1]:
        g = layer.transpose(slopes.pop().mul_(g))
        between.append(g)
    return a, g, kept, between[-2::-1]


def _ascend(stack: Stack, t: Tensor, z: Tensor, *, slopes: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Velocity, what is kept of each activation, and the activations' slopes where they are asked for."""
    kept: list[Tensor] = []
    found: list[Tensor] = []
    activate = _piece(stack, _activate)
    u = stack.products.layout(z.to(stack.dtype))
    *inner, (last, last_shift) = zip(stack.maps, shifts(stack, t), strict=True)
    for layer, shift in inner:
        a = layer.apply(u)
        u, slope = activate(stack.activation, a, shift, slopes)
        kept.append(u if stack.activation.keeps_output else a)
        if slope is not None:
            found.append(slope)
    return last.apply(u).add_(last_shift), kept, found


def _backward(
    stack: Stack,
    t: Tensor,
    z: Tensor,
    kept: Sequence[Tensor],
    pulled: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    needs: Sequence[bool],
) -> Gradients:
    products, dtype = stack.products, stack.dtype
    needs_t, needs_z, needs_pulled, *others = needs
    a, h = (products.layout(c.to(dtype)) for c in cotangents)
    # upward: the transpose of the product
    slopes: list[Tensor] = []
    bends: list[Tensor] = []
    grads: Gradients = []
    bend, follow = _piece(stack, _bend), _piece(stack, _follow)
    for k, g in enumerate(pulled):
        slope, bent, v = bend(stack.activation, kept[k], g.to(dtype))
        layer, grad = stack.maps[k], None
        if others[2 + k]:
            h, grad = layer.apply_with_gradient(h, v)
        else:
            h = layer.apply(h)
        grads.append(grad)
        follow(h, bent, slope)
        bends.append(bent)
        slopes.append(slope)
    rest = (needs_t, needs_z, *others)
    t_grad, z_grad, *found = _descend(stack, t, z, a, kept, rest, slopes=slopes, bends=bends, grads=grads)
    return [t_grad, z_grad, h.to(pulled[-1].dtype) if needs_pulled else None, *found]


def _descend(
    stack: Stack,
    t: Tensor,
    z: Tensor,
    a: Tensor,
    kept: Sequence[Tensor],
    needs: Sequence[bool],
    *,
    slopes: Sequence[Tensor] | None = None,
    bends: Sequence[Tensor] | None = None,
    grads: Sequence[Tensor | None] = (),
) -> Gradients:
    """Backpropagation through the velocity from its cotangent ``a``.

    Given from the product: the slopes, what it adds to the cotangents of the pre-activations (overwritten here),
    and its part of the weights' gradients.
    """
    products, activation = stack.products, stack.activation
    needs_t, needs_z, needs_bias, needs_response, *needs_weights = needs
    found: Gradients = [None] * len(stack.maps)
    sums: list[Tensor] = []
    below: Tensor | None = None
    for k in range(len(stack.maps) - 1, -1, -1):
        layer = stack.maps[k]
        sums.append(products.sum_batch(a))
        if needs_weights[k]:
            u = activation.output(kept[k - 1]) if k else products.layout(z.to(stack.dtype))
            if k or needs_z:
                below, grad = layer.transpose_with_gradient(a, u)
            else:
                grad = layer.gradient(u, a)
            other = grads[k] if k < len(grads) else None
            if other is not None:
                grad = grad.add_(other)
            found[k] = grad.to(stack.weights[k].dtype)
        elif k or needs_z:
            below = layer.transpose(a)
        if k:
            assert below is not None
            if bends is None or slopes is None:
                a = _piece(stack, _pull)(activation, kept[k - 1], below)
            else:
                a = bends[k - 1]
                _piece(stack, _join)(a, below, slopes[k - 1])
    # time and biases act alike on all samples: one sum over the batch serves them all
    total = torch.cat(sums[::-1], dim=1).to(stack.response.dtype)
    return [
        (total * stack.response).sum().to(t.dtype).reshape(t.shape) if needs_t else None,
        below.to(z.dtype) if needs_z and below is not None else None,
        total.unflatten(1, (-1, 1)).flatten(2).sum((0, 2)) if needs_bias else None,
        total * t if needs_response else None,
        *found,
    ]


# What is done between the products, element by element: torch.compile makes one loop of each.


def _piece(stack: Stack, function: Callable[..., Any]) -> Callable[..., Any]:
    return compiled(function) if stack.compiled else function


def _activate(activation: Activation, a: Tensor, shift: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
    """The activation and, if asked for, its slope at ``a + shift``, which overwrites ``a``."""
    a += shift
    return activation.value(a), activation.slope(a) if slope else None


def _bend(activation: Activation, kept: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``s'``, ``s'' g`` and ``s' g``."""
    slope, curvature = activation.derivatives(kept)
    return slope, curvature.mul_(g), slope * g


def _follow(p: Tensor, bent: Tensor, slope: Tensor) -> None:
    """``s'' g p`` into ``bent`` and ``s' p`` into ``p``."""
    bent *= p
    p *= slope


def _pull(activation: Activation, kept: Tensor, below: Tensor) -> Tensor:
    """``s' below``."""
    return activation.derivatives(kept)[0].mul_(below)


def _join(bent: Tensor, below: Tensor, slope: Tensor) -> None:
    """``s'' g p + s' below`` into ``bent``."""
    bent.addcmul_(below, slope)


def _differentiable_backward(
    stack: Stack, t: Tensor, z: Tensor, pulled: Tensor, cotangents: Sequence[Tensor]
) -> Gradients:
    """The same gradients by automatic differentiation, for ``create_graph=True``: slow, but with a graph."""
    # the product is taken with respect to a node of its own, so that the state's gradient is kept apart
    state = z.view_as(z) if z.requires_grad else z.detach().requires_grad_()
    dz, last = run_layers(stack, t, state)
    (product,) = torch.autograd.grad(last, state, pulled.to(last.dtype), create_graph=True)
    arguments = (t, z, pulled, stack.bias, stack.response, *stack.weights)
    return _by_autograd((dz, product), cotangents, arguments)


def _by_autograd(outputs: Sequence[Tensor], cotangents: Sequence[Tensor], arguments: Sequence[Tensor]) -> Gradients:
    inputs = [x for x in arguments if x.requires_grad]
    found = iter(torch.autograd.grad(outputs, inputs, cotangents, create_graph=True, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in arguments]
