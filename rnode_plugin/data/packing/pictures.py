"""``decode`` and ``ImageFiles``: picture files as uint8 arrays, limited in size; ``files_in`` lists them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ...errors import DataError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ImageFiles", "decode", "files_in", "fit_pixels", "is_hidden", "is_picture"]

# JPEG covers the multi-picture files of cameras; formats whose readers start other programs are left out
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
_MAX_PIXELS = 50_000_000


def is_picture(name: str) -> bool:
    """Whether a file calls itself a picture."""
    return PurePosixPath(name).suffix.lower() in _SUFFIXES


def is_hidden(name: str) -> bool:
    """Whether a file is what file managers and archivers leave behind, and not part of the data."""
    parts = PurePosixPath(name).parts
    return any(part.startswith(".") and part not in (".", "..") for part in parts) or bool(
        {"__MACOSX", "Thumbs.db", "desktop.ini"}.intersection(parts)
    )


def files_in(folder: Path) -> Iterator[str]:
    """Names of the files below a folder, relative, with ``/``, sorted folder by folder; links are followed once."""

    def refuse(error: OSError) -> None:  # os.walk would pass over a folder that it may not read
        raise DataError(f"the folder {error.filename} cannot be read: {error.strerror}.") from error

    seen: set[str] = set()
    for here, subfolders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(here)
        if real in seen:  # a link back up would lead in circles
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        for file in sorted(files):
            path = Path(here, file)
            name = path.relative_to(folder).as_posix()
            if path.is_file() and not is_hidden(name):  # reading a pipe could wait for ever
                yield name


def decode(file: IO[bytes], name: str, *, size: int | None, channels: int) -> np.ndarray:
    """One picture as ``(C, H, W)``, uint8.

    Args:
        file: an open picture file.
        name: for messages.
        size: if given, the shorter side is scaled to it and the longer one cut around the middle.
        channels: 3 for colour, 1 for grey. Transparency is dropped.

    Raises:
        DataError: not a picture, damaged, too large, or with more than 8 bits a channel.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=_FORMATS) as image:
                if image.width * image.height > _MAX_PIXELS:
                    raise DataError(f"{image.width}x{image.height} pixels are more than {_MAX_PIXELS:,}")
                if image.mode not in _MODES:
                    raise DataError(f"pixels of the kind {image.mode!r}, which 8 bits a channel cannot hold")
                pixels = _fit(ImageOps.exif_transpose(image), size, channels)
                if image.format == "PNG":  # Pillow reads the pixels without looking at their checksums
                    file.seek(0)
                    with Image.open(file, formats=("PNG",)) as again:
                        again.verify()
    # on garbage a decoder raises whatever it stumbled over: OSError, SyntaxError, struct.error, ValueError, ...
    except Exception as error:
        reason = "not a picture" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise DataError(f"{name} cannot be read as a picture: {reason}.") from error
    return pixels


def fit_pixels(pixels: np.ndarray, *, size: int | None, channels: int) -> np.ndarray:
    """Pixels ``(C, H, W)``, uint8, scaled and converted as :func:`decode` does with pictures."""
    from PIL import Image

    if size in (None, pixels.shape[1]) and pixels.shape[1] == pixels.shape[2] and channels == pixels.shape[0]:
        return pixels
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return _fit(image, size, channels)


def _fit(image: Image.Image, size: int | None, channels: int) -> np.ndarray:
    from PIL import Image, ImageOps

    image = image.convert("RGB" if channels == 3 else "L")
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), method=Image.Resampling.LANCZOS)
    pixels = np.asarray(image, dtype=np.uint8)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)) if pixels.ndim == 3 else pixels[None]


class ImageFiles:
    """Picture files as an array ``(N, C, H, W)`` of uint8 that decodes what is indexed.

    Args:
        folder: where they are.
        names: relative to it.
        size: height and width that they are scaled to; None: all have the size of the first.
        channels: 1 or 3.
        shift: bits to drop from each value: 8 bits ``x`` become ``floor(x / 2**shift)``.

    Raises:
        DataError: here or when indexed: a file that is not a readable picture, or has another size.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], *, size: int | None, channels: int, shift: int = 0
    ) -> None:
        self._folder, self._names, self._size = folder, names, size
        self._channels, self._shift = channels, shift
        self._image_shape = self._read(0).shape

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self._names), *self._image_shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint8)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: Any, /) -> np.ndarray:
        positions = np.arange(len(self))[index]
        images = np.empty((*positions.shape, *self._image_shape), np.uint8)
        for position, out in zip(positions.flat, images.reshape(-1, *self._image_shape), strict=True):
            image = self._read(int(position))
            if image.shape != self._image_shape:
                raise DataError(self._mismatch(int(position), image.shape))
            np.right_shift(image, self._shift, out=out)
        return images

    def _read(self, position: int) -> np.ndarray:
        path = self._folder / self._names[position]
        try:
            with open(path, "rb") as file:
                return decode(file, str(path), size=self._size, channels=self._channels)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error

    def _mismatch(self, position: int, shape: tuple[int, ...]) -> str:
        _, height, width = self._image_shape
        return (
            f"the pictures in {self._folder} differ in size: {self._names[position]} has {shape[1]}x{shape[2]} "
            f"pixels, {self._names[0]} has {height}x{width}. Give the size that all are scaled to (--size)."
        )
