"""FieldEvaluation: what a regularizer may read at one time of a solve."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import ConfigError
from .trace_estimators import TraceEstimator

__all__ = ["FieldEvaluation"]


@dataclass(frozen=True)
class FieldEvaluation:
    """One evaluation of the vector field, with the products that were made along with it.

    Attributes:
        t: time, a scalar tensor.
        z: state ``(B, *event)``.
        dz: velocity ``f(t, z)``, of the same shape.
        noise: the probe vector of the solve, of the same shape; None if there is none.
        products: ``noise^T df/dz`` of the same shape (or all rows of the Jacobian, ``(D, B, *event)``, with the
            exact estimator); None unless somebody asked for products.
        estimator: reduces the products.
    """

    t: Tensor
    z: Tensor
    dz: Tensor
    noise: Tensor | None = None
    products: Tensor | None = None
    estimator: TraceEstimator | None = None

    def divergence(self) -> Tensor:
        """``div f (B,)``, exact or estimated (eq. 5)."""
        products, estimator = self._need_products()
        return estimator.divergence(products, self.noise)

    def squared_frobenius(self) -> Tensor:
        """``||df/dz||_F^2 (B,)``, exact or estimated (eq. 16)."""
        products, estimator = self._need_products()
        return estimator.squared_frobenius(products)

    def _need_products(self) -> tuple[Tensor, TraceEstimator]:
        if self.products is None or self.estimator is None:
            raise ConfigError(
                "this evaluation has no products with the Jacobian: a regularizer that reads them must say "
                "`needs_vjp = True`."
            )
        return self.products, self.estimator
