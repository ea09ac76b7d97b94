"""Penalties on a vector field: small objects with a name, what they need, and a rate ``(B,)``.

A penalty's integral along the trajectory is what the objective (eq. 17) adds. ``kinetic`` and ``jacfrob`` are
the paper's two; another package offers its own through the hook ``rnode_register_regularizers``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from . import plugins
from .errors import ConfigError
from .estimators import sum_event

if TYPE_CHECKING:
    from .dynamics import Evaluation

__all__ = [
    "DEFAULT_LAMBDA",
    "FunctionRegularizer",
    "Regularizer",
    "Weighted",
    "jacfrob",
    "kinetic",
    "resolve_regularizers",
]

DEFAULT_LAMBDA = 0.01
"""The paper's strength for both penalties on every data set (section 6)."""


@runtime_checkable
class Regularizer(Protocol):
    """What a penalty must offer.

    Attributes:
        name: the key of its integral in every result.
        needs_vjp: whether it reads products with the Jacobian; without such a penalty (and without a density
            to follow) an evaluation costs no vector-Jacobian product.
    """

    @property
    def name(self) -> str: ...

    @property
    def needs_vjp(self) -> bool: ...

    def __call__(self, evaluation: Evaluation, /) -> Tensor:
        """The rate ``(B,)`` at one evaluation of the field."""
        ...


@dataclass(frozen=True)
class FunctionRegularizer:
    """A penalty from a function of an :class:`~rnode_plugin.dynamics.Evaluation`."""

    name: str
    rate: Callable[[Evaluation], Tensor]
    needs_vjp: bool = False

    def __call__(self, evaluation: Evaluation, /) -> Tensor:
        return self.rate(evaluation)


@dataclass(frozen=True)
class _PlainRate:
    """A function of ``(t, z, dz)`` as a rate; a class, so that a model that holds it can be pickled."""

    function: Callable[[Tensor, Tensor, Tensor], Any]

    def __call__(self, evaluation: Evaluation, /) -> Tensor:
        return self.function(evaluation.t, evaluation.z, evaluation.dz)


def _kinetic(evaluation: Evaluation) -> Tensor:
    """``||f(t, z)||^2``, the integrand of the kinetic energy (eq. 9a), summed over the event."""
    return sum_event(evaluation.dz.square())


def _jacfrob(evaluation: Evaluation) -> Tensor:
    """``||eps^T df/dz||^2`` (eq. 16), or ``||df/dz||_F^2`` itself (eq. 13) with the exact estimator."""
    return evaluation.squared_frobenius()


kinetic = FunctionRegularizer("kinetic", _kinetic)
jacfrob = FunctionRegularizer("jacfrob", _jacfrob, needs_vjp=True)


class Weighted(NamedTuple):
    """A penalty and its strength lambda in the objective."""

    regularizer: Regularizer
    strength: float


Spec = "str | Regularizer | Callable[[Tensor, Tensor, Tensor], Tensor]"


def resolve_regularizers(
    spec: Mapping[Any, float] | Iterable[Any] | Any | None, *, default_lambda: float = DEFAULT_LAMBDA
) -> dict[str, Weighted]:
    """Penalties by name with their strengths.

    Args:
        spec: names, :class:`Regularizer` objects or plain functions ``rate(t, z, dz) -> (B,)``, one or several,
            or a mapping from any of these to lambda.
        default_lambda: strength where ``spec`` gives none.

    Raises:
        ConfigError: for an unknown name, a name used twice, a lambda that is negative or not finite, or an
            object that is none of the three.
    """
    if spec is None:
        return {}
    if isinstance(spec, str) or callable(spec):
        spec = [spec]
    if isinstance(spec, Mapping):
        items = list(spec.items())
    elif isinstance(spec, Iterable):
        items = [(entry, default_lambda) for entry in spec]
    else:
        raise ConfigError(
            f"regularizers must be names, objects or functions, or a mapping of them to lambda, not {spec!r}."
        )
    resolved: dict[str, Weighted] = {}
    for entry, strength in items:
        regularizer = _resolve_one(entry)
        if regularizer.name in resolved:
            raise ConfigError(f"the regularizer {regularizer.name!r} is named twice; name each once.")
        resolved[regularizer.name] = Weighted(regularizer, _check_lambda(regularizer.name, strength))
    return resolved


def _resolve_one(entry: Any) -> Regularizer:
    if isinstance(entry, str):
        entry = plugins.get("regularizers", entry)
    if isinstance(entry, Regularizer):
        return entry
    if callable(entry) and not isinstance(entry, type):
        name = getattr(entry, "__name__", type(entry).__name__)
        return FunctionRegularizer(name, _PlainRate(entry))
    raise ConfigError(
        f"{entry!r} is no regularizer: give a name, an object with `name`, `needs_vjp` and "
        "`__call__(evaluation)`, or a function rate(t, z, dz) -> (B,)."
    )


def _check_lambda(name: str, strength: Any) -> float:
    try:
        value = float(strength)
    except (TypeError, ValueError):
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"lambda of {name!r} must be a finite number >= 0, not {strength!r}.")
    return value
