"""Files of tables: names of their columns, the values of some of them, and rows written back.

pandas reads ``.csv``, ``.tsv`` and ``.txt``, NumPy ``.npy`` and ``.npz``, pyarrow ``.parquet``. Where
another program may mean something else (a first line of numbers, row names, a decimal comma), a note names the
choice, or the file is refused.
"""

from __future__ import annotations

import csv
import io
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TextIO

import numpy as np

from ..errors import ConfigError, DataError, suggest
from ..files import write_atomically
from .images import naming

if TYPE_CHECKING:
    import pandas as pd


def column_names(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Names of the columns of a table.

    Raises:
        DataError: the file is missing or no table, or two of its columns have one name.
        ConfigError: another ending, or a reader that is not installed.
    """
    return _source(path).names


def read_columns(path: str | os.PathLike[str], wanted: Sequence[str]) -> np.ndarray:
    """The columns ``wanted`` of a table, ``(N, len(wanted))``, float64 and finite.

    Raises:
        DataError, ConfigError: as :func:`column_names`; a column is not there or not numeric, or a value is missing
            or infinite.
    """
    return read_with_notes(path, wanted)[0]


def read_with_notes(path: str | os.PathLike[str], wanted: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """The columns of :func:`read_columns`, and the choices made while reading, a sentence each."""
    source = _source(path)
    for name in wanted:
        if name not in source.names:
            raise DataError(f"{path}: {suggest(name, source.names, 'column')}")
    with naming(path):
        rows = source.read(wanted)
    if len(rows) == 0:
        raise DataError(f"{path} has columns, but no rows.")
    for name, column in zip(wanted, rows.T, strict=True):
        missing, infinite = np.flatnonzero(np.isnan(column)), np.flatnonzero(np.isinf(column))
        if len(missing):
            raise DataError(
                f"the column {name!r} of {path} has {len(missing)} missing value{'s' if len(missing) > 1 else ''}, "
                f"the first in row {missing[0] + 1}: remove these rows, or fill them in."
            )
        if len(infinite):
            raise DataError(f"the column {name!r} of {path} is infinite in row {infinite[0] + 1}.")
    return rows, source.notes


class _Source(NamedTuple):
    """A file whose columns are known.

    Attributes:
        read: the wanted columns, ``(N, len(wanted))``, float64, NaN for missing values.
        notes: choices made while reading.
    """

    names: tuple[str, ...]
    read: Callable[[Sequence[str]], np.ndarray]
    notes: tuple[str, ...] = ()


def _source(path: str | os.PathLike[str]) -> _Source:
    path = Path(path)
    with naming(path):
        source = _format_of(path).open(path)
    for name, count in Counter(source.names).items():
        if not name:
            raise DataError(f"{path} has a column without a name: name each in its first line.")
        if count > 1:
            raise DataError(f"{path} has {count} columns of the name {name!r}: each needs a name of its own.")
    return source


def _not_numeric(path: Path, name: str, what: str, wanted: Sequence[str]) -> DataError:
    return DataError(
        f"the column {name!r} of {path} is not numeric: {what}. Turn it into numbers, or {leave_out(wanted, name)}"
    )


def leave_out(columns: Sequence[str], name: str) -> str:
    """How to use all ``columns`` but ``name``."""
    left = [f'"{each}"' if "," in each else each for each in columns if each != name]
    listed = ",".join(left) if 0 < len(left) <= 12 else "NAME,NAME,..."
    return f"leave it out with --set data.columns={listed!r}."


# Text: the first lines tell what pandas cannot find by itself ---------------------------------------------------

_MISSING = {"", "na", "n/a", "nan", "null", "none", "?", "-", ".", "#n/a", "#null!", *(f".{c}" for c in "abcz")}
_UNNAMED = ("", "Unnamed: 0", "...1")  # above row names of R and pandas, also when written again
_SAMPLE = 1000  # rows that tell a header from a row
_WHOLE = re.compile(r"\d+")
_DECIMAL_COMMA = re.compile(r"[+-]?\d+(,\d+)+([eE][+-]?\d+)?")


class _Layout(NamedTuple):
    """How a text file is laid out.

    Attributes:
        start: position of the first row.
        names: of the columns that are used.
        first: columns before these, which hold row names.
        width: cells of a row.
    """

    encoding: str
    separator: str
    start: int
    names: tuple[str, ...]
    first: int
    width: int


def _open_text(path: Path) -> _Source:
    notes: list[str] = []
    layout = _layout(path, notes)
    return _Source(layout.names, lambda wanted: _text_values(path, layout, wanted), tuple(notes))


def _layout(path: Path, notes: list[str]) -> _Layout:
    with path.open("rb") as head:
        encoding = "utf-16" if head.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    with path.open(newline="", encoding=encoding) as file:
        comment, separator, begin, record = _first_record(file)
        if not record:
            raise DataError(f"{path} is empty.")
        after, row = file.tell(), _record(file)
    if separator is None:
        separator = "\t" if path.suffix.lower() == ".tsv" else _separator(record, row)
    width = len(_cells_of(row or record, separator))
    layout = _Layout(encoding, separator, after, tuple(_cells_of(record, separator)), 0, width)
    names = layout.names
    words = [cell for cell in names if _number(cell) is None and cell.lower() not in _MISSING]
    if not words:
        commented = tuple(_cells_of(comment.lstrip("# "), separator)) if comment else ()
        if len(commented) == len(names):  # NumPy's savetxt writes the names as a comment
            layout, row = layout._replace(names=commented, start=begin, width=len(names)), record
        elif row and _is_header(path, names, _frame(path, layout, _SAMPLE)):
            notes.append(f"the first line of {path} is taken as names: {', '.join(names)}")
        else:
            numbered = tuple(f"column_{k}" for k in range(1, len(names) + 1))
            layout, row = layout._replace(names=numbered, start=begin, width=len(names)), record
            notes.append(f"no header found in {path}: its first line holds numbers and is the first row")
    elif any(_number(cell) is not None for cell in names):  # or the first row of a file without a header
        notes.append(f"the first line of {path} is taken as names: {', '.join(names)}")
    if not row:
        raise DataError(f"{path} has columns, but no rows.")
    sample = _frame(path, layout, _SAMPLE)
    return _aligned(path, layout, sample, row, notes)


def _aligned(path: Path, layout: _Layout, rows: pd.DataFrame, row: str, notes: list[str]) -> _Layout:
    """The layout with the columns that have names, if they are as many as there are names."""
    names, first, width = list(layout.names), 0, rows.shape[1]
    more = width - len(names)
    last_is_empty = bool(rows[width - 1].isna().all())
    if more == 0:
        while len(names) > 1 and not names[-1] and rows[len(names) - 1].isna().all():
            names.pop()  # a spreadsheet's columns without any value
        first = int(len(names) > 1 and names[0] in _UNNAMED)
        names = names[first:]
    elif more == 1 and not last_is_empty:  # otherwise each row ends in a separator
        numbered = rows[0].astype(str).tolist() == [str(k) for k in range(1, len(rows) + 1)]
        words = rows[0].dtype.kind not in "fiu"
        if words and rows[1].dtype.kind in "iu":  # ",5" and "1,5" with a decimal comma
            words = bool(_pandas().to_numeric(rows[0], errors="coerce").isna().all())
        first = int(numbered or row.lstrip().startswith('"') or words)
    if first:
        notes.append(f"the first column of {path} has no name: it is left out, as names of the rows")
    elif more != 0 and not (more == 1 and last_is_empty):
        raise _odd(path, 1, width, len(names), layout.separator)
    return layout._replace(names=tuple(names), first=first, width=width)


def _first_record(file: TextIO) -> tuple[str, str | None, int, str]:
    """The last comment before the table, the separator of a first line ``sep=;``, and the first record's place."""
    comment, separator = "", None
    while True:
        begin = file.tell()
        record = _record(file)
        if named := re.fullmatch(r"sep=(.)\s*", record, re.IGNORECASE):  # as Excel reads it
            separator = named[1]
        elif record.startswith("#"):
            comment = record.strip()
        else:
            return comment, separator, begin, record


def _record(file: TextIO) -> str:
    """The next line that is not blank; a quoted cell may go on over several lines."""
    line = file.readline()
    while line and not line.strip(" \r\n\ufeff"):
        line = file.readline()
    while line.count('"') % 2 and (more := file.readline()):
        line += more
    return line.rstrip("\r\n")


def _cells_of(record: str, separator: str) -> list[str]:
    if separator == r"\s+":
        record, separator = " ".join(record.split()), " "
    records = list(csv.reader(io.StringIO(record, newline=""), delimiter=separator, skipinitialspace=True))
    if len(records) != 1:
        raise ValueError("a quotation mark in its first lines does not enclose a cell")
    return [cell.strip() for cell in records[0]]


def _separator(record: str, row: str) -> str:
    """The separator of the cells of the first two records, outside of quotes."""
    cells = {each: _cells_of(record, each) for each in ",;\t|"}
    cells = {each: found for each, found in cells.items() if len(found) > 1}
    for each in ";\t":
        if each in cells and all(_number(cell.replace(",", ".")) is not None for cell in cells[each]):
            return each  # and a comma inside of a cell is the decimal sign
    if not cells:
        words = _cells_of(record.lstrip("# "), r"\s+")
        numbers = all(_number(word) is not None for word in words)
        more = len(_cells_of(row, r"\s+")) - len(words) if row else 0
        return r"\s+" if len(words) > 1 and (numbers or more in (0, 1)) else ","
    alike = [each for each in cells if not row or len(_cells_of(row, each)) - len(cells[each]) in (0, 1)]
    return max(alike or cells, key=lambda each: len(cells[each]))


def _is_header(path: Path, first: Sequence[str], rows: pd.DataFrame) -> bool:
    """Whether a first line of numbers holds names: pandas' 0, 1, ..., or whole numbers that are far from all rows.

    A DataError if it may hold either.
    """
    whole = all(_WHOLE.fullmatch(cell) for cell in first) and len(set(first)) == len(first)
    if not whole or len(rows) < 5 or rows.shape[1] != len(first):
        return False
    values = rows.apply(_pandas().to_numeric, errors="coerce")
    least, most = values.min(), values.max()
    far = [abs(float(cell) - (a + b) / 2) > 1.5 * (b - a) for cell, a, b in zip(first, least, most, strict=True)]
    counted = list(first) == [str(number) for number in range(len(first))]
    if all(far) or (counted and bool((values % 1 != 0).any().all())):
        return True
    if counted and len(first) > 1:
        raise DataError(
            f"the first line of {path}, {','.join(first)}, may hold names or a row: write names there, such as "
            f"{','.join('abcdefgh'[: len(first)])}{',...' if len(first) > 8 else ''}."
        )
    return False


def _frame(path: Path, layout: _Layout, rows: int | None = None, **options: Any) -> pd.DataFrame:
    with path.open(newline="", encoding=layout.encoding) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions have this precision as their default, and say so
        file.seek(layout.start)
        try:
            return _pandas().read_csv(
                file, sep=layout.separator, header=None, nrows=rows, skipinitialspace=True, low_memory=False,
                float_precision="round_trip", keep_default_na=False, na_values=[""], **options,
            )  # fmt: skip
        except _pandas().errors.ParserError:
            _check_widths(path, layout)
            raise


def _pandas() -> Any:
    import pandas  # takes half a second

    return pandas


def _text_values(path: Path, layout: _Layout, wanted: Sequence[str]) -> np.ndarray:
    frame = _frame(path, layout)
    empty = frame.isna().all(axis=1)
    if empty.any():  # or rows of the word nan, which are missing values
        empty &= _frame(path, layout, dtype=str).isna().all(axis=1)
    if frame[layout.width - 1].isna().any():  # pandas fills rows that are too short
        _check_widths(path, layout)
    filled = np.flatnonzero(~empty)
    frame = frame[: filled[-1] + 1 if len(filled) else 0]  # without a spreadsheet's empty rows at the end
    places = [layout.names.index(name) + layout.first for name in wanted]
    columns = [_text_column(path, frame[place], name, wanted) for place, name in zip(places, wanted, strict=True)]
    return np.stack(columns, axis=1)


def _text_column(path: Path, column: pd.Series, name: str, wanted: Sequence[str]) -> np.ndarray:
    if column.dtype.kind in "fiu":
        return column.to_numpy(dtype=np.float64)
    values = np.full(len(column), np.nan)
    for at, (row, cell) in enumerate(column.items()):
        text = str(cell).strip()
        if text.lower() in _MISSING:
            continue
        number = _number(text)
        if number is None:
            comma = ", with a decimal comma or a comma between thousands" if _DECIMAL_COMMA.fullmatch(text) else ""
            raise _not_numeric(path, name, f"row {int(str(row)) + 1} holds {text[:40]!r}{comma}", wanted)
        values[at] = number
    return values


def _check_widths(path: Path, layout: _Layout) -> None:
    """Refuse the first row that has more or fewer cells than the others."""
    with path.open(newline="", encoding=layout.encoding) as file:
        file.seek(layout.start)
        lines: Iterator[list[str]] = (
            (_cells_of(line, layout.separator) for line in file)
            if layout.separator == r"\s+"
            else csv.reader(file, delimiter=layout.separator)
        )
        for number, cells in enumerate((each for each in lines if any(cell.strip() for cell in each)), 1):
            if len(cells) != layout.width:
                raise _odd(path, number, len(cells), layout.width, layout.separator)


def _odd(path: Path, number: int, found: int, wanted: int, separator: str) -> DataError:
    is_comma = separator == "," and found > wanted
    advice = " Is a comma its decimal sign? Write numbers with a point." if is_comma else ""
    return DataError(f"row {number} of {path} has {found} cells, not {wanted}.{advice}")


def _number(cell: str) -> float | None:
    try:
        return None if "_" in cell else float(cell)  # Python takes 2020_01 for 202001
    except ValueError:
        return None


# Arrays and parquet --------------------------------------------------------------------------------------------


def _open_arrays(path: Path) -> _Source:
    """``.npy`` with a matrix or records, ``.npz`` with an array a column, or a matrix ``data`` with ``columns``."""
    loaded: Any = np.load(path, allow_pickle=False)
    arrays = {"data": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    matrix = arrays.get("data")
    if isinstance(loaded, np.ndarray) and loaded.dtype.names:
        columns = [(name, loaded[name]) for name in loaded.dtype.names]
    elif matrix is not None and (matrix.ndim == 2 or matrix is loaded):
        if matrix.ndim != 2 or matrix.shape[1] == 0:
            raise DataError(
                f"{path} holds an array of shape {matrix.shape}: a table is one of shape (rows, columns)."
            )
        names = arrays.get("columns", [f"column_{number}" for number in range(1, matrix.shape[1] + 1)])
        columns = list(zip(np.atleast_1d(names).astype(str).tolist(), matrix.T, strict=True))
    else:
        columns = list(arrays.items())
    if len({column.shape for _, column in columns}) != 1 or columns[0][1].ndim != 1:
        shapes = ", ".join(f"{name} {column.shape}" for name, column in columns)
        raise DataError(
            f"{path} holds {shapes or 'nothing'}: give one array (N,) for each column, or a matrix `data`."
        )

    def read(wanted: Sequence[str]) -> np.ndarray:
        named = dict(columns)
        for name in wanted:
            if named[name].dtype.kind not in "fiub":
                raise _not_numeric(path, name, f"it is {named[name].dtype}", wanted)
        return np.stack([named[name].astype(np.float64) for name in wanted], axis=1)

    return _Source(tuple(name for name, _ in columns), read)


def _open_parquet(path: Path) -> _Source:
    schema = _parquet().read_schema(path)
    # an index that pandas has written beside the columns is none of them
    index = [name for name in (schema.pandas_metadata or {}).get("index_columns", ()) if isinstance(name, str)]
    names = tuple(name for name in schema.names if name not in index)
    left_out = tuple(f"the index {name!r} of {path} is left out" for name in index)
    return _Source(names, lambda wanted: _parquet_values(path, schema, wanted), left_out)


def _parquet_values(path: Path, schema: Any, wanted: Sequence[str]) -> np.ndarray:
    import pyarrow
    from pyarrow import types

    for name in wanted:
        kind = schema.field(name).type
        tests = (types.is_floating, types.is_integer, types.is_boolean, types.is_decimal)
        if not any(test(kind) for test in tests):
            raise _not_numeric(path, name, f"it is {kind}", wanted)
    read = _parquet().read_table(path, columns=list(wanted))
    columns = [read.column(name).cast(pyarrow.float64(), safe=False).to_numpy() for name in wanted]
    return np.stack(columns, axis=1)


def _parquet() -> Any:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ConfigError("parquet files need pyarrow: pip install 'rnode-plugin[parquet]'.") from None
    return parquet


# Writing -------------------------------------------------------------------------------------------------------


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
    frame = _pandas().DataFrame(rows, columns=list(names))
    file.write(frame.to_csv(sep=separator, index=False, float_format="%.8g", lineterminator="\n").encode())


def _write_parquet(file: IO[bytes], names: Sequence[str], rows: np.ndarray) -> None:
    parquet = _parquet()
    import pyarrow

    parquet.write_table(pyarrow.table(dict(zip(names, rows.T, strict=True))), file)


class _Format(NamedTuple):
    open: Callable[[Path], _Source]
    write: Callable[[IO[bytes], Sequence[str], np.ndarray], None]


_FORMATS = {
    ".csv": _Format(_open_text, lambda file, names, rows: _write_text(file, names, rows, ",")),
    ".tsv": _Format(_open_text, lambda file, names, rows: _write_text(file, names, rows, "\t")),
    ".txt": _Format(_open_text, lambda file, names, rows: _write_text(file, names, rows, "\t")),
    ".npy": _Format(_open_arrays, lambda file, names, rows: np.save(file, rows)),
    ".npz": _Format(
        _open_arrays, lambda file, names, rows: np.savez(file, data=rows, columns=np.array(list(names)))
    ),
    ".parquet": _Format(_open_parquet, _write_parquet),
}


def _format_of(path: Path) -> _Format:
    found = _FORMATS.get(path.suffix.lower())
    if found is None:
        raise ConfigError(f"{path} is not a table: its name must end in {', '.join(_FORMATS)}.")
    return found
