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

__all__ = ["StackSpec", "run_fused", "run_stack"]


class StackSpec(NamedTuple):
    """What a stack is, apart from its parameters.

    Attributes:
        products: the kind of its layers.
        activation: the function between them.
        dtype: what the layers compute in; the state's dtype unless autocast says otherwise.
    """

    products: Products
    activation: Activation
    dtype: torch.dtype


def run_stack(spec: StackSpec, t: Tensor | float, z: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The velocity alone, in operations that autograd differentiates as often as one likes.

    Args:
        spec: the stack.
        t: time, a scalar.
        z: state ``(B, *event)``.
        parameters: weight and bias of each layer in turn.
    """
    u = spec.products.layout(z.to(spec.dtype))
    layers = _Layers(spec, parameters, u)
    shifts = layers.shifts(t)
    for k in range(layers.count):
        if k:
            u = spec.activation.value(u)
        u = spec.products.apply(u, layers.weights[k], layers.biases[k]) + shifts[k]
    return u.to(z.dtype)


def run_fused(
    spec: StackSpec, t: Tensor | float, z: Tensor, noise: Tensor, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """``(f(t, z), noise^T df/dz)``; arguments as for :func:`run_stack`, ``noise`` of the state's shape."""
    if not isinstance(t, Tensor):
        t = z.new_tensor(t)
    return _FieldAndProduct.apply(spec, t, z, noise, *parameters)


class _Layers:
    """The parameters in the form in which an evaluation uses them; made for one evaluation, so never stale."""

    def __init__(self, spec: StackSpec, parameters: Sequence[Tensor], x: Tensor) -> None:
        split = [spec.products.split(w.to(spec.dtype)) for w in parameters[::2]]
        self.weights = [state for _, state in split]
        self.biases = [b.to(spec.dtype) for b in parameters[1::2]]
        self.count = len(split)
        # all layers' responses to time in one product: one small call instead of one a layer
        self.times = torch.cat([time for time, _ in split])
        self.sizes = [b.shape[0] for b in self.biases]
        self._spec, self._x = spec, x

    def responses(self) -> Tensor:
        """What a unit of time adds to the pre-activations of all layers, ``(1, sum of out, ...)``."""
        return self._spec.products.response(self.times, self._x)

    def shifts(self, t: Tensor | float) -> tuple[Tensor, ...]:
        """What time adds to the pre-activations of each layer, ``(1, out, ...)``."""
        return (self.responses() * t).to(self._spec.dtype).split(self.sizes, dim=1)


class _FieldAndProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, spec: StackSpec, t: Tensor, z: Tensor, noise: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        products, activation = spec.products, spec.activation
        with torch.autocast(z.device.type, enabled=False):
            u = products.layout(z.to(spec.dtype))
            v = products.layout(noise.to(spec.dtype))
            layers = _Layers(spec, parameters, u)
            shifts = layers.shifts(t)
            slopes: list[Tensor] = []
            kept: list[Tensor] = []
            for k in range(layers.count - 1):
                a = products.apply(u, layers.weights[k], layers.biases[k]).add_(shifts[k])
                u = activation.value(a)
                slopes.append(activation.slope(a))
                kept.append(u if activation.keeps_output else a)
            dz = products.apply(u, layers.weights[-1], layers.biases[-1]).add_(shifts[-1])
            pulled: list[Tensor] = []  # the g_k, the last one first
            for k in reversed(range(1, layers.count)):
                g = products.transpose(v, layers.weights[k])
                pulled.append(g)
                v = slopes[k - 1].mul_(g)
            product = products.transpose(v, layers.weights[0])
        ctx.spec = spec
        ctx.save_for_backward(t, z, noise, *parameters, *kept, *reversed(pulled))
        return dz.to(z.dtype), product.to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        spec: StackSpec = ctx.spec
        t, z, noise, *rest = ctx.saved_tensors
        count = (len(rest) + 2) // 4  # 2 L parameters, 2 (L - 1) kept tensors
        parameters, kept, pulled = rest[: 2 * count], rest[2 * count : 3 * count - 1], rest[3 * count - 1 :]
        if torch.is_grad_enabled():  # somebody wants to differentiate the gradient: autograd must see it
            return None, *_differentiable_backward(spec, t, z, noise, parameters, cotangents)
        with torch.autocast(z.device.type, enabled=False):
            needs = ctx.needs_input_grad[1:]
            return None, *_backward(spec, t, z, noise, parameters, kept, pulled, cotangents, needs)


def _backward(
    spec: StackSpec,
    t: Tensor,
    z: Tensor,
    noise: Tensor,
    parameters: Sequence[Tensor],
    kept: Sequence[Tensor],
    pulled: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    products, activation = spec.products, spec.activation
    x = products.layout(z.to(spec.dtype))
    layers = _Layers(spec, parameters, x)
    last = layers.count - 1
    needs_t, needs_z, needs_noise, *needs_parameters = needs
    grads: list[Tensor | None] = [None] * layers.count
    a, h = (products.layout(c.to(spec.dtype)) for c in cotangents)

    # upward: the transpose of the product
    inputs, slopes, bends = [x], [], []
    for k in range(last):
        slope, curvature = activation.derivatives(kept[k])
        inputs.append(kept[k] if activation.keeps_output else activation.value(kept[k]))
        slopes.append(slope)
        if needs_parameters[2 * k]:
            grads[k] = products.weight_grad(h, pulled[k] * slope, layers.weights[k])
        p = products.apply(h, layers.weights[k])
        h = p * slope
        bends.append(curvature.mul_(p).mul_(pulled[k]))
    if needs_parameters[2 * last]:
        grads[last] = products.weight_grad(h, products.layout(noise.to(spec.dtype)), layers.weights[last])
    noise_grad = products.apply(h, layers.weights[last]).to(noise.dtype) if needs_noise else None

    # downward: backpropagation through the velocity
    sums: list[Tensor] = []
    z_grad = None
    for k in reversed(range(layers.count)):
        sums.append(a.sum(0, keepdim=True))
        grad = grads[k]
        if grad is not None:
            grad += products.weight_grad(inputs[k], a, layers.weights[k])
        if k:
            a = bends[k - 1].addcmul_(products.transpose(a, layers.weights[k]), slopes[k - 1])
        elif needs_z:
            z_grad = products.transpose(a, layers.weights[0]).to(z.dtype)

    # time and biases act alike on all samples, so one sum over the batch serves all layers at once
    total = torch.cat(sums[::-1], dim=1)
    t_grad = (total * layers.responses()).sum().to(t.dtype).reshape(t.shape) if needs_t else None
    time_grads = (products.response_grad(total, layers.times) * t).split(layers.sizes)
    bias_grads = total.flatten(2).sum((0, 2)) if total.dim() > 2 else total[0]
    parameter_grads: list[Tensor | None] = []
    for k, bias_grad in enumerate(bias_grads.split(layers.sizes)):
        grad, weight, bias = grads[k], parameters[2 * k], parameters[2 * k + 1]
        parameter_grads += [
            None if grad is None else torch.cat([time_grads[k].to(grad.dtype), grad], dim=1).to(weight.dtype),
            bias_grad.to(bias.dtype) if needs_parameters[2 * k + 1] else None,
        ]
    return [t_grad, z_grad, noise_grad, *parameter_grads]


def _differentiable_backward(
    spec: StackSpec,
    t: Tensor,
    z: Tensor,
    noise: Tensor,
    parameters: Sequence[Tensor],
    cotangents: Sequence[Tensor],
) -> list[Tensor | None]:
    """The same gradients by automatic differentiation, for ``create_graph=True``: slow, but with a graph."""
    with torch.autocast(z.device.type, enabled=False):
        # products are taken with respect to a node of its own, so that the state's gradient is kept apart
        state = z.view_as(z) if z.requires_grad else z.detach().requires_grad_()
        dz = run_stack(spec, t, state, parameters)
        (product,) = torch.autograd.grad(dz, state, noise, create_graph=True)
        inputs = [x for x in (t, z, noise, *parameters) if x.requires_grad]
        found = iter(
            torch.autograd.grad((dz, product), inputs, tuple(cotangents), create_graph=True, allow_unused=True)
        )
    return [next(found) if x.requires_grad else None for x in (t, z, noise, *parameters)]
