"""The contract of a regularizer: four kinds, each with a name and what it needs; and how one declares itself.

- A **rate** (``kind = "rate"``) is a number per unit of time; its integral along the trajectory is the penalty.
- A **step penalty** (``"step"``) sees each accepted step of the solver.
- A **trajectory penalty** (``"trajectory"``) sees states at times that it chooses.
- A **span policy** (``"span"``) changes the times of the solve.

The objective (eq. 17) adds the penalties, each per sample ``(B,)``. Another package offers its regularizers through
the hook ``rnode_register_regularizers``.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import ConfigError
from ..schedules import DEFAULT_LAMBDA, Strength, check_lambda

if TYPE_CHECKING:
    from torch import Tensor

    from ..field_evaluation import FieldEvaluation

__all__ = [
    "KINDS",
    "FunctionRegularizer",
    "Regularizer",
    "Source",
    "StepRecord",
    "Trajectory",
    "Weighted",
    "check_batch_dim",
    "needs_of",
    "regularizer",
    "span_policy",
    "undivided",
    "warn_of_flat_state",
    "weigh_regularizers",
]

KINDS = ("rate", "step", "trajectory", "span")

_CHOICES = {
    "kind": frozenset(KINDS),
    "needs": frozenset({"vjp", "jvp", "aux", "field"}),
    "uses": frozenset({"error", "pair"}),
    "reduction": frozenset({"sum", "mean", "max"}),
}


class Source(NamedTuple):
    """Who proposed a regularizer.

    Attributes:
        method: the name of the method, such as ``"RNODE"``; ``""`` if it has none.
        authors: such as ``"Finlay et al."``.
        year: year of the paper.
        key: key of its BibTeX entry.
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


class Regularizer:
    """The base class of all regularizers: a ``name``, a call, and attributes with defaults.

    The call gives the value ``(B,)`` of a :class:`~rnode_plugin.core.field_evaluation.FieldEvaluation`, a
    :class:`StepRecord`, a :class:`Trajectory`, or for a span policy of a state ``z (B, *event)``. One that is a
    ``torch.nn.Module`` as well trains its parameters.

    Attributes:
        name: the key of its penalty in every result.
        kind: one of :data:`KINDS`.
        divided_by_dims: whether the objective divides the penalty by the number of dimensions, as every sum over
            the event.
        time_gradient: whether a sum over the steps of a solve has the right gradient by the times of the solve. It
            has not for a rate that holds a part of itself fixed.
        repeats: whether a rate evaluates the field again for ``jacobian()`` with a random estimator or a
            ``total_derivative()`` above order 2. Then each evaluation notes its random draws, as it does for the
            need ``"field"``.
        needs: what a rate reads of an evaluation beyond ``t, z, dz, noise``: ``"vjp"``, ``"jvp"``, ``"aux"``,
            ``"field"``. Without a need, and without a density, an evaluation costs no product with the Jacobian.
        uses: what a step penalty reads that not every method has: ``"error"``, the embedded error estimate, and
            ``"pair"``, two stages at the same time.
        reduction: ``"sum"``, ``"mean"`` or ``"max"`` of a step penalty over the steps.
        local: whether a step penalty sees one extra step instead, from a uniformly random time. It is unbiased for
            the time average of a step's value. The step's start is detached.
        rates: the rates whose integrals a trajectory penalty reads.
        penalized: whether a span policy has a penalty, and so takes a lambda.
        formula: what is penalized, in one line; the first line of the docstring if it is left out.
        cost: what an evaluation costs beyond the velocity, or what a penalty needs of the solve.
        source: who proposed it.

    A trajectory penalty has a method ``times(t0, t1)``, which gives times ``(k,)`` between both ends at which it
    wants states, drawn again for each solve. A span policy has a method ``times(t_span, *, training)``, which gives
    the times to solve through instead of ``t_span (T,)``, as many and in the same direction.

    Example:
        >>> from rnode_plugin.core.regularizers import FunctionRegularizer
        >>> l1 = FunctionRegularizer("l1", lambda evaluation: evaluation.dz.abs().flatten(1).sum(1))
        >>> l1.kind, l1.divided_by_dims
        ('rate', True)
    """

    name: str
    kind: str = "rate"
    divided_by_dims: bool = True
    time_gradient: bool = True
    repeats: bool = False
    needs: Collection[str] = frozenset()
    uses: Collection[str] = frozenset()
    reduction: str = "sum"
    local: bool = False
    rates: Sequence[Regularizer] = ()
    penalized: bool = True
    formula: str = ""
    cost: str = ""
    source: str | Source = ""

    if TYPE_CHECKING:

        def __call__(self, record: Any, /) -> Tensor: ...

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "formula" not in vars(cls):
            cls.formula = _first_line(cls)


def _first_line(described: Any) -> str:
    lines = inspect.cleandoc(described.__doc__ or "").splitlines()
    return lines[0] if lines else ""


@dataclass(frozen=True)
class StepRecord:
    """One step of a solve, as a step penalty sees it.

    Attributes:
        t: time at its start, a tensor of one entry.
        h: its length, positive, a tensor of one entry.
        z0, z1: states ``(B, *event)`` at its two ends.
        times, states, velocities: one for each stage, in the order of their evaluation.
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


@dataclass(frozen=True)
class FunctionRegularizer(Regularizer):
    """A rate or a step penalty from a function. One that :func:`regularizer` made is copied by reference.

    Args:
        name: the key of its penalty in every result.
        function: of a :class:`~rnode_plugin.core.field_evaluation.FieldEvaluation`, or of a :class:`StepRecord` for
            the kind ``"step"``, to ``(B,)``.
        formula: what is penalized; the first line of the function's docstring if it is left out.
        kind, needs, uses, reduction, local, divided_by_dims, time_gradient, repeats, cost, source: see
            :class:`Regularizer`.
    """

    name: str
    function: Callable[[Any], Tensor]
    kind: str = "rate"
    needs: Collection[str] = frozenset()
    uses: Collection[str] = frozenset()
    reduction: str = "sum"
    local: bool = False
    divided_by_dims: bool = True
    time_gradient: bool = True
    repeats: bool = False
    formula: str = ""
    cost: str = ""
    source: str | Source = ""

    def __post_init__(self) -> None:
        for attribute in ("needs", "uses"):  # hashable: a key of {regularizer: lambda}
            object.__setattr__(self, attribute, frozenset(getattr(self, attribute)))
        object.__setattr__(self, "formula", self.formula or _first_line(self.function))

    def __call__(self, record: Any, /) -> Tensor:
        return self.function(record)

    def __reduce__(self) -> Any:
        return self.function.__name__ if "__module__" in vars(self) else super().__reduce__()


@dataclass(frozen=True)
class _PlainRate:
    """A function of ``(t, z, dz)`` as a rate; a class, so that a model that holds it can be pickled."""

    function: Callable[[Tensor, Tensor, Tensor], Any]

    def __call__(self, evaluation: FieldEvaluation, /) -> Tensor:
        return self.function(evaluation.t, evaluation.z, evaluation.dz)


def regularizer(name: str, *, kind: str = "rate", **attributes: Any) -> Callable[[Any], Any]:
    """Make a function or a class the regularizer ``name``.

    A function becomes a :class:`FunctionRegularizer`. A class, derived from :class:`Regularizer`, gets the
    attributes. Its constructor takes the options of ``"name:options"``, and ``name=``.

    Args:
        name: the key of its penalty in every result.
        kind: one of :data:`KINDS`.
        attributes: further attributes of :class:`Regularizer`. The objective does not divide a step penalty of a
            function by the number of dimensions, unless ``divided_by_dims=True`` is given.
    """

    def declare(value: Any) -> Any:
        if isinstance(value, type):
            for attribute, choice in {"kind": kind, **attributes}.items():
                setattr(value, attribute, choice)
            return value
        made = FunctionRegularizer(name, value, kind, **{"divided_by_dims": kind != "step", **attributes})
        object.__setattr__(made, "__module__", value.__module__)
        object.__setattr__(made, "__doc__", value.__doc__)
        return made

    return declare


class Weighted(NamedTuple):
    """A regularizer and its strength lambda in the objective: a number, or a function of the optimizer's step."""

    regularizer: Regularizer
    strength: Strength


def needs_of(regularizers: Iterable[Regularizer]) -> frozenset[str]:
    """What the rates among them read of an evaluation, and the rates that trajectory penalties read."""
    needs: frozenset[str] = frozenset()
    for each in regularizers:
        for rate in (each, *each.rates):
            needs |= frozenset(rate.needs)
    return needs


def check_batch_dim(batch_dim: Any) -> None:
    """Refuse a dimension of the samples other than 0, or None for a state that is one sample."""
    if batch_dim not in (0, None):
        raise ConfigError(f"batch_dim must be 0, or None for a state that is one sample, not {batch_dim!r}.")


def warn_of_flat_state(z: Tensor, regularizers: Iterable[Regularizer]) -> None:
    """Warn of a state ``(D,)``, which counts as D samples, if a penalty reads derivatives: they may be between."""
    if len(z) > 1 and needs_of(regularizers):
        warnings.warn(  # Python shows it once
            f"a state of shape {tuple(z.shape)} counts as {len(z)} samples of one dimension, which must not depend "
            "on each other: give one sample as (1, D), or batch_dim=None.",
            stacklevel=5,
        )


def undivided(regularizers: Iterable[Regularizer]) -> frozenset[str]:
    """Names of those whose penalty the objective does not divide by the number of dimensions."""
    return frozenset(r.name for r in regularizers if not r.divided_by_dims)


def span_policy(regularizers: Iterable[Regularizer]) -> Any:
    """The one span policy among them; None if there is none."""
    return next((r for r in regularizers if r.kind == "span"), None)


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
    policies = [name for name, entry in resolved.items() if entry.regularizer.kind == "span"]
    if len(policies) > 1:
        raise ConfigError(f"{' and '.join(policies)} both change the times of a solve: choose one.")
    return resolved


def _strength(regularizer: Regularizer, strength: Any) -> Strength:
    if regularizer.penalized:
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
    if isinstance(entry, Regularizer):
        return _checked(entry)
    if not callable(entry) or isinstance(entry, type) or hasattr(entry, "name"):
        raise ConfigError(
            f"{entry!r} is not a regularizer: give a name, a function rate(t, z, dz) -> (B,), or an object, not a "
            "class, of a class derived from rnode_plugin.core.regularizers.Regularizer."
        )
    name = entry.__name__ if inspect.isroutine(entry) else type(entry).__name__
    return FunctionRegularizer(name, _PlainRate(entry))


def _checked(regularizer: Regularizer) -> Regularizer:
    if not hasattr(regularizer, "name") or not callable(regularizer):
        raise ConfigError(f"the regularizer {regularizer!r} lacks a `name` or a call.")
    given = {
        "kind": {regularizer.kind}, "needs": set(regularizer.needs), "uses": set(regularizer.uses),
        "reduction": {regularizer.reduction},
    }  # fmt: skip
    for attribute, values in given.items():
        if not _CHOICES[attribute].issuperset(values):
            choices = ", ".join(sorted(_CHOICES[attribute]))
            found = ", ".join(sorted(map(repr, values)))
            raise ConfigError(f"{regularizer.name!r} has {attribute} {found}; it can be of {choices}.")
    if regularizer.kind in ("trajectory", "span") and not hasattr(regularizer, "times"):
        raise ConfigError(f"{regularizer.name!r} lacks `times`, which a {regularizer.kind} regularizer has.")
    return regularizer
