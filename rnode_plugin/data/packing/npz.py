"""``batch_images``: the published ImageNet 64x64 batches, npz files with one flat image per row of ``data``."""

from __future__ import annotations

import math
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from ...errors import DataError
from .archives import Member, check_directory

__all__ = ["batch_images"]

_ROWS = 1024
_MAX_BYTES = 2**34


def batch_images(member: Member, name: str, *, scratch: Path) -> Iterator[np.ndarray]:
    """The images of one batch file, a thousand at a time, ``(n, 3, S, S)``, uint8.

    A row is the red plane, then green, then blue, each row by row.

    Args:
        member: the ``.npz``.
        name: for messages.
        scratch: a folder for a temporary copy, because a member of an archive cannot be read back and forth.

    Raises:
        DataError: damaged, or not such a batch.
    """
    if member.nbytes > _MAX_BYTES:
        raise DataError(f"{name} is larger than {_MAX_BYTES >> 30} GB; the published batches have 1.6 GB.")
    try:
        with member.open() as file, tempfile.TemporaryFile(dir=scratch) as copy:
            shutil.copyfileobj(file, copy, 2**20)
            with zipfile.ZipFile(copy) as archive:
                check_directory(archive, copy)
                if "data.npy" not in archive.namelist():
                    raise DataError(
                        f"{name} has no array `data`: it is not a batch of the ImageNet 64x64 archives."
                    )
                labels = _label_count(archive)
                with archive.open("data.npy") as data:
                    yield from _rows(data, name, labels)
    except DataError:
        raise
    except Exception as error:  # on garbage a reader raises whatever it stumbled over
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise DataError(f"{name} is damaged: {reason}. Download it again.") from error


def _label_count(archive: zipfile.ZipFile) -> int | None:
    """How many images the batch has by its labels; None if it has none."""
    if "labels.npy" not in archive.namelist():
        return None
    with archive.open("labels.npy") as labels:
        shape, _, _ = _read_header(labels)
        while labels.read(2**20):  # to the end, where the checksum is compared
            pass
    return math.prod(shape)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _rows(data: IO[bytes], name: str, labels: int | None) -> Iterator[np.ndarray]:
    # read by hand, not with np.load, which would hold a whole batch of 1.6 GB in memory
    shape, fortran, dtype = _read_header(data)
    side = math.isqrt(shape[1] // 3) if len(shape) == 2 else 0
    if dtype != np.uint8 or fortran or side == 0 or shape[1] != 3 * side * side:
        raise DataError(f"{name}: `data` is {dtype} {shape}; it should be uint8 with one flat RGB image per row.")
    if math.prod(shape) > _MAX_BYTES:  # it may be compressed
        raise DataError(f"{name}: `data` unpacks to more than {_MAX_BYTES >> 30} GB.")
    if labels not in (None, shape[0]):
        raise DataError(f"{name} is damaged: it has {shape[0]} images and {labels} labels. Download it again.")
    for start in range(0, shape[0], _ROWS):
        wanted = min(_ROWS, shape[0] - start) * shape[1]
        block = data.read(wanted)
        if len(block) != wanted:
            raise EOFError(f"it ends within {shape[0]} images")
        yield np.frombuffer(block, np.uint8).reshape(-1, 3, side, side)
    if data.read(1):
        raise EOFError(f"it goes on after {shape[0]} images")
