"""The contract of a regularizer: a name, what it needs, and a rate ``(B,)``.

The integral of the rate along the trajectory is the penalty, which the objective (eq. 17) adds. Another package
offers regularizers of its own through the hook ``rnode_register_regularizers``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from ..field_evaluation import FieldEvaluation

__all__ = ["DEFAULT_LAMBDA", "FunctionRegularizer", "PlainRate", "Regularizer", "Weighted"]

DEFAULT_LAMBDA = 0.01
"""The paper's strength for both penalties on every data set (section 6)."""


@runtime_checkable
class Regularizer(Protocol):
    """What a penalty must offer.

    Attributes:
        name: the key of its integral in every result.
        needs_vjp: whether it reads products with the Jacobian; without such a penalty (and without a density
            to follow) an evaluation costs no vector-Jacobian product.

    Example:
        >>> from rnode_plugin.core.regularizers import FunctionRegularizer
        >>> l1 = FunctionRegularizer("l1", lambda evaluation: evaluation.dz.abs().flatten(1).sum(1))
        >>> isinstance(l1, Regularizer)
        True
    """

    @property
    def name(self) -> str: ...

    @property
    def needs_vjp(self) -> bool: ...

    def __call__(self, evaluation: FieldEvaluation, /) -> Tensor:
        """The rate ``(B,)`` at one evaluation of the field."""
        ...


@dataclass(frozen=True)
class FunctionRegularizer:
    """A penalty from a function of an :class:`~rnode_plugin.core.field_evaluation.FieldEvaluation`."""

    name: str
    rate: Callable[[FieldEvaluation], Tensor]
    needs_vjp: bool = False

    def __call__(self, evaluation: FieldEvaluation, /) -> Tensor:
        return self.rate(evaluation)


@dataclass(frozen=True)
class PlainRate:
    """A function of ``(t, z, dz)`` as a rate; a class, so that a model that holds it can be pickled."""

    function: Callable[[Tensor, Tensor, Tensor], Any]

    def __call__(self, evaluation: FieldEvaluation, /) -> Tensor:
        return self.function(evaluation.t, evaluation.z, evaluation.dz)


class Weighted(NamedTuple):
    """A penalty and its strength lambda in the objective."""

    regularizer: Regularizer
    strength: float
