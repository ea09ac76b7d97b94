"""Hashes of images and rows, by which data are told from others and a sample is known again."""

from __future__ import annotations

import hashlib

import numpy as np

from .arrays import ImageArray

NONE = np.empty(0, dtype=np.uint64)
"""The hashes of no sample."""

SPREAD = 64  # samples that stand for all of them, because pictures on disk are decoded for this
_CHUNK = 1000  # samples that are read at once


def spread(samples: ImageArray) -> np.ndarray:
    """Return at most 64 of the images or rows, evenly spread."""
    count = min(len(samples), SPREAD)
    return np.ascontiguousarray(samples[np.arange(count) * len(samples) // count])


def fingerprint(samples: ImageArray) -> str:
    """Hash the number of images or rows and some of them, evenly spread, which tells other samples from these."""
    some = spread(samples)
    return hashlib.sha256(f"{len(samples)} {some.shape}".encode() + some.tobytes()).hexdigest()[:16]


def hashes_of(samples: ImageArray) -> np.ndarray:
    """Hash the shape and the values of each sample. Of an array on disk, a part is read at a time.

    Args:
        samples: images ``(N, C, H, W)``, uint8, or rows ``(N, C)``, float, which count as 32-bit numbers, in which
            a flow computes.

    Returns:
        64 bits for each sample, ``(N,)``, uint64. The chance that any two of a million different samples have the
        same hash is 3e-8.
    """
    start = hashlib.blake2b(str(samples.shape[1:]).encode(), digest_size=8)
    digests: list[bytes] = []
    for first in range(0, len(samples), _CHUNK):
        some = samples[first : first + _CHUNK]
        if some.dtype.kind == "f":
            with np.errstate(over="ignore"):
                some = some.astype("<f4") + np.float32(0)  # which turns -0.0 into 0.0
        for sample in np.ascontiguousarray(some).reshape(len(some), -1).view(np.uint8):
            each = start.copy()
            each.update(sample.data)
            digests.append(each.digest())
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64, copy=False)


def united(known: np.ndarray, more: np.ndarray) -> np.ndarray:
    """Return the hashes in either array, each once and sorted, as those in ``known`` are."""
    new = np.unique(more)
    new = new[~are_in(new, known)]
    return np.sort(np.concatenate([known, new])) if len(new) else known


def are_in(hashes: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return for each hash whether it is among the ``known`` ones, which are sorted."""
    if not len(known):
        return np.zeros(len(hashes), dtype=bool)
    # NumPy's isin would sort the known ones again, which takes 50 times as long
    indices = np.searchsorted(known, hashes)
    return known[np.minimum(indices, len(known) - 1)] == hashes
