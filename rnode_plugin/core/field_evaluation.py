"""FieldEvaluation: the velocity and the derivatives of a field at one time in a solve, for a regularizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .derivatives import Linearization, total_derivative
from .evaluator import Evaluator, explain
from .part import State, joined, parted
from .signature import innermost
from .trace_estimators import ProbedProducts, TraceEstimator

_Result = TypeVar("_Result")

# `wants` of another pass over the field
_PRODUCTS, _ROWS, _JVP = frozenset({"products"}), frozenset({"rows"}), frozenset({"jvp"})

_MAX_DIMS = 128  # of an exact Jacobian, which takes as many products at each evaluation


@final
@dataclass(slots=True, eq=False, kw_only=True)
class FieldEvaluation:
    """An evaluation of the vector field, as the regularizers of a solve read it, one after another.

    They share what they compute of it, so each product with the Jacobian is computed once per evaluation.

    A regularizer declares its reads in ``needs``: ``"vjp"`` for :meth:`divergence`, :meth:`squared_frobenius`,
    :meth:`probed_products`, :meth:`jacobian` and :meth:`vjp`, ``"jvp"`` for :meth:`jvp` and
    :meth:`total_derivative`, ``"field"`` for :meth:`velocity` and :attr:`net`. A method whose need is not declared
    raises a ConfigError, even if another regularizer has declared that need.

    Attributes:
        t: the time, a scalar tensor.
        z: the state ``(B, *event)``.
        dz: the velocity ``f(t, z)``, with the same shape.
        noise: the probe vector of the solve, with the same shape, or several, ``(k, B, *event)``; or None.
    """

    t: Tensor
    z: Tensor
    dz: Tensor
    noise: Tensor | None
    _products: Tensor | None
    """The products that the estimator computed along with the velocity, in the dtype of ``z``."""
    _linearization: Linearization
    _state: State
    _evaluator: Evaluator
    _estimator: TraceEstimator
    _computed: list[tuple[object, object, bool, Any]] = field(default_factory=list)
    """What the regularizers have computed: key, argument, whether gradients were enabled, and value."""
    _reader: tuple[str, Collection[str]] = ("", ())
    """The name and the declared needs of the regularizer that reads it now."""

    def read_by(self, name: str, needs: Collection[str]) -> None:
        """Hand this evaluation to a regularizer, whose declared needs count from now on."""
        self._reader = name, needs

    def divergence(self) -> Tensor:
        """``div f (B,)``, exact (eq. 3) or estimated (eq. 5), in nats per unit of time."""
        return self._estimator.divergence(self._shared_products(), self.noise)

    def squared_frobenius(self) -> Tensor:
        """``||df/dz||_F^2 (B,)``, exact (eq. 13) or estimated (eq. 16)."""
        return self._estimator.squared_frobenius(self._shared_products(), self.noise)

    def probed_products(self) -> ProbedProducts:
        """The probe vectors ``v_i``, their weight and the shared products ``v_i^T df/dz``.

        Raises:
            ConfigError: for the estimator ``"difference"``, which has no such products.
        """
        products = self._shared_products()
        return self._once("probed", lambda: self._estimator.probed(products, self.noise))

    @property
    def has_jacobian(self) -> bool:
        """Whether the products that came along with the velocity are the rows of the Jacobian."""
        return self._products is not None and "rows" in self._estimator.wants(self.noise)

    def jacobian(self) -> Tensor:
        """The exact ``df/dz (B, D, D)``, whatever the estimator; row i is the gradient of component i.

        Raises:
            ConfigError: for more than 128 dimensions, unless the estimator is exact.
        """
        self._require("vjp")
        if self._products is not None and self.has_jacobian:
            return _matrices(self._products)
        dims = math.prod(self.z.shape[1:])
        if dims > _MAX_DIMS and not self._estimator.is_exact:
            raise ConfigError(
                f"an exact Jacobian takes one product per dimension, too many for {dims} dimensions (the limit is "
                f"{_MAX_DIMS}): use a penalty that estimates, such as 'jacfrob', 'curl' or 'strain'."
            )
        return _matrices(self._once("rows", self._rows))

    def vjp(self, v: Tensor) -> Tensor:
        """``v^T df/dz``, with the shape of ``z``, for any ``v (B, *event)``."""
        self._require("vjp")
        if v is self.noise and self._products is not None and "products" in self._estimator.wants(v):
            return self._products

        def compute() -> Tensor:
            if self._linearization.pull is None:
                return self._product(v)
            try:
                return self._linearization.pull(v).to(self.z.dtype)
            except AttributeError as error:  # from a layer whose backward pass runs only once
                explain(error)

        return self._once("vjp", compute, v)

    def jvp(self, v: Tensor, dt: float = 0.0) -> Tensor:
        """``df/dz v + df/dt dt``, with the shape of ``z``, for any ``v (B, *event)``."""
        self._require("jvp")

        def compute() -> Tensor:
            jvp = self._linearization.jvp or self._evaluator.repeat(self.t, self._state, _JVP).jvp
            assert jvp is not None
            return jvp(v, dt).to(self.z.dtype)

        return self._once(("jvp", dt), compute, v)

    def total_derivative(self, order: int = 2) -> Tensor:
        """``d^order z / dt^order`` along the trajectory, with the shape of ``z``.

        Order 1 is the velocity. Order 2 is ``df/dz f + df/dt`` (eq. 7). A higher order evaluates the field again.
        If ``z`` is a part of the state, the rest of it moves by its own velocity, and the field is evaluated again
        at order 2 too.
        """
        if order == 1:
            return self.dz
        if order == 2 and not self._is_part:
            return self.jvp(self.dz, 1.0)
        self._require("jvp")
        evaluator, state = self._evaluator, self._state

        def again(t: Tensor, whole: Tensor) -> Tensor:
            return joined(evaluator.repeat(t, parted(whole, state)).dz)

        def part(velocity: Tensor) -> Tensor:
            return evaluator.z_of(parted(velocity, state))

        def compute() -> Tensor:
            return total_derivative(again, self.t, joined(state), order, part=part, captured=evaluator.captured).to(
                self.z.dtype
            )

        return self._once(("total", order), compute)

    def velocity(self, t: Tensor, z: Tensor) -> Tensor:
        """``f(t, z)`` at another time and state ``(B, *event)``.

        If ``z`` is a part of the state, the rest of it moves on by its own velocity up to the time ``t``.
        """
        self._require("field")
        evaluator, state = self._evaluator, self._state
        if self._is_part:
            whole = joined(state)
            later = t.to(whole.device) - self.t.to(whole.device)
            velocity = joined(self._linearization.dz).to(whole.dtype)
            state = parted(whole + later.to(whole.dtype) * velocity, state)
        return evaluator.z_of(evaluator.repeat(t, state, z=z).dz).to(z.dtype)

    @property
    def _is_part(self) -> bool:
        """Whether the state has more than ``z``."""
        part = self._evaluator.part
        return part is not None and part.leaves_out(self._state)

    @property
    def net(self) -> Any:
        """The module of this solve as the user gave it, without wrappers that only pass their arguments on.

        A penalty may read other functions of this module, such as a potential.

        Raises:
            ConfigError: if the field is not a module, or penalties measure a part of its state.
        """
        self._require("field")
        net = innermost(self._evaluator.user_field)
        if not isinstance(net, nn.Module):
            raise ConfigError(
                "a penalty reads the module of the vector field, but this field is not a module that takes just "
                "the state that the penalties measure: give the module itself, without a function around it, "
                "penalized= or an order above 1."
            )
        return net

    def _product(self, v: Tensor) -> Tensor:
        """``v^T df/dz`` from another pass over the field."""
        products = self._evaluator.repeat(self.t, self._state, _PRODUCTS, v).products
        assert products is not None
        return products.to(self.z.dtype)

    def _rows(self) -> Tensor:
        """The rows of ``df/dz`` from another pass over the field."""
        self._evaluator.check(self.t, self._state, _ROWS)  # which the declared needs do not tell before the solve
        rows = self._evaluator.repeat(self.t, self._state, _ROWS).rows
        assert rows is not None
        return rows.to(self.z.dtype)

    def _shared_products(self) -> Tensor:
        self._require("vjp")
        assert self._products is not None
        return self._products

    def _require(self, need: str) -> None:
        name, needs = self._reader
        if need not in needs:
            raise ConfigError(
                f"the regularizer {name!r} reads {need!r} of an evaluation and has not declared it: "
                f'it must declare `needs={{"{need}"}}`.'
            )

    def _once(self, key: object, compute: Callable[[], _Result], of: object = None) -> _Result:
        """The result of ``compute``, kept for all regularizers of this evaluation, by key and argument."""
        # a result that one regularizer reads under no_grad lacks the graph that another one needs
        graph = torch.is_grad_enabled()
        for earlier, argument, with_graph, value in self._computed:
            if earlier == key and argument is of and with_graph == graph:
                return value
        value = compute()
        self._computed.append((key, of, graph, value))
        return value


def _matrices(rows: Tensor) -> Tensor:
    """Jacobians ``(B, D, D)`` from their rows ``(D, B, *event)``."""
    return rows.unsqueeze(-1).flatten(2).transpose(0, 1)
