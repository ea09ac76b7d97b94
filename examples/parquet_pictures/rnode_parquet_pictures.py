"""A data set of pictures in parquet files, as the Hugging Face Hub offers CelebA-HQ and ImageNet 64x64.

Registers ``parquet-pictures`` with rnode-plugin: a folder of ``train-*.parquet`` and ``validation-*.parquet``.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rnode_plugin import hookimpl
from rnode_plugin.errors import DataError
from rnode_plugin.experiments.data import ImageData
from rnode_plugin.experiments.data.folders import decode
from rnode_plugin.experiments.data.images import naming

__all__ = ["pictures", "rnode_register_datasets"]

_COLUMNS = ("image", "img", "images", "png", "jpg", "bytes")


@hookimpl
def rnode_register_datasets() -> dict[str, str]:
    return {"parquet-pictures": "rnode_parquet_pictures:pictures"}


def pictures(*, root: str | None = None, size: int | None = None, channels: int = 3, bits: int = 8) -> ImageData:
    """Pictures in parquet files (--data-root): train-*.parquet and validation-*.parquet; a picture file per row."""
    folder = Path(root or "data")
    parts = []
    for part in ("train", "validation"):
        images = [
            image for file in sorted(folder.glob(f"{part}-*.parquet")) for image in _images(file, size, channels)
        ]
        if not images:
            raise DataError(f"parquet-pictures: {folder} has no pictures in {part}-*.parquet.")
        if len({image.shape for image in images}) > 1:
            raise DataError(f"parquet-pictures: the pictures in {folder} differ in size: give --size N.")
        parts.append(np.stack(images) >> (8 - bits))
    train, val = parts
    _, c, h, w = train.shape
    return ImageData(name="parquet-pictures", train=train, val=val, shape=(c, h, w), levels=2**bits)


def _images(file: Path, size: int | None, channels: int) -> Iterator[np.ndarray]:
    from pyarrow.parquet import ParquetFile

    with naming(file):
        table = ParquetFile(file)
        names = table.schema_arrow.names
        column = next((name for name in _COLUMNS if name in names), None)
        if column is None:
            raise DataError(f"{file} cannot be read: it has no column of pictures but {', '.join(names)}.")
        for batch in table.iter_batches(batch_size=64, columns=[column]):
            for cell in batch.column(0).to_pylist():
                content = cell["bytes"] if isinstance(cell, dict) else cell
                yield decode(io.BytesIO(content), size=size, channels=channels, name=f"a picture of {file}")
