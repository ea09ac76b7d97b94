"""The identity of data: a hash of all samples in memory, or of the contents of all files."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...errors import CheckpointError
from ..files import make_folder, sha256_of, write_atomically
from .arrays import ImageArray

_CHUNK = 1000  # samples that are read at once
_DIGITS = 16  # of 64, which no two data sets share by chance
_SETTLED = 2e9  # nanoseconds


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

    The result is kept in the user's cache (``$XDG_CACHE_HOME/rnode-plugin``, else ``~/.cache/rnode-plugin``) under
    a hash of the path, size, times and inode of each file. It is not kept if one has changed within the last two
    seconds, because a second change need not show in its times.

    Args:
        folder: their folder, which does not count, so that a copy is the same data.
        names: their paths in it.
    """
    states, newest = hashlib.sha256(str(folder.resolve()).encode("utf-8", "surrogateescape")), 0
    for name in names:
        state = (folder / name).stat()
        times = state.st_mtime_ns, state.st_ctime_ns
        newest = max(newest, *times)
        text = f"\n{name}\n{state.st_size} {times} {state.st_ino}"
        states.update(text.encode("utf-8", "surrogateescape"))
    kept, now = _cache() / states.hexdigest(), time.time_ns()
    with contextlib.suppress(OSError, ValueError):
        if len(identity := kept.read_text(encoding="ascii")) == _DIGITS:
            return identity
    identity = _of_contents(folder, names)
    if now - newest > _SETTLED:
        with contextlib.suppress(CheckpointError):  # a cache that cannot be written costs time alone
            make_folder(kept.parent)
            write_atomically(kept, identity.encode())
    return identity


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "rnode-plugin")


def _of_contents(folder: Path, names: Sequence[str]) -> str:
    hashed = hashlib.sha256()
    for name in names:
        # file names on Linux need not be valid UTF-8
        hashed.update(f"{sha256_of(folder / name)} {name}\n".encode("utf-8", "surrogateescape"))
    return hashed.hexdigest()[:_DIGITS]
