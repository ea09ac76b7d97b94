"""Results as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..text import duration, significant

if TYPE_CHECKING:
    from ..evaluation.bits import BitsPerDim, EvaluationResult

__all__ = ["evaluation_rows", "table"]


def table(rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns, as many as each row has."""
    rows = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = (f"{cell:<{width}}" for row in rows for cell, width in zip(row, widths, strict=True))
    return "\n".join("  ".join(next(padded) for _ in row).rstrip() for row in rows)


def evaluation_rows(evaluation: EvaluationResult) -> list[tuple[str, str]]:
    """What an evaluation measured, one row each."""
    spread = "" if evaluation.nfe_min == evaluation.nfe_max else f" ({evaluation.nfe_min} to {evaluation.nfe_max})"
    draws = f", {evaluation.draws} draws of noise" if evaluation.draws > 1 else ""
    return [
        ("held-out images", f"{evaluation.images:,}{draws}"),
        ("bits/dim dirty", f"{_bits(evaluation.dirty)}  uniform noise in each bin: bounds the discrete likelihood"),
        ("bits/dim clean", f"{_bits(evaluation.clean)}  density at the bins' centres: no bound"),
        ("NFE", f"{evaluation.nfe_mean:.1f}{spread} per batch, all blocks"),
        *([] if (gap := evaluation.gap) is None else [("solver gap", _GAP.format(gap))]),
        *((f"{name} / dim", f"{value:.5f}") for name, value in evaluation.penalties.items()),
        ("evaluation", duration(evaluation.seconds)),
    ]


_GAP = "{:+.4f}  bits/dim by the training solver, less those above; the first batch"


def _bits(bits: BitsPerDim) -> str:
    errors = [] if bits.stderr_images is None else [f"± {significant(bits.stderr_images, 2)} (images)"]
    errors += [] if bits.stderr_noise is None else [f"± {significant(bits.stderr_noise, 2)} (noise)"]
    return " ".join([f"{bits.mean:.4f}", *errors])
