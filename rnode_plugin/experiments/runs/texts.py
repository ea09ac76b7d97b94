"""The text files of a run: JSON and columns of numbers, written whole, and read with errors that name the file."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import ConfigError
from ...files import write_atomically

if TYPE_CHECKING:
    import numpy as np
    import pandas
    from numpy.typing import NDArray

    Columns = Mapping[str, NDArray[np.float64]]
    """Columns of numbers by their name, all of one length."""


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, contents: Mapping[str, object]) -> None:
    """Write plain data as JSON, whole or not at all."""
    write_text(path, json.dumps(contents, indent=2) + "\n")


@contextmanager
def reading(path: Path) -> Iterator[str | None]:
    """The text of a file, None if it is not there; what cannot be read in the block is an error with its name.

    Raises:
        ConfigError: the file cannot be read, or the block raised a ValueError, as for JSON that is cut off or for
            values that no run writes.
    """
    try:
        yield path.read_text(encoding="utf-8") if path.exists() else None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, JSON, CSV, or not what is expected there
        raise ConfigError(f"{path} does not hold what a run writes: {_sentence(error)}.") from None


def _sentence(error: ValueError | RecursionError) -> str:
    """What is wrong, without the point at the end; of pydantic's findings the first, with its place."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error).rstrip(".")
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")


def whole_lines(text: str) -> str:
    """The lines of a file that a process may be in the middle of writing, or that a kill has cut in two."""
    return text[: text.rfind("\n") + 1]


def numbers(text: str) -> pandas.DataFrame:
    """The cells of a CSV file that hold a number; the others are NaN.

    Raises:
        ValueError: a row has more cells than the first one.
    """
    import pandas

    whole = whole_lines(text)
    if not whole.strip():
        return pandas.DataFrame()
    table = pandas.read_csv(io.StringIO(whole), dtype=str)
    return table.apply(pandas.to_numeric, errors="coerce").astype(float)


def known_rows(table: pandas.DataFrame, known: Sequence[str]) -> Columns:
    """The columns of a table, of the rows in which ``known`` are known; one that is missing is known nowhere."""
    names = list(dict.fromkeys([*known, *table.columns]))
    complete = table.reindex(columns=names).dropna(subset=list(known))
    return {name: complete[name].to_numpy(float) for name in names}
