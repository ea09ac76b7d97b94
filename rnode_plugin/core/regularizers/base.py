"""The contract of a regularizer: four kinds, each with a name and what it needs.

- A **rate** (``kind = "rate"``) is a number per unit of time; its integral along the trajectory is the penalty.
- A **step penalty** (``"step"``) sees each accepted step of the solver.
- A **trajectory penalty** (``"trajectory"``) sees states at times of its own.
- A **span policy** (``"span"``) changes the times of the solve.

The objective (eq. 17) adds the penalties, each per sample ``(B,)``. Another package offers regularizers of its own
through the hook ``rnode_register_regularizers``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from ...types import StepRecord, Trajectory
from ..schedules import DEFAULT_LAMBDA, Strength

if TYPE_CHECKING:
    from ..field_evaluation import FieldEvaluation

__all__ = [
    "DEFAULT_LAMBDA",
    "KINDS",
    "NEEDS",
    "FunctionRegularizer",
    "PlainRate",
    "Rate",
    "Regularizer",
    "SpanPolicy",
    "StepPenalty",
    "TrajectoryPenalty",
    "Weighted",
    "kind_of",
    "span_policy",
    "undivided",
]

KINDS = ("rate", "step", "trajectory", "span")
NEEDS = frozenset({"vjp", "jvp", "aux"})
"""What a rate can need of an evaluation, see :class:`~rnode_plugin.core.field_evaluation.FieldEvaluation`."""


@runtime_checkable
class Regularizer(Protocol):
    """What all kinds share: a name and a call. See :class:`Rate` and its siblings for what is called with what.

    Two attributes are optional: ``kind``, one of :data:`KINDS`, ``"rate"`` if it is missing, and
    ``divided_by_dims``, whether the objective divides the penalty by the number of dimensions (True if it is
    missing, as for every sum over the event).

    Attributes:
        name: the key of its penalty in every result.

    Example:
        >>> from rnode_plugin.core.regularizers import FunctionRegularizer
        >>> l1 = FunctionRegularizer("l1", lambda evaluation: evaluation.dz.abs().flatten(1).sum(1))
        >>> isinstance(l1, Regularizer)
        True
    """

    @property
    def name(self) -> str: ...

    def __call__(self, record: Any, /) -> Any: ...


@runtime_checkable
class Rate(Protocol):
    """A rate: its integral along the trajectory is the penalty.

    Attributes:
        name: the key of its penalty in every result.
        needs: what it reads of an evaluation beyond ``t, z, dz, noise``: a set of ``"vjp"``, ``"jvp"``, ``"aux"``.
            Without such a penalty, and without a density to follow, an evaluation costs no product with the
            Jacobian.
    """

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> Collection[str]: ...

    def __call__(self, evaluation: FieldEvaluation, /) -> Tensor:
        """The rate ``(B,)`` at one evaluation of the field."""
        ...


@runtime_checkable
class StepPenalty(Protocol):
    """A penalty on the solver's accepted steps, or on one extra step.

    Attributes:
        name: the key of its penalty in every result.
        kind: ``"step"``.
        uses: what it reads of a step that not every method has: ``"error"``, the embedded error estimate, and
            ``"pair"``, two stages at the same time.
        reduction: ``"sum"``, ``"mean"`` or ``"max"`` over the steps.
        local: whether it sees one extra step instead, from a uniformly random time: unbiased for the time average
            of a step's value. The step's start is detached.
    """

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def uses(self) -> Collection[str]: ...

    @property
    def reduction(self) -> str: ...

    @property
    def local(self) -> bool: ...

    def __call__(self, step: StepRecord, /) -> Tensor:
        """The value ``(B,)`` of one step."""
        ...


@runtime_checkable
class TrajectoryPenalty(Protocol):
    """A penalty on the states of a solve at times of its own.

    Attributes:
        name: the key of its penalty in every result.
        kind: ``"trajectory"``.
        rates: rates whose integrals it reads.
    """

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def rates(self) -> Collection[Rate]: ...

    def times(self, t0: Tensor, t1: Tensor, /) -> Tensor:
        """Times strictly between both ends at which it wants states, ``(k,)``; drawn again for each solve."""
        ...

    def __call__(self, trajectory: Trajectory, /) -> Tensor:
        """The penalty ``(B,)``."""
        ...


@runtime_checkable
class SpanPolicy(Protocol):
    """A rule for the times of a solve.

    Attributes:
        name: the key of its penalty in every result.
        kind: ``"span"``.
        penalized: whether it has a penalty, and so takes a lambda.
    """

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def penalized(self) -> bool: ...

    def times(self, t_span: Tensor, /, *, training: bool) -> Tensor:
        """The times to solve through instead of ``t_span (T,)``, as many and in the same direction."""
        ...

    def __call__(self, z: Tensor, /) -> Tensor:
        """The penalty ``(B,)`` for a state ``z (B, *event)``."""
        ...


@dataclass(frozen=True)
class FunctionRegularizer:
    """A rate from a function of a :class:`~rnode_plugin.core.field_evaluation.FieldEvaluation`.

    Args:
        name: the key of its penalty in every result.
        rate: evaluation to ``(B,)``.
        needs: ``"vjp"``, ``"jvp"`` and ``"aux"``, those that it reads.
        divided_by_dims: whether the objective divides the penalty by the number of dimensions.
    """

    name: str
    rate: Callable[[FieldEvaluation], Tensor]
    needs: Collection[str] = frozenset()
    divided_by_dims: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs", frozenset(self.needs))  # hashable: a key of {regularizer: lambda}

    def __call__(self, evaluation: FieldEvaluation, /) -> Tensor:
        return self.rate(evaluation)


@dataclass(frozen=True)
class PlainRate:
    """A function of ``(t, z, dz)`` as a rate; a class, so that a model that holds it can be pickled."""

    function: Callable[[Tensor, Tensor, Tensor], Any]

    def __call__(self, evaluation: FieldEvaluation, /) -> Tensor:
        return self.function(evaluation.t, evaluation.z, evaluation.dz)


class Weighted(NamedTuple):
    """A regularizer and its strength lambda in the objective: a number, or a function of the optimizer's step."""

    regularizer: Regularizer
    strength: Strength


def kind_of(regularizer: Any) -> str:
    """One of :data:`KINDS`."""
    return getattr(regularizer, "kind", "rate")


def undivided(regularizers: Collection[Any]) -> frozenset[str]:
    """Names of those whose penalty the objective does not divide by the number of dimensions."""
    return frozenset(r.name for r in regularizers if not getattr(r, "divided_by_dims", True))


def span_policy(regularizers: Collection[Any]) -> SpanPolicy | None:
    """The one span policy among them; None if there is none."""
    return next((r for r in regularizers if kind_of(r) == "span"), None)
