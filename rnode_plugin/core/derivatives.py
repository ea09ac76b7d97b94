"""Products of a vector field with its Jacobian, and its derivatives along a trajectory, by differentiation.

A field that brings its own products (:class:`~rnode_plugin.types.FieldWithVJP`,
:class:`~rnode_plugin.types.FieldWithJVP`) is asked for them. One whose call goes through autograd Functions of its
own may offer ``plain_path``: the same function ``(t, z)`` in operations that autograd knows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from ..errors import RnodeError
from ..types import FieldWithJVP, FieldWithVJP, VectorField
from .transformed import in_transform

__all__ = ["FieldDerivatives", "field_and_vjp", "vjp_of"]


def field_and_vjp(field: VectorField, t: Tensor, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """``(f(t, z), noise^T df/dz)`` for any differentiable field, by automatic differentiation.

    Works under ``no_grad``, ``inference_mode`` and the transforms of ``torch.func`` too. Without gradients enabled
    the result carries no graph.
    """
    if in_transform():
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
    """Derivatives of one field at any point, each by the fastest way that is right for it.

    The choice between forward mode and two reverse passes is made at the first product and kept. Forward mode is
    not taken through an autograd Function of a user's own: nested, it would silently give zero.

    Args:
        field: ``f(t, z)``.
    """

    def __init__(self, field: VectorField) -> None:
        self._own_vjp = field.forward_and_vjp if isinstance(field, FieldWithVJP) else None
        self._own_jvp = field.forward_and_jvp if isinstance(field, FieldWithJVP) else None
        plain: VectorField | None = getattr(field, "plain_path", None)
        self._plain: VectorField = field if plain is None else plain
        self._forward_mode: bool | None = None if plain is None else True

    def vjp(self, t: Tensor, z: Tensor, v: Tensor) -> Tensor:
        """``v^T df/dz``, of the shape of ``z (B, *event)``."""
        if self._own_vjp is not None and not in_transform():
            return self._own_vjp(t, z, v)[1].to(z.dtype)
        return field_and_vjp(self._plain, t, z, v)[1].to(z.dtype)

    def jvp(self, t: Tensor, z: Tensor, v: Tensor, dt: float = 0.0) -> Tensor:
        """``df/dz v + dt df/dt``, of the shape of ``z (B, *event)``."""
        if self._own_jvp is not None and not in_transform():
            return self._own_jvp(t, z, v, dt)[1].to(z.dtype)
        return self._apply(lambda push, t, z, v: push(self._plain, t, z, v, dt), t, z, v)

    def jacobian_rows(self, t: Tensor, z: Tensor) -> Tensor:
        """All rows of ``df/dz``, ``(D, B, *event)``, one product each."""
        basis = torch.eye(z[0].numel(), dtype=z.dtype, device=z.device).reshape(-1, 1, *z.shape[1:])
        return torch.stack([self.vjp(t, z, v.expand_as(z)) for v in basis])

    def total_derivative(self, t: Tensor, z: Tensor, order: int) -> Tensor:
        """``d^order z / dt^order`` along the trajectory through ``(t, z)``; order 1 is the velocity.

        ``order - 1`` nested products on the field's plain path, at a cost of about ``2^order`` evaluations.
        """

        def nested(push: _Push, t: Tensor, z: Tensor) -> Tensor:
            derivative: VectorField = self._plain
            for _ in range(order - 1):
                derivative = _along(push, self._plain, derivative)
            return derivative(t, z)

        return self._apply(nested, t, z)

    def _apply(self, compute: Callable[..., Tensor], t: Tensor, z: Tensor, *rest: Tensor) -> Tensor:
        """``compute(push, t, z, *rest)`` with the way to push tangents that suits the field."""
        if in_transform():
            return compute(_push_forward, t, z, *rest).to(z.dtype)
        if self._forward_mode is None:
            self._forward_mode = not self._has_own_functions(t, z)
        keep_graph = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        if self._forward_mode:
            try:
                with torch.inference_mode(False), torch.set_grad_enabled(keep_graph):
                    inputs = (x.clone() if x.is_inference() else x for x in (t, z, *rest))
                    return compute(_push_forward, *inputs).to(z.dtype)
            except (RnodeError, torch.OutOfMemoryError):
                raise
            except RuntimeError:  # an operation without a rule for forward mode, or a field that differentiates
                self._forward_mode = False
        with _grad_enabled():
            result = compute(_push_by_two_pulls, *_ours(t, z, *rest, keep_graph=keep_graph)).to(z.dtype)
        return result if keep_graph else result.detach()

    def _has_own_functions(self, t: Tensor, z: Tensor) -> bool:
        with _grad_enabled():
            return _reaches_own_function(self._plain(*_ours(t, z, keep_graph=False)))


_Push = Callable[["VectorField", Tensor, Tensor, Tensor, float], Tensor]  # (g, t, z, v, dt) -> dg/dz v + dt dg/dt


def _along(push: _Push, field: VectorField, derivative: VectorField) -> VectorField:
    """The derivative of a function of ``(t, z)`` along the field's trajectories."""
    return lambda t, z: push(derivative, t, z, field(t, z), 1.0)


def _push_forward(g: VectorField, t: Tensor, z: Tensor, v: Tensor, dt: float) -> Tensor:
    """By forward mode; differentiable again, and safe under transforms."""
    v = v.to(z.dtype)
    if dt == 0:
        return torch.func.jvp(lambda z: g(t, z), (z,), (v,))[1]
    return torch.func.jvp(g, (t, z), (torch.full_like(t, dt), v))[1]


def _push_by_two_pulls(g: VectorField, t: Tensor, z: Tensor, v: Tensor, dt: float) -> Tensor:
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


def _reaches_own_function(dz: Tensor) -> bool:
    """Whether the graph of ``dz`` holds an autograd Function written in Python."""
    pending: list[Any] = [dz.grad_fn]
    seen: set[Any] = {None}
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction):
            return True
        pending += [parent for parent, _ in node.next_functions]
    return False


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
