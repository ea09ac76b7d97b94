"""``pack`` writes folders of pictures, or the published ImageNet 64x64 batches, as two arrays."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import ConfigError, DataError
from ...files import Draft
from .folders import (
    TRAIN_FILE,
    VAL_FILE,
    assign,
    decode,
    different,
    folder,
    is_gray,
    is_picture,
    notice_left_out,
    separated,
    split_named,
)
from .images import ImageData, naming, shown

_BATCH = ".npz"


class _Source(NamedTuple):
    """A file to read, and the part that its images belong to: ``"train"`` or ``"val"``."""

    path: Path
    split: str


def pack(
    sources: Sequence[Path],
    target: Path,
    *,
    size: int | None = None,
    channels: int | None = None,
    overwrite: bool = False,
    progress: Callable[[Sequence[_Source]], Iterable[_Source]] = iter,
) -> ImageData:
    """Write pictures into ``train.npy`` and ``val.npy``, arrays ``(N, C, H, W)`` of uint8. Both appear, or neither.

    Args:
        sources: folders of pictures, or folders of the published ImageNet batches (``train_data_batch_1.npz`` to
            ``_10``, ``val_data.npz``). Several folders become one data set. Other files are left out, with a line
            on standard error. The pictures are split as in :func:`~rnode_plugin.experiments.data.folders.folder`.
        target: folder for the two files, which is made if it is missing.
        size: height and width that pictures are scaled to (the shorter side is scaled, and the longer one is
            cropped around the center); None if all have the same size already.
        channels: 3 for color, 1 for gray; None for gray if all pictures are gray, as a recipe reads their folder.
        overwrite: replace packed files.
        progress: wraps the files, to show the progress.

    Returns:
        The images of the two files.

    Raises:
        ConfigError: an option that cannot work.
        DataError: a source that is missing or empty, or whose split is unclear; a bad picture, pictures of
            different sizes, packed files there already, no room on the disk.
    """
    if channels not in (None, 1, 3) or (size is not None and size < 1):
        raise ConfigError(f"channels must be 1 or 3 and the size at least 1, not {channels} and {size}.")
    there = [str(target / file) for file in (TRAIN_FILE, VAL_FILE) if (target / file).exists()]
    if there and not overwrite:
        raise DataError(f"{' and '.join(there)} exist already. Pass --overwrite to replace them.")
    files = _plan(sources)
    if channels is None:  # color that all pictures repeat would be three times as many dimensions
        channels = 1 if all(path.suffix != _BATCH and is_gray(path) for path, _ in files) else 3
    first: tuple[str, tuple[int, ...]] | None = None
    is_new = not target.exists()
    try:
        with _Writer(target / TRAIN_FILE) as train, _Writer(target / VAL_FILE) as val:
            for path, split in progress(files):
                images = _images(path, size, channels)
                first = first or (str(path), images.shape[1:])
                if images.shape[1:] != first[1]:
                    raise different(str(path), images.shape[1:], *first)
                (train if split == "train" else val).append(images)
            # both files are complete on the disk before either gets its name, so a full disk leaves the old pair
            for step in (_Writer.finish, _Writer.publish):
                for writer in (train, val):
                    step(writer)
    except OSError as error:
        raise DataError(f"{target} cannot be written: {(error.strerror or str(error)).lower()}.") from error
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # the folder holds the two files, unless writing them failed
                target.rmdir()
    return folder(root=str(target))


def _plan(sources: Sequence[Path]) -> list[_Source]:
    """List the files to read, each with its part of the split."""
    found: list[tuple[Path, str]] = []
    splits: list[str | None] = []
    for one, other in itertools.permutations([source.resolve() for source in sources], 2):
        if one.is_relative_to(other):  # each picture would count twice, perhaps in both parts
            raise ConfigError(f"{one} is given twice, because it is inside {other}: give each folder once.")
    for source in sources:
        own = split_named(f"{source.name}/file")  # for a source that is itself called train or val
        names, others = separated(source, lambda name: is_picture(name) or name.endswith(_BATCH))
        notice_left_out(source, others)
        for name in names:
            found.append((source / name, name))
            splits.append(split_named(name) or own)
    where = ", ".join(map(str, sources))
    if not found:
        raise DataError(f"{where} has neither pictures nor ImageNet batches. Unpack archives first.")
    batches = [name.endswith(_BATCH) for _, name in found]
    if any(batches) and not (all(batches) and set(splits) == {"train", "val"}):
        raise DataError(
            f"{where}: give the folders of all ImageNet batches in one command, train_data_batch_1.npz to "
            "train_data_batch_10.npz together with val_data.npz, and no other pictures."
        )
    assigned = assign(splits, [name for _, name in found], where=where)
    return [_Source(path, split) for (path, _), split in zip(found, assigned, strict=True) if split is not None]


def _images(path: Path, size: int | None, channels: int) -> np.ndarray:
    """Read the images in a file, ``(n, C, H, W)``, uint8. A picture has one, a batch many."""
    if path.suffix != _BATCH:
        return decode(path, size=size, channels=channels)[None]
    with naming(path, " Download it again."), np.load(path, allow_pickle=False) as arrays:
        rows = arrays["data"]  # a row is the red plane, then green, then blue, each row by row
        side = math.isqrt(rows.shape[1] // 3)
        images = rows.reshape(len(rows), 3, side, side)
    if images.dtype != np.uint8:
        raise DataError(f"{path} holds {images.dtype}, not the bytes of an ImageNet batch. Download it again.")
    if channels != 3 or size not in (None, side):
        raise ConfigError(f"{path} holds images of {shown(images.shape[1:])}, which are packed as they are.")
    return images


class _Writer(Draft):
    """Writes a ``.npy`` file image by image, so that a data set need not fit into memory.

    The file gets its name when it is published.
    """

    shape: tuple[int, ...] = ()

    def __enter__(self) -> _Writer:
        super().__enter__()
        return self

    def append(self, images: np.ndarray) -> None:
        """Add images ``(n, C, H, W)``, uint8, all of the shape of the first."""
        if not self.shape:
            self.shape = (0, *images.shape[1:])
            # the number of images is known at the end. NumPy pads this header for a larger first dimension, and
            # `finish` writes it again over this one
            self._header()
        self.file.write(np.ascontiguousarray(images).data)
        self.shape = (self.shape[0] + len(images), *self.shape[1:])

    def finish(self) -> None:
        """Write the header with the number of images, and sync everything to the disk."""
        self.file.seek(0)
        self._header()
        super().finish()

    def _header(self) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(self.file, header)
