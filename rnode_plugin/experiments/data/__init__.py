"""Data sets of images (uint8) and tables, which are loaded by name and read in batches.

``catalog`` finds a data set by its name, ``sets`` has the published ones, ``folders`` the user's pictures and
``tables`` the user's rows. ``images`` and ``tables`` define what a data set is, and ``batches`` hands samples to
PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .catalog import get_dataset, get_table
from .images import ImageArray, ImageData
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
]


def __getattr__(name: str) -> object:
    """Import ``ArrayDataset`` on first use. It needs torch, and a wrong file or folder is refused before that."""
    if name != "ArrayDataset":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .batches import ArrayDataset

    return ArrayDataset
