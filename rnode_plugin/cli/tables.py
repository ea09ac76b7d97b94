"""Tables in the terminal: aligned columns, and the rows of an evaluation."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..text import duration, significant

if TYPE_CHECKING:
    from ..evaluation.measures import Evaluation, Mean, Measure

__all__ = ["evaluation_rows", "table", "wrapped_table"]


def table(rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns; all rows have the same number of cells."""
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def wrapped_table(rows: Iterable[Sequence[str]], *, width: int) -> str:
    """Aligned columns whose last one is wrapped, in at most ``width`` characters; an empty line between rows."""
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)][:-1]
    indent = sum(widths) + 2 * len(widths)
    blocks = []
    for *heads, last in cells:
        lines = textwrap.wrap(last, max(20, width - indent)) or [""]
        first = "".join(head.ljust(size + 2) for head, size in zip(heads, widths, strict=True))
        blocks.append("\n".join([first + lines[0], *(" " * indent + line for line in lines[1:])]))
    return "\n\n".join(blocks)


def evaluation_rows(evaluation: Evaluation, measure: Measure[Any]) -> list[tuple[str, str]]:
    """What an evaluation measured, one row each."""
    spread = "" if evaluation.nfe_min == evaluation.nfe_max else f" ({evaluation.nfe_min} to {evaluation.nfe_max})"
    draws = f", {evaluation.draws} draws of noise" if evaluation.draws > 1 else ""
    values = measure.values(evaluation)
    known = [each for each in (*measure.quantities, *measure.baselines) if each.name in values]
    return [
        (f"held-out {measure.samples}", f"{len(next(iter(values.values())).samples):,}{draws}"),
        *((each.label, f"{_score(values[each.name], measure)}  {each.explained}") for each in known),
        ("NFE", f"{evaluation.nfe_mean:.1f}{spread} per batch, all blocks"),
        *([] if (gap := evaluation.gap) is None else [("solver gap", _GAP.format(gap, measure.unit))]),
        *((f"{name} / dim", f"{value:.5f}") for name, value in evaluation.penalties.items()),
        ("evaluation", duration(evaluation.seconds)),
    ]


_GAP = "{:+.4f}  {} by the training solver, less those above; the first batch"


def _score(mean: Mean, measure: Measure[Any]) -> str:
    errors = [] if mean.stderr is None else [f"± {significant(mean.stderr, 2)} ({measure.samples})"]
    errors += [] if mean.stderr_noise is None else [f"± {significant(mean.stderr_noise, 2)} (noise)"]
    return " ".join([f"{mean.mean:.4f}", *errors])
