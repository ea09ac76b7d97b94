"""CSV and TSV files as numbers: with or without a header, with the separator that the file uses."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ...errors import DataError
from .advice import leave_out

__all__ = ["text_names", "text_values"]

_MISSING = {"", "na", "n/a", "nan", "null", "none", "?", "-", "."}


def text_names(path: Path) -> tuple[str, ...]:
    """The names in the first line; ``column_1``, ``column_2``, ... if that holds numbers.

    Raises:
        DataError: the file is empty, or not text.
    """
    first = next(_lines(path), None)
    if first is None:
        raise DataError(f"{path} is empty.")
    return _names(first)


def _names(first: Sequence[str]) -> tuple[str, ...]:
    if all(_number(cell) is not None for cell in first):
        return tuple(f"column_{number}" for number in range(1, len(first) + 1))
    return tuple(cell.strip() for cell in first)


def text_values(path: Path, wanted: Sequence[str]) -> np.ndarray:
    """The columns ``wanted`` of all rows, ``(N, len(wanted))``, float64, NaN for missing values.

    Raises:
        DataError: a cell that is no number, or a row with more or fewer cells than the first one.
    """
    first = next(_lines(path))
    names = _names(first)
    places = [names.index(name) for name in wanted]
    skipped = 0 if names[0] == "column_1" and _number(first[0]) is not None else 1
    try:  # fast and without a copy as text; whatever it does not like is read again to say what it is
        return np.loadtxt(
            path, delimiter=_separator(path), skiprows=skipped, usecols=places, ndmin=2, comments=None,
            quotechar='"', encoding="utf-8-sig",
        )  # fmt: skip
    except ValueError:
        rows = _lines(path)
        if skipped:
            next(rows)
        return np.array([_values(path, number, row, names, places) for number, row in enumerate(rows, 1)], float)


def _values(
    path: Path, number: int, row: Sequence[str], names: Sequence[str], places: Sequence[int]
) -> list[float]:
    if len(row) != len(names):
        raise DataError(f"row {number} of {path} has {len(row)} cells, not {len(names)}.")
    values = []
    for place in places:
        cell = row[place].strip()
        value = math.nan if cell.lower() in _MISSING else _number(cell)
        if value is None:
            raise DataError(
                f"the column {names[place]!r} of {path} is not numeric: row {number} holds {cell[:40]!r}. Turn it "
                f"into numbers, or {leave_out([names[each] for each in places], names[place])}"
            )
        values.append(value)
    return values


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _lines(path: Path) -> Iterator[list[str]]:
    """The cells of each line that holds any."""
    separator = _separator(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for row in csv.reader(file, delimiter=separator):
                if any(cell.strip() for cell in row):
                    yield row
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a text table: {error}.") from None


def _separator(path: Path) -> str:
    """What separates the cells: a tab in ``.tsv``, else what the first line has most of."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    try:
        with path.open(encoding="utf-8-sig") as file:
            line = file.readline()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text table: {error}.") from None
    return max(",;\t", key=line.count)
