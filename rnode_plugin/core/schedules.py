"""The strength lambda of a penalty, a number or a function of the optimizer step. Importing this needs no torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from ..errors import ConfigError, check_count, check_number

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_LAMBDA = 0.01
"""The paper's strength for both penalties on every data set (section 6)."""

Lambda: TypeAlias = "float | Tensor"
"""A number. A scalar tensor that requires a gradient gets one, as a multiplier of Lagrange does."""

Strength: TypeAlias = "Lambda | Callable[[int], Lambda]"
"""Lambda: a number, or a function of the number of optimizer steps taken."""


@dataclass(frozen=True)
class LinearWarmup:
    """A lambda that grows from 0 to ``strength`` over ``steps`` optimizer steps; see :func:`linear_warmup`.

    ``str`` returns its text in a recipe, such as ``linear_warmup(1000)*0.01``.
    """

    spelling: ClassVar[str] = "linear_warmup(STEPS)*LAMBDA with STEPS a whole number >= 1 and LAMBDA >= 0"

    steps: int
    strength: float

    def __call__(self, step: int) -> float:
        return self.strength * min(1.0, step / self.steps)

    def __str__(self) -> str:
        return f"linear_warmup({self.steps})*{self.strength!r}"

    @classmethod
    def from_text(cls, text: str) -> LinearWarmup:
        """Parse the text that ``str`` returns. A text without a lambda gets :data:`DEFAULT_LAMBDA`.

        Raises:
            ValueError: for another text.
            ConfigError: as :func:`linear_warmup`.
        """
        match = re.fullmatch(r"linear_warmup\(\s*(\d+)\s*\)\s*(?:\*\s*(\S+))?", text.strip())
        if match is None:
            raise ValueError(f"expected {cls.spelling}")
        return linear_warmup(int(match[1]), float(match[2] or DEFAULT_LAMBDA))


WrittenStrength = float | LinearWarmup
"""A strength that has a text in a recipe."""


def linear_warmup(steps: int, strength: float = DEFAULT_LAMBDA) -> LinearWarmup:
    """Make a lambda that grows linearly from 0 to ``strength`` over the first ``steps`` steps of the optimizer.

    Give it as ``NeuralODE(..., regularizers={"kinetic": linear_warmup(1000)})``, and call
    ``model.reg_loss(step=n)``. A recipe spells it ``regularizers.kinetic=linear_warmup(1000)*0.01``, and training
    passes the step.

    Raises:
        ConfigError: for fewer than one step, or a strength that is negative or not finite.
    """
    return LinearWarmup(check_count(steps, "the steps of a warm-up"), checked_lambda("linear_warmup", strength))


def strength_at(name: str, strength: Strength, step: int | None) -> Lambda:
    """The lambda of penalty ``name`` at an optimizer step.

    Raises:
        ConfigError: for a step that is not finite, a function without a step, or one whose value is negative or not
            finite.
    """
    if not callable(strength):
        return strength
    if step is None:
        raise ConfigError(
            f"lambda of {name!r} depends on the optimizer's step: give it, reg_loss(step=n), n = 0 at the first."
        )
    # min() of a warm-up would take NaN for its end
    check_number(step, "step, the number of steps that the optimizer has taken,")
    return checked_lambda(name, strength(step))


def final_strength(strength: WrittenStrength) -> float:
    """The lambda that a schedule ends at, or the number itself."""
    return strength.strength if isinstance(strength, LinearWarmup) else strength


def strength_text(strength: WrittenStrength) -> str:
    """A short text: ``0.01``, or the text of a schedule."""
    return str(strength) if isinstance(strength, LinearWarmup) else f"{strength:g}"


def checked_lambda(name: str, strength: Any) -> Any:
    """A strength as a float, or as it is if it has a graph; a ConfigError unless it is a finite number >= 0."""
    trains = getattr(strength, "requires_grad", False)
    value = check_number(strength.detach() if trains else strength, f"lambda of {name!r}", least=0)
    return strength if trains else value
