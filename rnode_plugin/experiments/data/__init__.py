"""Data sets of images (uint8) and tables: loaded by name, read in batches, packed into arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .catalog import get_dataset, get_table
from .images import ImageArray, ImageData
from .packing import pack
from .sets import one_download
from .tables import Table

if TYPE_CHECKING:
    from .batches import ArrayDataset

__all__ = [
    "ArrayDataset",
    "ImageArray",
    "ImageData",
    "Table",
    "get_dataset",
    "get_table",
    "one_download",
    "pack",
]


def __getattr__(name: str) -> Any:
    """``ArrayDataset`` on first use: it imports torch, which a wrong file or folder is refused without."""
    if name != "ArrayDataset":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .batches import ArrayDataset

    return ArrayDataset
