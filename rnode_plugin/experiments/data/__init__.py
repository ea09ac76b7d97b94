"""Data sets of images (uint8) and tables, which are loaded by name and read in batches.

``catalog`` finds a data set by its name, ``sets`` has the published ones, ``folders`` the user's pictures and
``tables`` the user's rows. ``images`` and ``tables`` define what a data set is, of the samples in ``arrays``.
``batches`` hands them to PyTorch, and is the only module here that imports it.
"""

from __future__ import annotations

from .arrays import ImageArray
from .catalog import get_dataset, get_table
from .images import ImageData
from .sets import one_download
from .tables import Table

__all__ = [
    "ImageArray",
    "ImageData",
    "Table",
    "get_dataset",
    "get_table",
    "one_download",
]
