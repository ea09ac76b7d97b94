r"""A stack's velocity, alone or with its product with the Jacobian, as one graph node with a backward by hand.

With layers ``a_k = W_k u_{k-1} + b_k + t r_k``, ``u_k = s(a_k)``, ``u_0 = z`` and ``dz = a_L``, the product
``e^T df/dz`` runs backward through the stack: ``g_{L-1} = W_L^T e``, ``v_k = s'(a_k) g_k``,
``g_{k-1} = W_k^T v_k``, and ends as ``g_0``. The noise e is the same in a whole solve, and so is ``g_{L-1}``: here
it is an input. Several noises at once, for the whole Jacobian, are a dimension in front of the batch.

Given cotangents D of the velocity and P of the product, their gradients are two sweeps. Upward, the product's own
transpose, ``h_0 = P``, ``p_k = W_k h_{k-1}``, ``h_k = s'(a_k) p_k``, with ``s''(a_k) g_k p_k`` as what the product
adds to the cotangent of ``a_k``, and ``h_{L-1}`` at its end as the cotangent of ``g_{L-1}``. Downward, ordinary
backpropagation from D picks those up. A pass keeps one tensor for ``a_k`` and one for ``g_k`` per hidden layer. An
evaluation and its gradient take six times the convolutions of a forward pass, without a double backward; the
velocity alone takes three.

All parameters are one row (:attr:`~rnode_plugin.fields.prepared.FastParts.packed`), so an evaluation has one
gradient for them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.tensors.foreach import add_each, multiply_each
from ..core.tensors.transforms_active import needs_plain_pass
from .activations import Activation
from .autocast import without_autocast
from .kernels.compile import compiled
from .prepared import FastParts, Stack, Structure, run_stack, run_vjp, shift_maps, unpack

__all__ = ["pull_noise", "run_fused", "run_velocity"]


def pull_noise(stack: Stack, noise: Tensor) -> Tensor:
    """``W_L^T noise``, from which :func:`run_fused` starts its products: the same at all times of a solve.

    It has the noise's dtype, in which the gradients of many evaluations add up, whatever the layers compute in.
    """
    products, dtype = stack.structure.products, stack.structure.dtype
    v = products.layout(noise.to(dtype))
    return products.layout(products.transpose(v, stack.last_weight.to(dtype))).to(noise.dtype)


def run_velocity(stack: Stack, t: Tensor | float, z: Tensor) -> Tensor:
    """As :func:`~rnode_plugin.fields.prepared.run_stack`, saving half as much for the backward pass."""
    t, fast = _time(t, z), stack.fast
    if fast is None or needs_plain_pass(t, z, fast.packed):
        return run_stack(stack, t, z)
    dz, *_ = _Velocity.apply(_Fixed(stack.structure, fast), t, z, fast.packed)  # pyright: ignore[reportGeneralTypeIssues]
    return dz


def run_fused(stack: Stack, t: Tensor | float, z: Tensor, pulled: Tensor) -> tuple[Tensor, Tensor]:
    """``(f(t, z), noise^T df/dz)`` for noise as :func:`pull_noise` made it; ``t`` and ``z`` as in ``run_stack``.

    For ``pulled (K, B, ...)`` or ``(K, 1, ...)`` of linear layers there are K products, ``(K, B, ...)``.
    """
    t, fast = _time(t, z), stack.fast
    linear = len(stack.structure.shapes) == 1  # its Jacobian depends on nothing
    if linear or fast is None or needs_plain_pass(t, z, pulled, fast.packed):
        dz, product = run_vjp(stack, t, z, pulled)
        return dz, product.expand(*pulled.shape[: pulled.dim() - z.dim()], *z.shape)
    fixed = _Fixed(stack.structure, fast)
    dz, product, *_ = _FieldAndProduct.apply(fixed, t, z, pulled, fast.packed)  # pyright: ignore[reportGeneralTypeIssues]
    return dz, product


def _time(t: Tensor | float, z: Tensor) -> Tensor:
    return t if isinstance(t, Tensor) else z.new_tensor(t)


class _Fixed(NamedTuple):
    """What autograd does not see of an evaluation."""

    structure: Structure
    fast: FastParts

    @property
    def hidden(self) -> int:
        """The number of activations."""
        return len(self.structure.shapes) - 1

    def plain(self, packed: Tensor) -> Stack:
        """The same stack with a graph that leads to ``packed``."""
        parts = unpack(self.structure, packed)
        return Stack(self.structure, parts.weights[-1], parts)


class _Kept(NamedTuple):
    """What a pass keeps of each hidden layer, first layer first."""

    activations: Sequence[Tensor]
    products: Sequence[Tensor] = ()


class _Needs(NamedTuple):
    """Whose gradients are asked for; the inputs of :class:`_FieldAndProduct` that autograd sees."""

    t: bool
    z: bool
    pulled: bool
    packed: bool


class _Up(NamedTuple):
    """What the sweep upward leaves for the one downward, for each hidden layer."""

    bends: Sequence[Tensor]
    slopes: Sequence[Tensor]
    gradients: Sequence[Tensor]  # of the weights


def _keep(ctx: Any, inputs: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(*inputs, *kept)


class _Velocity(torch.autograd.Function):
    @staticmethod
    def forward(fixed: _Fixed, t: Tensor, z: Tensor, packed: Tensor) -> tuple[Tensor, ...]:
        with without_autocast(z):
            a, activations = _ascend(fixed, t, z)
        return a.to(z.dtype), *activations

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.fixed, *tensors = inputs
        _keep(ctx, tensors, output[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        fixed: _Fixed = ctx.fixed
        t, z, packed, *activations = ctx.saved_tensors
        dz = cotangents[0]
        if dz is None:
            return None, None, None, None
        with without_autocast(z):
            if torch.is_grad_enabled():  # somebody wants to differentiate the gradient: autograd must see it
                outputs = (run_stack(fixed.plain(packed), t, z),)
                return None, *_by_autograd(outputs, (dz,), (t, z, packed))
            _, needs_t, needs_z, needs_packed = ctx.needs_input_grad
            needs = _Needs(needs_t, needs_z, False, needs_packed)
            a = fixed.structure.products.layout(dz.to(fixed.structure.dtype))
            return None, *_descend(fixed, t, z, a, activations, needs, packed.dtype)


class _FieldAndProduct(torch.autograd.Function):
    @staticmethod
    def forward(fixed: _Fixed, t: Tensor, z: Tensor, pulled: Tensor, packed: Tensor) -> tuple[Tensor, ...]:
        with without_autocast(z):
            pre: list[tuple[Tensor, Tensor]] = []
            a, activations = _ascend(fixed, t, z, pre=pre)
            g, products = _pull_through(fixed, pulled, pre)
        return a.to(z.dtype), g.to(z.dtype), *activations, *products

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.fixed, *tensors = inputs
        _keep(ctx, tensors, output[2:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        fixed: _Fixed = ctx.fixed
        t, z, pulled, packed, *rest = ctx.saved_tensors
        kept = _Kept(rest[: fixed.hidden], rest[fixed.hidden :])
        dz, product = cotangents[:2]
        with without_autocast(z):
            if torch.is_grad_enabled():
                outputs = run_vjp(fixed.plain(packed), t, z, pulled)
                return None, *_by_autograd(outputs, (dz, product), (t, z, pulled, packed))
            needs = _Needs(*ctx.needs_input_grad[1:])
            return None, *_backward(fixed, t, z, pulled, kept, (dz, product), needs, packed.dtype)


for each in (_Velocity, _FieldAndProduct):  # Function.apply asks for the signature at every call: 40 us
    each.forward.__signature__ = inspect.signature(each.forward)  # pyright: ignore[reportFunctionMemberAccess]


def _ascend(
    fixed: _Fixed, t: Tensor, z: Tensor, *, pre: list[tuple[Tensor, Tensor]] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Velocity and what is kept of each activation; ``pre`` receives each pre-activation with its activation."""
    structure, fast = fixed
    kept: list[Tensor] = []
    u = structure.products.layout(z.to(structure.dtype))
    *inner, (last, last_shift) = zip(fast.maps, _shifts(fixed, t), strict=True)
    for layer, shift in inner:
        if fast.compiled:
            a, u = compiled(_activate)(structure.activation, layer.apply(u), shift)
        else:
            a = layer.shifted(u, shift)
            u = structure.activation.value_over(a)
        kept.append(u if structure.activation.keeps_output else a)
        if pre is not None:
            pre.append((a, u))
    return last.shifted(u, last_shift), kept


def _shifts(fixed: _Fixed, t: Tensor) -> Sequence[Tensor]:
    """What bias and time add to the pre-activations of each layer, ``(1, out, ...)``."""
    structure, fast = fixed
    if fast.still is not None:
        return fast.still
    row = torch.addcmul(fast.bias, fast.response, t.to(fast.bias.dtype)).to(structure.dtype)
    return shift_maps(structure, row)


def _pull_through(
    fixed: _Fixed, pulled: Tensor, pre: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The product, and what is kept of it at each hidden layer."""
    structure, fast = fixed
    activation = structure.activation
    pull = _piece(fast, _pull)
    g = start = pulled.to(structure.dtype)
    kept: list[Tensor] = []
    for layer in fast.maps[-2::-1]:
        v = pull(activation, *pre.pop(), g, g is not start)
        kept.append(v if activation.keeps_pulled else g)
        g = layer.transpose(v)
    # the last g is an input, which autograd keeps already
    return g, tuple(kept[::-1] if _keeps_last(fixed, start) else kept[:0:-1])


def _keeps_last(fixed: _Fixed, pulled: Tensor) -> bool:
    """Whether a pass keeps what it makes of ``pulled``; for several noises it is cheaper to make again."""
    return fixed.structure.activation.keeps_pulled and not _several(pulled)


def _several(pulled: Tensor) -> bool:
    return pulled.dim() == 3  # (K, B, hidden); else (B, hidden) or (B, hidden, H, W)


def _backward(
    fixed: _Fixed,
    t: Tensor,
    z: Tensor,
    pulled: Tensor,
    kept: _Kept,
    cotangents: Sequence[Tensor | None],
    needs: _Needs,
    dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """Gradients with respect to time, state, pulled noise and parameters (of ``dtype``)."""
    products, compute = fixed.structure.products, fixed.structure.dtype
    dz, product = cotangents
    if dz is None:  # of the velocity's shape: a state may have more columns, those of a context
        dz = z.new_zeros(len(z), fixed.structure.outputs[-1], *fixed.structure.event)
    a = products.layout(dz.to(compute))
    if product is None:  # nobody asked for the product's gradient
        t_grad, z_grad, packed_grad = _descend(fixed, t, z, a, kept.activations, needs, dtype)
        return t_grad, z_grad, None, packed_grad
    saved, activation = kept.products, fixed.structure.activation
    if not activation.keeps_pulled:
        saved = [*saved, pulled.to(compute)]
    elif _several(pulled):
        last = pulled.to(compute).expand(-1, len(z), -1).clone()
        saved = [*saved, activation.pull_kept(last, kept.activations[-1])]
    h, up = _climb(fixed, products.layout(product.to(compute)), kept.activations, saved, needs)
    t_grad, z_grad, packed_grad = _descend(fixed, t, z, a, kept.activations, needs, dtype, up=up)
    pulled_grad = h.sum_to_size(pulled.shape).to(pulled.dtype) if needs.pulled else None
    return t_grad, z_grad, pulled_grad, packed_grad


def _climb(
    fixed: _Fixed, h: Tensor, activations: Sequence[Tensor], saved: Sequence[Tensor], needs: _Needs
) -> tuple[Tensor, _Up]:
    """The transpose of the product, from its cotangent ``h`` up to that of the pulled noise."""
    structure, fast = fixed
    activation = structure.activation
    bend, follow = _piece(fast, _bend), _piece(fast, _follow)
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


def _descend(
    fixed: _Fixed,
    t: Tensor,
    z: Tensor,
    a: Tensor,
    activations: Sequence[Tensor],
    needs: _Needs,
    dtype: torch.dtype,
    *,
    up: _Up | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Backpropagation through the velocity from its cotangent ``a``: gradients of time, state and parameters.

    ``up`` is what the product adds.
    """
    structure, fast = fixed
    products, activation = structure.products, structure.activation
    pull, join = _piece(fast, _pull_kept), _piece(fast, _join)
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
            if up is None:
                a = pull(activation, activations[k - 1], below)
            else:
                a = join(activation, up.bends[k - 1], below, up.slopes[k - 1])
    sums.reverse()
    gradients.reverse()
    if up is not None and up.gradients:
        add_each(gradients[:-1], list(up.gradients))
    z_grad = below.to(z.dtype) if needs.z and below is not None else None
    t_grad = _time_gradient(fast, sums, t) if needs.t else None
    if not needs.packed:
        return t_grad, z_grad, None
    if fast.still is not None:
        return t_grad, z_grad, torch.cat([*map(products.flatten, gradients), *sums]).to(dtype)
    # biases and responses of time act alike on all samples: one sum over the batch serves both
    rows = [products.flatten(gradient) for gradient in gradients]
    timed = multiply_each(sums, t.reshape(()).to(sums[0].dtype))
    return t_grad, z_grad, torch.cat([*rows, *sums, *timed]).to(dtype)


def _time_gradient(fast: FastParts, sums: Sequence[Tensor], t: Tensor) -> Tensor:
    if fast.still is not None:
        return torch.zeros_like(t)
    return (torch.cat(list(sums)).to(fast.response.dtype) * fast.response).sum().to(t.dtype).reshape(t.shape)


# What is done between the products, entry by entry: torch.compile makes one loop of each.


def _piece(fast: FastParts, function: Callable[..., Any]) -> Callable[..., Any]:
    return compiled(function) if fast.compiled else function


def _activate(activation: Activation, a: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """``a + shift``, which overwrites ``a``, and its activation."""
    a += shift
    return a, activation.value(a)


def _pull(activation: Activation, a: Tensor, u: Tensor, g: Tensor, own: bool) -> Tensor:
    """``s' g``, which may overwrite ``g`` if it is our own and not kept."""
    return activation.pull(a, u, g, over=own and activation.keeps_pulled)


def _bend(activation: Activation, kept: Tensor, saved: Tensor) -> tuple[Tensor, Tensor]:
    """The slope and ``v = s' g``."""
    slope = activation.kept_slope(kept)
    return slope, activation.pulled(saved, slope)


def _follow(activation: Activation, kept: Tensor, saved: Tensor, slope: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """What the product adds to the cotangent of ``a``, and ``h = s' p``, which overwrites ``p``."""
    if p.dim() == kept.dim():
        kept_p = saved * p
    else:  # of several noises, summed without an array of all of them
        kept_p = saved[0] * p[0]
        for one, other in zip(saved[1:], p[1:], strict=True):
            kept_p.addcmul_(one, other)
    return activation.bend(kept, kept_p), activation.follow(slope, p)


def _pull_kept(activation: Activation, kept: Tensor, below: Tensor) -> Tensor:
    return activation.pull_kept(below, kept)


def _join(activation: Activation, bent: Tensor, below: Tensor, slope: Tensor) -> Tensor:
    return activation.join(bent, below, slope)


def _by_autograd(
    outputs: Sequence[Tensor], cotangents: Sequence[Tensor | None], arguments: Sequence[Tensor]
) -> list[Tensor | None]:
    """The same gradients by automatic differentiation, for ``create_graph=True``: slow, but with a graph."""
    given = [(x, c) for x, c in zip(outputs, cotangents, strict=True) if c is not None and x.requires_grad]
    inputs = [x for x in arguments if x.requires_grad]
    ends, seeds = zip(*given, strict=True)
    found = iter(torch.autograd.grad(ends, inputs, seeds, create_graph=True, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in arguments]
