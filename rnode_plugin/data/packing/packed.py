"""Packed images: ``train.npy`` and ``val.npy``, uint8, 8 bits, mapped into memory when read."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ...errors import DataError

__all__ = ["TRAIN_FILE", "VAL_FILE", "PackedImages", "PackedWriter"]

TRAIN_FILE, VAL_FILE = "train.npy", "val.npy"

_HEADER_BYTES = 128
_PROBED = 64  # images looked at to tell 8 bits from fewer


class PackedImages:
    """A ``.npy`` file of images ``(N, C, H, W)``, uint8, that is read where it is asked for.

    It is pickled by its path, so that worker processes map the file instead of being sent its content.

    Args:
        path: the file.
        shift: bits to drop from each value: 8 bits ``x`` become ``floor(x / 2**shift)``.

    Raises:
        DataError: damaged, not such images, or with fewer than 8 bits where some are to be dropped.
    """

    def __init__(self, path: Path, *, shift: int = 0) -> None:
        self._path, self._shift = path, shift
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path} cannot be read as a packed array: {error}. Make it again with "
                            "`rnode-cli data prepare`.") from error  # fmt: skip
        if not isinstance(array, np.ndarray):
            raise DataError(f"{path} is an archive of arrays (.npz), not one array.")
        if array.dtype != np.uint8:
            raise DataError(f"{path} holds {array.dtype}; packed images are uint8 with values 0 to 255.")
        if array.ndim != 4 or array.shape[1] not in (1, 3) or 0 in array.shape:
            raise DataError(f"{path} has the shape {array.shape}; packed images are (N, C, H, W), channels first, "
                            "with 1 or 3 of them.")  # fmt: skip
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


class PackedWriter:
    """Writes one packed file image by image; it appears under its name only when it is complete.

    As a context manager it removes what it has written unless :meth:`publish` was called.

    Args:
        path: the file to make. Until then the data is in a hidden file beside it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        self._file = open(self._draft, "xb")  # noqa: SIM115 - closed by __exit__
        self._file.write(bytes(_HEADER_BYTES))
        self._image_shape: tuple[int, ...] = ()
        self.count = 0

    def append(self, images: np.ndarray) -> None:
        """Add images ``(n, C, H, W)``, uint8, all of the shape of the first."""
        self._image_shape = images.shape[1:]
        self._file.write(np.ascontiguousarray(images).data)
        self.count += len(images)

    def finish(self) -> None:
        """Write the header, which tells the number of images, and bring everything to the disk."""
        # version 1.0 of NumPy's format by hand: only a header of known length can be written after the data
        shape = (self.count, *self._image_shape)
        text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
        start = b"\x93NUMPY\x01\x00" + (_HEADER_BYTES - 10).to_bytes(2, "little")
        self._file.seek(0)
        self._file.write(start + text.encode().ljust(_HEADER_BYTES - 11) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def publish(self) -> None:
        """Give the finished file its name, in one step."""
        os.replace(self._draft, self._path)
        if os.name == "posix":  # the name itself is on the disk once the folder is
            folder = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def __enter__(self) -> PackedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._draft.unlink(missing_ok=True)
