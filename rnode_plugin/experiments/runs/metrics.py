"""Writes and reads ``metrics.csv``, which has a row for each logged training step and for each validation."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..files import write_atomically
from .texts import known_rows, numbers, reading, whole_lines

if TYPE_CHECKING:
    from .texts import Columns

_AXES = ("step", "epoch", "train_seconds")


class MetricsTable:
    """Writes rows of numbers by step into a CSV file, with a column for each name that it has met.

    In a file that exists, rows stay up to step ``keep``, where a resumed run continues. The run takes later steps
    once more, so their rows are removed. A new run that begins with the steps of another takes the rows of its file
    ``former`` in place of its own.
    """

    def __init__(self, path: str | os.PathLike[str], *, keep: int = 0, former: Path | None = None) -> None:
        self._path, self._names = Path(path), list[str]()
        if (source := former or self._path).is_file():
            self._names, rows = self._read(source)
            self._replace([row for row in rows if (step := row.get("step", "")).isdecimal() and int(step) <= keep])

    def add(self, row: Mapping[str, float], step: int) -> None:
        """Write a row. It is in the file when this returns, so that a report can be made while the run trains."""
        full = {**row, "step": step}
        # a new name, such as the first validation's, needs a wider header, for which the file is written again. A
        # row with known names is appended
        if new := full.keys() - set(self._names):
            rows = self._read(self._path)[1] if self._path.is_file() else []
            self._names = sorted({*self._names, *new})
            self._replace(rows)
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, self._names).writerow(full)

    @staticmethod
    def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
        """Read names and rows as texts, so that a row that stays keeps each digit. Nothing in a file is refused."""
        text = path.read_text(encoding="utf-8", errors="replace")
        reader = csv.DictReader(io.StringIO(whole_lines(text), newline=""), restval="")
        return list(reader.fieldnames or []), list(reader)

    def _replace(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self._path, text.getvalue().encode())


class Metrics(NamedTuple):
    """The rows in a ``metrics.csv``, by column.

    Attributes:
        rows: an entry for each row, also of a step of flow matching: ``step``, ``epoch``, ``train_seconds``, ...
        steps: an entry for each logged training step of likelihood: ``step``, ``epoch``, ``train_seconds``,
            ``train/bpd``, ...
        validations: an entry for each validation: the same three axes and ``val/bpd``, ``val/nfe``, ... A table has
            ``nll`` in place of ``bpd``.
    """

    rows: Columns
    steps: Columns
    validations: Columns

    @property
    def last_step(self) -> int:
        """The last step that has a row; 0 if there is none."""
        return int(max(self.rows["step"], default=0))


def read_metrics(path: Path, metric: str) -> Metrics:
    """Read the metrics in a file that :class:`MetricsTable` has written or still writes; empty without a file.

    Args:
        path: a ``metrics.csv``.
        metric: the score of the kind, ``bpd`` or ``nll``.

    Raises:
        ConfigError: the file cannot be read, or does not hold a table.
    """
    with reading(path) as text:
        table = numbers(text or "")
    axes = table.columns.intersection(_AXES)
    table[axes] = table[axes].where(np.isfinite(table[axes]))  # a score may be infinite, a time cannot
    return Metrics(
        rows=known_rows(table, _AXES),
        steps=known_rows(table, [*_AXES, f"train/{metric}"]),
        validations=known_rows(table, [*_AXES, f"val/{metric}"]),
    )
