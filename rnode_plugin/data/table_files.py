"""Files of tables: names of their columns, the values of some of them, and rows written back.

pandas reads ``.csv``, ``.tsv`` and ``.txt``, pyarrow ``.parquet``, and NumPy ``.npy``. What could be misread is
refused: a text needs a first line of names, one separator, a cell in each row for each name, and decimal points.
"""

from __future__ import annotations

import csv
import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import ConfigError, DataError, suggest
from ..files import write_atomically
from .images import naming

if TYPE_CHECKING:
    import pandas as pd

_NO_ROW_NAMES = "Write the file without the names of its rows: index=False in pandas, row.names=FALSE in R."


def column_names(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Names of the columns of a table.

    Raises:
        DataError: the file is missing or no table, or two of its columns have one name.
        ConfigError: another ending, or a reader that is not installed.
    """
    return tuple(_frame(Path(path), rows=1).columns)


def read_columns(path: str | os.PathLike[str], wanted: Sequence[str]) -> np.ndarray:
    """The columns ``wanted`` of a table, ``(N, len(wanted))``, float64 and finite.

    Raises:
        DataError, ConfigError: as :func:`column_names`; a column is not there or not numeric, or a value is missing
            or infinite.
    """
    frame = _frame(Path(path))
    if frame.empty:
        raise DataError(f"{path} has columns, but no rows.")
    return np.stack([_values(path, frame, name, wanted) for name in wanted], axis=1)


def _values(path: str | os.PathLike[str], frame: pd.DataFrame, name: str, wanted: Sequence[str]) -> np.ndarray:
    if name not in frame.columns:
        raise DataError(f"{path}: {suggest(name, frame.columns, 'column')}")
    what, column = f"the column {name!r} of {path}", frame[name]
    if column.dtype.kind not in "fiub":
        raise DataError(
            f"{what} is not numeric: {_first_text(column)}. Turn it into numbers, or {leave_out(wanted, name)}"
        )
    values = column.to_numpy(dtype=np.float64, na_value=np.nan)
    missing, infinite = np.flatnonzero(np.isnan(values)), np.flatnonzero(np.isinf(values))
    if len(missing):
        raise DataError(
            f"{what} has {len(missing)} missing value{'s' if len(missing) > 1 else ''}, the first in row "
            f"{missing[0] + 1}. Remove these rows, or fill them in."
        )
    if len(infinite):
        raise DataError(f"{what} is infinite in row {infinite[0] + 1}.")
    return values


def _first_text(column: pd.Series) -> str:
    """Why a column is not numeric: its first value that is not a number, or its type."""
    import pandas

    texts = column[column.map(lambda value: isinstance(value, str))]
    wrong = texts[np.isnan(np.asarray(pandas.to_numeric(texts, errors="coerce"), dtype=float))]
    if wrong.empty:
        return f"it is {column.dtype}"
    row, text = list(column.index).index(wrong.index[0]), str(wrong.iloc[0])
    is_number = "," in text and text.replace(",", "").replace(".", "").strip("+-").isdecimal()
    comma = ", with a decimal comma or a comma between thousands" if is_number else ""
    return f"row {row + 1} holds {text[:40]!r}{comma}"


def leave_out(columns: Sequence[str], name: str) -> str:
    """How to use all ``columns`` but ``name``."""
    left = [f'"{each}"' if "," in each else each for each in columns if each != name]
    listed = ",".join(left) if 0 < len(left) <= 12 else "NAME,NAME,..."
    return f"leave it out with --set data.columns={listed!r}."


def _frame(path: Path, rows: int | None = None) -> pd.DataFrame:
    """A table with checked names; ``rows``: not more than so many are needed."""
    read = _format_of(path).read
    with naming(path):
        frame = read(path, rows)
    for name, count in Counter(frame.columns).items():
        if not name or name.startswith("Unnamed: ") or name == "...1":  # pandas' and R's names for no name
            raise DataError(f"{path} has a column without a name. Name it in the first line. {_NO_ROW_NAMES}")
        if count > 1:
            raise DataError(f"{path} has {count} columns of the name {name!r}. Each needs another name.")
    return frame


# Formats -------------------------------------------------------------------------------------------------------


def _read_text(path: Path, rows: int | None) -> pd.DataFrame:
    import pandas

    try:
        with path.open(encoding="utf-8-sig") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            names, separator = _header(path, file.readline().rstrip("\n"))
            try:
                # with a header, pandas would cut rows that are too long, or take the first column for row names
                frame = pandas.read_csv(
                    file, sep=separator, header=None, nrows=rows, skipinitialspace=True, low_memory=False
                )
            except pandas.errors.EmptyDataError:
                return pandas.DataFrame(columns=names)
            except pandas.errors.ParserError:
                frame = pandas.DataFrame()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8. Save it again in this encoding.") from error
    # pandas fills rows that are too short
    if frame.shape[1] != len(names) or frame.iloc[:, -1].isna().any():
        _check_widths(path, len(names), separator)
    if frame.empty:
        raise DataError(f"{path} cannot be read: its quotation marks do not enclose cells.")
    return frame.set_axis(names, axis=1)


def _header(path: Path, line: str) -> tuple[list[str], str]:
    """The names in the first line of a text, and what separates cells."""
    if not line.strip():
        raise DataError(f"{path} is empty, or its first line is. The names of the columns belong there.")
    if line.startswith("#"):
        raise DataError(
            f"{path} begins with a comment. Its first line must hold the names of the columns, without '#'."
        )
    if line.count('"') % 2:
        raise DataError(f"{path} has a quotation mark in its first line that does not enclose a name.")
    cells = {each: next(csv.reader([line], delimiter=each, skipinitialspace=True)) for each in ",;\t| "}
    tabs = path.suffix.lower() == ".tsv" or "\t" in line  # a name holds none
    found = ["\t"] if tabs else [each for each in ",;|" if len(cells[each]) > 1]
    if len(found) > 1:
        raise DataError(
            f"the first line of {path} holds {' and '.join(map(repr, found))}, and either may separate the names. "
            "Put names that hold one of them in double quotes."
        )
    separator = found[0] if found else " " if len(cells[" "]) > 1 else ","
    names = [cell.strip() for cell in cells[separator]]
    numbers = [name for name in names if any(digit.isdigit() for digit in name) and _is_number(name)]
    if numbers:
        raise DataError(
            f"the first line of {path} holds the number {numbers[0]}, but the names of the columns belong there. "
            "Add a line of names, or begin this name with a letter."
        )
    return names, r"\s+" if separator == " " else separator


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "."))
    except ValueError:
        return False
    return True


def _check_widths(path: Path, width: int, separator: str) -> None:
    """Refuse the first row that does not have one cell for each name."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        by_spaces = separator == r"\s+"
        split = (
            (line.split() for line in file)
            if by_spaces
            else csv.reader(file, delimiter=separator, skipinitialspace=True)
        )
        rows = (cells for cells in split if cells)
        next(rows)
        for number, cells in enumerate(rows, 1):
            if len(cells) != width:
                more = f" Write decimals with a point. {_NO_ROW_NAMES}" if len(cells) > width else ""
                fewer = " Put names with spaces in double quotes." if by_spaces and len(cells) < width else ""
                raise DataError(
                    f"row {number} of {path} has {len(cells)} cells, but there are {width} names.{more}{fewer}"
                )


def _read_array(path: Path, rows: int | None) -> pd.DataFrame:
    import pandas

    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.ndim != 2 or array.shape[1] == 0 or array.dtype.names:
        raise DataError(f"{path} holds {array.dtype} {array.shape}, but a table is an array (rows, columns).")
    return pandas.DataFrame(array[:rows], columns=[f"column_{number}" for number in range(1, array.shape[1] + 1)])


def _read_parquet(path: Path, rows: int | None) -> pd.DataFrame:
    frame = _parquet().read_table(path).to_pandas()  # an index that pandas has written is not a column
    return frame.set_axis(frame.columns.map(str), axis=1)


def _parquet() -> Any:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ConfigError("parquet files need pyarrow: pip install 'rnode-plugin[parquet]'.") from None
    return parquet


def check_written(path: str | os.PathLike[str]) -> None:
    """Refuse a file that :func:`write_rows` could not write, with a ConfigError."""
    _format_of(Path(path))


def write_rows(path: str | os.PathLike[str], names: Sequence[str], rows: np.ndarray) -> None:
    """Write rows ``(N, len(names))`` as a table; whole or not at all.

    Raises:
        ConfigError: another ending, or a writer that is not installed.
        CheckpointError: the file cannot be written.
    """
    write = _format_of(Path(path)).write
    write_atomically(Path(path), lambda file: write(file, names, rows))


def _write_text(file: IO[bytes], names: Sequence[str], rows: np.ndarray, separator: str) -> None:
    import pandas

    frame = pandas.DataFrame(rows, columns=list(names))
    # nine digits are enough for each 32-bit number
    file.write(frame.to_csv(sep=separator, index=False, float_format="%.9g", lineterminator="\n").encode())


def _write_parquet(file: IO[bytes], names: Sequence[str], rows: np.ndarray) -> None:
    parquet = _parquet()
    import pyarrow

    parquet.write_table(pyarrow.table(dict(zip(names, rows.T, strict=True))), file)


class _Format(NamedTuple):
    read: Callable[[Path, int | None], Any]
    write: Callable[[IO[bytes], Sequence[str], np.ndarray], None]


_FORMATS = {
    ".csv": _Format(_read_text, lambda file, names, rows: _write_text(file, names, rows, ",")),
    ".tsv": _Format(_read_text, lambda file, names, rows: _write_text(file, names, rows, "\t")),
    ".txt": _Format(_read_text, lambda file, names, rows: _write_text(file, names, rows, "\t")),
    ".npy": _Format(_read_array, lambda file, names, rows: np.save(file, rows)),
    ".parquet": _Format(_read_parquet, _write_parquet),
}


def _format_of(path: Path) -> _Format:
    found = _FORMATS.get(path.suffix.lower())
    if found is None:
        raise ConfigError(f"{path} is not a table: its name must end in {', '.join(_FORMATS)}.")
    return found
