"""The augmented system (RNODE): velocity, divergence and the rates of the penalties, with one product at most."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..types import FieldWithVJP, Rates, VectorField
from .field_evaluation import FieldEvaluation
from .regularizers import Regularizer
from .trace_estimators import TraceEstimator, get_estimator

__all__ = ["Dynamics"]


class Dynamics:
    """The augmented system (RNODE) of a vector field: state, log-determinant and penalties.

    Args:
        field: ``f(t, z)``. One that has ``forward_and_vjp`` computes its own product; the choice is made here,
            once.
        regularizers: penalties to follow.
        estimator: ``"gaussian"``, ``"rademacher"``, ``"exact"`` or an object.
        divergence: whether a density is followed (a continuous normalizing flow) or the state alone.

    Raises:
        ConfigError: for an unknown estimator; later for a penalty whose rate is not of shape ``(B,)``.

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
    ) -> None:
        self.field = field
        self.estimator = get_estimator(estimator)
        self.regularizers = tuple(regularizers)
        self.divergence = divergence
        self.needs_products = divergence or any(r.needs_vjp for r in self.regularizers)
        self.inner_autograd = self.needs_products and not isinstance(field, FieldWithVJP)
        self._field_and_products = self.estimator.bind(field)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The field's parameters, where it is a module."""
        if isinstance(self.field, nn.Module):
            yield from self.field.parameters()

    def draw(self, z: Tensor, *, generator: torch.Generator | None = None) -> Tensor | None:
        """Noise for one solve from ``z``; None where no product is needed."""
        return self.estimator.draw(z, generator=generator) if self.needs_products else None

    def bind(self, noise: Tensor | None) -> _Bound:
        """The system with its noise fixed, ready to be integrated."""
        return _Bound(self, noise)

    def evaluate(self, t: Tensor, z: Tensor, noise: Tensor | None, *, products: bool = True) -> Rates:
        """The right-hand side at one time; ``products=False`` leaves out whatever needs a product."""
        with_products = products and self.needs_products
        if with_products:
            dz, rows = self._field_and_products(t, z, noise)
            # under autocast the field runs in low precision; everything that is summed does not
            evaluation = FieldEvaluation(t, z, dz.to(z.dtype), noise, rows.to(z.dtype), self.estimator)
        else:
            evaluation = FieldEvaluation(t, z, self.field(t, z).to(z.dtype))
        if evaluation.dz.shape != z.shape:
            raise ConfigError(
                f"the vector field returned shape {tuple(evaluation.dz.shape)} for a state of shape "
                f"{tuple(z.shape)}; f(t, z) must have the shape of z."
            )
        dlogdet = evaluation.divergence() if with_products and self.divergence else None
        return Rates(evaluation.dz, dlogdet, self.penalties(evaluation, products=products))

    def penalties(self, evaluation: FieldEvaluation, *, products: bool = True) -> dict[str, Tensor]:
        """The rate ``(B,)`` of each penalty by name; ``products=False`` leaves out those that read products."""
        return {r.name: self._rate(r, evaluation) for r in self.regularizers if products or not r.needs_vjp}

    @staticmethod
    def _rate(regularizer: Regularizer, evaluation: FieldEvaluation) -> Tensor:
        rate = regularizer(evaluation)
        if not isinstance(rate, Tensor) or rate.shape != evaluation.z.shape[:1]:
            got = tuple(rate.shape) if isinstance(rate, Tensor) else type(rate).__name__
            raise ConfigError(
                f"the regularizer {regularizer.name!r} returned {got}; it must return one rate a sample, "
                f"a tensor of shape {tuple(evaluation.z.shape[:1])}."
            )
        return rate


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

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.dynamics.parameters()
