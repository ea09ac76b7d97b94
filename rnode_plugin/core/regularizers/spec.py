"""weigh_regularizers: objects, functions and names to regularizers with their strengths lambda."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ...errors import ConfigError
from .base import DEFAULT_LAMBDA, FunctionRegularizer, PlainRate, Regularizer, Weighted

__all__ = ["check_lambda", "weigh_regularizers"]


def weigh_regularizers(
    spec: Mapping[Any, float] | Iterable[Any] | Any | None,
    *,
    by_name: Callable[[str], Any],
    default_lambda: float = DEFAULT_LAMBDA,
) -> dict[str, Weighted]:
    """Regularizers by name with their strengths.

    Args:
        spec: names, :class:`Regularizer` objects or plain functions ``rate(t, z, dz) -> (B,)``, one or several,
            or a mapping from any of these to lambda.
        by_name: looks up the regularizer of a name; the plugin host's ``get`` is one.
        default_lambda: strength if ``spec`` gives none.

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
        regularizer = _regularizer(entry, by_name)
        if regularizer.name in resolved:
            raise ConfigError(f"the regularizer {regularizer.name!r} is named twice; name each once.")
        resolved[regularizer.name] = Weighted(regularizer, check_lambda(regularizer.name, strength))
    return resolved


def _regularizer(entry: Any, by_name: Callable[[str], Any]) -> Regularizer:
    if isinstance(entry, str):
        entry = by_name(entry)
    if isinstance(entry, Regularizer):
        return entry
    if callable(entry) and not isinstance(entry, type):
        name = getattr(entry, "__name__", type(entry).__name__)
        return FunctionRegularizer(name, PlainRate(entry))
    raise ConfigError(
        f"{entry!r} is not a regularizer: give a name, an object with `name`, `needs_vjp` and "
        "`__call__(evaluation)`, or a function rate(t, z, dz) -> (B,)."
    )


def check_lambda(name: str, strength: Any) -> float:
    """``strength``, the lambda of a penalty, as a number.

    Raises:
        ConfigError: if it is negative or not finite.
    """
    try:
        value = float(strength)
    except (TypeError, ValueError):
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"lambda of {name!r} must be a finite number >= 0, not {strength!r}.")
    return value
