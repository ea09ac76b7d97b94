"""The three kinds of regularizers: :class:`Rate`, :class:`StepPenalty` and :class:`SpanPolicy`.

- A :class:`Rate` is a number per unit of time; its integral along the trajectory is the penalty.
- A :class:`StepPenalty` reads each accepted step of the solver.
- A :class:`SpanPolicy` changes the times of the solve.

The first two are data with a function in them. The objective (eq. 17) adds the penalties, each given per sample,
``(B,)``. Another package offers its regularizers through the hook ``rnode_register_regularizers``.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeAlias, TypeVar

from ..errors import ConfigError, check_name

if TYPE_CHECKING:
    from torch import Tensor

    from .field_evaluation import FieldEvaluation

__all__ = [
    "About",
    "Rate",
    "Regularizer",
    "Source",
    "SpanPolicy",
    "StepPenalty",
    "StepRecord",
    "rate",
    "step_penalty",
]

Reduction = Literal["sum", "mean", "max"]
Finish = Callable[["Tensor", "Tensor", "Tensor", "Tensor"], "Tensor"]


class Source(NamedTuple):
    """The method and the paper that a regularizer comes from.

    Attributes:
        method: the name of the method, such as ``"RNODE"``; ``""`` if it has none.
        authors: the paper's authors, such as ``"Finlay et al."``.
        year: year of the paper.
        key: key of the paper's BibTeX entry; the page *Papers* has those of this package's regularizers.
        place: where the paper defines it, such as ``"eq. 9a"``, or ``"code"`` for the authors' code.
    """

    method: str
    authors: str = ""
    year: int = 0
    key: str = ""
    place: str = ""

    def at(self, place: str, *, method: str = "") -> Source:
        """The same source with a place in the paper, and optionally another method from it."""
        return self._replace(place=place, method=method or self.method)

    def __str__(self) -> str:
        paper = f"{self.authors}, {self.year}" if self.authors else ""
        text = f"{self.method} ({paper})" if self.method and paper else self.method or paper
        return f"{text}, {self.place}" if self.place else text


@dataclass(frozen=True)
class About:
    """The description of a regularizer in lists. No solve reads it.

    Attributes:
        formula: the penalized quantity, in one line; the first line of the function's docstring, without its full
            stop, if it is left out.
        cost: cost of an evaluation beyond the velocity, or the quantities that the penalty needs from the solver.
        source: its method and paper.
        estimate: the formula of what is computed in place of ``formula`` by a trace estimator with noise ε; empty
            if the value does not depend on the estimator.
    """

    formula: str = ""
    cost: str = ""
    source: str | Source = ""
    estimate: str = ""

    def or_of(self, described: object) -> About:
        """The same, with the first line of the docstring of ``described`` if there is no formula."""
        lines = inspect.cleandoc(described.__doc__ or "").splitlines()
        return self if self.formula or not lines else replace(self, formula=lines[0].removesuffix("."))


@dataclass(frozen=True)
class Rate:
    """A rate per unit of time, whose integral along the trajectory is the penalty.

    Attributes:
        name: the key of its penalty in every result.
        of: maps a :class:`~rnode_plugin.core.field_evaluation.FieldEvaluation` to the rate ``(B,)``, a sum over the
            event. The parameters of a ``torch.nn.Module`` are trained with the model.
        needs: the quantities of an evaluation that it reads beyond ``t, z, dz, noise``: any of ``"vjp"``, ``"jvp"``
            and ``"field"``. If no rate needs one and no log-determinant is integrated, an evaluation computes no
            product with the Jacobian.
        divided_by_dims: whether the objective divides the penalty by the number of dimensions, as it must for a sum
            over the event.
        finish: None, or a function that makes the penalty ``(B,)`` of one solve from the integral ``(B,)``, the
            states ``(B, *event)`` at both ends of the solve, and the length of the solve in time.
        about: its formula, cost and source, for lists.

    Copies and pickles of a rate that :func:`rate` made refer to it by name.

    Raises:
        ConfigError: for a name that is not a text, an ``of`` that is not callable, and other ``needs``.

    Example:
        >>> from rnode_plugin.regularizers import Rate
        >>> l1 = Rate("l1", lambda evaluation: evaluation.dz.abs().flatten(1).sum(1))
        >>> l1.name, l1.divided_by_dims
        ('l1', True)
    """

    kind: ClassVar[str] = "rate"

    name: str
    of: Callable[[FieldEvaluation], Tensor]
    _: KW_ONLY
    needs: Collection[str] = frozenset()
    divided_by_dims: bool = True
    finish: Finish | None = None
    about: About = About()

    def __post_init__(self) -> None:
        _check(self)
        # hashable, since a regularizer may be a key of {regularizer: lambda}
        object.__setattr__(self, "needs", _names(self.name, "needs", self.needs, ("vjp", "jvp", "field")))
        object.__setattr__(self, "about", self.about.or_of(self.of))

    def __reduce__(self) -> str | tuple[object, ...]:
        return _by_reference(self) or super().__reduce__()


@dataclass(frozen=True)
class StepPenalty:
    """A penalty on the steps that the solver accepts.

    Attributes:
        name: the key of its penalty in every result.
        of: maps a :class:`StepRecord` to a value ``(B,)``. The parameters of a ``torch.nn.Module`` are trained with
            the model.
        reduction: ``"sum"``, ``"mean"`` or ``"max"`` over the steps.
        uses: quantities that it reads and that not every method has: ``"error"`` for the embedded error estimate,
            ``"pair"`` for two stages at the same time.
        local: whether it reads one extra step from a uniformly random time instead of the accepted steps. Its value
            is an unbiased estimate of the time average. The start of the extra step is detached.
        divided_by_dims: whether the objective divides the penalty by the number of dimensions. By default it does
            not, because a solver's error norm is a mean over the dimensions.
        about: its formula, cost and source, for lists.

    Copies and pickles of a penalty that :func:`step_penalty` made refer to it by name.

    Raises:
        ConfigError: for a name that is not a text, an ``of`` that is not callable, and another ``reduction`` or
            other ``uses``.
    """

    kind: ClassVar[str] = "step"

    name: str
    of: Callable[[StepRecord], Tensor]
    _: KW_ONLY
    reduction: Reduction = "sum"
    uses: Collection[str] = frozenset()
    local: bool = False
    divided_by_dims: bool = False
    about: About = About()

    def __post_init__(self) -> None:
        _check(self)
        object.__setattr__(self, "uses", _names(self.name, "uses", self.uses, ("error", "pair")))
        object.__setattr__(self, "about", self.about.or_of(self.of))
        check_name(self.reduction, ("sum", "mean", "max"), f"reduction of {self.name!r}:")

    def __reduce__(self) -> str | tuple[object, ...]:
        return _by_reference(self) or super().__reduce__()


class SpanPolicy(ABC):
    """A rule that changes the times of a solve. The parameters of one that is a module train with the model.

    Attributes:
        name: the key of its penalty in every result.
        penalized: whether it has a penalty and therefore takes a lambda.
        divided_by_dims: whether the objective divides the penalty by the number of dimensions.
        about: its formula, cost and source, for lists.
    """

    kind: ClassVar[str] = "span"

    name: str
    penalized: bool = True
    divided_by_dims: bool = False
    about: About = About()

    @abstractmethod
    def times(self, t_span: Tensor, /, *, training: bool) -> Tensor:
        """The times ``(T,)`` to solve through instead of ``t_span (T,)``, in its direction, dtype and device."""

    @abstractmethod
    def penalty(self, z: Tensor, /) -> Tensor:
        """The penalty ``(B,)`` of a solve for a state ``z (B, *event)``; zeros if it has none."""


Regularizer: TypeAlias = Rate | StepPenalty | SpanPolicy
"""One of the three kinds of regularizers."""


@dataclass(frozen=True)
class StepRecord:
    """One step of a solve, for step penalties.

    Attributes:
        t: time at the start of the step, a tensor with one entry.
        h: length of the step, positive, a tensor with one entry.
        z0, z1: states ``(B, *event)`` at the two ends of the step.
        times, states, velocities: one entry for each stage, in the order of evaluation.
        error: the embedded estimate of the error in ``z1``, ``(B, *event)``; None if the method has none.
        pair: indices of two stages at the same time; None if the method has no such stages.
        atol, rtol: the solve's tolerances; None for a fixed grid.
    """

    t: Tensor
    h: Tensor
    z0: Tensor
    z1: Tensor
    times: Sequence[Tensor]
    states: Sequence[Tensor]
    velocities: Sequence[Tensor]
    error: Tensor | None
    pair: tuple[int, int] | None
    atol: float | Tensor | None
    rtol: float | Tensor | None


def code_of(regularizer: Regularizer) -> object:
    """The object that may have parameters: the function or module of a penalty, or the span policy itself."""
    return regularizer if isinstance(regularizer, SpanPolicy) else regularizer.of


# from functions -------------------------------------------------------------------------------------------------

_Made = TypeVar("_Made", Rate, StepPenalty)


def rate(name: str, **options: Any) -> Callable[[Callable[[FieldEvaluation], Tensor]], Rate]:
    """Decorator that puts a :class:`Rate` with these options in the place of its function."""

    def declare(function: Callable[[FieldEvaluation], Tensor]) -> Rate:
        return _standing_for(function, Rate(name, function, **options))

    return declare


def step_penalty(name: str, **options: Any) -> Callable[[Callable[[StepRecord], Tensor]], StepPenalty]:
    """Decorator that puts a :class:`StepPenalty` with these options in the place of its function."""

    def declare(function: Callable[[StepRecord], Tensor]) -> StepPenalty:
        return _standing_for(function, StepPenalty(name, function, **options))

    return declare


def _standing_for(function: Callable[..., Tensor], made: _Made) -> _Made:
    # the decorated name now means the regularizer, so documentation and pickle look for it where the function was
    object.__setattr__(made, "__module__", function.__module__)
    object.__setattr__(made, "__doc__", function.__doc__)
    return made


def _by_reference(made: Rate | StepPenalty) -> str:
    """The name by which pickle finds a regularizer that a decorator put in its function's place; else ``""``."""
    return getattr(made.of, "__name__", "") if "__module__" in vars(made) else ""


def _check(made: Rate | StepPenalty) -> None:
    if not isinstance(made.name, str) or not callable(made.of):
        raise ConfigError(
            f"a {type(made).__name__} takes a name and a function, not {made.name!r} and {made.of!r:.60}."
        )


def _names(name: str, attribute: str, given: Collection[str], allowed: Collection[str]) -> frozenset[str]:
    if not set(given) <= set(allowed):
        wrong, choices = ("{" + ", ".join(sorted(map(repr, names))) + "}" for names in (given, allowed))
        raise ConfigError(f"{attribute} of {name!r} must be a set of names in {choices}, not {wrong}.")
    return frozenset(given)
