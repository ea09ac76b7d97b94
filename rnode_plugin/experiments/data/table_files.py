"""Reads names and columns of table files by pandas and NumPy, and writes rows.

The functions import pandas, which takes longer than all other checks of a request, so that no wrong word or path
waits for it.
"""

from __future__ import annotations

import csv
import importlib.util
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np

from ...errors import ConfigError, DataError, first_line, suggest
from ..files import write_atomically
from .images import naming, refuse_special

if TYPE_CHECKING:
    import pandas as pd

_FORM = (
    "Write UTF-8 text with a first line of column names, all different and no numbers, one cell for each name in "
    "every row, points in decimals, and no row names (index=False in pandas, row.names=FALSE in R)."
)


def column_names(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return the names of the columns of a table.

    Raises:
        DataError: the file is missing or no table.
        ConfigError: the name has another ending, or the reader is not installed.
    """
    return tuple(_frame(Path(path), rows=1).columns)


def read_columns(path: str | os.PathLike[str], names: Sequence[str]) -> np.ndarray:
    """Read the columns ``names`` of a table as ``(N, len(names))``, float64 and finite.

    Raises:
        ConfigError: see :func:`column_names`.
        DataError: see :func:`column_names`; a column is missing, or a cell holds no finite number.
    """
    frame = _frame(Path(path))
    columns: list[np.ndarray] = []
    for name in names:
        if name not in frame.columns:
            raise DataError(f"{path}: {suggest(name, frame.columns, 'column')}")
        columns.append(_as_numbers(cast("pd.Series", frame[name])))
        if len(bad := np.flatnonzero(~np.isfinite(columns[-1]))):
            raise DataError(
                f"the column {name!r} of {path} must hold finite numbers, and row {bad[0] + 1} holds "
                f"{str(frame[name].iloc[bad[0]])[:40]!r}. Write plain numbers with a point, fill in or remove rows "
                "without one, or name the other columns by --set data.columns=NAME,NAME."
            )
    return np.stack(columns, axis=1)


def _as_numbers(column: pd.Series) -> np.ndarray:
    """Convert a column to float64, with NaN for each cell that is not a number."""
    if column.dtype.kind in "fiub":
        return column.to_numpy(dtype=np.float64, na_value=np.nan)
    return np.array([_number(cell) for cell in column])


def _number(cell: object) -> float:
    # Python also reads 1_000, which a program may have written for 1.000
    try:
        return math.nan if isinstance(cell, str) and "_" in cell else float(cast("float", cell))
    except (TypeError, ValueError):
        return math.nan


def _frame(path: Path, rows: int | None = None) -> pd.DataFrame:
    """Read a table, or its names and at most its first ``rows`` rows."""
    suffix = _suffix_of(path)
    with naming(path):
        refuse_special(path)  # also a missing file, before pandas is imported
        if suffix == ".npy":
            return _read_array(path, rows)
        return _read_parquet(path, rows) if suffix == ".parquet" else _read_text(path, rows)


def _read_text(path: Path, rows: int | None) -> pd.DataFrame:
    import pandas

    # before 3.1 pandas rounds some last bits wrongly by default; since then it deprecates the choice
    old = tuple(map(int, pandas.__version__.split(".")[:2])) < (3, 1)
    exact: dict[str, Any] = {"float_precision": "round_trip"} if old else {}
    try:
        with path.open(encoding="utf-8-sig") as file, warnings.catch_warnings():  # Excel writes a byte-order mark
            warnings.simplefilter("ignore")
            line = file.readline().strip("\n ")
            tabs = path.suffix.lower() == ".tsv"
            separator = "\t" if tabs else next((mark for mark in "\t,;|" if mark in line), " ")
            # the names are read by hand, because with a header pandas cuts rows that are too long, or takes the
            # first column for row names
            cells = next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])
            names = [cell.strip() for cell in cells]
            _check_names(path, names)
            frame = pandas.read_csv(
                file, sep=r"\s+" if separator == " " else separator, header=None, nrows=rows, skipinitialspace=True,
                low_memory=False, skip_blank_lines=len(names) > 1,  # an empty line is an empty cell of one column
                **exact,
            )  # fmt: skip
    except (UnicodeDecodeError, pandas.errors.ParserError, pandas.errors.EmptyDataError, csv.Error) as error:
        raise _misread(path, first_line(error)) from None
    if frame.shape[1] != len(names):
        raise _misread(path, f"row 1 has {frame.shape[1]} cells, and there are {len(names)} names")
    # pandas fills a row with fewer cells at its end. Where spaces separate, an empty cell makes such a row, and all
    # later values stand under the names of their neighbors
    if separator == " " and len(names) > 1 and len(gaps := np.flatnonzero(frame.iloc[:, -1].isna())):
        raise _misread(path, f"row {gaps[0] + 1} has no cell for {names[-1]!r}")
    return frame.set_axis(names, axis=1)


def _check_names(path: Path, names: Sequence[str]) -> None:
    if not names or "" in names:
        raise _misread(path, "a column has no name")
    for name in names:
        if math.isfinite(_number(name)):  # without a line of names the first row would be lost
            raise _misread(path, f"its first line holds the number {name}")
        if names.count(name) > 1:
            raise _misread(path, f"{names.count(name)} columns have the name {name!r}")


def _misread(path: Path, fault: str) -> DataError:
    return DataError(f"{path} could be misread: {fault}. {_FORM}")


def _read_array(path: Path, rows: int | None) -> pd.DataFrame:
    import pandas

    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.ndim != 2 or array.dtype.names:
        raise DataError(f"{path} holds {array.dtype} {array.shape}, but a table is an array (rows, columns).")
    return pandas.DataFrame(array[:rows], columns=[f"column_{number}" for number in range(1, array.shape[1] + 1)])


def _read_parquet(path: Path, rows: int | None) -> pd.DataFrame:
    import pandas

    # an index that pandas has written is not a column, in either case
    if rows is None:
        frame = pandas.read_parquet(path)
    else:  # a file has its names at its end, so no value is read
        from pyarrow import dataset

        frame = dataset.dataset(path, format="parquet", partitioning="hive").schema.empty_table().to_pandas()
    return frame.set_axis(frame.columns.map(str), axis=1)


def check_written(path: str | os.PathLike[str]) -> None:
    """Refuse a file that :func:`write_rows` cannot write.

    Raises:
        ConfigError: its name has another ending, or the writer is not installed.
    """
    _suffix_of(Path(path))


def write_rows(path: str | os.PathLike[str], names: Sequence[str], rows: np.ndarray) -> None:
    """Write rows ``(N, len(names))`` as a table, whole or not at all.

    Raises:
        ConfigError: another ending, or a writer that is not installed.
        CheckpointError: the file cannot be written.
    """
    import pandas

    suffix, frame = _suffix_of(path := Path(path)), pandas.DataFrame(rows, columns=list(names))

    def write(file: IO[bytes]) -> None:
        if suffix == ".npy":
            np.save(file, rows)
        elif suffix == ".parquet":
            frame.to_parquet(file, index=False)
        else:  # nine significant digits are the fewest that bring every 32-bit number back
            separator = "," if suffix == ".csv" else "\t"
            text = frame.to_csv(sep=separator, index=False, float_format="%.9g", lineterminator="\n")
            file.write(text.encode())

    write_atomically(path, write)


_SUFFIXES = (".csv", ".tsv", ".txt", ".npy", ".parquet")


def _suffix_of(path: Path) -> str:
    """Return the ending of a table's name in small letters, if such a table can be read and written here."""
    if (suffix := path.suffix.lower()) not in _SUFFIXES:
        raise ConfigError(f"{path} is not a table: its name must end in {', '.join(_SUFFIXES)}.")
    if suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError("parquet files need pyarrow: pip install pyarrow.")
    return suffix
