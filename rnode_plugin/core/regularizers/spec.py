"""weigh_regularizers: objects, functions and names to regularizers with their strengths lambda."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ...errors import ConfigError
from ..schedules import Strength, check_lambda
from .base import (
    DEFAULT_LAMBDA,
    NEEDS,
    FunctionRegularizer,
    PlainRate,
    Rate,
    Regularizer,
    SpanPolicy,
    StepPenalty,
    TrajectoryPenalty,
    Weighted,
    kind_of,
)

__all__ = ["check_lambda", "weigh_regularizers"]

_REDUCTIONS = ("sum", "mean", "max")
_OF_KIND: dict[str, tuple[type, str]] = {
    "rate": (Rate, "`needs` and `__call__(evaluation)`"),
    "step": (StepPenalty, "`uses`, `reduction`, `local` and `__call__(step)`"),
    "trajectory": (TrajectoryPenalty, "`rates`, `times(t0, t1)` and `__call__(trajectory)`"),
    "span": (SpanPolicy, "`penalized`, `times(t_span, *, training)` and `__call__(z)`"),
}


def weigh_regularizers(
    spec: Mapping[Any, Strength | None] | Iterable[Any] | Any | None,
    *,
    by_name: Callable[[str], Any],
    default_lambda: float = DEFAULT_LAMBDA,
) -> dict[str, Weighted]:
    """Regularizers by name with their strengths.

    Args:
        spec: names, :class:`Regularizer` objects or plain functions ``rate(t, z, dz) -> (B,)``, one or several,
            or a mapping from any of these to lambda: a number, or a function of the optimizer's step.
        by_name: looks up the regularizer of a name; ``rnode_plugin.plugins.registry.get_regularizer`` is one.
        default_lambda: strength if ``spec`` gives none, or None.

    Raises:
        ConfigError: for an unknown name, a name used twice, a lambda that is negative or not finite, a lambda of a
            regularizer that has no penalty, two span policies, or an object that is none of the three.
    """
    if spec is None:
        return {}
    if isinstance(spec, str) or callable(spec):
        spec = [spec]
    if isinstance(spec, Mapping):
        items = list(spec.items())
    elif isinstance(spec, Iterable):
        items = [(entry, None) for entry in spec]
    else:
        raise ConfigError(
            f"regularizers must be names, objects or functions, or a mapping of them to lambda, not {spec!r}."
        )
    resolved: dict[str, Weighted] = {}
    for entry, strength in items:
        regularizer = _regularizer(entry, by_name)
        name = regularizer.name
        if name in resolved:
            raise ConfigError(f"the regularizer {name!r} is named twice; name each once.")
        resolved[name] = Weighted(regularizer, _strength(regularizer, strength, default_lambda))
    policies = [name for name, entry in resolved.items() if kind_of(entry.regularizer) == "span"]
    if len(policies) > 1:
        raise ConfigError(f"{' and '.join(policies)} both change the times of a solve: choose one.")
    return resolved


def _strength(regularizer: Regularizer, strength: Any, default: float) -> Strength:
    if getattr(regularizer, "penalized", True):
        return check_lambda(regularizer.name, default if strength is None else strength)
    if strength is not None and strength != 1:
        raise ConfigError(
            f"{regularizer.name!r} has no penalty and takes no lambda: give None, or 1. Its strength is an option, "
            f"as in 'steer:0.25'."
        )
    return 1.0


def _regularizer(entry: Any, by_name: Callable[[str], Any]) -> Regularizer:
    if isinstance(entry, str):
        entry = by_name(entry)
    if isinstance(entry, type):
        raise ConfigError(f"{entry.__name__} is a class: give an object, {entry.__name__}(...).")
    kind = kind_of(entry)
    if hasattr(entry, "name") and kind in _OF_KIND and isinstance(entry, _OF_KIND[kind][0]):
        _check(entry, kind)
        return entry
    if callable(entry) and not hasattr(entry, "name"):
        name = getattr(entry, "__name__", type(entry).__name__)
        return FunctionRegularizer(name, PlainRate(entry))
    if kind not in _OF_KIND:
        raise ConfigError(f"{entry!r} has kind = {kind!r}; the kinds are {', '.join(_OF_KIND)}.")
    raise ConfigError(
        f"{entry!r} is not a regularizer: give a name, a function rate(t, z, dz) -> (B,), or an object with "
        f"`name`, {_OF_KIND[kind][1]}."
    )


def _check(regularizer: Any, kind: str) -> None:
    if kind == "rate" and not set(regularizer.needs) <= NEEDS:
        wanted = ", ".join(sorted(NEEDS))
        raise ConfigError(f"{regularizer.name!r} needs {set(regularizer.needs) - NEEDS}; it can need {wanted}.")
    if kind == "step":
        if regularizer.reduction not in _REDUCTIONS:
            raise ConfigError(
                f"{regularizer.name!r} has reduction {regularizer.reduction!r}; it must be one of "
                f"{', '.join(_REDUCTIONS)}."
            )
        if not set(regularizer.uses) <= {"error", "pair"}:
            raise ConfigError(f"{regularizer.name!r} uses {set(regularizer.uses)}; a step has 'error' and 'pair'.")
