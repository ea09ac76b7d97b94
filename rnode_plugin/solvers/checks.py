"""Names of methods, gradients and quadratures, and checks of a solver's values. Importing this needs no torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

from ..errors import ConfigError, suggest

if TYPE_CHECKING:
    from torch import Tensor

FIXED_METHODS = ("euler", "midpoint", "rk4", "rk4_38")
ADAPTIVE_METHODS = ("dopri5", "tsit5")
METHODS = FIXED_METHODS + ADAPTIVE_METHODS
GRADIENTS = ("autograd", "checkpointed", "adjoint", "interpolated_adjoint")
QUADRATURES = ("full", "sampled")
ERROR_NORMS = ("rms", "worst")

Tolerance: TypeAlias = "float | Tensor"

DEFAULT_MAX_NFE = 100_000
"""Most evaluations of an adaptive solve by default, so that a solve of a stiff field ends."""


def check_name(value: str, known: tuple[str, ...], what: str) -> None:
    """Refuse an unknown name, with the known ones."""
    if value not in known:
        raise ConfigError(suggest(str(value), known, what))


def check_quadrature(quadrature: str) -> None:
    """Refuse an unknown quadrature."""
    check_name(quadrature, QUADRATURES, "quadrature")


def check_positive(value: object, name: str) -> None:
    """Refuse what is neither None nor a finite number > 0."""
    if value is not None and not (_is_number(value) and value > 0):
        raise ConfigError(f"{name} must be a number > 0 or None, not {value!r}.")


def check_tolerances(atol: Tolerance, rtol: Tolerance) -> None:
    """Refuse tolerances that are not numbers >= 0, and two that are 0."""
    check_tolerance(atol, "atol")
    check_tolerance(rtol, "rtol")
    if all(isinstance(x, (int, float)) and x == 0 for x in (atol, rtol)):
        raise ConfigError("atol and rtol are both 0, which no step can meet: raise one of them.")


def check_tolerance(value: object, name: str) -> None:
    """Refuse a tolerance that is not a number >= 0."""
    # a tensor of tolerances is checked where the user gives it, because here each solve would wait for the device
    tensor = hasattr(value, "dtype") and not isinstance(value, float)
    if not (tensor or (_is_number(value) and value >= 0)):
        raise ConfigError(f"{name} must be a number >= 0, not {value!r}.")


def _is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a finite number, but not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def refuse_sampled_density(method: str, quadrature: str, *, adaptive: bool, setting: str = "solver") -> None:
    """Refuse a sampled quadrature for a density with an adaptive method; ``setting`` names the solver."""
    if quadrature == "sampled" and adaptive:
        raise ConfigError(
            f"{setting}.quadrature='sampled' of a density needs a fixed grid: {method} would control an error that "
            f"the log-determinant does not have. Use one of {', '.join(FIXED_METHODS)}, or quadrature='full'."
        )


def refuse_worst(error_norm: str, method: str) -> None:
    """Refuse the error norm ``worst`` for a fixed grid."""
    if error_norm != "rms":
        raise ConfigError(
            f"error_norm={error_norm!r} is for adaptive methods ({', '.join(ADAPTIVE_METHODS)}): {method} does not "
            "look at its errors."
        )


def adaptive_text(name: str, atol: Tolerance, rtol: Tolerance, error_norm: str) -> str:
    """``dopri5, tolerance 1e-05`` or ``dopri5, atol 1e-06, rtol 0.01, error norm worst``."""
    absolute, relative = (_tolerance_text(each) for each in (atol, rtol))
    both = f"tolerance {absolute}" if absolute == relative else f"atol {absolute}, rtol {relative}"
    return f"{name}, {both}" + ("" if error_norm == "rms" else f", error norm {error_norm}")


def _tolerance_text(tolerance: Tolerance) -> str:
    """A tolerance, or the range of a tensor of tolerances."""
    if isinstance(tolerance, (int, float)):
        return f"{tolerance:g}"
    low, high = float(tolerance.min()), float(tolerance.max())
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def grid_text(name: str, step: float | None) -> str:
    """``rk4_38, step 0.25``."""
    return f"{name}, one step per interval" if step is None else f"{name}, step {step:g}"


def count_steps(length: float, longest: float) -> int:
    """The number of steps, at least one, that divide ``length`` into steps no longer than ``longest``.

    A small slack absorbs rounding. From 0.8 to 1.1 there are three steps of 0.1, although 1.1 - 0.8 is above 0.3.
    """
    return max(1, math.ceil(abs(length) / longest - 1e-6))
