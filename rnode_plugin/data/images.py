"""``ImageData``: a data set of two sets of uint8 images, in memory or on disk; ``ImageArray`` and ``Selection``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from ..errors import ConfigError, DataError

__all__ = ["ImageArray", "ImageData", "Selection", "shuffled"]


class ImageArray(Protocol):
    """Images that can be indexed like a NumPy array ``(N, C, H, W)`` of uint8, in memory or on disk.

    ``images[indices]``, with a slice or a 1-D integer array, returns a new array with these images.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Any: ...


class Selection:
    """Some of the images of another array, read only when they are asked for."""

    def __init__(self, images: ImageArray, indices: np.ndarray) -> None:
        self._images, self._indices = images, indices

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self._indices), *self._images.shape[1:]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._images.dtype

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any, /) -> np.ndarray:
        return self._images[self._indices[index]]


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set for density estimation.

    Attributes:
        name: what messages and runs call it.
        train, val: images ``(N, C, H, W)``, uint8, values ``0 .. levels - 1``.
        shape: (C, H, W) of each of them.
        levels: number of values a pixel can take: 256 for 8 bits.
        flip: whether a mirrored image is as likely, so that a recipe may mirror images while training.

    Raises:
        DataError: the arrays are not such images. Values of arrays on disk are not checked.
    """

    name: str
    train: ImageArray
    val: ImageArray
    shape: tuple[int, int, int]
    levels: int = 256
    flip: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.levels <= 256:
            raise DataError(f"{self.name}: levels must be 2 to 256, not {self.levels}: images are uint8.")
        for part, images in (("train", self.train), ("val", self.val)):
            what = f"{self.name}: the {part} images"
            if images.dtype != np.uint8:
                raise DataError(f"{what} are {images.dtype}; they must be uint8.")
            if len(images.shape) != 4 or images.shape[1:] != tuple(self.shape):
                wanted = ", ".join(map(str, self.shape))
                raise DataError(f"{what} have the shape {tuple(images.shape)}, not (N, {wanted}).")
            if len(images) == 0:
                raise DataError(f"{what} are missing: there are none.")
            if isinstance(images, np.ndarray) and self.levels < 256 and images.max() >= self.levels:
                raise DataError(f"{what} hold the value {images.max()}; with {self.levels} levels the largest is "
                                f"{self.levels - 1}.")  # fmt: skip

    @property
    def held_out(self) -> ImageArray:
        """The images that measure the result: those of ``val``."""
        return self.val

    def limit(self, n_train: int | None = None, n_val: int | None = None) -> ImageData:
        """The same data set with at most so many images, the same ones each time.

        They are drawn from the whole set, because folders are often sorted by class. A smaller limit draws a subset
        of what a larger one draws.

        Raises:
            ConfigError: a limit below 1.
        """
        return replace(self, train=_limited(self.train, n_train), val=_limited(self.val, n_val))


def shuffled(n: int) -> np.ndarray:
    """A fixed permutation of ``range(n)``.

    NumPy promises the stream of RandomState for good, that of its newer generators only within a version; a split
    that changes with an update would leak training images into the held-out ones.
    """
    return np.random.RandomState(0).permutation(n)


def _limited(images: ImageArray, n: int | None) -> ImageArray:
    if n is None or n >= len(images):
        return images
    if n < 1:
        raise ConfigError(f"a limit on the number of images must be at least 1, not {n}.")
    chosen = np.sort(shuffled(len(images))[:n])
    return images[chosen] if isinstance(images, np.ndarray) else Selection(images, chosen)
