"""FieldEvaluation: what a regularizer may read at one time of a solve."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from .derivatives import Ask, Field, total_derivative
from .trace_estimators import Probes, TraceEstimator

_MAX_DIMS = 128  # of an exact Jacobian: as many products at each evaluation


@dataclass(eq=False)  # not frozen: that makes each evaluation slower
class FieldEvaluation:
    """One evaluation of the vector field, and lazily what follows from it; each is computed once.

    A regularizer declares what it reads in ``needs``: ``"vjp"`` for :meth:`divergence`, :meth:`squared_frobenius`,
    :meth:`probes`, :meth:`jacobian` and :meth:`vjp`, ``"jvp"`` for :meth:`jvp` and :meth:`total_derivative`,
    ``"aux"`` for :meth:`aux`, ``"field"`` for :meth:`velocity`.

    Attributes:
        t: time, a scalar tensor.
        z: state ``(B, *event)``.
        dz: velocity ``f(t, z)``, of the same shape.
        noise: the probe vector of the solve, of the same shape, or several, with one more dimension in front; None
            if there is none.
        products: what the estimator computed along with the velocity, for one probe ``noise^T df/dz``; None unless
            products were asked for.
        estimator: what reduces the products.
        field: the field, for derivatives that did not come with the evaluation.
        shared_jvp: ``(v, dt)`` to ``df/dz v + dt df/dt`` from the pass that gave the velocity.
        shared_aux: values that the field offers by name.
    """

    t: Tensor
    z: Tensor
    dz: Tensor
    noise: Tensor | None = None
    products: Tensor | None = None
    estimator: TraceEstimator | None = None
    field: Field | None = None
    shared_jvp: Callable[[Tensor, float], Tensor] | None = None
    shared_aux: Mapping[str, Tensor] | None = None
    _known: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def divergence(self) -> Tensor:
        """``div f (B,)``, exact or estimated (eq. 5)."""
        if "divergence" not in self._known:
            products, estimator = self._shared_products()
            self._known["divergence"] = estimator.divergence(products, self.noise)
        return self._known["divergence"]

    def squared_frobenius(self) -> Tensor:
        """``||df/dz||_F^2 (B,)``, exact or estimated (eq. 16)."""
        if "frobenius" not in self._known:
            products, estimator = self._shared_products()
            self._known["frobenius"] = estimator.squared_frobenius(products, self.noise)
        return self._known["frobenius"]

    def probes(self) -> Probes:
        """The probe vectors ``v_i``, their weights and the shared products ``v_i^T df/dz``."""
        products, estimator = self._shared_products()
        return self._once("probes", lambda: estimator.probes(products, self.noise))

    @property
    def has_jacobian(self) -> bool:
        """Whether the products that came along with the velocity are the rows of the Jacobian."""
        return self.products is not None and self.estimator is not None and self.estimator.asks == "rows"

    def jacobian(self) -> Tensor:
        """The exact ``df/dz (B, D, D)`` with every estimator; row i is the gradient of component i.

        Raises:
            ConfigError: for more than 128 dimensions.
        """
        if self.products is not None and self.has_jacobian:
            return _matrices(self.products)
        dims = math.prod(self.z.shape[1:])
        if dims > _MAX_DIMS:
            raise ConfigError(
                f"an exact Jacobian takes one product per dimension, too many for {dims} dimensions (the limit is "
                f"{_MAX_DIMS}): use a penalty that estimates, such as 'jacfrob', 'curl' or 'strain'."
            )
        return _matrices(self._once("rows", lambda: self._again(Ask("rows"), "vjp").products.to(self.z.dtype)))

    def vjp(self, v: Tensor) -> Tensor:
        """``v^T df/dz`` of the shape of ``z``, for any ``v (B, *event)``."""
        if v is self.noise and self.products is not None and self.products.shape == v.shape:
            return self.products

        def compute() -> tuple[Tensor, Tensor]:
            return v, self._again(Ask("noise"), "vjp", v).products.to(self.z.dtype)

        return self._once(("vjp", id(v)), compute)[1]  # the tuple keeps v, and with it its id

    def jvp(self, v: Tensor, dt: float = 0.0) -> Tensor:
        """``df/dz v + df/dt dt`` of the shape of ``z``, for any ``v (B, *event)``."""

        def compute() -> tuple[Tensor, Tensor]:
            jvp = self.shared_jvp or self._again(Ask(jvp=True), "jvp").jvp
            return v, jvp(v, dt).to(self.z.dtype)

        return self._once(("jvp", id(v), dt), compute)[1]

    def total_derivative(self, order: int = 2) -> Tensor:
        """``d^order z / dt^order`` along the trajectory, of the shape of ``z``; order 1 is the velocity.

        Order 2 is ``df/dz f + df/dt`` (eq. 7). A ConfigError for a regularizer that declares no ``needs``.
        """
        if order == 1:
            return self.dz
        if order == 2:
            return self.jvp(self.dz, 1.0)
        if self.field is None:
            raise _undeclared("jvp")
        field = self.field
        return self._once(("total", order), lambda: total_derivative(field, self.t, self.z, order))

    def velocity(self, t: Tensor, z: Tensor) -> Tensor:
        """``f(t, z)`` at another time and state. A ConfigError for a regularizer that does not need ``"field"``."""
        if self.field is None:
            raise _undeclared("field")
        return copy.copy(self.field)(t, z).to(z.dtype)  # a copy: this evaluation is not the solve's

    def aux(self, name: str) -> Tensor:
        """The value that the field itself offers under ``name``.

        Raises:
            ConfigError: for a field that does not offer it.
        """
        if self.shared_aux is None:
            raise _undeclared("aux")
        if name not in self.shared_aux:
            raise ConfigError(
                f"the vector field offers no {name!r}: a penalty on it needs a field whose `aux(t, z)` does, such "
                "as rnode_plugin.fields.potential.PotentialField."
            )
        return self.shared_aux[name]

    def _once(self, key: Any, compute: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def _again(self, ask: Ask, need: str, noise: Tensor | None = None) -> Any:
        """Another pass over the field, for what the first one did not give."""
        if self.field is None:
            raise _undeclared(need)
        return self.field.linearize(self.t, self.z, noise, ask=ask)

    def _shared_products(self) -> tuple[Tensor, TraceEstimator]:
        if self.products is None or self.estimator is None:
            raise _undeclared("vjp")
        return self.products, self.estimator


def _matrices(rows: Tensor) -> Tensor:
    """Jacobians ``(B, D, D)`` from their rows ``(D, B, *event)``."""
    return rows.unsqueeze(-1).flatten(2).transpose(0, 1)


def _undeclared(need: str) -> ConfigError:
    return ConfigError(
        f'a regularizer reads what this evaluation does not have: it must declare `needs = {{"{need}"}}`.'
    )
