"""Folders of pictures and of arrays as data sets: ``folder``, ``imagenet64`` and ``celebahq256``."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from ...errors import ConfigError, DataError
from ..files import missing, walk
from ..text import count_of, shape_text
from .arrays import ImageArray, Index
from .identity import of_files
from .images import ImageData, naming, refuse_special

DEFAULT_ROOT = Path("data")
"""The folder of the data sets unless another one is named."""

# Pictures that fit are decoded once. More than that are decoded batch by batch, which data.workers speeds up
_IN_MEMORY_BYTES = 2**30
_LARGEST = 256  # height or width of pictures that are trained on without a size


def folder(
    *,
    root: str | None = None,
    size: int | None = None,
    channels: int | None = None,
    bits: int = 8,
) -> ImageData:
    """Your pictures: a folder (--data-root FOLDER), or the arrays train.npy and val.npy in it.

    Args:
        root: the folder. Subfolders for training and for validation (``train`` and ``val`` or ``test``) decide the
            split. Without them about a tenth is held out, chosen by a hash of the names. If there are ``train.npy``
            and ``val.npy``, arrays ``(N, C, H, W)`` of uint8, these are read in place of the pictures.
        size: height and width that pictures are scaled to; None if all have the same size already.
        channels: 3 or 1; None for 3 with pictures, and for the number that arrays have.
        bits: bits per value, 1 to 8. The 8 bits ``x`` become ``floor(x / 2**(8 - bits))``.

    Raises:
        ConfigError: an option that cannot work.
        DataError: the images are missing or cannot be read.
    """
    if root is None:
        raise ConfigError("the data set 'folder' needs the folder of your pictures: --data-root DIRECTORY.")
    return _read("folder", Path(root), size=size, channels=channels, bits=bits)


def imagenet64(*, root: str | None = None) -> ImageData:
    """ImageNet at 3x64x64, 8 bits: train/ and val/ of pictures, or the arrays of examples/imagenet64.py."""
    advice = (
        "Get Imagenet64_train_part1_npz.zip, Imagenet64_train_part2_npz.zip and Imagenet64_val_npz.zip from "
        "https://image-net.org/download-images (free, after registration), unpack all three into one FOLDER, and "
        "run `python examples/imagenet64.py FOLDER {where}`; or put pictures into train and val in that folder."
    )
    return _manual_download("imagenet64", root, advice, size=64, bits=8)


def celebahq256(*, root: str | None = None) -> ImageData:
    """CelebA-HQ at 3x256x256, 5 bits (when read): a folder of pictures, scaled when they are read."""
    advice = (
        "Get CelebAMask-HQ.zip from https://github.com/switchablenorms/CelebAMask-HQ, and move the folder "
        "CelebA-HQ-img in it to {where}."
    )
    return _manual_download("celebahq256", root, advice, size=256, bits=5)


def _manual_download(name: str, root: str | None, advice: str, *, size: int, bits: int) -> ImageData:
    """Read a data set that the user has to download by hand, from the folder with its name below the root."""
    where = (Path(root) if root is not None else DEFAULT_ROOT) / name
    if not where.is_dir():
        raise DataError(
            f"the data set {name} is missing, and it cannot be downloaded for you. {advice.format(where=where)}"
        )
    return _read(name, where, size=size, channels=3, bits=bits)


def _read(name: str, where: Path, *, size: int | None, channels: int | None, bits: int) -> ImageData:
    """Read both parts of a folder, pictures or arrays, and check their shapes against what was asked for."""
    if not 1 <= bits <= 8 or channels not in (None, 1, 3) or (size is not None and size < 1):
        raise ConfigError(
            f"{name}: bits must be 1 to 8, channels 1 or 3, the size at least 1, not {bits}, {channels} and {size}."
        )
    arrays: Sequence[ImageFiles | PackedImages]
    if _is_packed(where):
        arrays = [PackedImages(where / file, shift=8 - bits) for file in (TRAIN_FILE, VAL_FILE)]
    else:
        names = _pictures(where, notice=True)
        splits = assign(names, where=str(where))
        chosen = [[n for n, split in zip(names, splits, strict=True) if split == part] for part in ("train", "val")]
        options = {"size": size, "channels": channels or 3, "shift": 8 - bits}
        arrays = [ImageFiles(where, part, **options) for part in chosen]
    train, val = parts = [each.in_memory() if isinstance(each, ImageFiles) else each for each in arrays]
    _, c, h, w = train.shape
    # a request that was left open takes the shape of the training images, so the held-out ones are checked as well
    wanted = (channels or c, size or h, size or w)
    for images in parts:
        if images.shape[1:] != wanted:
            raise DataError(
                f"{name}: {where} holds images of {shape_text(images.shape[1:])}, not {shape_text(wanted)}. Scale "
                "pictures with --size, and arrays before you write them."
            )
    identity = arrays[0].identity(), arrays[1].identity()
    return ImageData(name=name, train=train, val=val, shape=(c, h, w), levels=2**bits, identity=identity)


def folder_shape(root: str | Path, *, size: int | None = None) -> tuple[int, int, int]:
    """Find the shape (C, H, W) of the pictures below a folder, or of its arrays, without decoding them.

    Args:
        root: the folder.
        size: height and width that the pictures are scaled to; None if all have the same size already.

    Raises:
        DataError: no pictures, one that cannot be read, or different or large sizes without a ``size``.
    """
    where = Path(root)
    if _is_packed(where):
        _, c, h, w = PackedImages(where / TRAIN_FILE).shape
        return c, h, w
    gray = True  # one picture in color makes the data set one in color
    first: tuple[str, tuple[int, int]] | None = None
    for name in _pictures(where):
        with _opened(where / name, where / name) as image:
            # cameras store a picture as the sensor saw it, and orientations 5 to 8 turn it by 90 degrees for
            # display
            turned = image.getexif().get(0x0112, 1) > 4
            found = (image.width, image.height) if turned else (image.height, image.width)
            gray = gray and image.mode in _GRAY
        first = (name, found) if first is None else first
        if size is None and found != first[1]:
            raise _different(where, name, found, *first)
    assert first is not None  # _pictures refuses a folder without any
    h, w = first[1] if size is None else (size, size)
    if size is None and max(h, w) > _LARGEST:
        raise DataError(
            f"{where / first[0]} has {shape_text((h, w))} pixels, too large to train on: the largest of the "
            "paper are 256x256. Give the height and width that all of them are scaled to, such as --size 32."
        )
    return (1 if gray else 3), h, w


def _is_packed(where: Path) -> bool:
    # one file is enough, so that a folder which has lost the other one is refused and not read as pictures
    return any((where / file).exists() for file in (TRAIN_FILE, VAL_FILE))


def _pictures(where: Path, *, notice: bool = False) -> list[str]:
    """List the pictures below a folder. ``notice`` prints that other files are left out."""
    names, others = list[str](), list[str]()
    for name in _files_in(where):
        (names if PurePosixPath(name).suffix.lower() in _SUFFIXES else others).append(name)
    if notice and others:  # the folder may hold pictures in a format that is not read
        left_out = f"{count_of(len(others), 'file')} without a known suffix of pictures, such as {others[0]}"
        print(f"{where}: left out {left_out}", file=sys.stderr)
    if not names:
        raise DataError(
            f"the folder {where} holds neither pictures (png, jpg, webp, ...) nor {TRAIN_FILE}. Unpack an archive, "
            "or name another folder with --data-root."
        )
    return names


def _different(where: Path, name: str, shape: tuple[int, ...], other: str, size: tuple[int, ...]) -> DataError:
    """Make the error for pictures of different sizes."""
    return DataError(
        f"the pictures of {where} differ in size: {name} is {shape_text(shape)}, {other} is {shape_text(size)}. "
        "Give the height and width that all of them are scaled to, such as --size 32."
    )


# Training and held-out pictures --------------------------------------------------------------------------------

_FOLDERS = {
    **dict.fromkeys(("train", "training", "train_64x64"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "valid_64x64"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def _split_named(name: str) -> str | None:
    """Read ``"train"``, ``"val"`` or ``"test"`` from the first three folders of a path; None if they do not say."""
    *folders, _ = PurePosixPath(name).parts
    return next((_FOLDERS[each.lower()] for each in folders[:3] if each.lower() in _FOLDERS), None)


_HELD_OUT = 0.1  # share of the pictures, if no folders split them
_SALT = "\x000"  # of the hashes that split them; another text would give another split


def assign(names: Sequence[str], *, where: str) -> list[str | None]:
    """Assign ``"train"``, ``"val"`` or None (left out) to each picture.

    If there are folders for both, they decide, and ``test`` counts only if there is no ``val``. Otherwise a hash of
    the name holds out about a tenth of the pictures, so adding pictures to a folder does not move the others
    between training and validation. ``where`` is for messages.

    Raises:
        DataError: a picture lies outside of the folders that decide, or there is only one picture.
    """
    splits = [_split_named(name) for name in names]
    counts = Counter(splits)
    held_out = "val" if counts["val"] else "test"
    if counts["train"] and counts[held_out]:
        if counts[None]:
            stray = names[splits.index(None)]
            raise DataError(
                f"{where}: {stray} lies outside of the folders for training and validation "
                f"({counts[None]} such files). Move them into one of the folders, or away."
            )
        return ["train" if s == "train" else "val" if s == held_out else None for s in splits]
    if len(splits) < 2:
        raise DataError(f"{where}: one picture is too few to hold one out.")
    hashes: list[float] = []  # of each picture, evenly spread over [0, 1)
    for name in names:
        # file names on Linux need not be valid UTF-8
        digest = hashlib.sha256(f"{name}{_SALT}".encode("utf-8", "surrogateescape")).digest()
        hashes.append(int.from_bytes(digest[:6], "big") / 2**48)
    # in a small folder all hashes may lie on one side of the tenth, so the lowest is always held out and the
    # highest always trained on: both parts have an image
    lowest, highest = min(hashes), max(hashes)
    return ["val" if each == lowest or each < min(_HELD_OUT, highest) else "train" for each in hashes]


# Picture files --------------------------------------------------------------------------------------------------

# JPEG covers the multi-picture files of cameras. Formats whose readers start other programs are left out
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_GRAY = {"1", "L", "LA"}
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}


def _files_in(folder: Path) -> Iterator[str]:
    """Yield the names of the files below a folder, relative, with ``/``, sorted folder by folder."""

    def refuse(error: OSError) -> None:
        if isinstance(error, FileNotFoundError):
            raise DataError(f"the folder {missing(error.filename)}") from error
        raise DataError(f"the folder {error.filename} cannot be read: {(error.strerror or '').lower()}.") from error

    for parent, files in walk(folder, onerror=refuse):
        for file in files:
            path = parent / file
            name = path.relative_to(folder).as_posix()
            # file managers and archivers leave hidden files, and reading a pipe could wait for ever
            if path.is_file() and not any(part.startswith((".", "__MACOSX")) for part in name.split("/")):
                yield name


@contextmanager
def _opened(file: Path | IO[bytes], name: object) -> Iterator[Image.Image]:
    """Open a picture without decoding its pixels. A fault in it is a DataError, also inside the context."""
    with naming(name):
        try:
            opened = Image.open(file, formats=_FORMATS)
        except Image.DecompressionBombError as error:
            raise DataError(f"{name} is too large: scale it down. {error}") from None
        with opened as image:
            # PIL clips gray values of 16 bits to 255, so that most of such a picture is white, and takes the upper
            # 8 bits of colors, whose depth is in the raw mode of the decoder alone, such as "RGB;16B"
            if image.mode.startswith(("I", "F")) or ";16" in str(image.tile[:1]):
                raise DataError(f"{name} has more than 8 bits per channel: convert it to 8 bits.")
            if image.mode not in _MODES:
                raise DataError(f"{name} has colors in the mode {image.mode}: convert it to RGB.")
            yield image


def decode(file: Path | IO[bytes], *, size: int | None, channels: int, name: str | None = None) -> np.ndarray:
    """Decode one picture as ``(C, H, W)``, uint8, without its transparency. ``name`` is for messages.

    With a ``size`` the shorter side is scaled to it, and the longer one is cropped around the center.

    Raises:
        DataError: the file is missing, damaged, or has more than 8 bits per channel.
    """
    with _opened(file, name or file) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB" if channels == 3 else "L")
        if size is not None and image.size != (size, size):  # a picture of the size is not filtered
            image = ImageOps.fit(image, (size, size), method=Image.Resampling.LANCZOS)
    pixels = np.asarray(image, dtype=np.uint8)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)) if pixels.ndim == 3 else pixels[None]


class ImageFiles:
    """Presents picture files as an array ``(N, C, H, W)`` of uint8, and decodes the indexed ones.

    Args:
        folder, names: the files.
        size: height and width that they are scaled to; None if all have the size of the first.
        channels: 1 or 3.
        shift: number of bits to drop from each value. The 8 bits ``x`` become ``floor(x / 2**shift)``.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], *, size: int | None, channels: int, shift: int = 0
    ) -> None:
        self._folder, self._names, self._size = folder, names, size
        self._channels, self._shift = channels, shift
        self.shape, self.dtype = (len(names), *self._read(0).shape), np.dtype(np.uint8)

    def in_memory(self) -> ImageArray:
        """Decode all pictures if they fit into memory; otherwise return this array, which decodes on demand."""
        return self[:] if np.prod(self.shape, dtype=np.int64) <= _IN_MEMORY_BYTES else self

    def identity(self) -> str:
        """Hash the names and the contents of the files, which takes seconds where decoding them takes minutes."""
        return of_files(self._folder, self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: Index, /) -> np.ndarray:
        # NumPy resolves the index, so a slice, a list and a mask mean here what they mean for an array
        positions, shape = np.asarray(np.arange(len(self))[index]), self.shape[1:]
        images = np.empty((*positions.shape, *shape), np.uint8)
        for position, out in zip(positions.flat, images.reshape(-1, *shape), strict=True):
            image = self._read(int(position))
            if image.shape != shape:
                raise _different(self._folder, self._names[int(position)], image.shape, self._names[0], shape)
            np.right_shift(image, self._shift, out=out)
        return images

    def _read(self, position: int) -> np.ndarray:
        return decode(self._folder / self._names[position], size=self._size, channels=self._channels)


# Arrays ---------------------------------------------------------------------------------------------------------

TRAIN_FILE, VAL_FILE = "train.npy", "val.npy"

_PROBED = 64  # images that are checked for fewer than 8 bits


class PackedImages:
    """Reads images ``(N, C, H, W)``, uint8, from a ``.npy`` file when they are indexed.

    It is pickled by its path, so that worker processes map the file instead of receiving its content. ``shift``
    bits are dropped from each value, as in :class:`ImageFiles`.

    Raises:
        DataError: the file is missing or damaged, or does not hold such images.
    """

    def __init__(self, path: Path, *, shift: int = 0) -> None:
        self._path, self._shift = path, shift
        with naming(path, " Write it again."):
            refuse_special(path)
            array = np.lib.format.open_memmap(path, mode="r")
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1] not in (1, 3) or 0 in array.shape:
            raise DataError(
                f"{path} holds {array.dtype} {array.shape}, but packed images are uint8 (N, C, H, W) with 1 or 3 "
                "channels, which come first."
            )
        self._array, self.shape, self.dtype = array, array.shape, array.dtype
        # arrays that were already reduced, say to 5 bits, would lose their upper bits a second time and train as
        # nearly black images, so a sample of the values is checked
        if shift:
            probe = array[np.linspace(0, len(array) - 1, min(len(array), _PROBED)).astype(int)]
            if probe.max() < 2 ** (8 - shift):
                raise DataError(
                    f"{path} has no value above {probe.max()}, so it seems to hold {8 - shift} bits already, "
                    f"where 8 are expected. Multiply it by {2**shift}."
                )

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: Index, /) -> np.ndarray:
        # without bits to drop this still copies, because a tensor can be written to and a mapped file cannot
        return np.right_shift(self._array[index], self._shift)

    def identity(self) -> str:
        """Hash the name and the contents of the file."""
        return of_files(self._path.parent, [self._path.name])

    def __reduce__(self) -> tuple[partial[PackedImages], tuple[()]]:
        return partial(PackedImages, self._path, shift=self._shift), ()
