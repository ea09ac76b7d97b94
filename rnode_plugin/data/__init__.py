"""Data sets of images (uint8) and tables: loaded by name, read in batches, packed into arrays."""

from .catalog import get_dataset, get_table
from .folders import celebahq256, folder, imagenet64
from .images import ArrayDataset, ImageArray, ImageData
from .packing import pack
from .sets import cifar10, digits, fashion_mnist, mnist, one_download, svhn
from .tables import Table

__all__ = [
    "ArrayDataset",
    "ImageArray",
    "ImageData",
    "Table",
    "celebahq256",
    "cifar10",
    "digits",
    "fashion_mnist",
    "folder",
    "get_dataset",
    "get_table",
    "imagenet64",
    "mnist",
    "one_download",
    "pack",
    "svhn",
]
