"""Reads names and columns of table files, and writes rows.

pandas reads text and parquet, and NumPy reads ``.npy``. A text that pandas could misread is refused. The functions
import pandas, which takes longer than all other checks of a request, so that no wrong word or path waits for it.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import shlex
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from ...errors import ConfigError, DataError, first_line, suggest
from ..files import write_atomically
from ..text import count_of
from .images import naming, refuse_special

if TYPE_CHECKING:
    import pandas as pd

_MOST_NAMES = 50  # that a message lists; a command line with more would not be copied

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


def leave_out(others: Sequence[str], *, given: bool = False) -> str:
    """Advise how to use only the other columns of a table, as the end of a sentence.

    Args:
        others: the columns that are left.
        given: whether the column that is left out conditions the density, which then may not name it.
    """
    names = ",".join(others)
    if len(others) > _MOST_NAMES:
        names = "NAME,NAME,..."
    elif any("," in name or name != name.strip() for name in others):  # a list of names would be read otherwise
        names = json.dumps(list(others), ensure_ascii=False)
    where = "of --given, and out of the columns " if given else ""
    return f"leave it out {where}with --set {shlex.quote(f'data.columns={names}')}"


def read_columns(
    path: str | os.PathLike[str], wanted: Sequence[str], *, optional: bool = False, given: Sequence[str] = ()
) -> np.ndarray:
    """Read the columns ``wanted`` of a table as ``(N, len(wanted))``, float64 and finite.

    Args:
        path: the file.
        wanted: names of the columns.
        optional: whether a column can be left out, which the message of an error then advises.
        given: the columns that condition a density. One of the others must be left.

    Raises:
        ConfigError: see :func:`column_names`.
        DataError: see :func:`column_names`; a column is missing, or a cell holds no finite number.
    """
    frame = _frame(Path(path))
    for name in wanted:
        if name not in frame.columns:
            raise DataError(f"{path}: {suggest(name, frame.columns, 'column')}")
    columns = {name: _as_numbers(cast("pd.Series", frame[name])) for name in wanted}
    finite = [name for name, values in columns.items() if np.isfinite(values).all()]
    for name, values in columns.items():
        if name in finite:
            continue
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        left = optional and set(finite) - set(given)
        advice = f", or {leave_out(finite, given=name in given)}" if left else ""
        raise DataError(
            f"the column {name!r} of {path} must hold finite numbers, and row {row + 1} holds "
            f"{str(frame[name].iloc[row])[:40]!r}. Write plain numbers with a point, and fill in or remove rows "
            f"without one{advice}."
        )
    return np.stack(list(columns.values()), axis=1)


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
    """Read a table with checked names, or at least its first ``rows`` rows."""
    read = _format_of(path).read
    with naming(path):
        refuse_special(path)  # also a missing file, before pandas is imported
        frame = read(path, rows)
    names = list(frame.columns)
    for name in names:
        if not name:
            raise _refused(path, "a column has no name")
        if names.count(name) > 1:
            raise _refused(path, f"{names.count(name)} columns have the name {name!r}")
    if frame.empty:
        raise DataError(f"{path} has {'columns, but no rows' if names else 'no columns'}.")
    return frame


# Formats -------------------------------------------------------------------------------------------------------


def _refused(path: Path, fault: str) -> DataError:
    return DataError(f"{path} could be misread: {fault}. {_FORM}")


def _read_text(path: Path, rows: int | None) -> pd.DataFrame:
    import pandas

    try:
        with path.open(encoding="utf-8-sig") as file, warnings.catch_warnings():  # Excel writes a byte-order mark
            warnings.simplefilter("ignore")
            names, separator = _header(path, file.readline().strip("\n "))
            # before 3.1 pandas rounds some last bits wrongly by default; since then it deprecates the choice
            old = tuple(map(int, pandas.__version__.split(".")[:2])) < (3, 1)
            exact: dict[str, Any] = {"float_precision": "round_trip"} if old else {}
            # the header is read by hand, because with a header pandas cuts rows that are too long, or takes the
            # first column for row names
            try:
                frame = pandas.read_csv(
                    file,
                    sep=separator,
                    header=None,
                    nrows=rows,
                    skipinitialspace=True,
                    low_memory=False,
                    **exact,
                    skip_blank_lines=len(names) > 1,  # with one column an empty line is an empty cell
                )
            except pandas.errors.EmptyDataError:  # names without rows
                frame = pandas.DataFrame(columns=range(len(names)))
    except UnicodeDecodeError:
        raise _refused(path, "it is not text in UTF-8") from None
    except (pandas.errors.ParserError, csv.Error) as error:  # such as a later row with more cells than the first
        fault = first_line(error).removeprefix("Error tokenizing data. C error: ")
        raise _refused(path, f"below its first line pandas found: {fault}") from None
    if frame.shape[1] != len(names):
        cells, expected = count_of(frame.shape[1], "cell"), count_of(len(names), "name")
        raise _refused(path, f"row 1 has {cells}, but there are {expected}")
    # pandas fills a row with fewer cells at its end. Where spaces separate, an empty cell makes such a row, and all
    # later values stand under the names of their neighbors
    if separator == r"\s+" and len(names) > 1 and len(gaps := np.flatnonzero(frame.iloc[:, -1].isna())):
        raise _refused(
            path, f"row {gaps[0] + 1} seems to have fewer cells than names, because {names[-1]!r} is missing"
        )
    return frame.set_axis(names, axis=1)


def _header(path: Path, line: str) -> tuple[list[str], str]:
    """Find the names in the first line of a text, and what separates cells."""
    if not line:
        raise _refused(path, "its first line is empty")
    tabs = path.suffix.lower() == ".tsv"
    separator = "\t" if tabs else next((each for each in "\t,;|" if each in line), " ")
    names = [cell.strip() for cell in next(csv.reader([line], delimiter=separator, skipinitialspace=True))]
    # a number means that the file has no line of names, and its first row would be lost
    if numbers := [name for name in names if math.isfinite(_number(name))]:
        raise _refused(path, f"its first line holds the number {numbers[0]}")
    return names, r"\s+" if separator == " " else separator


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
    else:  # a file has its names and the number of its rows at its end, so no value is read
        from pyarrow import dataset

        parts = dataset.dataset(path, format="parquet", partitioning="hive")
        frame = parts.schema.empty_table().to_pandas().reindex(range(min(rows, parts.count_rows())))
    return frame.set_axis(frame.columns.map(str), axis=1)


def check_written(path: str | os.PathLike[str]) -> None:
    """Refuse a file that :func:`write_rows` cannot write.

    Raises:
        ConfigError: its name has another ending, or the writer is not installed.
    """
    _format_of(Path(path))


def write_rows(path: str | os.PathLike[str], names: Sequence[str], rows: np.ndarray) -> None:
    """Write rows ``(N, len(names))`` as a table, whole or not at all.

    Raises:
        ConfigError: another ending, or a writer that is not installed.
        CheckpointError: the file cannot be written.
    """
    import pandas

    frame, write = pandas.DataFrame(rows, columns=list(names)), _format_of(Path(path)).write
    write_atomically(Path(path), lambda file: write(file, frame))


def _write_text(file: IO[bytes], frame: pd.DataFrame, separator: str) -> None:
    # nine significant digits are the fewest that bring every 32-bit number back
    file.write(frame.to_csv(sep=separator, index=False, float_format="%.9g", lineterminator="\n").encode())


def _write_parquet(file: IO[bytes], frame: pd.DataFrame) -> None:
    frame.to_parquet(file, index=False)


class _Format(NamedTuple):
    read: Callable[[Path, int | None], pd.DataFrame]
    write: Callable[[IO[bytes], pd.DataFrame], None]


_FORMATS = {
    ".csv": _Format(_read_text, lambda file, frame: _write_text(file, frame, ",")),
    ".tsv": _Format(_read_text, lambda file, frame: _write_text(file, frame, "\t")),
    ".txt": _Format(_read_text, lambda file, frame: _write_text(file, frame, "\t")),
    ".npy": _Format(_read_array, lambda file, frame: np.save(file, frame.to_numpy())),
    ".parquet": _Format(_read_parquet, _write_parquet),
}


def _format_of(path: Path) -> _Format:
    known = _FORMATS.get(path.suffix.lower())
    if known is None:
        raise ConfigError(f"{path} is not a table: its name must end in {', '.join(_FORMATS)}.")
    if path.suffix.lower() == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError("parquet files need pyarrow: pip install pyarrow.")
    return known
