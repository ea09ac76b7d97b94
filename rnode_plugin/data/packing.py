"""``pack``: folders of pictures, or the published ImageNet 64x64 batches, become two arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import ConfigError, DataError
from ..files import Draft
from .folders import TRAIN_FILE, VAL_FILE, assign, decode, files_in, is_picture, split_named
from .images import naming, shown

_BATCH = ".npz"
_SHOWN = 5


@dataclass(frozen=True)
class PackingResult:
    """Numbers of packed images, their shape (C, H, W), and the names of files left out as unreadable."""

    train: int
    val: int
    shape: tuple[int, ...]
    skipped: list[str]


class _Source(NamedTuple):
    """A file to read, and the part that its images belong to: ``"train"``, ``"val"`` or None."""

    path: Path
    split: str | None


def pack(
    sources: Sequence[Path],
    target: Path,
    *,
    size: int | None = None,
    channels: int = 3,
    skip: bool = False,
    overwrite: bool = False,
    progress: Callable[[Sequence[_Source]], Iterable[_Source]] = iter,
) -> PackingResult:
    """Write ``train.npy`` and ``val.npy``: ``(N, C, H, W)``, uint8, 8 bits. Both appear complete, or neither.

    Args:
        sources: folders of pictures, or folders of the published ImageNet batches (``train_data_batch_1.npz`` to
            ``_10``, ``val_data.npz``). Several make one data set. Folders for training and validation
            (``train`` and ``val`` or ``test``) make the split; without them about a tenth is held out, by name.
        target: folder for the two files; made if missing.
        size: height and width that pictures are scaled to (the shorter side; the longer one is cut around the
            middle); None: all have the same.
        channels: 3 for colour, 1 for grey.
        skip: leave out what is not a readable picture, and name it in the result; else the first one is an error.
        overwrite: replace packed files.
        progress: wraps the files to show how far it is.

    Raises:
        ConfigError: an option that cannot work.
        DataError: a source that is missing or empty, or whose split is unclear; a bad picture, pictures of
            different sizes, packed files there already, no room on the disk.
    """
    if channels not in (1, 3) or (size is not None and size < 1):
        raise ConfigError(f"channels must be 1 or 3 and the size at least 1, not {channels} and {size}.")
    there = [str(target / file) for file in (TRAIN_FILE, VAL_FILE) if (target / file).exists()]
    if there and not overwrite:
        raise DataError(f"{' and '.join(there)} exist already. Pass --overwrite to replace them.")
    files, skipped = _plan(sources)
    if skipped and not skip:
        raise DataError(
            f"{_listing('These files are not pictures', skipped)} Remove them, or pass --on-error skip."
        )
    try:
        with _Writer(target / TRAIN_FILE) as train, _Writer(target / VAL_FILE) as val:
            for path, split in progress(files):
                if split is None:
                    continue
                try:
                    images = _images(path, size, channels)
                except DataError as error:
                    if not skip or path.suffix == _BATCH:
                        raise DataError(f"{error} Remove it, or pass --on-error skip.") from error
                    skipped.append(str(path))
                    continue
                shape = train.shape[1:] or val.shape[1:] or images.shape[1:]
                if images.shape[1:] != shape:
                    raise DataError(
                        f"the pictures differ in size: {path} is {shown(images.shape[1:])}, those before are "
                        f"{shown(shape)}. Give the height and width that all of them are scaled to with --size."
                    )
                (train if split == "train" else val).append(images)
            if not (train.shape and val.shape):
                raise DataError(
                    f"no readable picture to train on, or none to hold out.{_listing(' Skipped', skipped)}"
                )
            for step in (_Writer.finish, _Writer.publish):
                for writer in (train, val):
                    step(writer)
    except OSError as error:
        raise DataError(f"{target} cannot be written: {(error.strerror or str(error)).lower()}.") from error
    return PackingResult(train.shape[0], val.shape[0], train.shape[1:], skipped)


def _plan(sources: Sequence[Path]) -> tuple[list[_Source], list[str]]:
    """The files to read with their split, and the names of those that are not pictures."""
    found: list[tuple[Path, str]] = []
    splits: list[str | None] = []
    rejected: list[str] = []
    for source in sources:
        if source.is_file():
            raise DataError(f"{source} is not a folder. Unpack an archive first, and name the folder.")
        own = split_named(f"{source.name}/file")  # a folder `train` need not hold another one
        for name in files_in(source):
            if is_picture(name) or name.endswith(_BATCH):
                found.append((source / name, name))
                splits.append(split_named(name) or own)
            else:
                rejected.append(str(source / name))
    where = ", ".join(map(str, sources))
    if not found:
        raise DataError(f"no pictures and no ImageNet batches in {where}.{_listing(' Found instead', rejected)}")
    batches = [name.endswith(_BATCH) for _, name in found]
    if any(batches) and not (all(batches) and set(splits) == {"train", "val"}):
        raise DataError(
            f"{where}: give the folders of all ImageNet batches in one command, train_data_batch_1.npz to "
            "train_data_batch_10.npz together with val_data.npz, and no other pictures."
        )
    assigned = assign(splits, [name for _, name in found], where=where)
    return [_Source(path, split) for (path, _), split in zip(found, assigned, strict=True)], rejected


def _images(path: Path, size: int | None, channels: int) -> np.ndarray:
    """The images of a file, ``(n, C, H, W)``, uint8: one of a picture, all of a batch."""
    if path.suffix != _BATCH:
        with naming(path), path.open("rb") as file:
            return decode(file, str(path), size=size, channels=channels)[None]
    with naming(path, " Download it again."), np.load(path, allow_pickle=False) as arrays:
        rows = arrays["data"]  # a row is the red plane, then green, then blue, each row by row
        side = math.isqrt(rows.shape[1] // 3)
        images = rows.reshape(len(rows), 3, side, side)
    if images.dtype != np.uint8:
        raise DataError(f"{path} holds {images.dtype}, not the bytes of an ImageNet batch. Download it again.")
    if channels != 3 or size not in (None, side):
        raise ConfigError(f"{path} holds images of {shown(images.shape[1:])}, which are packed as they are.")
    return images


def _listing(what: str, names: Sequence[str]) -> str:
    """``what: a, b, c and 7 more.``, or nothing if there are no names."""
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what}: {', '.join(names[:_SHOWN])}{more}."


class _Writer(Draft):
    """Writes a ``.npy`` file image by image; it appears under its name when it is published."""

    shape: tuple[int, ...] = ()

    def __enter__(self) -> _Writer:
        super().__enter__()
        return self

    def append(self, images: np.ndarray) -> None:
        """Add images ``(n, C, H, W)``, uint8, all of the shape of the first."""
        if not self.shape:
            self.shape = (0, *images.shape[1:])
            self._header()  # NumPy leaves room in it for a larger count
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
