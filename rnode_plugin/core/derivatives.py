"""Products of a vector field with its Jacobian, and its derivatives along a trajectory, by differentiation.

A field that brings its own products (:class:`~rnode_plugin.types.FieldWithVJP`,
:class:`~rnode_plugin.types.FieldWithJVP`) is asked for them. One whose call goes through autograd Functions of its
own may offer ``plain_path``: the same function ``(t, z)`` in operations that autograd knows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..types import FieldWithJVP, FieldWithVJP, VectorField
from .tensors.transforms_active import transforms_active

__all__ = ["FieldDerivatives", "field_and_vjp", "vjp_of"]


def field_and_vjp(field: VectorField, t: Tensor, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """``(f(t, z), noise^T df/dz)`` for any differentiable field, by automatic differentiation.

    Works under ``no_grad``, ``inference_mode`` and the transforms of ``torch.func`` too. Without gradients enabled
    the result carries no graph.
    """
    if transforms_active():
        dz, pull = torch.func.vjp(lambda z: field(t, z), z)[:2]
        return dz, pull(noise.to(dz.dtype))[0]
    keep_graph = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with _grad_enabled():
        t, z, noise = _ours(t, z, noise, keep_graph=keep_graph)
        dz = field(t, z)
        vjp = vjp_of(dz, z, noise, create_graph=keep_graph)
    return (dz, vjp) if keep_graph else (dz.detach(), vjp.detach())


def vjp_of(dz: Tensor, z: Tensor, v: Tensor, *, create_graph: bool, retain: bool = False) -> Tensor:
    """``v^T d(dz)/dz`` from the graph of ``dz``; zero for a field that ignores its state."""
    if not dz.requires_grad:
        return torch.zeros_like(z)
    (vjp,) = torch.autograd.grad(
        dz, z, v.to(dz.dtype), create_graph=create_graph, retain_graph=create_graph or retain, allow_unused=True
    )
    return torch.zeros_like(z) if vjp is None else vjp


class FieldDerivatives:
    """Derivatives of one field at any point: by the products that it brings, or by reverse mode.

    Reverse mode twice gives ``J v``: faster in training than forward mode, and right through autograd Functions
    of a user's own, for which nested forward mode silently gives zero.

    Args:
        field: ``f(t, z)``.
    """

    def __init__(self, field: VectorField) -> None:
        self._own_vjp = field.forward_and_vjp if isinstance(field, FieldWithVJP) else None
        self._own_jvp = field.forward_and_jvp if isinstance(field, FieldWithJVP) else None
        plain: VectorField | None = getattr(field, "plain_path", None)
        self._plain: VectorField = field if plain is None else plain

    def vjp(self, t: Tensor, z: Tensor, v: Tensor) -> Tensor:
        """``v^T df/dz``, of the shape of ``z (B, *event)``."""
        if self._own_vjp is not None and not transforms_active():
            return self._own_vjp(t, z, v)[1].to(z.dtype)
        return field_and_vjp(self._plain, t, z, v)[1].to(z.dtype)

    def jvp(self, t: Tensor, z: Tensor, v: Tensor, dt: float = 0.0) -> Tensor:
        """``df/dz v + dt df/dt``, of the shape of ``z (B, *event)``."""
        if self._own_jvp is not None and not transforms_active():
            return self._own_jvp(t, z, v, dt)[1].to(z.dtype)
        return _with_graph(lambda push, t, z, v: push(self._plain, t, z, v, dt), t, z, v)

    def jacobian_rows(self, t: Tensor, z: Tensor) -> Tensor:
        """All rows of ``df/dz``, ``(D, B, *event)``, one product each."""
        basis = torch.eye(z[0].numel(), dtype=z.dtype, device=z.device).reshape(-1, 1, *z.shape[1:])
        return torch.stack([self.vjp(t, z, v.expand_as(z)) for v in basis])

    def total_derivative(self, t: Tensor, z: Tensor, order: int) -> Tensor:
        """``d^order z / dt^order`` along the trajectory through ``(t, z)``; order 1 is the velocity.

        ``order - 1`` nested products on the field's plain path; each order costs about three times the one before.
        """

        def nested(push: _Push, t: Tensor, z: Tensor) -> Tensor:
            derivative: VectorField = self._plain
            for _ in range(order - 1):
                derivative = _along(push, self._plain, derivative)
            return derivative(t, z)

        return _with_graph(nested, t, z)


_Push = Callable[["VectorField", Tensor, Tensor, Tensor, float], Tensor]  # (g, t, z, v, dt) -> dg/dz v + dt dg/dt


def _with_graph(compute: Callable[..., Tensor], t: Tensor, z: Tensor, *rest: Tensor) -> Tensor:
    """``compute(push, t, z, *rest)`` with a graph inside; its result has one only if gradients are enabled."""
    if transforms_active():
        return compute(_push_in_transform, t, z, *rest).to(z.dtype)
    keep_graph = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with _grad_enabled():
        result = compute(_push, *_ours(t, z, *rest, keep_graph=keep_graph)).to(z.dtype)
    return result if keep_graph else result.detach()


def _along(push: _Push, field: VectorField, derivative: VectorField) -> VectorField:
    """The derivative of a function of ``(t, z)`` along the field's trajectories."""
    return lambda t, z: push(derivative, t, z, field(t, z), 1.0)


def _push(g: VectorField, t: Tensor, z: Tensor, v: Tensor, dt: float) -> Tensor:
    """By reverse mode twice: ``u^T J`` is linear in ``u``, and its own transpose is the product wanted."""
    if not z.requires_grad:
        z = z.detach().requires_grad_()
    if not t.requires_grad:
        t = t.detach().requires_grad_()
    dz = g(t, z)
    if not dz.requires_grad:
        return torch.zeros_like(z)
    u = torch.zeros_like(dz).requires_grad_()
    inputs, tangents = (z, t), (v, torch.full_like(t, dt))
    if dt == 0:
        inputs, tangents = inputs[:1], tangents[:1]
    pulled = torch.autograd.grad(dz, inputs, u, create_graph=True, allow_unused=True)
    pairs = [(p, w.to(p.dtype)) for p, w in zip(pulled, tangents, strict=True) if p is not None and p.requires_grad]
    if not pairs:
        return torch.zeros_like(z)
    (product,) = torch.autograd.grad(
        [p for p, _ in pairs], u, [w for _, w in pairs], create_graph=True, allow_unused=True
    )
    return torch.zeros_like(z) if product is None else product


def _push_in_transform(g: VectorField, t: Tensor, z: Tensor, v: Tensor, dt: float) -> Tensor:
    """The same inside a transform of ``torch.func``, where autograd's own functions fail."""
    dz, pull = torch.func.vjp(g, t, z)[:2]
    transpose = torch.func.vjp(pull, torch.zeros_like(dz))[1]
    return transpose((torch.full_like(t, dt), v.to(z.dtype)))[0]


@contextlib.contextmanager
def _grad_enabled() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _ours(t: Tensor, z: Tensor, *rest: Tensor, keep_graph: bool) -> list[Tensor]:
    """The tensors in a form that can be differentiated: ``z`` requires a gradient, nobody else's tensor changes."""
    # a tensor made in inference mode cannot be saved for a backward pass: a clone outside of it can
    tensors = [x.clone() if x.is_inference() else x for x in (t, z, *rest)]
    if not (keep_graph and tensors[1].requires_grad):
        tensors[1] = tensors[1].detach().requires_grad_()
    return tensors
