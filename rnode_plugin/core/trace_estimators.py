"""Divergence of a vector field and the Frobenius norm of its Jacobian, exact or by Hutchinson's estimator.

Both come from the same products ``e^T J`` with ``J = df/dz``, taken for probe vectors ``e`` that stay fixed
during one solve. Everything else that wants the Jacobian (the ``jacfrob`` penalty) reads those products too, so
that an evaluation never pays for a second one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ConfigError, suggest
from ..types import FieldWithVJP, VectorField
from .reductions import sum_products, sum_squares

__all__ = ["Exact", "Hutchinson", "TraceEstimator", "field_and_vjp", "get_estimator", "sum_event"]

FieldAndProduct = Callable[[Tensor, Tensor, "Tensor | None"], tuple[Tensor, Tensor]]


def sum_event(x: Tensor) -> Tensor:
    """Sum over all but the first dimension: ``(B, *event) -> (B,)``."""
    return x.reshape(x.shape[0], -1).sum(1)


def field_and_vjp(field: VectorField, t: Tensor, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """``(f(t, z), noise^T df/dz)`` for any differentiable field, by automatic differentiation.

    Works under ``no_grad`` and ``inference_mode`` too; the result then carries no graph.
    """
    keep_graph = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    # A tensor made in inference mode cannot be saved for a backward pass: a clone outside of it can.
    with torch.inference_mode(False), torch.enable_grad():
        t, noise = (x.clone() if x.is_inference() else x for x in (t, noise))
        if z.is_inference():
            z = z.clone()
        if not (keep_graph and z.requires_grad):
            z = z.detach().requires_grad_()
        dz = field(t, z)
        (vjp,) = _grad(dz, z, noise, create_graph=keep_graph)
    return (dz, vjp) if keep_graph else (dz.detach(), vjp.detach())


def _grad(dz: Tensor, z: Tensor, noise: Tensor, *, create_graph: bool, retain: bool = False) -> tuple[Tensor]:
    if not dz.requires_grad:  # a field that ignores both its state and all parameters
        return (torch.zeros_like(z),)
    (vjp,) = torch.autograd.grad(
        dz, z, noise.to(dz.dtype), create_graph=create_graph, retain_graph=create_graph or retain, allow_unused=True
    )
    return (torch.zeros_like(z) if vjp is None else vjp,)


class TraceEstimator(ABC):
    """How to obtain the divergence and the Frobenius norm from products with the Jacobian.

    :meth:`draw` is called once a solve, :meth:`bind` once per field; the function that it returns is called at
    every evaluation and gives the velocity and the products, which the other two methods reduce.
    """

    @abstractmethod
    def draw(self, z: Tensor, *, generator: torch.Generator | None = None) -> Tensor | None:
        """Noise for one solve from the state ``z (B, *event)``; None where the estimator needs none."""

    @abstractmethod
    def bind(self, field: VectorField) -> FieldAndProduct:
        """Choose, once, how ``(t, z, noise) -> (f(t, z), products)`` is computed for this field."""

    @abstractmethod
    def divergence(self, products: Tensor, noise: Tensor | None) -> Tensor:
        """``div f (B,)`` (eq. 3) or an unbiased estimate of it (eq. 5)."""

    @abstractmethod
    def squared_frobenius(self, products: Tensor) -> Tensor:
        """``||df/dz||_F^2 (B,)`` (eq. 13) or an unbiased estimate of it (eq. 16)."""


class Hutchinson(TraceEstimator):
    """Hutchinson's unbiased estimator with one probe vector: one product an evaluation, whatever the dimension.

    Args:
        noise: ``"gaussian"`` (the paper's) or ``"rademacher"`` (signs; smaller variance of the divergence).

    Raises:
        ConfigError: for another kind of noise.

    Example:
        >>> import torch
        >>> estimator = Hutchinson("rademacher")
        >>> evaluate = estimator.bind(lambda t, z: torch.tensor([1.0, 2.0]) * z)
        >>> z = torch.ones(3, 2)
        >>> noise = estimator.draw(z)
        >>> dz, products = evaluate(torch.tensor(0.0), z, noise)
        >>> estimator.divergence(products, noise)  # signs are exact if the Jacobian is diagonal
        tensor([3., 3., 3.])
    """

    def __init__(self, noise: str = "gaussian") -> None:
        if noise not in ("gaussian", "rademacher"):
            raise ConfigError(suggest(noise, ("gaussian", "rademacher"), "trace noise"))
        self.noise = noise

    def __repr__(self) -> str:
        return f"Hutchinson({self.noise!r})"

    def draw(self, z: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        if self.noise == "gaussian":
            return torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator)
        signs = torch.randint(0, 2, z.shape, dtype=torch.int8, device=z.device, generator=generator)
        return signs.to(z.dtype) * 2 - 1

    def bind(self, field: VectorField) -> FieldAndProduct:
        if isinstance(field, FieldWithVJP):
            return field.forward_and_vjp  # pyright: ignore[reportReturnType]  (noise is never None here)

        def products(t: Tensor, z: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
            assert noise is not None
            return field_and_vjp(field, t, z, noise)

        return products

    def divergence(self, products: Tensor, noise: Tensor | None) -> Tensor:
        assert noise is not None
        return sum_products(products, noise)

    def squared_frobenius(self, products: Tensor) -> Tensor:
        return sum_squares(products)


class Exact(TraceEstimator):
    """The whole Jacobian, one product per dimension: exact, for few dimensions.

    The products are its rows, ``(D, B, *event)``.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> evaluate = Exact().bind(lambda t, z: z @ matrix.T)
        >>> dz, rows = evaluate(torch.tensor(0.0), torch.ones(1, 2), None)
        >>> Exact().divergence(rows, None), Exact().squared_frobenius(rows)
        (tensor([5.]), tensor([30.]))
    """

    def __repr__(self) -> str:
        return "Exact()"

    def draw(self, z: Tensor, *, generator: torch.Generator | None = None) -> None:
        return None

    def bind(self, field: VectorField) -> FieldAndProduct:
        return _rows_in_one_batch(field) if isinstance(field, FieldWithVJP) else _rows_one_by_one(field)

    def divergence(self, products: Tensor, noise: Tensor | None) -> Tensor:
        # (D, B, *event) -> (D, B, D) -> the diagonal
        return products.reshape(*products.shape[:2], -1).diagonal(dim1=0, dim2=2).sum(-1)

    def squared_frobenius(self, products: Tensor) -> Tensor:
        return products.square().transpose(0, 1).reshape(products.shape[1], -1).sum(1)


def _basis(z: Tensor) -> Tensor:
    """The unit vectors of the event space for each sample: ``(D, B, *event)``."""
    dims = z[0].numel()
    eye = torch.eye(dims, dtype=z.dtype, device=z.device).reshape(dims, 1, *z.shape[1:])
    return eye.expand(dims, *z.shape)


def _rows_in_one_batch(field: FieldWithVJP) -> FieldAndProduct:
    def products(t: Tensor, z: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        basis = _basis(z)
        dims, batch = basis.shape[:2]
        repeated = z.unsqueeze(0).expand(dims, *z.shape).reshape(dims * batch, *z.shape[1:])
        dz, rows = field.forward_and_vjp(t, repeated, basis.reshape(dims * batch, *z.shape[1:]))
        return dz[:batch], rows.reshape(dims, *z.shape)

    return products


def _rows_one_by_one(field: VectorField) -> FieldAndProduct:
    def products(t: Tensor, z: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        keep_graph = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            if t.is_inference():
                t = t.clone()
            if z.is_inference():
                z = z.clone()
            if not (keep_graph and z.requires_grad):
                z = z.detach().requires_grad_()
            dz = field(t, z)
            rows = [_grad(dz, z, e, create_graph=keep_graph, retain=True)[0] for e in _basis(z)]
        jacobian = torch.stack(rows)
        return (dz, jacobian) if keep_graph else (dz.detach(), jacobian.detach())

    return products


def get_estimator(spec: str | TraceEstimator) -> TraceEstimator:
    """An estimator from its name: ``"gaussian"``, ``"rademacher"`` (both Hutchinson) or ``"exact"``.

    Raises:
        ConfigError: for another name.
    """
    if isinstance(spec, TraceEstimator):
        return spec
    if spec == "exact":
        return Exact()
    if spec in ("gaussian", "rademacher"):
        return Hutchinson(spec)
    raise ConfigError(suggest(str(spec), ("exact", "gaussian", "rademacher"), "trace estimator"))
