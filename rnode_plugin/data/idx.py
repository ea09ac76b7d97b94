"""IDX files, the form in which MNIST is published: a short header, then the pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import DataError

__all__ = ["read_idx_images"]

_UBYTE_IMAGES = 0x00000803  # unsigned bytes, three dimensions
_HEADER_BYTES = 16


def read_idx_images(path: Path) -> np.ndarray:
    """Grey images ``(N, 1, H, W)``, uint8.

    Raises:
        DataError: another kind of file, or one with fewer or more bytes than its header says.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    header = np.frombuffer(content[:_HEADER_BYTES].ljust(_HEADER_BYTES, b"\0"), dtype=">u4").astype(int).tolist()
    magic, count, height, width = header
    found, expected = len(content) - _HEADER_BYTES, count * height * width
    if magic != _UBYTE_IMAGES or found != expected or expected == 0:
        raise DataError(f"{path} is damaged: {_what_is_wrong(magic, found, expected)}.")
    return np.frombuffer(content, dtype=np.uint8, offset=_HEADER_BYTES).reshape(count, 1, height, width)


def _what_is_wrong(magic: int, found: int, expected: int) -> str:
    if magic != _UBYTE_IMAGES:
        return f"it is not an IDX file of images (it begins with {magic:08x}, not {_UBYTE_IMAGES:08x})"
    return f"it holds {max(found, 0):,} bytes of pixels, and its header says {expected:,}"
