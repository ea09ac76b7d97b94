"""Data sets with a publisher's split: scikit-learn's digits, and those that torchvision reads."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError
from .images import ImageData, shuffled

__all__ = ["DEFAULT_ROOT", "cifar10", "digits", "fashion_mnist", "mnist", "svhn"]

DEFAULT_ROOT = Path("data")

_HELD_OUT_DIGITS = 297
_SILENT_SECONDS = 60.0


def digits(*, root: str | None = None, download: bool = False, size: int | None = None) -> ImageData:
    """1,797 handwritten digits, 1x8x8, 17 grey levels, 297 held out; scikit-learn brings them along."""
    from sklearn.datasets import load_digits

    _only_size(size, 8, "digits")
    pixels, labels = load_digits(return_X_y=True)
    images = np.asarray(pixels, dtype=np.uint8).reshape(-1, 1, 8, 8)
    # evenly spaced in a random order sorted by class: each digit is held out in proportion
    order = shuffled(len(images))
    order = order[np.argsort(np.asarray(labels)[order], kind="stable")]
    held_out = np.zeros(len(images), dtype=bool)
    held_out[order[np.arange(_HELD_OUT_DIGITS) * len(images) // _HELD_OUT_DIGITS]] = True
    return ImageData(name="digits", train=images[~held_out], val=images[held_out], shape=(1, 8, 8), levels=17)


@dataclass(frozen=True)
class _Published:
    """How torchvision calls a data set, and how a user gets it without torchvision's help."""

    class_name: str
    shape: tuple[int, int, int]
    folder: str  # under the root
    files: str
    url: str
    train: dict[str, Any]
    val: dict[str, Any]
    flip: bool = False


_TRAIN, _VAL = {"train": True}, {"train": False}
_IDX_FILES = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte"


def mnist(*, root: str | None = None, download: bool = False, size: int | None = None) -> ImageData:
    """70,000 handwritten digits, 1x28x28; 10,000 of them held out."""
    url = "https://ossci-datasets.s3.amazonaws.com/mnist/"
    published = _Published("MNIST", (1, 28, 28), "MNIST/raw", _IDX_FILES, url, _TRAIN, _VAL)
    return _load("mnist", published, root, download, size)


def fashion_mnist(*, root: str | None = None, download: bool = False, size: int | None = None) -> ImageData:
    """70,000 pieces of clothing, 1x28x28; 10,000 of them held out."""
    url = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
    published = _Published("FashionMNIST", (1, 28, 28), "FashionMNIST/raw", _IDX_FILES, url, _TRAIN, _VAL)
    return _load("fashion-mnist", published, root, download, size)


def cifar10(*, root: str | None = None, download: bool = False, size: int | None = None) -> ImageData:
    """60,000 photographs, 3x32x32; 10,000 of them held out."""
    url = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    files = "data_batch_1 to data_batch_5, test_batch and batches.meta"
    published = _Published("CIFAR10", (3, 32, 32), "cifar-10-batches-py", files, url, _TRAIN, _VAL, flip=True)
    return _load("cifar10", published, root, download, size)


def svhn(*, root: str | None = None, download: bool = False, size: int | None = None) -> ImageData:
    """99,289 house numbers from street views, 3x32x32; 26,032 of them held out."""
    url = "http://ufldl.stanford.edu/housenumbers/"
    files = "train_32x32.mat and test_32x32.mat"
    published = _Published("SVHN", (3, 32, 32), "", files, url, {"split": "train"}, {"split": "test"})
    return _load("svhn", published, root, download, size)


def _load(name: str, published: _Published, root: str | None, download: bool, size: int | None) -> ImageData:
    import torchvision.datasets

    _only_size(size, published.shape[1], name)
    base = Path(root) if root is not None else DEFAULT_ROOT
    cls = getattr(torchvision.datasets, published.class_name)
    folder = base / published.folder
    try:
        with _no_endless_download():
            parts = [cls(root=str(base), download=download, **which) for which in (published.train, published.val)]
    # whatever a reader meets in a damaged file, and a download in the network: there is no closed list of it
    except Exception as error:
        get = f"put {published.files} from {published.url} into {folder}"
        if download:
            raise DataError(
                f"{name}: the download to {base} failed: {_line(error)}. Try again, or {get} by hand."
            ) from error
        raise DataError(
            f"{name} cannot be read from {base}: {_line(error)}. Pass --download to fetch it, or {get}; "
            "--data-root names another folder."
        ) from error
    train, val = (_channels_first(part.data, published.shape, name, folder) for part in parts)
    return ImageData(name=name, train=train, val=val, shape=published.shape, flip=published.flip)


def _channels_first(data: Any, shape: tuple[int, int, int], name: str, folder: Path) -> np.ndarray:
    """``(N, H, W)``, ``(N, H, W, C)`` or ``(N, C, H, W)``, as the class of torchvision has it, to the last one."""
    images = np.asarray(data)
    channels, height, width = shape
    if images.shape[1:] == (height, width) and channels == 1:
        images = images[:, None]
    elif images.shape[1:] == (height, width, channels):
        images = images.transpose(0, 3, 1, 2)
    elif images.shape[1:] != shape:
        raise DataError(f"{name}: the files in {folder} hold images of shape {images.shape[1:]}, not {shape}.")
    return np.ascontiguousarray(images)


def _only_size(size: int | None, native: int, name: str) -> None:
    if size not in (None, native):
        raise ConfigError(f"{name} comes in {native}x{native} pixels only, not {size}x{size}.")


def _line(error: Exception) -> str:
    """The first sentence of an error, since torchvision's next tells of its own arguments; its type if silent."""
    return str(error).strip().split("\n")[0].split(". ")[0].rstrip(".") or type(error).__name__


@contextmanager
def _no_endless_download() -> Iterator[None]:
    """Let a connection that has gone silent end in an error; torchvision sets no limit itself."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SILENT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
