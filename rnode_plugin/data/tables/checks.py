"""check_columns: columns that have no density, found before anything is trained, one sentence each."""

from __future__ import annotations

import numpy as np

from ...errors import DataError
from .advice import leave_out
from .table import Table

__all__ = ["check_columns"]

_RESOLVED = 1e-5  # deviation over size: 32-bit numbers have seven digits, of which two are left for the values
_DEPENDENT = 1e-6  # share of a column's deviation that the other columns do not determine
_ROWS = 100_000  # enough to find a dependent column


def check_columns(table: Table, modelled: int) -> None:
    """Refuse a table whose rows have no density that 32-bit numbers could show.

    Args:
        table: its first ``modelled`` columns are the density's, the rest are given.
        modelled: how many.

    Raises:
        DataError: a constant column, one whose values differ by too little for their size, one that is a linear
            function of the others, or fewer training rows than columns.
    """
    rows = np.asarray(table.train[:_ROWS], dtype=np.float64)
    if len(rows) <= rows.shape[1]:
        raise DataError(f"{table.name}: {len(rows)} training rows are too few for {rows.shape[1]} columns.")
    mean, deviation, size = rows.mean(0), rows.std(0), np.abs(rows).max(0)
    for name, column, spread, largest, middle in zip(table.columns, rows.T, deviation, size, mean, strict=True):
        if column.min() == column.max():
            raise DataError(
                f"the column {name!r} of {table.name} is {column[0]:g} in all training rows, so it has no density: "
                f"{leave_out(table.columns, name)}"
            )
        if spread < _RESOLVED * largest:
            raise DataError(
                f"the column {name!r} of {table.name} is {middle:.10g} ± {spread:.2g}: 32-bit numbers do not tell "
                f"its values apart. Subtract {middle:.6g} from it, which changes no likelihood."
            )
    standard = (rows - mean) / deviation
    # the given columns first: one that they determine has no conditional density either
    order = [*range(modelled, rows.shape[1]), *range(modelled)]
    alone = np.abs(np.diag(np.linalg.qr(standard[:, order], mode="r"))) / np.sqrt(len(rows))
    for place, share in zip(order, alone, strict=True):
        if share < _DEPENDENT and place < modelled:
            name = table.columns[place]
            raise DataError(
                f"the column {name!r} of {table.name} is a linear function of the others, so the rows have no "
                f"density together: {leave_out(table.columns, name)}"
            )
