"""``ImageData`` holds two sets of uint8 images in memory or on disk."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from ...errors import DataError, RnodeError
from ..files import missing
from ..text import shape_text
from .arrays import ImageArray, limited
from .identity import identity_of


@contextmanager
def naming(what: object, advice: str = "") -> Iterator[None]:
    """Turn any exception of a file's reader into a DataError that names the file and the cause."""
    try:
        yield
    except (RnodeError, MemoryError):  # they name the cause already, and a full memory does not lie in the file
        raise
    except FileNotFoundError as error:
        own = missing(what) if isinstance(what, Path) and not advice else f"{what} does not exist.{advice}"
        raise DataError(own) from error
    except Exception as error:  # PIL, NumPy and pandas raise many types for a damaged file
        cause = error.strerror.lower() if isinstance(error, OSError) and error.strerror else _DAMAGED
        raise DataError(f"{what} cannot be read: {cause}.{advice}") from error


def refuse_special(path: Path) -> None:
    """Refuse a pipe or a device, from which a reader could wait for ever, and a missing file.

    Raises:
        DataError: it is neither a regular file nor a folder.
        OSError: nothing has this name.
    """
    if not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode):
        raise DataError(f"{path} is a pipe or a device: name a file.")


_DAMAGED = "the file is damaged, or its format is not the one that its name promises"


def _check_reads(images: ImageArray, what: str) -> None:
    """Refuse an array, such as a plugin's, that returns other images than its shape and dtype promise.

    A batch would take one image for each of its indices, or cut numbers off, without an error.
    """
    indices = np.array([0, len(images) - 1])
    read = images[indices]
    wanted = (len(indices), *images.shape[1:])
    if not isinstance(read, np.ndarray) or (read.shape, read.dtype) != (wanted, images.dtype):
        got = f"{read.dtype} {read.shape}" if isinstance(read, np.ndarray) else type(read).__name__
        raise DataError(
            f"{what} return {got} for {len(indices)} indices, but they promise {images.dtype} {wanted}."
        )


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set of images for density estimation, split into training and held-out images.

    Attributes:
        name: the name in messages and runs.
        train, val: images ``(N, C, H, W)``, uint8, values ``0 .. levels - 1``.
        shape: (C, H, W) of each image, a tuple or what becomes one.
        levels: number of values that a pixel can take, 256 for 8 bits.
        numbers: the index of each image of ``val`` among all held-out images; None if ``val`` is all of them.
        identity: a hash of all training images, and one of all held-out images. They are computed if they are not
            given, by the ``identity()`` of an array that offers it. :meth:`limit` keeps them, because they describe
            the whole data set.
        noun: what the samples are called.

    Raises:
        DataError: the arrays are not such images. Values of arrays on disk are not checked.
    """

    name: str
    train: ImageArray
    val: ImageArray
    shape: tuple[int, int, int]
    levels: int = 256
    numbers: np.ndarray | None = None
    identity: tuple[str, str] = ("", "")
    noun: ClassVar[str] = "images"

    def __post_init__(self) -> None:
        if not 2 <= self.levels <= 256:
            raise DataError(f"{self.name}: levels must be 2 to 256, not {self.levels}: images are uint8.")
        object.__setattr__(self, "shape", tuple(self.shape))
        for part, images in (("train", self.train), ("val", self.val)):
            what = f"{self.name}: the {part} images"
            is_array = hasattr(images, "dtype")
            if not is_array or images.dtype != np.uint8 or images.shape[1:] != self.shape or len(images) == 0:
                given = f"{images.dtype} {images.shape}" if is_array else type(images).__name__
                wanted = ", ".join(map(str, self.shape))
                raise DataError(f"{what} are {given}, but they must be uint8 arrays (N, {wanted}).")
            if isinstance(images, np.ndarray) and self.levels < 256 and images.max() >= self.levels:
                raise DataError(f"{what} hold the value {images.max()}, which {self.levels} levels do not reach.")
        if not all(self.identity):
            for part, images in (("train", self.train), ("val", self.val)):
                _check_reads(images, f"{self.name}: the {part} images")
            object.__setattr__(self, "identity", (identity_of(self.train), identity_of(self.val)))

    def described(self) -> str:
        """Describe the images by shape and levels, in one line at the start of a run.

        A second line counts the held-out images that equal a training image, if all are in memory.
        """
        text = f"{self.name}: images of {shape_text(self.shape)}, {self.levels} levels"
        if not isinstance(self.train, np.ndarray) or not isinstance(self.val, np.ndarray):
            return text
        return text + repeated(self.train, self.val, "image")

    @property
    def held_out(self) -> ImageArray:
        """The images that measure the result. They are ``val``, because published sets have only two parts."""
        return self.val

    def limit(self, *, train: int | None = None, val: int | None = None, held_out: int | None = None) -> ImageData:
        """Return the data set with at most so many images in its parts, the same ones in each call; None for all.

        They are drawn from the whole set, because folders are often sorted by class. A smaller limit draws a subset
        of a larger one. ``val`` and ``held_out`` are the same images here, so the smaller limit holds.

        Raises:
            ConfigError: a limit below 1.
        """
        measured = min((each for each in (val, held_out) if each is not None), default=None)
        numbers = np.arange(len(self.val)) if self.numbers is None else self.numbers
        return replace(
            self,
            train=limited(self.train, train),
            val=limited(self.val, measured),
            numbers=limited(numbers, measured),
        )


def repeated(train: np.ndarray, held_out: np.ndarray, sample: str) -> str:
    """Write a second line that counts the held-out samples which equal a training sample; empty without any.

    A flow may have memorized them. ``sample`` is the noun.
    """
    known = {each.tobytes() for each in train}
    count = sum(each.tobytes() in known for each in held_out)
    equal = "equals" if count == 1 else "equal"
    return f"\n{count:,} of {len(held_out):,} held-out {sample}s {equal} a training {sample}" if count else ""
