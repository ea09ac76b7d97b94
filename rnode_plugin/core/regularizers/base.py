"""The contract of a regularizer: four kinds, each with a name and what it needs; and how one declares itself.

- A **rate** (``kind = "rate"``) is a number per unit of time; its integral along the trajectory is the penalty.
- A **step penalty** (``"step"``) sees each accepted step of the solver.
- A **trajectory penalty** (``"trajectory"``) sees states at times of its own.
- A **span policy** (``"span"``) changes the times of the solve.

The objective (eq. 17) adds the penalties, each per sample ``(B,)``. A regularizer of this package declares itself
once, with :func:`regularizer`: its registration, the listings and the table in the docs read that. Another package
offers regularizers of its own through the hook ``rnode_register_regularizers``.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from ...errors import ConfigError
from ..schedules import DEFAULT_LAMBDA, Strength, check_lambda

if TYPE_CHECKING:
    from ..field_evaluation import FieldEvaluation

__all__ = [
    "DECLARED",
    "KINDS",
    "Declaration",
    "FunctionRegularizer",
    "FunctionStepPenalty",
    "Regularizer",
    "Source",
    "StepRecord",
    "Trajectory",
    "Weighted",
    "check_batch_dim",
    "declaration_of",
    "kind_of",
    "span_policy",
    "undivided",
    "warn_of_flat_state",
    "weigh_regularizers",
]

KINDS = {
    "rate": ("needs",),
    "step": ("uses", "reduction", "local"),
    "trajectory": ("rates", "times"),
    "span": ("penalized", "times"),
}
"""The kinds, and what each has beside a name and a call."""

_CHOICES = {
    "needs": frozenset({"vjp", "jvp", "aux"}),
    "uses": frozenset({"error", "pair"}),
    "reduction": frozenset({"sum", "mean", "max"}),
}


@runtime_checkable
class Regularizer(Protocol):
    """The contract of all kinds: a ``name``, a call, and what :data:`KINDS` lists for its ``kind``.

    Attributes:
        name: the key of its penalty in every result.
        kind: one of :data:`KINDS`; ``"rate"`` if it is missing.
        divided_by_dims: whether the objective divides the penalty by the number of dimensions; True if it is
            missing, as for every sum over the event.
        needs: of a rate: what it reads of an evaluation beyond ``t, z, dz, noise``, a set of ``"vjp"``, ``"jvp"``,
            ``"aux"``. Without a need, and without a density, an evaluation costs no product with the Jacobian.
        uses: of a step penalty: what it reads that not every method has, ``"error"``, the embedded error estimate,
            and ``"pair"``, two stages at the same time.
        reduction: of a step penalty: ``"sum"``, ``"mean"`` or ``"max"`` over the steps.
        local: of a step penalty: whether it sees one extra step instead, from a uniformly random time: unbiased for
            the time average of a step's value. The step's start is detached.
        rates: of a trajectory penalty: rates whose integrals it reads.
        times: of a trajectory penalty, ``times(t0, t1)``: times ``(k,)`` between both ends at which it wants
            states, drawn again for each solve. Of a span policy, ``times(t_span, *, training)``: the times to solve
            through instead of ``t_span (T,)``, as many and in the same direction.
        penalized: of a span policy: whether it has a penalty, and so takes a lambda.

    Example:
        >>> from rnode_plugin.core.regularizers import FunctionRegularizer
        >>> l1 = FunctionRegularizer("l1", lambda evaluation: evaluation.dz.abs().flatten(1).sum(1))
        >>> isinstance(l1, Regularizer)
        True
    """

    @property
    def name(self) -> str: ...

    def __call__(self, record: Any, /) -> Tensor:
        """The value ``(B,)``.

        ``record`` is a :class:`~rnode_plugin.core.field_evaluation.FieldEvaluation`, a :class:`StepRecord`, a
        :class:`Trajectory`, or for a span policy a state ``z (B, *event)``.
        """
        ...


@dataclass(frozen=True)
class StepRecord:
    """One step of a solve, as a step penalty sees it.

    Attributes:
        t: time at its start, a tensor of one entry.
        h: its length, positive, a tensor of one entry.
        z0, z1: states ``(B, *event)`` at its two ends.
        times, states, velocities: of each stage, in the order of their evaluation.
        error: the embedded estimate of the error of ``z1``, ``(B, *event)``; None if the method has none.
        pair: indices of two stages at the same time; None if the method has no two.
        atol, rtol: the solve's tolerances; a fixed grid does not use them.
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
    atol: float
    rtol: float


@dataclass(frozen=True)
class Trajectory:
    """States along one solve, as a trajectory penalty sees them.

    Attributes:
        t: times ``(T,)`` in the order of the solve: both ends, and between them those that the penalty asked for.
        z: states at them, ``(T, B, *event)``.
        integrals: integral along the path of each rate that the penalty asked for by name, ``(B,)``.
    """

    t: Tensor
    z: Tensor
    integrals: Mapping[str, Tensor]


class _Reference:
    """A regularizer made by :func:`regularizer` from a function: copies and pickles of it are references."""

    name: str

    def __reduce__(self) -> Any:
        return self.name if "__module__" in vars(self) else super().__reduce__()


@dataclass(frozen=True)
class FunctionRegularizer(_Reference):
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
class FunctionStepPenalty(_Reference):
    """A step penalty from a function of a :class:`StepRecord`.

    Args:
        name: the key of the penalty in every result.
        value: step to ``(B,)``.
        uses: ``"error"`` and ``"pair"``, those that it reads.
        reduction: ``"sum"``, ``"mean"`` or ``"max"`` over the steps.
        local: whether it sees one extra step from a random time instead of the accepted ones.
        divided_by_dims: whether the objective divides the penalty by the number of dimensions.
    """

    name: str
    value: Callable[[StepRecord], Tensor]
    uses: Collection[str] = frozenset()
    reduction: str = "sum"
    local: bool = False
    divided_by_dims: bool = False
    kind: str = "step"

    def __post_init__(self) -> None:
        object.__setattr__(self, "uses", frozenset(self.uses))  # hashable: a key of {regularizer: lambda}

    def __call__(self, step: StepRecord, /) -> Tensor:
        return self.value(step)


@dataclass(frozen=True)
class _PlainRate:
    """A function of ``(t, z, dz)`` as a rate; a class, so that a model that holds it can be pickled."""

    function: Callable[[Tensor, Tensor, Tensor], Any]

    def __call__(self, evaluation: FieldEvaluation, /) -> Tensor:
        return self.function(evaluation.t, evaluation.z, evaluation.dz)


class Source(NamedTuple):
    """Who proposed a regularizer.

    Attributes:
        method: the name of the method, such as ``"RNODE"``; ``""`` if it has none.
        authors: such as ``"Finlay et al."``; ``""`` for this package.
        year: of the paper.
        key: of its BibTeX entry.
        place: where in the paper, such as ``"eq. 9a"``, or ``"code"``.
    """

    method: str
    authors: str = ""
    year: int = 0
    key: str = ""
    place: str = ""

    def at(self, place: str, *, method: str = "") -> Source:
        """The same at a place, or for another method of the paper."""
        return self._replace(place=place, method=method or self.method)

    def __str__(self) -> str:
        paper = f"{self.authors}, {self.year}" if self.authors else ""
        text = f"{self.method} ({paper})" if self.method and paper else self.method or paper
        return f"{text}, {self.place}" if self.place else text


class Declaration(NamedTuple):
    """What a regularizer says of itself.

    Attributes:
        name: under which it is registered.
        kind: one of :data:`KINDS`.
        formula: what is penalized.
        cost: of an evaluation beyond itself, or what a penalty needs of the solve.
        source: who proposed it.
    """

    name: str
    kind: str
    formula: str
    cost: str
    source: str | Source


DECLARED: dict[str, Declaration] = {}
"""The regularizers of this package in the order of their declaration."""

_T = TypeVar("_T", bound=type)


def regularizer(
    name: str, *, formula: str, source: Source, cost: str = "none", kind: str = "rate", **options: Any
) -> Callable[[Any], Any]:
    """Declare a function or a class as the regularizer ``name`` of this package.

    A function becomes a :class:`FunctionRegularizer` or a :class:`FunctionStepPenalty`. A class gets its ``kind``
    and the options as attributes; its constructor takes the options of ``"name:options"``, and ``name=``. The
    declaration must be a decorator at the top level of a module of this package with ``name`` in quotes: the
    registration reads the source, without importing torch.

    Args:
        name, formula, source, cost, kind: see :class:`Declaration`.
        options: attributes of :class:`Regularizer`.
    """
    DECLARED[name] = Declaration(name, kind, formula, cost, source)

    def declare(value: Any) -> Any:
        if isinstance(value, type):
            for attribute, choice in {"kind": kind, **options}.items():
                setattr(value, attribute, choice)
            return value
        made = (FunctionRegularizer if kind == "rate" else FunctionStepPenalty)(name, value, **options)
        for attribute in ("__module__", "__doc__"):
            object.__setattr__(made, attribute, getattr(value, attribute))
        return made

    return declare


def declaration_of(found: Any, name: str) -> Declaration:
    """What is known of the regularizer ``found`` that is registered as ``name``.

    One of another package tells by its ``kind``, its ``needs`` and the first line of its docstring, or that of the
    function that it was made from.
    """
    if name in DECLARED:
        return DECLARED[name]
    function = getattr(found, "rate", None) or getattr(found, "value", None) or found
    owner = function if isinstance(function, type) or inspect.isroutine(function) else type(function)
    text = vars(function).get("__doc__") or owner.__doc__ or ""  # not inherited, as from torch's nn.Module
    lines = inspect.cleandoc(text).splitlines()
    needs = ", ".join(sorted(getattr(found, "needs", ()))) or "none"
    return Declaration(name, kind_of(found), lines[0] if lines else "", needs, "its plugin")


class Weighted(NamedTuple):
    """A regularizer and its strength lambda in the objective: a number, or a function of the optimizer's step."""

    regularizer: Regularizer
    strength: Strength


def kind_of(regularizer: Any) -> str:
    """One of :data:`KINDS`."""
    return getattr(regularizer, "kind", "rate")


def check_batch_dim(batch_dim: Any) -> None:
    """Refuse a dimension of the samples other than 0, or None for a state that is one sample."""
    if batch_dim not in (0, None):
        raise ConfigError(f"batch_dim must be 0, or None for a state that is one sample, not {batch_dim!r}.")


def warn_of_flat_state(z: Tensor, regularizers: Iterable[Any]) -> None:
    """Warn of a state ``(D,)``, which counts as D samples, if a penalty reads derivatives: they may be between."""
    if len(z) > 1 and any(getattr(r, "needs", ()) for r in regularizers):
        warnings.warn(  # Python shows it once
            f"a state of shape {tuple(z.shape)} counts as {len(z)} samples of one dimension, which must not depend "
            "on each other: give one sample as (1, D), or batch_dim=None.",
            stacklevel=5,
        )


def undivided(regularizers: Iterable[Any]) -> frozenset[str]:
    """Names of those whose penalty the objective does not divide by the number of dimensions."""
    return frozenset(r.name for r in regularizers if not getattr(r, "divided_by_dims", True))


def span_policy(regularizers: Iterable[Any]) -> Any:
    """The one span policy among them; None if there is none."""
    return next((r for r in regularizers if kind_of(r) == "span"), None)


def weigh_regularizers(
    spec: Mapping[Any, Strength | None] | Iterable[Any] | Any | None,
    *,
    by_name: Callable[[str], Any],
) -> dict[str, Weighted]:
    """Regularizers by name with their strengths.

    Args:
        spec: names, :class:`Regularizer` objects or plain functions ``rate(t, z, dz) -> (B,)``, one or several,
            or a mapping from any of these to lambda: a number, a function of the optimizer's step, or None for
            :data:`~rnode_plugin.core.schedules.DEFAULT_LAMBDA`.
        by_name: looks up the regularizer of a name; ``rnode_plugin.plugins.registry.get_regularizer`` is one.

    Raises:
        ConfigError: for an unknown name, a name used twice, a lambda that is negative or not finite, a lambda of a
            regularizer that has no penalty, two span policies, or an object that is none of the three.
    """
    if spec is None:
        return {}
    if isinstance(spec, Mapping):
        items = list(spec.items())
    else:
        several = isinstance(spec, Iterable) and not (isinstance(spec, str) or callable(spec))
        items = [(entry, None) for entry in (spec if several else [spec])]
    resolved: dict[str, Weighted] = {}
    for entry, strength in items:
        found = _regularizer(entry, by_name)
        if found.name in resolved:
            raise ConfigError(f"the regularizer {found.name!r} is named twice; name each once.")
        resolved[found.name] = Weighted(found, _strength(found, strength))
    policies = [name for name, entry in resolved.items() if kind_of(entry.regularizer) == "span"]
    if len(policies) > 1:
        raise ConfigError(f"{' and '.join(policies)} both change the times of a solve: choose one.")
    return resolved


def _strength(regularizer: Regularizer, strength: Any) -> Strength:
    if getattr(regularizer, "penalized", True):
        return check_lambda(regularizer.name, DEFAULT_LAMBDA if strength is None else strength)
    if strength is not None and strength != 1:
        raise ConfigError(
            f"{regularizer.name!r} has no penalty and takes no lambda: give None, or 1. Its strength is an option, "
            f"as in 'steer:0.25'."
        )
    return 1.0


def _regularizer(entry: Any, by_name: Callable[[str], Any]) -> Regularizer:
    if isinstance(entry, str):
        entry = by_name(entry)
    if callable(entry) and not isinstance(entry, type) and not hasattr(entry, "name"):
        return FunctionRegularizer(getattr(entry, "__name__", type(entry).__name__), _PlainRate(entry))
    kind = kind_of(entry)
    if isinstance(entry, type) or not isinstance(entry, Regularizer) or kind not in KINDS:
        raise ConfigError(
            f"{entry!r} is not a regularizer: give a name, a function rate(t, z, dz) -> (B,), or an object, not a "
            f"class, with a `name`, a `kind` among {', '.join(KINDS)}, and a call."
        )
    for attribute in KINDS[kind]:
        if not hasattr(entry, attribute):
            raise ConfigError(f"{entry.name!r} lacks `{attribute}`, which a regularizer of kind {kind!r} has.")
        value: Any = getattr(entry, attribute)
        choices = _CHOICES.get(attribute)
        if choices is not None and not choices.issuperset({value} if attribute == "reduction" else value):
            raise ConfigError(
                f"{entry.name!r} has {attribute} = {value!r}; it can be of {', '.join(sorted(choices))}."
            )
    return entry
