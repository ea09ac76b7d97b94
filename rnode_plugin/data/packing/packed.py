"""Packed images: ``train.npy`` and ``val.npy``, uint8, 8 bits, mapped into memory when read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError
from ...files import Draft

__all__ = ["TRAIN_FILE", "VAL_FILE", "PackedImages", "PackedWriter"]

TRAIN_FILE, VAL_FILE = "train.npy", "val.npy"

_HEADER_BYTES = 128
_PROBED = 64  # images that are checked for fewer than 8 bits


class PackedImages:
    """A ``.npy`` file of images ``(N, C, H, W)``, uint8, that is read when it is indexed.

    It is pickled by its path, so that worker processes map the file instead of being sent its content.

    Args:
        path: the file.
        shift: bits to drop from each value: 8 bits ``x`` become ``floor(x / 2**shift)``.

    Raises:
        DataError: damaged, not such images, or with fewer than 8 bits although some are to be dropped.
    """

    def __init__(self, path: Path, *, shift: int = 0) -> None:
        self._path, self._shift = path, shift
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # NumPy's reader of headers is Python's own: on garbage it raises anything
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise DataError(f"{path} cannot be read as a packed array: {reason}. Make it again with "
                            "`rnode-cli data prepare`.") from error  # fmt: skip
        if not isinstance(array, np.memmap):
            raise DataError(f"{path} is an archive of arrays (.npz), not one array.")
        if array.dtype != np.uint8:
            raise DataError(f"{path} holds {array.dtype}; packed images are uint8 with values 0 to 255.")
        if array.ndim != 4 or array.shape[1] not in (1, 3) or 0 in array.shape:
            raise DataError(f"{path} has the shape {array.shape}; packed images are (N, C, H, W), channels first, "
                            "with 1 or 3 of them.")  # fmt: skip
        whole, found = array.offset + array.nbytes, path.stat().st_size
        if found != whole:  # a damaged header can claim fewer images than there are
            raise DataError(f"{path} is damaged: it has {found:,} bytes, and its header says {whole:,}. Make it "
                            "again with `rnode-cli data prepare`.")  # fmt: skip
        self._array = array
        if shift:
            probe = array[np.linspace(0, len(array) - 1, min(len(array), _PROBED)).astype(int)]
            if probe.max() < 2 ** (8 - shift):
                raise DataError(f"{path} has no value above {probe.max()}: it seems to hold {8 - shift} bits "
                                f"already, where 8 are expected. Multiply it by {2**shift}.")  # fmt: skip

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._array.dtype

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: Any, /) -> np.ndarray:
        # without bits to drop this still copies: a map of a file cannot be written to, a tensor can
        return np.right_shift(self._array[index], self._shift)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self._path, self._shift)


def _reopen(path: Path, shift: int) -> PackedImages:
    return PackedImages(path, shift=shift)


class PackedWriter(Draft):
    """Writes one packed file image by image; it appears under its name when it is published.

    Args:
        path: the file to make.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._image_shape: tuple[int, ...] = ()
        self.count = 0

    def __enter__(self) -> PackedWriter:
        super().__enter__()
        self.file.write(bytes(_HEADER_BYTES))
        return self

    def append(self, images: np.ndarray) -> None:
        """Add images ``(n, C, H, W)``, uint8, all of the shape of the first."""
        self._image_shape = images.shape[1:]
        self.file.write(np.ascontiguousarray(images).data)
        self.count += len(images)

    def finish(self) -> None:
        """Write the header with the number of images, and sync everything to the disk."""
        # version 1.0 of NumPy's format by hand: only a header of known length can be written after the data
        shape = (self.count, *self._image_shape)
        text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
        start = b"\x93NUMPY\x01\x00" + (_HEADER_BYTES - 10).to_bytes(2, "little")
        self.file.seek(0)
        self.file.write(start + text.encode().ljust(_HEADER_BYTES - 11) + b"\n")
        super().finish()
