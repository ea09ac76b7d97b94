"""Numbers as readers want them."""

from __future__ import annotations

__all__ = ["change_with_error", "duration", "significant", "with_error"]


def duration(seconds: float) -> str:
    """``12.3 s``, ``4 min 05 s`` or ``2 h 07 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def significant(value: float, digits: int = 3) -> str:
    """``value`` with so many significant digits; a whole number from ten on without a point."""
    if abs(value) >= 10 ** (digits - 1) or (value == round(value) and abs(value) >= 10):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}" if value else "0"


def with_error(value: float, error: float | None) -> str:
    """``2.971 ± 0.012``; without the second part where no error is known."""
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def change_with_error(value: float, error: float) -> str:
    """``−0.021 ± 0.003``, always with a sign."""
    return f"{value:+.4f} ± {error:.4f}".replace("-", "−")
