"""The published ImageNet 64x64 batches: ``.npz`` files whose member ``data`` holds one flat image a row."""

from __future__ import annotations

import math
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from ...errors import DataError
from .archives import READ_ERRORS, Member

__all__ = ["batch_images"]

_ROWS = 1024
_MAX_BYTES = 2**34


def batch_images(member: Member, name: str, *, scratch: Path) -> Iterator[np.ndarray]:
    """The images of one batch file, a thousand at a time, ``(n, 3, S, S)``, uint8.

    A row is the red plane, then green, then blue, each row by row.

    Args:
        member: the ``.npz``.
        name: for messages.
        scratch: a folder for a nameless copy, since a member of an archive cannot be read back and forth.

    Raises:
        DataError: damaged, or not such a batch.
    """
    if member.nbytes > _MAX_BYTES:
        raise DataError(f"{name} is larger than {_MAX_BYTES >> 30} GB; the published batches have 1.6 GB.")
    try:
        with member.open() as file, tempfile.TemporaryFile(dir=scratch) as copy:
            shutil.copyfileobj(file, copy, 2**20)
            with zipfile.ZipFile(copy) as archive:
                if "data.npy" not in archive.namelist():
                    raise DataError(f"{name} has no array `data`: it is no batch of the ImageNet 64x64 archives.")
                with archive.open("data.npy") as data:
                    yield from _rows(data, name)
    except (*READ_ERRORS, ValueError) as error:  # ValueError: NumPy's for a header that is none
        raise DataError(f"{name} is damaged: {error}. Download it again.") from error


def _rows(data: IO[bytes], name: str) -> Iterator[np.ndarray]:
    # read by hand, not with np.load, which would hold a whole batch of 1.6 GB in memory
    version = np.lib.format.read_magic(data)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(data)
    side = math.isqrt(shape[1] // 3) if len(shape) == 2 else 0
    if dtype != np.uint8 or fortran or side == 0 or shape[1] != 3 * side * side:
        raise DataError(f"{name}: `data` is {dtype} {shape}; it should be uint8 with one flat RGB image a row.")
    if math.prod(shape) > _MAX_BYTES:  # it may be compressed
        raise DataError(f"{name}: `data` unpacks to more than {_MAX_BYTES >> 30} GB.")
    for start in range(0, shape[0], _ROWS):
        wanted = min(_ROWS, shape[0] - start) * shape[1]
        block = data.read(wanted)
        if len(block) != wanted:
            raise EOFError(f"it ends within {shape[0]} images")
        yield np.frombuffer(block, np.uint8).reshape(-1, 3, side, side)
