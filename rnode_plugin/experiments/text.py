"""Formats durations, numbers, tables and JSON as text, and prints the progress of batches."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence

_INTERVAL = 10.0  # shortest time between two progress lines, in seconds


def to_json(value: object) -> str:
    """Write a value as JSON, with null for a number that is not finite, and text for what JSON cannot hold."""
    # Python writes NaN and Infinity, which JSON does not have and other readers refuse
    plain = json.loads(json.dumps(value, default=str), parse_constant=lambda name: None)
    return json.dumps(plain, indent=2)


def duration(seconds: float) -> str:
    """Format a duration as ``12.3 s``, ``4 min 05 s`` or ``2 h 07 min``."""
    if seconds < 59.95:  # 59.95 would round to 60.0 s
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def significant(value: float, digits: int = 3) -> str:
    """Format ``value`` with ``digits`` significant digits; a whole number from ten on has no decimal point."""
    if abs(value) >= 10 ** (digits - 1) or (abs(value) >= 10 and value == round(value)):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".") if value else "0"  # 99.96 becomes 100


def with_error(value: float, error: float | None) -> str:
    """Format a value as ``2.971 ± 0.012``, with two significant digits of the error; None: the value alone.

    There are six decimal places at most.
    """
    places = 4
    if error and math.isfinite(error):
        places = min(max(0, 1 - math.floor(math.log10(error))), 6)
    text = _rounded(value, places)
    if error is None:
        return text
    return f"{text} ± {error:.{places}f}" if error else f"{text} ± 0"


def change_with_error(value: float, error: float) -> str:
    """Format a change as ``−0.021 ± 0.003``, like :func:`with_error`, but always with a sign."""
    return _with_sign(with_error(value, error))


def signed(value: float) -> str:
    """Format a number with its sign, as ``+0.0123`` or ``−0.0123``."""
    return _with_sign(_rounded(value, 4))


def count_of(number: int, noun: str) -> str:
    """Format a count with its noun, as ``1 image`` or ``64 images``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def table(rows: Iterable[Sequence[str]]) -> str:
    """Format rows as aligned columns; all rows have the same number of cells."""
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def _with_sign(text: str) -> str:
    return text.replace("-", "−") if text.startswith("-") else f"+{text}"


def _rounded(value: float, places: int) -> str:
    return f"{round(value, places) + 0.0:.{places}f}"  # adding 0.0 turns -0.0 into 0.0


def batch_counter(what: str) -> Callable[[int, int], None]:
    """Make a callback ``(done, total)`` that prints a line to standard error at most every ten seconds."""
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _INTERVAL:
            last = time.monotonic()
            print(f"{what}, batch {done} of {total}", file=sys.stderr, flush=True)

    return show


def shape_text(shape: tuple[int, ...]) -> str:
    """Write a shape for a message, as in ``3x32x32``."""
    return "x".join(map(str, shape))
