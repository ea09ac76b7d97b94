"""``Table`` holds rows of numbers with a split. ``table`` reads the user's file, ``check_columns`` checks it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np

from ...errors import DataError, suggest
from ..text import count_of
from .arrays import limited
from .identity import of_samples
from .images import repeated
from .table_files import column_names, read_columns

CELLS = ("radius", "texture", "perimeter", "area", "smoothness", "compactness", "symmetry", "fractal dimension")
"""Columns of the table of scikit-learn: means over the cell nuclei in an image, in the units of the file."""

_FEWEST = 20  # rows: with fewer, the parts of a split are too small to measure anything


@dataclass(frozen=True, eq=False)
class Table:
    """A table of real numbers for density estimation, split into three parts.

    Attributes:
        name: the name in messages and runs.
        columns: names of the columns, a tuple or what becomes one.
        train: rows ``(N, len(columns))``, float.
        val: rows whose likelihood chooses the best weights.
        held_out: rows that measure the result.
        identity: a hash of all rows in ``train`` and ``val``, and one of those in ``held_out``. They are computed
            if they are not given. :meth:`limit` and :meth:`single` keep them, because they describe the file.
        numbers: the number of each held-out row in the file, from 1; None for a table that comes in parts.
        noun: what the samples are called.

    Raises:
        DataError: the arrays are not such rows.
    """

    name: str
    columns: tuple[str, ...]
    train: np.ndarray
    val: np.ndarray
    held_out: np.ndarray
    identity: tuple[str, str] = ("", "")
    numbers: np.ndarray | None = None
    noun: ClassVar[str] = "rows"

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns))
        for part, rows in self._parts.items():
            is_array = isinstance(rows, np.ndarray)
            if not is_array or rows.dtype.kind != "f" or rows.shape[1:] != (len(self.columns),) or len(rows) == 0:
                given = f"{rows.dtype} {rows.shape}" if is_array else type(rows).__name__
                raise DataError(
                    f"{self.name}: the {part} rows are {given}; they must be a NumPy array of floating-point "
                    f"numbers of shape (N, {len(self.columns)})."
                )
        if not all(self.identity):
            identity = of_samples(self.train, self.val), of_samples(self.held_out)
            object.__setattr__(self, "identity", identity)

    @property
    def _parts(self) -> dict[str, np.ndarray]:
        return {"train": self.train, "val": self.val, "held_out": self.held_out}

    def ranges(self, columns: Sequence[str]) -> tuple[tuple[float, float], ...]:
        """Return the smallest and the largest value of each of these columns in the training rows."""
        rows = self.train[:, [self.columns.index(name) for name in columns]]
        return tuple(zip(rows.min(0).tolist(), rows.max(0).tolist(), strict=True))

    def _each(self, change: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
        return {part: change(rows) for part, rows in self._parts.items()}

    def select(self, columns: Sequence[str]) -> Table:
        """Return the same rows with these columns, in this order, and the identity of them alone.

        Raises:
            DataError: the table does not have one of them.
        """
        for name in columns:
            if name not in self.columns:
                raise DataError(f"{self.name}: {suggest(name, self.columns, 'column')}")
        at = [self.columns.index(name) for name in columns]
        parts = self._each(lambda rows: np.ascontiguousarray(rows[:, at]))
        return dataclasses.replace(self, columns=tuple(columns), identity=("", ""), **parts)

    def limit(self, *, train: int | None = None, val: int | None = None, held_out: int | None = None) -> Table:
        """Return the table with at most so many rows in its parts, drawn as for images; None for all."""
        return dataclasses.replace(
            self,
            train=limited(self.train, train),
            val=limited(self.val, val),
            held_out=limited(self.held_out, held_out),
            numbers=None if self.numbers is None else limited(self.numbers, held_out),
        )

    def check_finite(self) -> None:
        """Refuse missing and infinite values, which only a table of a plugin can have.

        Raises:
            DataError: names the column.
        """
        for part, rows in self._parts.items():
            for name, bad in zip(self.columns, (~np.isfinite(rows)).sum(0), strict=True):
                if bad:
                    raise DataError(
                        f"the column {name!r} of {self.name} is missing or infinite in {bad:,} of {len(rows):,} "
                        f"{part} rows. A density needs whole rows: leave these out, or fill the values in."
                    )

    def single(self) -> Table:
        """Convert the rows to 32-bit numbers, in which a flow computes.

        Raises:
            DataError: a value is outside of their range.
        """
        with np.errstate(over="ignore"):  # an overflow becomes infinite, which is refused below with its column
            parts = self._each(lambda rows: rows.astype(np.float32))
        for index, name in enumerate(self.columns):
            if not all(np.isfinite(parts[part][:, index]).all() for part in self._parts):
                raise DataError(
                    f"the column {name!r} of {self.name} has values outside of 32-bit numbers: divide it by a "
                    "constant c, which lowers its NLL by log(c)."
                )
        return dataclasses.replace(self, **parts)

    def described(self) -> str:
        """Describe the table by its rows and columns, in one line at the start of a run.

        A second line counts the held-out rows that equal a training row, because a flow may have memorized them.
        """
        columns = ", ".join(self.columns[:20]) + (", ..." if len(self.columns) > 20 else "")
        text = f"{self.name}: columns {columns}"
        return text + repeated(self.train + 0, self.held_out + 0, "row")  # which turns -0.0 into 0.0


def split_rows(
    name: str,
    columns: Sequence[str],
    rows: np.ndarray,
    *,
    validation: float,
    held_out: float,
    seed: int,
) -> Table:
    """Split ``rows (N, C)`` into the parts of a table at random.

    ``validation`` and ``held_out`` are shares of the rows. Each part has at least one row.

    Raises:
        DataError: too few rows, or shares that leave none to train on.
    """
    if len(rows) < _FEWEST:
        count = count_of(len(rows), "row")
        raise DataError(f"{name} has {count}, but a density needs at least {_FEWEST}, better hundreds.")
    order = np.random.RandomState(seed).permutation(len(rows))  # a stream that NumPy keeps for good
    n_held_out, n_val = (max(1, round(share * len(rows))) for share in (held_out, validation))
    if n_held_out + n_val >= len(rows):
        raise DataError(
            f"{name} has {count_of(len(rows), 'row')}, of which data.held_out={held_out:g} takes {n_held_out} and "
            f"data.validation={validation:g} takes {n_val}. None is left to train on: give smaller shares."
        )
    parts = np.split(rows[order], [n_held_out, n_held_out + n_val])
    return Table(
        name, tuple(columns), train=parts[2], val=parts[1], held_out=parts[0], numbers=order[:n_held_out] + 1
    )


def table(
    *,
    root: str | None = None,
    columns: Sequence[str] = (),
    validation: float = 0.1,
    held_out: float = 0.2,
    split_seed: int = 0,
) -> Table:
    """Your own file (--data-root), or 569 cell nuclei of scikit-learn's breast cancer data.

    The split depends on the number of rows and the seed alone, so it stays when a column is left out.

    Args:
        root: a ``.csv``, ``.tsv``, ``.txt``, ``.npy`` or ``.parquet`` file; None for the table of scikit-learn
            (Wisconsin Diagnostic, 8 columns that are real numbers without repeated zeros).
        columns: names of the columns to read; empty for all.
        validation, held_out: shares of the rows, see :class:`~rnode_plugin.experiments.data.Table`.
        split_seed: seed of the split.

    Raises:
        DataError: the file cannot be read, or has too few rows.
    """
    split = {"validation": validation, "held_out": held_out, "seed": split_seed}
    if root is None:
        return split_rows("table", CELLS, _cells(), **split).select(columns or CELLS)
    columns = columns or column_names(root)
    return split_rows(str(root), columns, read_columns(root, columns), **split)


def table_columns(root: str | None) -> tuple[str, ...]:
    """Return the names of all columns of :func:`table`."""
    return CELLS if root is None else column_names(root)


def _cells() -> np.ndarray:
    from sklearn.datasets import load_breast_cancer

    loaded = cast("Mapping[str, np.ndarray]", load_breast_cancer())
    names = [str(name) for name in loaded["feature_names"]]
    return np.asarray(loaded["data"], dtype=np.float64)[:, [names.index(f"mean {cell}") for cell in CELLS]]


# Columns without a density -------------------------------------------------------------------------------------

_RESOLVED = 1e-5  # least deviation over size. Of the seven digits of 32-bit numbers, it leaves two to the variation
_DEPENDENT = 1e-6  # least share of a column's deviation that the other columns do not determine
_LEAVE_OUT = "Leave it out: name the other columns by --set data.columns=NAME,NAME"
_ROWS = 100_000  # more rows find no further dependent column, and the QR decomposition takes longer


def check_columns(table: Table, modeled: int) -> None:
    """Refuse a table whose rows have no density, or none that 32-bit numbers resolve.

    Its first ``modeled`` columns are modeled, and the others are given. On a constant column, or on a linear
    subspace, the likelihood of a flow rises without bound, and training would only report ever better numbers.

    Raises:
        DataError: a value that is missing or infinite, a column that is constant or whose values differ by too
            little, one that is a linear function of the others, or fewer training rows than columns.
    """
    table.check_finite()
    rows = np.asarray(table.train[:_ROWS], dtype=np.float64)
    if len(rows) <= rows.shape[1]:
        raise DataError(f"{table.name}: {len(rows)} training rows are too few for {rows.shape[1]} columns.")
    smallest = np.finfo(np.float32).tiny  # smaller numbers have fewer digits, or count as 0
    sizes = np.abs(rows).max(0)
    largest = np.maximum(sizes, smallest)
    scaled = rows / largest  # to at most 1, because squares of large values would overflow in the deviation
    for name, column, size, unit in zip(table.columns, scaled.T, sizes, largest, strict=True):
        if column.std() < _RESOLVED or size < smallest:
            raise DataError(
                f"the column {name!r} of {table.name} is {unit * column.mean():.10g} ± {unit * column.std():.2g}, "
                f"constant or nearly so for 32-bit numbers. {_LEAVE_OUT}, or, if its values differ, subtract its "
                "mean or give it another unit."
            )
    deviation = scaled.std(0)
    standard = (scaled - scaled.mean(0)) / deviation
    # the given columns first, because a column that they determine has no conditional density either
    order = [*range(modeled, rows.shape[1]), *range(modeled)]
    # a diagonal entry of R is the norm of what a column adds to the span of the columns before it. One QR
    # decomposition therefore tests all columns, where regressions would take one for each
    alone = np.abs(np.diag(np.linalg.qr(standard[:, order], mode="r"))) / np.sqrt(len(rows))
    for index, share in zip(order, alone, strict=True):
        # 32-bit numbers round a column with a large mean by more than what the others leave undetermined
        if share < max(_DEPENDENT, np.finfo(np.float32).eps / deviation[index]) and index < modeled:
            raise DataError(
                f"the column {table.columns[index]!r} of {table.name} is a linear function of the others, or "
                f"nearly so for 32-bit numbers. So the rows have no density together. {_LEAVE_OUT}."
            )
