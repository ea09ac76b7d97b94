"""Files of tables: names of the columns, values of some of them, and rows written back, by the file's ending."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from ...errors import ConfigError, DataError, suggest
from ...files import write_atomically
from .arrays import array_names, array_values
from .columnar import parquet_names, parquet_values, write_parquet
from .text import text_names, text_values

__all__ = ["check_written", "column_names", "read_columns", "write_rows"]


class _Format(NamedTuple):
    names: Callable[[Path], tuple[str, ...]]
    values: Callable[[Path, Sequence[str]], np.ndarray]
    write: Callable[[IO[bytes], Sequence[str], np.ndarray], None]


def _text_writer(separator: str) -> Callable[[IO[bytes], Sequence[str], np.ndarray], None]:
    def write(file: IO[bytes], names: Sequence[str], rows: np.ndarray) -> None:
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter=separator, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([f"{value:.8g}" for value in row] for row in rows)
        file.write(text.getvalue().encode())

    return write


def _write_npy(file: IO[bytes], names: Sequence[str], rows: np.ndarray) -> None:
    np.save(file, rows)


def _write_npz(file: IO[bytes], names: Sequence[str], rows: np.ndarray) -> None:
    np.savez(file, data=rows, columns=np.array(list(names)))


_FORMATS = {
    ".csv": _Format(text_names, text_values, _text_writer(",")),
    ".tsv": _Format(text_names, text_values, _text_writer("\t")),
    ".npy": _Format(array_names, array_values, _write_npy),
    ".npz": _Format(array_names, array_values, _write_npz),
    ".parquet": _Format(parquet_names, parquet_values, write_parquet),
}


def column_names(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Names of the columns of a table.

    Raises:
        DataError: the file is missing or no table, or two of its columns have one name.
        ConfigError: another ending, or a reader that is not installed.
    """
    path = _existing(path)
    names = _format_of(path).names(path)
    if not names:
        raise DataError(f"{path} has no columns.")
    for name, count in Counter(names).items():
        if not name:
            raise DataError(f"{path} has a column without a name: name each in its first line.")
        if count > 1:
            raise DataError(f"{path} has {count} columns of the name {name!r}: each needs a name of its own.")
    return names


def read_columns(path: str | os.PathLike[str], wanted: Sequence[str]) -> np.ndarray:
    """The columns ``wanted`` of a table, ``(N, len(wanted))``, float64 and finite.

    Raises:
        DataError: the file is missing or no table, a column is not there or not numeric, or a value is missing or
            infinite.
        ConfigError: another ending, or a reader that is not installed.
    """
    path = _existing(path)
    names = column_names(path)
    for name in wanted:
        if name not in names:
            raise DataError(f"{path}: {suggest(name, names, 'column')}")
    rows = _format_of(path).values(path, wanted)
    for name, column in zip(wanted, rows.T, strict=True):
        missing, infinite = np.flatnonzero(np.isnan(column)), np.flatnonzero(np.isinf(column))
        if len(missing):
            several = "value" if len(missing) == 1 else "values"
            raise DataError(
                f"the column {name!r} of {path} has {len(missing)} missing {several}, the first in row "
                f"{missing[0] + 1}: remove these rows, or fill them in."
            )
        if len(infinite):
            raise DataError(f"the column {name!r} of {path} is infinite in row {infinite[0] + 1}.")
    return rows


def check_written(path: str | os.PathLike[str]) -> None:
    """Refuse a file that :func:`write_rows` could not write.

    Raises:
        ConfigError: another ending.
    """
    _format_of(Path(path))


def write_rows(path: str | os.PathLike[str], names: Sequence[str], rows: np.ndarray) -> None:
    """Write rows ``(N, len(names))`` as a table; whole or not at all.

    Raises:
        ConfigError: another ending, or a writer that is not installed.
        CheckpointError: the file cannot be written.
    """
    write = _format_of(Path(path)).write
    write_atomically(Path(path), lambda file: write(file, names, rows))


def _format_of(path: Path) -> _Format:
    found = _FORMATS.get(path.suffix.lower())
    if found is None:
        raise ConfigError(f"{path} is not a table: its name must end in {', '.join(_FORMATS)}.")
    return found


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.is_file():
        what = "it is a folder" if path.is_dir() else "there is no such file"
        raise DataError(f"cannot read the table {path}: {what}.")
    return path
