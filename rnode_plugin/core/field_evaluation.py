"""FieldEvaluation: what a regularizer may read at one time of a solve."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from ..types import FieldWithAux, VectorField
from .derivatives import FieldDerivatives
from .trace_estimators import Exact, Probes, TraceEstimator

__all__ = ["FieldEvaluation"]

_MAX_DIMS = 128  # of an exact Jacobian: as many products at each evaluation


@dataclass(eq=False)  # not frozen: that makes each evaluation slower
class FieldEvaluation:
    """One evaluation of the vector field, and lazily whatever follows from it; each is computed once.

    A regularizer declares what it reads in ``needs``: ``"vjp"`` for :meth:`divergence`, :meth:`squared_frobenius`,
    :meth:`probes`, :meth:`jacobian` and :meth:`vjp`, ``"jvp"`` for :meth:`jvp` and :meth:`total_derivative`,
    ``"aux"`` for :meth:`aux`.

    Attributes:
        t: time, a scalar tensor.
        z: state ``(B, *event)``.
        dz: velocity ``f(t, z)``, of the same shape.
        noise: the probe vector of the solve, of the same shape (of several probes, one more dimension in front);
            None if there is none.
        products: what the estimator computed along with the velocity, for one probe ``noise^T df/dz``; None unless
            somebody asked for products.
        estimator: reduces the products.
        field: ``f(t, z)``, for derivatives that did not come with the evaluation.
        derivatives: computes them.
        shared_jvp: ``(v, dt)`` to ``df/dz v + dt df/dt`` from the pass that gave the velocity; None if the field
            does not share it.
    """

    t: Tensor
    z: Tensor
    dz: Tensor
    noise: Tensor | None = None
    products: Tensor | None = None
    estimator: TraceEstimator | None = None
    field: VectorField | None = None
    derivatives: FieldDerivatives | None = None
    shared_jvp: Callable[[Tensor, float], Tensor] | None = None
    _known: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def divergence(self) -> Tensor:
        """``div f (B,)``, exact or estimated (eq. 5)."""
        products, estimator = self._need_products()
        return self._once("divergence", lambda: estimator.divergence(products, self.noise))

    def squared_frobenius(self) -> Tensor:
        """``||df/dz||_F^2 (B,)``, exact or estimated (eq. 16)."""
        products, estimator = self._need_products()
        return self._once("frobenius", lambda: estimator.squared_frobenius(products, self.noise))

    def probes(self) -> Probes:
        """The probe vectors ``v_i``, their weights and the shared products ``v_i^T df/dz``."""
        products, estimator = self._need_products()
        return self._once("probes", lambda: estimator.probes(products, self.noise))

    def jacobian(self) -> Tensor:
        """The exact ``df/dz (B, D, D)``, whatever the estimator; row i is the gradient of component i.

        Raises:
            ConfigError: for more than 128 dimensions.
        """
        return self._once("jacobian", self._jacobian)

    def vjp(self, v: Tensor) -> Tensor:
        """``v^T df/dz`` of the shape of ``z``, for any ``v (B, *event)``."""
        if v is self.noise and self.products is not None and self.products.shape == v.shape:
            return self.products
        return self._once(("vjp", id(v)), lambda: (v, self._derivatives("vjp").vjp(self.t, self.z, v)))[1]

    def jvp(self, v: Tensor, dt: float = 0.0) -> Tensor:
        """``df/dz v + dt df/dt`` of the shape of ``z``, for any ``v (B, *event)``."""
        # the tuple keeps v, and with it its id
        return self._once(("jvp", id(v), dt), lambda: (v, self._jvp(v, dt)))[1]

    def total_derivative(self, order: int = 2) -> Tensor:
        """``d^order z / dt^order`` along the trajectory, of the shape of ``z``; order 1 is the velocity.

        Order 2 is ``df/dz f + df/dt`` (eq. 7).
        """
        if order == 1:
            return self.dz
        if order == 2:
            return self.jvp(self.dz, 1.0)
        derivatives = self._derivatives("jvp")
        return self._once(("total", order), lambda: derivatives.total_derivative(self.t, self.z, order))

    def aux(self, name: str) -> Tensor:
        """What the field itself offers under ``name``.

        Raises:
            ConfigError: for a field that does not offer it.
        """
        source = self.field
        known: Mapping[str, Tensor] = {}
        if isinstance(source, FieldWithAux):
            known = self._once("aux", lambda: source.aux(self.t, self.z))
        if name not in known:
            raise ConfigError(
                f"the vector field offers no {name!r}: a penalty on it needs a field whose `aux(t, z)` does, such "
                "as rnode_plugin.fields.potential.PotentialField."
            )
        return known[name]

    def _jvp(self, v: Tensor, dt: float) -> Tensor:
        if self.shared_jvp is not None:
            return self.shared_jvp(v, dt).to(self.z.dtype)
        return self._derivatives("jvp").jvp(self.t, self.z, v, dt)

    def _jacobian(self) -> Tensor:
        if self.products is not None and isinstance(self.estimator, Exact):
            rows = self.products
        else:
            derivatives, dims = self._derivatives("vjp"), math.prod(self.z.shape[1:])
            if dims > _MAX_DIMS:
                raise ConfigError(
                    f"an exact Jacobian takes one product per dimension, too many for {dims} dimensions (the limit "
                    f"is {_MAX_DIMS}): use a penalty that estimates, such as 'jacfrob', 'curl' or 'strain'."
                )
            rows = derivatives.jacobian_rows(self.t, self.z)
        return rows.flatten(2).transpose(0, 1)  # (D, B, *event) -> (B, D, D)

    def _once(self, key: Any, compute: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def _need_products(self) -> tuple[Tensor, TraceEstimator]:
        if self.products is None or self.estimator is None:
            raise _undeclared("vjp")
        return self.products, self.estimator

    def _derivatives(self, need: str) -> FieldDerivatives:
        if self.derivatives is None:
            raise _undeclared(need)
        return self.derivatives


def _undeclared(need: str) -> ConfigError:
    return ConfigError(
        "this evaluation has no products with the Jacobian: a regularizer that reads them must say "
        f'`needs = {{"{need}"}}`.'
    )
