"""Results as text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..evaluation import BitsPerDim, Evaluation

__all__ = ["duration", "evaluation_rows", "table"]


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Two aligned columns."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def duration(seconds: float) -> str:
    """``12.3 s``, ``4 min 05 s`` or ``2 h 07 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def evaluation_rows(evaluation: Evaluation) -> list[tuple[str, str]]:
    """What an evaluation measured, one row each."""
    spread = "" if evaluation.nfe_min == evaluation.nfe_max else f" ({evaluation.nfe_min} to {evaluation.nfe_max})"
    draws = f", {evaluation.draws} draws of noise" if evaluation.draws > 1 else ""
    return [
        ("held-out images", f"{evaluation.images:,}{draws}"),
        ("bits/dim dirty", f"{_bits(evaluation.dirty)}  uniform noise in each bin: bounds the discrete likelihood"),
        ("bits/dim clean", f"{_bits(evaluation.clean)}  density at the bins' centres: no bound"),
        ("NFE", f"{evaluation.nfe_mean:.1f}{spread} per batch, all blocks"),
        *((f"{name} / dim", f"{value:.5f}") for name, value in evaluation.penalties.items()),
        ("evaluation", duration(evaluation.seconds)),
    ]


def _bits(bits: BitsPerDim) -> str:
    errors = [] if bits.stderr_images is None else [f"± {bits.stderr_images:.4f} (images)"]
    errors += [] if bits.stderr_draws is None else [f"± {bits.stderr_draws:.4f} (noise)"]
    return " ".join([f"{bits.mean:.4f}", *errors])
