"""Data sets that are published with a split: digits of scikit-learn, MNIST, Fashion-MNIST, CIFAR10 and SVHN.

torchvision knows the addresses and checksums, and downloads. Each loader takes its arguments and raises its errors
as :func:`~rnode_plugin.experiments.data.get_dataset` does.
"""

from __future__ import annotations

import os
import sys
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from ...errors import ConfigError, DataError, first_line
from .arrays import shuffled
from .folders import DEFAULT_ROOT
from .images import ImageData

_HELD_OUT_DIGITS = 297
_LOCK = ".download.lock"
_WAIT_SECONDS = 3600.0  # for another process that downloads


def digits(*, root: str | None = None) -> ImageData:
    """1,797 handwritten digits, 1x8x8, 17 gray levels, 297 held out; they come with scikit-learn."""
    from sklearn.datasets import load_digits  # a second, which no other data set needs

    pixels, labels = load_digits(return_X_y=True)
    images = np.asarray(pixels, dtype=np.uint8).reshape(-1, 1, 8, 8)
    # a random order, sorted by class, of which every sixth image or so is held out. Each digit is therefore held
    # out in proportion to its count
    order = shuffled(len(images))
    order = order[np.argsort(np.asarray(labels)[order], kind="stable")]
    held_out = np.zeros(len(images), dtype=bool)
    held_out[order[np.arange(_HELD_OUT_DIGITS) * len(images) // _HELD_OUT_DIGITS]] = True
    return ImageData(name="digits", train=images[~held_out], val=images[held_out], shape=(1, 8, 8), levels=17)


class _Published(NamedTuple):
    """A data set that torchvision reads.

    Attributes:
        cls: the class of torchvision.
        folder: the folder of its files, below the root.
        files: names of the published files and their address, for messages.
    """

    name: str
    cls: str
    shape: tuple[int, int, int]
    folder: str
    files: str


_IDX = ", ".join(f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
_MNIST = f"{_IDX} from https://ossci-datasets.s3.amazonaws.com/mnist"
_FASHION = f"{_IDX} from http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_CIFAR10 = "cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz"
_SVHN = "train_32x32.mat and test_32x32.mat from http://ufldl.stanford.edu/housenumbers"


def mnist(*, root: str | None = None, download: bool = False) -> ImageData:
    """70,000 handwritten digits, 1x28x28; 10,000 of them held out."""
    return _load(_Published("mnist", "MNIST", (1, 28, 28), "MNIST/raw", _MNIST), root, download)


def fashion_mnist(*, root: str | None = None, download: bool = False) -> ImageData:
    """70,000 clothes, 1x28x28; 10,000 of them held out."""
    source = _Published("fashion-mnist", "FashionMNIST", (1, 28, 28), "FashionMNIST/raw", _FASHION)
    return _load(source, root, download)


def cifar10(*, root: str | None = None, download: bool = False) -> ImageData:
    """60,000 photographs, 3x32x32; 10,000 of them held out."""
    return _load(_Published("cifar10", "CIFAR10", (3, 32, 32), "", _CIFAR10), root, download)


def svhn(*, root: str | None = None, download: bool = False) -> ImageData:
    """99,289 house numbers from street views, 3x32x32; 26,032 of them held out."""
    return _load(_Published("svhn", "SVHN", (3, 32, 32), "", _SVHN), root, download)


def _load(source: _Published, root: str | None, download: bool) -> ImageData:
    """Read a published data set, and fetch it only if it cannot be read."""
    base = Path(root) if root is not None else DEFAULT_ROOT
    folder = base / source.folder
    try:
        import torchvision.datasets  # it imports torch  # noqa: F401
    except Exception as error:  # such as a RuntimeError, if it was built for another version of torch
        raise ConfigError(
            f"the data set {source.name} needs torchvision, which cannot be imported: "
            f"{first_line(error).rstrip('.')}. Install the version that belongs to your torch: pip install "
            "--upgrade torch torchvision."
        ) from error
    try:
        return _read(source, base, download=False)
    except Exception as error:  # if it is missing or damaged, torchvision may raise anything
        if not download:
            raise DataError(
                f"the data set {source.name} is missing or damaged in the folder {folder}. Leave out --no-download "
                "to fetch it (in Python: download=True); --data-root names another folder."
            ) from error
    try:
        return _read(source, base, download=True)
    except Exception as error:
        cause = "its server cannot be reached, or did not send the published files"
        if isinstance(error, OSError) and not isinstance(error, urllib.error.URLError) and error.filename:
            cause = f"the folder cannot be written ({(error.strerror or '').lower()})"
        raise DataError(
            f"the data set {source.name} cannot be downloaded: {cause}. Put {source.files} into the folder "
            f"{folder} and run this again, which then needs no network. --data-root names another folder."
        ) from error


def _read(source: _Published, base: Path, *, download: bool) -> ImageData:
    import torchvision.datasets

    # torchvision takes any unpacked file for a complete one, so a process that was killed while it unpacked would
    # leave a file that no later download replaces
    if download and source.cls.endswith("MNIST"):
        for file in (base / source.folder).glob("*-ubyte"):
            file.unlink()
    parts: list[np.ndarray] = []
    for part in ("train", "test"):
        which = {"split": part} if source.cls == "SVHN" else {"train": part == "train"}
        images = np.asarray(getattr(torchvision.datasets, source.cls)(str(base), download=download, **which).data)
        images = images.transpose(0, 3, 1, 2) if source.cls == "CIFAR10" else images.reshape(-1, *source.shape)
        parts.append(np.ascontiguousarray(images))
    return ImageData(name=source.name, train=parts[0], val=parts[1], shape=source.shape)


@contextmanager
def one_download(root: str | os.PathLike[str] | None) -> Iterator[Path]:
    """Let one process at a time into the folder of the data sets, so that only the first one downloads.

    Args:
        root: the folder, which is made if it is missing; None for ``data`` in the working directory.

    Yields:
        The folder.

    Raises:
        DataError: the folder cannot be written, or another process holds it for an hour.
    """
    folder = Path(root) if root is not None else DEFAULT_ROOT
    # one object for each path, so that it can be acquired again: a plugin's data set may load one of ours inside
    lock = FileLock(folder.resolve() / _LOCK, is_singleton=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _LOCK).touch()  # where no file can be made this fails at once, and FileLock would wait for ever
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"Waiting for another process that downloads to {folder}", file=sys.stderr)
            lock.acquire(timeout=_WAIT_SECONDS)
    except NotImplementedError:  # a file system without locks
        pass
    except OSError as error:  # Timeout is one
        cause = "another process has been downloading for an hour" if isinstance(error, Timeout) else error.strerror
        raise DataError(
            f"nothing can be downloaded to {folder}: {(cause or 'it cannot be written').lower()}. "
            "--data-root names another folder."
        ) from error
    try:
        yield folder
    finally:
        lock.release()
