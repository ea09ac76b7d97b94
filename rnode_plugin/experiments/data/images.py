"""``ImageData``: two sets of uint8 images in memory or on disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from ...errors import ConfigError, DataError, RnodeError


@contextmanager
def naming(what: object, advice: str = "") -> Iterator[None]:
    """Turn any exception of a file's reader into a DataError that names the file and the cause."""
    try:
        yield
    except (RnodeError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise DataError(f"{what} does not exist.{advice}") from error
    except Exception as error:
        cause = error.strerror.lower() if isinstance(error, OSError) and error.strerror else _DAMAGED
        raise DataError(f"{what} cannot be read: {cause}.{advice}") from error


_DAMAGED = "the file is damaged, or its format is not the one that its name promises"


def shown(shape: tuple[int, ...]) -> str:
    """A shape in messages: ``3x32x32``."""
    return "x".join(map(str, shape))


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
    """Some images of another array, read when they are indexed."""

    def __init__(self, images: ImageArray, indices: np.ndarray) -> None:
        self._images, self._indices = images, indices
        self.shape, self.dtype = (len(indices), *images.shape[1:]), images.dtype

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any, /) -> np.ndarray:
        return self._images[self._indices[index]]


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set for density estimation.

    Attributes:
        name: the name in messages and runs.
        train, val: images ``(N, C, H, W)``, uint8, values ``0 .. levels - 1``.
        shape: (C, H, W) of each image.
        levels: number of values that a pixel can take, 256 for 8 bits.

    Raises:
        DataError: the arrays are not such images. Values of arrays on disk are not checked.
    """

    name: str
    train: ImageArray
    val: ImageArray
    shape: tuple[int, int, int]
    levels: int = 256

    def __post_init__(self) -> None:
        if not 2 <= self.levels <= 256:
            raise DataError(f"{self.name}: levels must be 2 to 256, not {self.levels}: images are uint8.")
        for part, images in (("train", self.train), ("val", self.val)):
            what = f"{self.name}: the {part} images"
            if images.dtype != np.uint8 or len(images) == 0 or images.shape[1:] != tuple(self.shape):
                wanted = ", ".join(map(str, self.shape))
                raise DataError(f"{what} are {images.dtype} {images.shape}, but they must be uint8 (N, {wanted}).")
            if isinstance(images, np.ndarray) and self.levels < 256 and images.max() >= self.levels:
                raise DataError(f"{what} hold the value {images.max()}, which {self.levels} levels do not reach.")

    def described(self) -> str:
        """The first line of a run: shape and levels."""
        return f"{self.name}: images of {shown(self.shape)}, {self.levels} levels"

    @property
    def held_out(self) -> ImageArray:
        """The images that measure the result, which are the ones of ``val``."""
        return self.val

    def limit(self, n_train: int | None = None, n_val: int | None = None) -> ImageData:
        """The same data set with at most so many images, the same ones each time.

        They are drawn from the whole set, because folders are often sorted by class. A smaller limit draws a subset
        of a larger one.

        Raises:
            ConfigError: a limit below 1.
        """
        return replace(self, train=limited(self.train, n_train), val=limited(self.val, n_val))


def shuffled(n: int) -> np.ndarray:
    """A fixed permutation of ``range(n)``.

    NumPy keeps the stream of RandomState in all versions, and the streams of its newer generators only within one.
    A split that changes with an update would move training images to the held-out ones.
    """
    return np.random.RandomState(0).permutation(n)


def limited(samples: Any, n: int | None) -> Any:
    """At most ``n`` of the images or rows, drawn from all of them, the same ones each time."""
    if n is None or n >= len(samples):
        return samples
    if n < 1:
        raise ConfigError(f"a limit on the number of images or rows must be at least 1, not {n}.")
    chosen = np.sort(shuffled(len(samples))[:n])
    return samples[chosen] if isinstance(samples, np.ndarray) else Selection(samples, chosen)
