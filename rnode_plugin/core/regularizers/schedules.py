"""The strength lambda of a penalty: a number, or a function of the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError

__all__ = ["LinearWarmup", "Strength", "check_lambda", "linear_warmup", "strength_at"]

Strength = float | Callable[[int], float]
"""Lambda: a number, or a function of the number of optimizer steps taken."""


@dataclass(frozen=True)
class LinearWarmup:
    """Lambda from 0 to ``strength`` over the first ``steps`` steps of the optimizer; see :func:`linear_warmup`."""

    steps: int
    strength: float

    def __call__(self, step: int) -> float:
        return self.strength * min(1.0, step / self.steps)


def linear_warmup(steps: int, strength: float = 0.01) -> LinearWarmup:
    """A lambda that grows from 0 to ``strength`` over the first ``steps`` steps of the optimizer.

    ``NeuralODE(..., regularizers={"kinetic": linear_warmup(1000)})``, then ``model.reg_loss(step=n)``.

    Raises:
        ConfigError: for fewer than one step, or a strength that is negative or not finite.
    """
    if not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"a warm-up takes a whole number of steps, at least 1, not {steps!r}.")
    return LinearWarmup(steps, _number("linear_warmup", strength))


def check_lambda(name: str, strength: Any) -> Strength:
    """A number that is finite and not negative, or a function as it is.

    Raises:
        ConfigError: for anything else.
    """
    return strength if callable(strength) else _number(name, strength)  # pyright: ignore[reportReturnType]


def strength_at(name: str, strength: Strength, step: int | None) -> float:
    """The lambda of penalty ``name`` at an optimizer step.

    Raises:
        ConfigError: for a function without a step, or one whose value is negative or not finite.
    """
    if not callable(strength):
        return strength
    if step is None:
        raise ConfigError(
            f"lambda of {name!r} depends on the optimizer's step: give it, reg_loss(step=n), n = 0 at the first."
        )
    return _number(name, strength(step))


def _number(name: str, strength: Any) -> float:
    try:
        value = float(strength)
    except (TypeError, ValueError):
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"lambda of {name!r} must be a finite number >= 0, not {strength!r}.")
    return value
