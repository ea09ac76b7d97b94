"""Data sets of images (uint8) and tables: loaded by name, read in batches, packed into arrays."""

from .catalog import get_dataset, get_table
from .images import ArrayDataset, ImageArray, ImageData
from .packing import pack
from .sets import one_download
from .tables import Table

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
