"""Writes the text files of a run, JSON and columns of numbers, and reads them with errors that name the file."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import ConfigError
from ..files import write_atomically
from ..text import to_json

if TYPE_CHECKING:
    import numpy as np
    import pandas
    from numpy.typing import NDArray

    Columns = Mapping[str, NDArray[np.float64]]
    """Columns of numbers by their name, all with the same length."""


def write_json(path: Path, contents: Mapping[str, object]) -> None:
    """Write plain data as JSON, whole or not at all, with null for a number that is not finite."""
    write_atomically(path, f"{to_json(contents)}\n".encode())


@contextmanager
def reading(path: Path) -> Iterator[str | None]:
    """Read the text of a file, None if the file is missing, and name the file in errors that the block raises.

    The block parses the text. All parsers that it may use raise a ValueError for a bad text: JSON, pandas,
    pydantic, and our own.

    Raises:
        ConfigError: the file cannot be read, or the block raised a ValueError, as for JSON that is cut off or for
            values that no run writes.
    """
    try:
        if (exists := path.exists()) and not path.is_file():  # a pipe would wait for a writer
            raise OSError("it is not a regular file")
        yield path.read_text(encoding="utf-8") if exists else None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, JSON, CSV, or not what is expected there
        raise ConfigError(f"{path} does not hold what a run writes: {_sentence(error)}.") from None


def _sentence(error: ValueError | RecursionError) -> str:
    """Say what is wrong, without the period at the end. pydantic may find several faults, and this is the first."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error).rstrip(".")
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")


def whole_lines(text: str) -> str:
    """Leave out the last line of a text if it has no end.

    A process may be in the middle of writing the line, or a kill has cut it in two.
    """
    return text[: text.rfind("\n") + 1]  # rfind gives -1 for a text without a whole line, and this is empty then


def numbers(text: str) -> pandas.DataFrame:
    """Parse the cells of a CSV file that hold a number. The others become NaN.

    Raises:
        ValueError: a row has more cells than the first one.
    """
    import pandas

    whole = whole_lines(text)
    if not whole.strip():
        return pandas.DataFrame()
    # as texts first, because pandas would give a column with one bad cell another type, and older versions of it do
    # not read the last bit
    table = pandas.read_csv(io.StringIO(whole), dtype=str)
    return pandas.DataFrame({name: cells.map(_number) for name, cells in table.items()}, dtype=float)


def _number(cell: str | float) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def known_rows(table: pandas.DataFrame, known: Sequence[str]) -> Columns:
    """Select the rows in which all columns ``known`` have a number, and return their columns.

    A column in ``known`` that the table does not have is known in no row, so the result is empty then.
    """
    names = list(dict.fromkeys([*known, *table.columns]))
    complete = table.reindex(columns=names).dropna(subset=list(known))
    return {name: complete[name].to_numpy(float) for name in names}
