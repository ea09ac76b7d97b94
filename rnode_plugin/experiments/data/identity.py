"""The identity of data: a hash of all samples in memory, or of the contents of all files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .arrays import ImageArray

_CHUNK = 1000  # samples that are read at once
_DIGITS = 16  # of 64, which no two data sets share by chance


def identity_of(samples: ImageArray) -> str:
    """Hash all samples, or return the ``identity()`` that an array offers, such as a hash of its files."""
    own = getattr(samples, "identity", None)
    return of_samples(samples) if own is None else str(own())


def of_samples(*parts: ImageArray) -> str:
    """Compute the SHA-256 of the shapes and all values of arrays, as 16 hexadecimal digits.

    Floating-point numbers count in double precision. Of an array on disk, a part is read at a time.
    """
    hashed = hashlib.sha256()
    for samples in parts:
        hashed.update(f"{tuple(samples.shape)}".encode())
        for first in range(0, len(samples), _CHUNK):
            some = samples[first : first + _CHUNK]
            # one byte order and precision, so that every machine computes the same hash
            hashed.update(np.ascontiguousarray(some, dtype="<f8" if some.dtype.kind == "f" else None).data)
    return hashed.hexdigest()[:_DIGITS]


def of_files(folder: Path, names: Sequence[str]) -> str:
    """Compute the SHA-256 of the names and the contents of files, as 16 hexadecimal digits.

    Args:
        folder: their folder, which does not count, so that a copy is the same data.
        names: their paths in it.
    """
    hashed = hashlib.sha256()
    for name in names:
        with (folder / name).open("rb") as file:
            contents = hashlib.file_digest(file, "sha256").hexdigest()
        # file names on Linux need not be valid UTF-8
        hashed.update(f"{contents} {name}\n".encode("utf-8", "surrogateescape"))
    return hashed.hexdigest()[:_DIGITS]
