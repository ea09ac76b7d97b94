"""The augmented system (RNODE): velocity, divergence and the rates of the penalties, with one product at most."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..types import FieldWithDivergence, FieldWithLinearization, FieldWithVJP, Rates, VectorField
from .derivatives import FieldDerivatives
from .field_evaluation import FieldEvaluation
from .path_penalties import PathPenalties, hidden_rates
from .regularizers import Regularizer, kind_of
from .regularizers.checked_call import checked_call
from .trace_estimators import Exact, Linearize, TraceEstimator, get_estimator

__all__ = ["Dynamics"]


class Dynamics:
    """The augmented system (RNODE) of a vector field: state, log-determinant and penalties.

    Args:
        field: ``f(t, z)``. One that has ``forward_and_vjp`` computes its own product, one with ``forward_and_jvp``
            its own product along a direction, one with ``linearize`` all of them from one pass; the choice is made
            here, once.
        regularizers: rates, step penalties and trajectory penalties to follow. A span policy is not one of the
            dynamics: whoever chooses the times of a solve applies it.
        estimator: ``"gaussian"``, ``"rademacher"``, ``"exact"``, see
            :func:`~rnode_plugin.core.trace_estimators.get_estimator`, or an object.
        divergence: whether a density is followed (a continuous normalizing flow) or the state alone.
        event: takes from a state what step and trajectory penalties are about; None: all of it.

    Raises:
        ConfigError: for an unknown estimator and a span policy; later for a penalty that does not return ``(B,)``.

    Example:
        >>> import torch
        >>> from rnode_plugin.core.regularizers import jacfrob, kinetic
        >>> dynamics = Dynamics(lambda t, z: -z, regularizers=[kinetic, jacfrob], estimator="exact")
        >>> rates = dynamics.evaluate(torch.tensor(0.0), torch.ones(1, 3), None)
        >>> rates.dlogdet.item(), rates.penalties["kinetic"].item(), rates.penalties["jacfrob"].item()
        (-3.0, 3.0, 3.0)
    """

    def __init__(
        self,
        field: VectorField,
        *,
        regularizers: Iterable[Regularizer] = (),
        estimator: str | TraceEstimator = "gaussian",
        divergence: bool = True,
        event: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.field = field
        self.estimator = get_estimator(estimator)
        self.regularizers = tuple(regularizers)
        self.divergence = divergence
        kinds: dict[str, list[Any]] = {"rate": [], "step": [], "trajectory": [], "span": []}
        for regularizer in self.regularizers:
            kinds[kind_of(regularizer)].append(regularizer)
        if kinds["span"]:
            raise ConfigError(
                f"{kinds['span'][0].name!r} changes the times of a solve, which Dynamics does not choose: give it "
                "to NeuralODE, RegularizedCNF or a flow, or call its `times(t_span, training=...)`."
            )
        hidden = hidden_rates(kinds["trajectory"], kinds["rate"])
        self.rates = (*kinds["rate"], *hidden)
        self.path: PathPenalties | None = None
        if kinds["step"] or kinds["trajectory"]:
            self.path = PathPenalties(
                tuple(r for r in kinds["step"] if not r.local),
                tuple(r for r in kinds["step"] if r.local),
                tuple(kinds["trajectory"]),
                hidden=frozenset(r.name for r in hidden),
                **({} if event is None else {"event": event}),
            )
        needs = {need for rate in self.rates for need in rate.needs}
        self.needs_products = divergence or "vjp" in needs
        self.inner_autograd = "jvp" in needs or (self.needs_products and not isinstance(field, FieldWithVJP))
        self._derivatives = FieldDerivatives(field) if needs & {"vjp", "jvp"} else None
        self._velocity_and_divergence = None
        knows = isinstance(self.estimator, Exact) and isinstance(field, FieldWithDivergence)
        if knows and divergence and "vjp" not in needs:  # no Jacobian needed
            self._velocity_and_divergence = field.forward_and_divergence  # pyright: ignore[reportAttributeAccessIssue]
        self._field_and_products = self.estimator.bind(field)
        self._linearize = self._shared_pass(field) if "jvp" in needs else None

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the field and of the regularizers, of those that are modules."""
        for part in (self.field, *self.rates):
            if isinstance(part, nn.Module):
                yield from part.parameters()

    def draw(self, z: Tensor, *, generator: torch.Generator | None = None) -> Tensor | None:
        """Noise for one solve from ``z``; None if no product is needed."""
        return self.estimator.draw(z, generator=generator) if self.needs_products else None

    def bind(self, noise: Tensor | None) -> _Bound:
        """The system with its noise fixed, ready to be integrated."""
        return _Bound(self, noise)

    def evaluate(self, t: Tensor, z: Tensor, noise: Tensor | None, *, products: bool = True) -> Rates:
        """The right-hand side at one time; ``products=False`` leaves out whatever needs a product."""
        with_products = products and self.needs_products
        rows = known = jvp = None
        if products and self._linearize is not None:
            dz, rows, jvp = self._linearize(t, z, noise)
        elif not with_products:
            dz = self.field(t, z)
        elif self._velocity_and_divergence is not None:
            dz, known = self._velocity_and_divergence(t, z)
        else:
            dz, rows = self._field_and_products(t, z, noise)
        if dz.shape != z.shape:
            raise ConfigError(
                f"the vector field returned shape {tuple(dz.shape)} for a state of shape {tuple(z.shape)}; f(t, z) "
                "must have the shape of z."
            )
        # under autocast the field runs in low precision; everything that is summed does not
        dz = dz.to(z.dtype)
        evaluation = FieldEvaluation(
            t,
            z,
            dz,
            noise,
            None if rows is None else rows.to(z.dtype),
            self.estimator,
            self.field,
            self._derivatives,
            jvp,
        )
        dlogdet = None
        if with_products and self.divergence:
            dlogdet = evaluation.divergence() if known is None else known.to(z.dtype)
        return Rates(dz, dlogdet, self.penalties(evaluation, products=products))

    def _shared_pass(self, field: VectorField) -> Linearize | None:
        """How velocity, products and directions come from one pass; None if they cannot."""
        if self._velocity_and_divergence is not None:
            return None
        if self.needs_products:
            return self.estimator.bind_linearization(field)
        return field.linearize if isinstance(field, FieldWithLinearization) else None

    def penalties(self, evaluation: FieldEvaluation, *, products: bool = True) -> dict[str, Tensor]:
        """The rate ``(B,)`` of each penalty by name; ``products=False`` leaves out those that need anything."""
        seen = (evaluation.z, evaluation.dz)
        return {
            rate.name: checked_call(rate, evaluation, seen, evaluation.z)
            for rate in self.rates
            if products or not rate.needs
        }


@dataclass(frozen=True)
class _Bound:
    dynamics: Dynamics
    noise: Tensor | None

    def __call__(self, t: Tensor, z: Tensor, *, products: bool = True) -> Rates:
        return self.dynamics.evaluate(t, z, self.noise, products=products)

    @property
    def inner_autograd(self) -> bool:
        """Whether an evaluation differentiates inside, which a checkpoint has to know."""
        return self.dynamics.inner_autograd

    @property
    def path(self) -> PathPenalties | None:
        """The penalties that are not rates."""
        return self.dynamics.path

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.dynamics.parameters()
