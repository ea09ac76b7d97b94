"""NumPy files as tables: ``.npy`` with a matrix or records, ``.npz`` an array a column or a matrix ``data``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError
from .advice import leave_out

__all__ = ["array_names", "array_values"]


def array_names(path: Path) -> tuple[str, ...]:
    """Names of the columns: those of records, of the arrays, or of an array ``columns``; else ``column_1``, ...

    Raises:
        DataError: the file is not such a table.
    """
    return tuple(_columns(path))


def array_values(path: Path, wanted: Sequence[str]) -> np.ndarray:
    """The columns ``wanted``, ``(N, len(wanted))``, float64, NaN for missing values.

    Raises:
        DataError: the file is not such a table, or a column is not numeric.
    """
    columns = _columns(path)
    for name in wanted:
        if columns[name].dtype.kind not in "fiub":
            raise DataError(
                f"the column {name!r} of {path} is not numeric: it is {columns[name].dtype}. Turn it into "
                f"numbers, or {leave_out(wanted, name)}"
            )
    return np.stack([columns[name].astype(np.float64) for name in wanted], axis=1)


def _columns(path: Path) -> Mapping[str, np.ndarray]:
    try:
        loaded: Any = np.load(path, allow_pickle=False)
        arrays = dict(loaded) if path.suffix.lower() == ".npz" else loaded
    except Exception as error:  # on garbage a reader raises whatever it stumbled over
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise DataError(f"{path} cannot be read: {reason}.") from None
    if isinstance(arrays, np.ndarray):
        if arrays.dtype.names:
            return {name: arrays[name] for name in arrays.dtype.names}
        return _matrix(path, arrays, None)
    if "data" in arrays and arrays["data"].ndim == 2:
        return _matrix(path, arrays["data"], arrays.get("columns"))
    lengths = {array.shape for array in arrays.values()}
    if len(lengths) != 1 or len(next(iter(lengths))) != 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise DataError(
            f"{path} holds {shapes or 'nothing'}: give one array (N,) for each column, or a matrix `data`."
        )
    return arrays


def _matrix(path: Path, rows: np.ndarray, names: np.ndarray | None) -> dict[str, np.ndarray]:
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise DataError(f"{path} holds an array of shape {rows.shape}: a table is one of shape (rows, columns).")
    if names is None:
        names = np.array([f"column_{number}" for number in range(1, rows.shape[1] + 1)])
    if len(names) != rows.shape[1]:
        raise DataError(f"{path} names {len(names)} columns, but its rows have {rows.shape[1]}.")
    return {str(name): column for name, column in zip(names, rows.T, strict=True)}
