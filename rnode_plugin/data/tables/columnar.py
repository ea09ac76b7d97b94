"""Parquet files as tables, by pyarrow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ConfigError, DataError
from .advice import leave_out

__all__ = ["parquet_names", "parquet_values", "write_parquet"]


def parquet_names(path: Path) -> tuple[str, ...]:
    """Names of the columns.

    Raises:
        DataError: damaged, or another kind of file.
        ConfigError: pyarrow is not installed.
    """
    return tuple(_opened(path).schema_arrow.names)


def parquet_values(path: Path, wanted: Sequence[str]) -> np.ndarray:
    """The columns ``wanted``, ``(N, len(wanted))``, float64, NaN for missing values.

    Raises:
        DataError: damaged, or a column that is not numeric.
        ConfigError: pyarrow is not installed.
    """
    file = _opened(path)
    import pyarrow

    for name in wanted:
        kind = file.schema_arrow.field(name).type
        is_number = (pyarrow.types.is_floating, pyarrow.types.is_integer, pyarrow.types.is_boolean)
        if not any(is_one(kind) for is_one in (*is_number, pyarrow.types.is_decimal)):
            raise DataError(
                f"the column {name!r} of {path} is not numeric: it is {kind}. Turn it into numbers, or "
                f"{leave_out(wanted, name)}"
            )
    try:
        table = file.read(columns=list(wanted))
        columns = [table.column(name).cast(pyarrow.float64()).to_numpy() for name in wanted]
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}.") from None
    return np.stack(columns, axis=1)


def write_parquet(file: Any, names: Sequence[str], rows: np.ndarray) -> None:
    """Write rows ``(N, len(names))`` into an open file.

    Raises:
        ConfigError: pyarrow is not installed.
    """
    parquet = _pyarrow()
    import pyarrow

    parquet.write_table(pyarrow.table(dict(zip(names, rows.T, strict=True))), file)


def _opened(path: Path) -> Any:
    parquet = _pyarrow()
    import pyarrow

    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}.") from None


def _pyarrow() -> Any:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ConfigError("parquet files need pyarrow: pip install 'rnode-plugin[parquet]'.") from None
    return parquet
