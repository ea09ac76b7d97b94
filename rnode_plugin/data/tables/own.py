"""``table``: a file of one's own, or a table that comes with scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .files import column_names, read_columns
from .table import Table, split_rows

__all__ = ["CELLS", "table", "table_columns"]

CELLS = (
    "radius", "texture", "perimeter", "area", "smoothness", "compactness", "symmetry", "fractal dimension",
)  # fmt: skip
"""Columns of the table that comes along: means over the cell nuclei in an image, in the units of the file."""


def table(
    *,
    root: str | None = None,
    columns: Sequence[str] = (),
    validation: float = 0.1,
    held_out: float = 0.1,
    split_seed: int = 0,
) -> Table:
    """A file of one's own (--data-root), or 569 cell nuclei of scikit-learn's breast cancer data.

    Args:
        root: a ``.csv``, ``.tsv``, ``.npy``, ``.npz`` or ``.parquet`` file; None for scikit-learn's table
            (Wisconsin Diagnostic, 8 columns that are real numbers without repeated zeros).
        columns: names of those to read; none for all.
        validation, held_out: shares of the rows, see :class:`~rnode_plugin.data.tables.table.Table`.
        split_seed: of their draw.

    Raises:
        DataError: see :func:`~rnode_plugin.data.tables.files.read_columns`; too few rows.
    """
    columns = tuple(columns) or table_columns(root)
    if root is None:
        name, rows = "table", _cells()
        rows = Table(name, CELLS, rows, rows, rows).select(columns).train
    else:
        name, rows = str(root), read_columns(root, columns)
    return split_rows(name, columns, rows, validation=validation, held_out=held_out, seed=split_seed)


def table_columns(root: str | None) -> tuple[str, ...]:
    """Names of all columns of :func:`table`."""
    return CELLS if root is None else column_names(root)


def _cells() -> np.ndarray:
    from sklearn.datasets import load_breast_cancer

    loaded: Any = load_breast_cancer()
    names = [str(name) for name in loaded["feature_names"]]
    return np.asarray(loaded["data"], dtype=np.float64)[:, [names.index(f"mean {cell}") for cell in CELLS]]
