"""``ImageArray`` is what holds samples, in memory or on disk. ``limited`` draws some of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, overload

import numpy as np

from ...errors import ConfigError

Index = int | slice | Sequence[int] | np.ndarray
"""What selects samples along the first dimension of an array."""


class ImageArray(Protocol):
    """Images that can be indexed like a NumPy array ``(N, C, H, W)`` of uint8, in memory or on disk.

    ``images[indices]``, with a slice or a 1-D integer array, returns an array of these images.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: Index, /) -> np.ndarray: ...


class Selection:
    """Selects some images of another array, and reads them when they are indexed.

    Indexing the other array with ``indices`` at once would read a file of many gigabytes into memory.
    """

    def __init__(self, images: ImageArray, indices: np.ndarray) -> None:
        self._images, self._indices = images, indices
        self.shape, self.dtype = (len(indices), *images.shape[1:]), images.dtype

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Index, /) -> np.ndarray:
        return self._images[self._indices[index]]


def shuffled(n: int) -> np.ndarray:
    """Return a permutation of ``range(n)`` that is the same in every call and every version.

    NumPy promises never to change the stream of RandomState, but may change its newer generators in any release.
    A split that changes with an update would hold out images that a run has trained on.
    """
    return np.random.RandomState(0).permutation(n)


@overload
def limited(samples: np.ndarray, n: int | None) -> np.ndarray: ...
@overload
def limited(samples: ImageArray, n: int | None) -> ImageArray: ...
def limited(samples: ImageArray, n: int | None) -> ImageArray:
    """Draw at most ``n`` of the images or rows from all of them, the same ones in each call.

    Arrays of equal length keep the same entries, so samples and their numbers stay together.

    Raises:
        ConfigError: ``n`` is below 1.
    """
    if n is None or n >= len(samples):
        return samples
    if n < 1:
        raise ConfigError(f"a limit on the number of images or rows must be at least 1, not {n}.")
    # a prefix of one permutation makes smaller limits subsets of larger ones, and sorted indices keep the order of
    # the files
    chosen = np.sort(shuffled(len(samples))[:n])
    return samples[chosen] if isinstance(samples, np.ndarray) else Selection(samples, chosen)
