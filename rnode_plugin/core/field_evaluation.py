"""FieldEvaluation: the velocity and the derivatives of a field at one time in a solve, for a regularizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .derivatives import DirectionalDerivative, total_derivative
from .evaluator import Evaluator, explain
from .part import State, joined, parted
from .signature import innermost
from .trace_estimators import Probes, TraceEstimator

_Found = TypeVar("_Found")

# `wants` of another pass over the field
_PRODUCTS, _ROWS, _JVP = frozenset({"products"}), frozenset({"rows"}), frozenset({"jvp"})

_MAX_DIMS = 128  # of an exact Jacobian, which takes as many products at each evaluation


@dataclass(eq=False, slots=True)  # not frozen, which would slow down each evaluation
class Record:
    """One evaluation of the vector field, shared by all regularizers that read it.

    Attributes:
        t: time, a scalar tensor.
        state: the state of the solve.
        z: the part of the state that penalties measure, ``(B, *event)``.
        dz: velocity of that part, with the same shape.
        whole: velocity of the state.
        noise: the probe vectors of the solve; None if there are none.
        products: the products that the estimator computed along with the velocity; None if they were not wanted.
        estimator: reduces the products to a divergence or a norm.
        evaluator: evaluates the field again, for quantities that this evaluation did not compute.
        jvp, pull: derivatives from the pass that gave the velocity; None if the pass gave none.
        net: the field as the user gave it; None where penalties measure a part of its state.
        known: results that a regularizer has computed: key, argument, whether gradients were enabled, value, and
            versions of argument and value.
    """

    t: Tensor
    state: State
    z: Tensor
    dz: Tensor
    whole: State
    noise: Tensor | None
    products: Tensor | None
    estimator: TraceEstimator
    evaluator: Evaluator
    jvp: DirectionalDerivative | None
    pull: Callable[[Tensor], Tensor] | None
    net: object
    known: list[tuple[object, object, bool, Any, list[int]]] = field(default_factory=list)

    def divergence(self) -> Tensor:
        """``div f (B,)`` from the products."""
        assert self.products is not None
        return self.estimator.divergence(self.products, self.noise)

    def once(self, key: object, compute: Callable[[], _Found], of: object = None) -> _Found:
        """The result of ``compute``, kept for all regularizers of this evaluation, by a key and an argument ``of``.

        If one of them has modified the result in place, it is computed again.
        """
        # a result that one regularizer reads under no_grad lacks the graph that another one needs
        graph = torch.is_grad_enabled()
        for known, argument, with_graph, value, versions in self.known:
            if known == key and argument is of and with_graph == graph and _versions(of, value) == versions:
                return value
        value = compute()
        self.known.append((key, of, graph, value, _versions(of, value)))
        return value


class FieldEvaluation:
    """An evaluation of the vector field, as one regularizer reads it.

    All regularizers share the products with the Jacobian, so each product is computed once per evaluation.

    A regularizer declares its reads in ``needs``: ``"vjp"`` for :meth:`divergence`, :meth:`squared_frobenius`,
    :meth:`probes`, :meth:`jacobian` and :meth:`vjp`, ``"jvp"`` for :meth:`jvp` and :meth:`total_derivative`,
    ``"field"`` for :meth:`velocity` and :attr:`net`. A method whose need is not declared raises a ConfigError, even
    if another regularizer has declared that need.

    Attributes:
        t: time, a scalar tensor.
        z: state ``(B, *event)``.
        dz: velocity ``f(t, z)``, with the same shape.
        noise: the probe vector of the solve, with the same shape, or several, ``(k, B, *event)``; None if there is
            none.
    """

    __slots__ = ("_name", "_needs", "_record", "dz", "noise", "t", "z")

    def __init__(self, record: Record, needs: Collection[str], name: str) -> None:
        self._record, self._needs, self._name = record, needs, name
        self.t, self.z, self.dz, self.noise = record.t, record.z, record.dz, record.noise

    def divergence(self) -> Tensor:
        """``div f (B,)``, exact (eq. 3) or estimated (eq. 5), in nats per unit of time."""
        self._require("vjp")
        return self._record.divergence()

    def squared_frobenius(self) -> Tensor:
        """``||df/dz||_F^2 (B,)``, exact (eq. 13) or estimated (eq. 16)."""
        self._require("vjp")
        record = self._record
        assert record.products is not None
        return record.estimator.squared_frobenius(record.products, self.noise)

    def probes(self) -> Probes:
        """The probe vectors ``v_i``, their weight and the shared products ``v_i^T df/dz``.

        Raises:
            ConfigError: for the estimator ``"difference"``, which has no such products.
        """
        self._require("vjp")
        record, products = self._record, self._record.products
        assert products is not None
        return record.once("probes", lambda: record.estimator.pair(products, self.noise))

    @property
    def has_jacobian(self) -> bool:
        """Whether the products that came along with the velocity are the rows of the Jacobian."""
        return self._record.products is not None and "rows" in self._record.estimator.wants(self.noise)

    def jacobian(self) -> Tensor:
        """The exact ``df/dz (B, D, D)``, whatever the estimator; row i is the gradient of component i.

        Raises:
            ConfigError: for more than 128 dimensions, unless the estimator is exact.
        """
        self._require("vjp")
        if self._record.products is not None and self.has_jacobian:
            return _matrices(self._record.products)
        dims = math.prod(self.z.shape[1:])
        if dims > _MAX_DIMS and not self._record.estimator.is_exact:
            raise ConfigError(
                f"an exact Jacobian takes one product per dimension, too many for {dims} dimensions (the limit is "
                f"{_MAX_DIMS}): use a penalty that estimates, such as 'jacfrob', 'curl' or 'strain'."
            )
        return _matrices(self._record.once("rows", self._rows))

    def vjp(self, v: Tensor) -> Tensor:
        """``v^T df/dz``, with the shape of ``z``, for any ``v (B, *event)``."""
        self._require("vjp")
        record = self._record
        if v is self.noise and record.products is not None and "products" in record.estimator.wants(v):
            return record.products

        def compute() -> Tensor:
            if record.pull is None:
                return self._product(v)
            try:
                return record.pull(v).to(self.z.dtype)
            except AttributeError as error:  # from a layer whose backward pass runs only once
                explain(error)

        return record.once("vjp", compute, v)

    def jvp(self, v: Tensor, dt: float = 0.0) -> Tensor:
        """``df/dz v + df/dt dt``, with the shape of ``z``, for any ``v (B, *event)``."""
        self._require("jvp")

        def compute() -> Tensor:
            record = self._record
            jvp = record.jvp or record.evaluator.repeat(self.t, record.state, _JVP).jvp
            assert jvp is not None
            return jvp(v, dt).to(self.z.dtype)

        return self._record.once(("jvp", dt), compute, v)

    def total_derivative(self, order: int = 2) -> Tensor:
        """``d^order z / dt^order`` along the trajectory, with the shape of ``z``.

        Order 1 is the velocity. Order 2 is ``df/dz f + df/dt`` (eq. 7). A regularizer that reads a higher order
        must declare ``repeats=True``, because the field is evaluated again. If ``z`` is a part of the state, the
        rest of it moves by its own velocity, and the field is evaluated again at order 2 too.
        """
        if order == 1:
            return self.dz
        if order == 2 and not self._is_part:
            return self.jvp(self.dz, 1.0)
        self._require("jvp")
        evaluator, state = self._record.evaluator, self._record.state

        def again(t: Tensor, whole: Tensor) -> Tensor:
            return joined(evaluator.repeat(t, parted(whole, state)).dz)

        def part(velocity: Tensor) -> Tensor:
            return evaluator.z_of(parted(velocity, state))

        def compute() -> Tensor:
            found = total_derivative(again, self.t, joined(state), order, part=part, captured=evaluator.captured)
            return found.to(self.z.dtype)

        return self._record.once(("total", order), compute)

    def velocity(self, t: Tensor, z: Tensor) -> Tensor:
        """``f(t, z)`` at another time and state ``(B, *event)``, with the random draws of this evaluation.

        If ``z`` is a part of the state, the rest of it moves on by its own velocity up to the time ``t``.
        """
        self._require("field")
        record = self._record
        evaluator, state = record.evaluator, record.state
        if self._is_part:
            whole = joined(state)
            later = t.to(whole.device) - self.t.to(whole.device)
            state = parted(whole + later.to(whole.dtype) * joined(record.whole).to(whole.dtype), state)
        return evaluator.z_of(evaluator.repeat(t, state, z=z).dz).to(z.dtype)

    @property
    def _is_part(self) -> bool:
        """Whether the state has more than ``z``."""
        part = self._record.evaluator.part
        return part is not None and part.leaves_out(self._record.state)

    @property
    def net(self) -> Any:
        """The module of this solve as the user gave it, without wrappers that only pass their arguments on.

        A penalty may read other functions of this module, such as a potential.

        Raises:
            ConfigError: if the field is not a module, or penalties measure a part of its state.
        """
        self._require("field")
        net = innermost(self._record.net)
        if not isinstance(net, nn.Module):
            raise ConfigError(
                f"the regularizer {self._name!r} reads the module of the vector field, but this field is not a "
                "module that takes just the state that the penalties measure: give the module itself, without a "
                "function around it, penalized= or an order above 1."
            )
        return net

    def _product(self, v: Tensor) -> Tensor:
        """``v^T df/dz`` from another pass over the field."""
        products = self._record.evaluator.repeat(self.t, self._record.state, _PRODUCTS, v).products
        assert products is not None
        return products.to(self.z.dtype)

    def _rows(self) -> Tensor:
        """The rows of ``df/dz`` from another pass over the field."""
        rows = self._record.evaluator.repeat(self.t, self._record.state, _ROWS).rows
        assert rows is not None
        return rows.to(self.z.dtype)

    def _require(self, need: str) -> None:
        if need not in self._needs:
            raise ConfigError(
                f"the regularizer {self._name!r} reads {need!r} of an evaluation and has not declared it: it must "
                f'declare `needs={{"{need}"}}`.'
            )


def _versions(*found: object) -> list[int]:
    """The number of writes into each tensor; torch does not count them in inference mode."""
    versions: list[int] = []  # torch.compile cannot trace list[int]()
    if not torch.compiler.is_compiling():
        for x in found:
            if isinstance(x, Tensor) and not x.is_inference():
                versions.append(x._version)
    return versions


def _matrices(rows: Tensor) -> Tensor:
    """Jacobians ``(B, D, D)`` from their rows ``(D, B, *event)``."""
    return rows.unsqueeze(-1).flatten(2).transpose(0, 1)
