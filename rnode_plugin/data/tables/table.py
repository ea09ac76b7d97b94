"""``Table``: rows of a table, split into those that train, those that choose the weights and those that measure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import ConfigError, DataError, suggest
from ..images import shuffled

__all__ = ["Table", "split_rows"]

_FEWEST = 20  # rows: with fewer, the parts of a split say nothing


@dataclass(frozen=True, eq=False)
class Table:
    """A table of real numbers for density estimation.

    Attributes:
        name: what messages and runs call it.
        columns: their names.
        train: rows ``(N, len(columns))``, float.
        val: rows whose likelihood says which weights are the best.
        held_out: rows that measure the result.

    Raises:
        DataError: the arrays are not such rows.
    """

    name: str
    columns: tuple[str, ...]
    train: np.ndarray
    val: np.ndarray
    held_out: np.ndarray

    def __post_init__(self) -> None:
        for part in ("train", "val", "held_out"):
            rows = getattr(self, part)
            if rows.ndim != 2 or rows.shape[1] != len(self.columns) or rows.dtype.kind != "f":
                raise DataError(
                    f"{self.name}: the {part} rows are {rows.dtype} {rows.shape}; they must be floating-point "
                    f"numbers of shape (N, {len(self.columns)})."
                )
            if len(rows) == 0:
                raise DataError(f"{self.name}: there are no {part} rows.")

    def select(self, columns: Sequence[str]) -> Table:
        """The same rows with these columns, in this order.

        Raises:
            DataError: one of them is not there; those that are get listed.
        """
        for name in columns:
            if name not in self.columns:
                raise DataError(f"{self.name}: {suggest(name, self.columns, 'column')}")
        at = [self.columns.index(name) for name in columns]
        parts = {part: np.ascontiguousarray(getattr(self, part)[:, at]) for part in ("train", "val", "held_out")}
        return dataclasses.replace(self, columns=tuple(columns), **parts)

    def limit(self, n_train: int | None = None, n_val: int | None = None) -> Table:
        """The same table with at most so many rows to train on and to choose weights by, always the same ones."""
        return dataclasses.replace(self, train=_limited(self.train, n_train), val=_limited(self.val, n_val))

    def single(self) -> Table:
        """The same rows in 32-bit numbers, in which a flow computes."""
        parts = {part: getattr(self, part).astype(np.float32) for part in ("train", "val", "held_out")}
        return dataclasses.replace(self, **parts)


def split_rows(
    name: str, columns: Sequence[str], rows: np.ndarray, *, validation: float, held_out: float, seed: int
) -> Table:
    """Draw the parts of a table at random.

    Args:
        name, columns: of the table.
        rows: all rows ``(N, C)``.
        validation, held_out: shares of the rows; each part has one row at least.
        seed: of the draw.

    Raises:
        DataError: too few rows.
    """
    if len(rows) < _FEWEST:
        raise DataError(f"{name} has {len(rows)} rows: a density needs {_FEWEST} at least, and better hundreds.")
    order = np.random.RandomState(seed).permutation(len(rows))  # a stream that NumPy keeps for good
    n_held_out, n_val = (max(1, round(share * len(rows))) for share in (held_out, validation))
    parts = np.split(rows[order], [n_held_out, n_held_out + n_val])
    if len(parts[2]) == 0:
        raise DataError(f"{name} has {len(rows)} rows: the held-out shares leave none to train on.")
    return Table(name, tuple(columns), train=parts[2], val=parts[1], held_out=parts[0])


def _limited(rows: np.ndarray, n: int | None) -> np.ndarray:
    if n is None or n >= len(rows):
        return rows
    if n < 1:
        raise ConfigError(f"a limit on the number of rows must be at least 1, not {n}.")
    return rows[np.sort(shuffled(len(rows))[:n])]
