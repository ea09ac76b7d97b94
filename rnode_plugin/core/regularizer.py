"""The contract of a regularizer, with one class for each of the three things that a penalty can see in a solve.

- A :class:`Rate` is a number per unit of time; its integral along the trajectory is the penalty.
- A :class:`StepPenalty` sees each accepted step of the solver.
- A :class:`SpanPolicy` changes the times of the solve.

The objective (eq. 17) adds the penalties, each given per sample, ``(B,)``. Another package offers its regularizers
through the hook ``rnode_register_regularizers``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from ..errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from .field_evaluation import FieldEvaluation

__all__ = [
    "KINDS",
    "FunctionRegularizer",
    "FunctionStepPenalty",
    "Rate",
    "Regularizer",
    "Source",
    "SpanPolicy",
    "StepPenalty",
    "StepRecord",
    "kind_of",
    "rate",
    "step_penalty",
]

Reduction = Literal["sum", "mean", "max"]
Finish = Callable[["Tensor", "Tensor", "Tensor", "Tensor"], "Tensor"]


class Source(NamedTuple):
    """Who proposed a regularizer.

    Attributes:
        method: the name of the method, such as ``"RNODE"``; ``""`` if it has none.
        authors: the paper's authors, such as ``"Finlay et al."``.
        year: year of the paper.
        key: key of the paper's BibTeX entry.
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


def _first_line(described: object) -> str:
    lines = inspect.cleandoc(described.__doc__ or "").splitlines()
    return lines[0] if lines else ""


class Regularizer:
    """What the three kinds of regularizers share. Derive a regularizer from one of them, not from this class.

    The parameters of a regularizer that also is a ``torch.nn.Module`` are trained with the model.

    Attributes:
        name: the key of its penalty in every result.
        divided_by_dims: whether the objective divides the penalty by the number of dimensions, as it must for a sum
            over the event.
        formula: what is penalized, in one line; the first line of the docstring if it is left out.
        cost: what an evaluation costs beyond the velocity, or what the penalty needs from the solver.
        source: who proposed it.

    Example:
        >>> from rnode_plugin.regularizers import jacfrob
        >>> isinstance(jacfrob, Regularizer), jacfrob.name, str(jacfrob.source)
        (True, 'jacfrob', 'RNODE (Finlay et al., 2020), eqs. 13 and 16')
    """

    name: str
    divided_by_dims: bool = True
    formula: str = ""
    cost: str = ""
    source: str | Source = ""

    if TYPE_CHECKING:  # a definition would hide the call of a module

        def __call__(self, record: Any, /) -> Tensor: ...

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        # vars, not hasattr: a subclass must not inherit the formula of its base
        if "formula" not in vars(cls):
            cls.formula = _first_line(cls)

    def check(self) -> None:
        """Refuse an incomplete declaration. This runs once, before any solve.

        Raises:
            ConfigError: if it has no ``name`` or no call, or an attribute has a value that it cannot have.
        """
        if not hasattr(self, "name") or not callable(self):
            raise ConfigError(f"the regularizer {self!r} lacks a `name` or a call.")

    def join(self, before: Tensor, last: Tensor, *, solves: int, share: float) -> Tensor:
        """Combine the penalties ``(B,)`` of consecutive solves, such as the blocks of a flow.

        Args:
            before: penalty of all solves except the last one, ``(B,)``.
            last: penalty of the last solve, ``(B,)``.
            solves: number of solves, the last one included.
            share: number of steps in the last solve, as a fraction of all steps, between 0 and 1.
        """
        return before + last


def _refuse_others(
    regularizer: Regularizer, attribute: str, given: Collection[str], allowed: Collection[str]
) -> None:
    if not set(given) <= set(allowed):
        found, choices = ("{" + ", ".join(sorted(map(repr, names))) + "}" for names in (given, allowed))
        raise ConfigError(f"{attribute} of {regularizer.name!r} must be a set of names in {choices}, not {found}.")


class Rate(Regularizer):
    """A rate per unit of time, whose integral along the trajectory is the penalty.

    A call maps a :class:`~rnode_plugin.core.field_evaluation.FieldEvaluation` to the rate ``(B,)``.

    Attributes:
        needs: what it reads of an evaluation beyond ``t, z, dz, noise``: any of ``"vjp"``, ``"jvp"`` and
            ``"field"``. If no rate needs one and no density is followed, an evaluation computes no product with the
            Jacobian.
        repeats: whether it evaluates the field again, for ``jacobian()`` with a random estimator or for a
            ``total_derivative()`` above order 2. Then the state of the random generators is noted at each
            evaluation, as it is for the need ``"field"``.
        time_gradient: whether backward through the steps of a solve gives the right gradient by the times of the
            solve. Set it to False for a rate that detaches a part of itself; then only a continuous adjoint gives a
            gradient, and only by the end.
        finish: None, or a function that makes the penalty ``(B,)`` of one solve from the integral ``(B,)``, the
            states ``(B, *event)`` at both ends of the solve, and the length of the solve in time.

    Example:
        >>> from rnode_plugin.regularizers import Rate
        >>> class L1(Rate):
        ...     name = "l1"
        ...     def __call__(self, evaluation):
        ...         return evaluation.dz.abs().flatten(1).sum(1)
    """

    needs: Collection[str] = frozenset()
    repeats: bool = False
    time_gradient: bool = True
    finish: Any = None  # not `Finish | None`, which a method of a subclass could not override

    if TYPE_CHECKING:

        def __call__(self, evaluation: FieldEvaluation, /) -> Tensor: ...

    def check(self) -> None:
        super().check()
        _refuse_others(self, "needs", self.needs, ("vjp", "jvp", "field"))


class StepPenalty(Regularizer):
    """A penalty on the steps that the solver accepts.

    A call maps a :class:`StepRecord` to a value ``(B,)``. By default the objective does not divide it by the number
    of dimensions, because a solver's error norm is a mean over the dimensions.

    Attributes:
        uses: what it reads that not every method has: ``"error"`` for the embedded error estimate, ``"pair"`` for
            two stages at the same time.
        reduction: ``"sum"``, ``"mean"`` or ``"max"`` over the steps.
        local: whether it sees one extra step from a uniformly random time instead of the accepted steps. Its value
            is an unbiased estimate of the time average. The start of the extra step is detached.
    """

    divided_by_dims: bool = False
    uses: Collection[str] = frozenset()
    reduction: Reduction = "sum"
    local: bool = False

    if TYPE_CHECKING:

        def __call__(self, step: StepRecord, /) -> Tensor: ...

    def check(self) -> None:
        super().check()
        _refuse_others(self, "uses", self.uses, ("error", "pair"))
        if self.reduction not in ("sum", "mean", "max"):
            raise ConfigError(f"reduction of {self.name!r} must be 'sum', 'mean' or 'max', not {self.reduction!r}.")

    def join(self, before: Tensor, last: Tensor, *, solves: int, share: float) -> Tensor:
        if self.reduction == "max":
            return before.maximum(last)
        if self.reduction == "sum":
            return before + last
        # a running mean: over the solves, which have one local step each, or else over their steps
        return before + (last - before) * (1 / solves if self.local else share)


class SpanPolicy(Regularizer):
    """A rule that changes the times of a solve. A call maps a state ``(B, *event)`` to its penalty ``(B,)``.

    Attributes:
        penalized: whether it has a penalty and therefore takes a lambda.
    """

    divided_by_dims: bool = False
    penalized: bool = True

    if TYPE_CHECKING:

        def __call__(self, z: Tensor, /) -> Tensor: ...

        def times(self, t_span: Tensor, /, *, training: bool) -> Tensor:
            """The times ``(T,)`` to solve through instead of ``t_span (T,)``, in the same direction."""
            ...

    def check(self) -> None:
        super().check()
        if not hasattr(self, "times"):
            raise ConfigError(f"{self.name!r} lacks `times`, which a span policy has.")


KINDS: Mapping[str, type[Regularizer]] = {
    "rate": Rate, "step": StepPenalty, "span": SpanPolicy,
}  # fmt: skip
"""The three classes, by the word that stands for each in lists and tables."""


def kind_of(regularizer: Regularizer | type[Regularizer]) -> str:
    """The word in :data:`KINDS` for a regularizer or its class."""
    made = regularizer if isinstance(regularizer, type) else type(regularizer)
    return next(word for word, kind in KINDS.items() if issubclass(made, kind))


@dataclass(frozen=True)
class StepRecord:
    """One step of a solve, as a step penalty sees it.

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


# from functions -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FunctionRegularizer(Rate):
    """A rate from a function. Copies and pickles of one that :func:`rate` made refer to it by name.

    Args:
        name: the key of its penalty in every result.
        function: maps a :class:`~rnode_plugin.core.field_evaluation.FieldEvaluation` to ``(B,)``.
        formula: what is penalized; the first line of the function's docstring if it is left out.
        needs, repeats, time_gradient, finish, divided_by_dims, cost, source: see :class:`Rate` and
            :class:`Regularizer`.

    Example:
        >>> from rnode_plugin.regularizers import FunctionRegularizer
        >>> l1 = FunctionRegularizer("l1", lambda evaluation: evaluation.dz.abs().flatten(1).sum(1))
        >>> l1.name, l1.divided_by_dims
        ('l1', True)
    """

    name: str
    function: Callable[[FieldEvaluation], Tensor]
    needs: Collection[str] = frozenset()
    repeats: bool = False
    time_gradient: bool = True
    finish: Finish | None = None
    divided_by_dims: bool = True
    formula: str = ""
    cost: str = ""
    source: str | Source = ""

    def __post_init__(self) -> None:
        # hashable, since a regularizer may be a key of {regularizer: lambda}
        object.__setattr__(self, "needs", frozenset(self.needs))
        object.__setattr__(self, "formula", self.formula or _first_line(self.function))

    def __call__(self, evaluation: FieldEvaluation, /) -> Tensor:
        return self.function(evaluation)

    def __reduce__(self) -> str | tuple[object, ...]:
        return _by_reference(self) or super().__reduce__()


@dataclass(frozen=True)
class FunctionStepPenalty(StepPenalty):
    """A step penalty from a function. Copies and pickles of one that :func:`step_penalty` made refer to it by name.

    Args:
        name: the key of its penalty in every result.
        function: maps a :class:`StepRecord` to ``(B,)``.
        formula: what is penalized; the first line of the function's docstring if it is left out.
        uses, reduction, local, divided_by_dims, cost, source: see :class:`StepPenalty` and :class:`Regularizer`.
    """

    name: str
    function: Callable[[StepRecord], Tensor]
    uses: Collection[str] = frozenset()
    reduction: Reduction = "sum"
    local: bool = False
    divided_by_dims: bool = False
    formula: str = ""
    cost: str = ""
    source: str | Source = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "uses", frozenset(self.uses))
        object.__setattr__(self, "formula", self.formula or _first_line(self.function))

    def __call__(self, step: StepRecord, /) -> Tensor:
        return self.function(step)

    def __reduce__(self) -> str | tuple[object, ...]:
        return _by_reference(self) or super().__reduce__()


_Made = TypeVar("_Made", FunctionRegularizer, FunctionStepPenalty)


def rate(name: str, **attributes: Any) -> Callable[[Callable[[FieldEvaluation], Tensor]], FunctionRegularizer]:
    """Decorator that turns a function into a rate, with the arguments of :class:`FunctionRegularizer`."""

    def declare(function: Callable[[FieldEvaluation], Tensor]) -> FunctionRegularizer:
        return _standing_for(function, FunctionRegularizer(name, function, **attributes))

    return declare


def step_penalty(name: str, **attributes: Any) -> Callable[[Callable[[StepRecord], Tensor]], FunctionStepPenalty]:
    """Decorator that turns a function into a step penalty, with the arguments of :class:`FunctionStepPenalty`."""

    def declare(function: Callable[[StepRecord], Tensor]) -> FunctionStepPenalty:
        return _standing_for(function, FunctionStepPenalty(name, function, **attributes))

    return declare


def _standing_for(function: Callable[..., Tensor], made: _Made) -> _Made:
    # the decorated name now means the regularizer, so documentation and pickle look for it where the function was
    object.__setattr__(made, "__module__", function.__module__)
    object.__setattr__(made, "__doc__", function.__doc__)
    return made


def _by_reference(made: FunctionRegularizer | FunctionStepPenalty) -> str:
    """The name by which pickle finds a regularizer that a decorator put in its function's place; else ``""``."""
    return made.function.__name__ if "__module__" in vars(made) else ""
