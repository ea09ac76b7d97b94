"""Parquet files of images, as the Hugging Face Hub offers CelebA-HQ and ImageNet 64x64: a picture file per row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

from ...errors import ConfigError

__all__ = ["encoded_pictures", "row_count"]

_ROWS = 64
_COLUMNS = ("image", "img", "images", "png", "jpg", "bytes")


def row_count(file: IO[bytes]) -> int:
    """Number of rows.

    Raises:
        ValueError, OSError: damaged.
        ConfigError: pyarrow is not installed.
    """
    return _opened(file).metadata.num_rows


def encoded_pictures(file: IO[bytes]) -> Iterator[bytes]:
    """The picture file of each row, such as PNG or JPEG.

    Raises:
        ValueError, OSError: damaged, or without a column of pictures.
        ConfigError: pyarrow is not installed.
    """
    table = _opened(file)
    column = _picture_column(table.schema_arrow)
    found = 0
    for batch in table.iter_batches(batch_size=_ROWS, columns=[column]):
        for cell in batch.column(0).to_pylist():
            content = cell.get("bytes") if isinstance(cell, dict) else cell
            if not isinstance(content, bytes):
                raise ValueError(f"row {found} of its column {column!r} holds no picture")
            yield content
            found += 1
    if found != table.metadata.num_rows:
        raise ValueError(f"it has {found} rows, and says it has {table.metadata.num_rows}")


def _opened(file: IO[bytes]) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError:
        raise ConfigError("reading parquet files needs pyarrow: pip install 'rnode-plugin[parquet]'.") from None
    return ParquetFile(file, page_checksum_verification=True)


def _picture_column(schema: Any) -> str:
    import pyarrow

    def holds_bytes(kind: Any) -> bool:
        return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)

    for name in _COLUMNS:
        position = schema.get_field_index(name)
        if position >= 0:
            kind = schema.field(position).type
            if pyarrow.types.is_struct(kind):
                inner = kind.get_field_index("bytes")
                if inner >= 0 and holds_bytes(kind.field(inner).type):
                    return name
            elif holds_bytes(kind):
                return name
    raise ValueError(f"it has no column of pictures ({' or '.join(_COLUMNS[:2])}) but {', '.join(schema.names)}")
