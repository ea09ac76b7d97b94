"""products_of: a field and several products ``v^T df/dz`` at one state, as exact and multi-probe traces need."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..types import FieldWithVJP, VectorField
from .derivatives import vjp_of
from .tensors.transforms_active import transforms_active

__all__ = ["products_of"]

Products = Callable[[Tensor, Tensor, list[Tensor]], tuple[Tensor, Tensor]]


def products_of(field: VectorField) -> Products:
    """``(t, z, vectors) -> (f(t, z), v^T df/dz of each vector, stacked)``; one batch if the field has a product."""
    return _in_one_batch(field) if isinstance(field, FieldWithVJP) else _one_by_one(field)


def _in_one_batch(field: FieldWithVJP) -> Products:
    def products(t: Tensor, z: Tensor, vectors: list[Tensor]) -> tuple[Tensor, Tensor]:
        count, batch = len(vectors), z.shape[0]
        repeated = z.unsqueeze(0).expand(count, *z.shape).reshape(count * batch, *z.shape[1:])
        dz, rows = field.forward_and_vjp(t, repeated, torch.cat(vectors))
        return dz[:batch], rows.reshape(count, *z.shape)

    return products


def _one_by_one(field: VectorField) -> Products:
    def products(t: Tensor, z: Tensor, vectors: list[Tensor]) -> tuple[Tensor, Tensor]:
        if transforms_active():
            dz, pull = torch.func.vjp(lambda z: field(t, z), z)[:2]
            return dz, torch.stack([pull(v.to(dz.dtype))[0] for v in vectors])
        keep_graph = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            t, z, *vectors = (x.clone() if x.is_inference() else x for x in (t, z, *vectors))
            if not (keep_graph and z.requires_grad):
                z = z.detach().requires_grad_()
            dz = field(t, z)
            rows = torch.stack([vjp_of(dz, z, v, create_graph=keep_graph, retain=True) for v in vectors])
        return (dz, rows) if keep_graph else (dz.detach(), rows.detach())

    return products
