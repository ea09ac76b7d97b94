"""Data sets that are published with a split: digits of scikit-learn, MNIST, Fashion-MNIST, CIFAR10 and SVHN.

torchvision has the addresses and checksums, and downloads. Arguments, result and errors are those of
:func:`~rnode_plugin.data.get_dataset`.
"""

from __future__ import annotations

import os
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from ..errors import DataError
from .folders import DEFAULT_ROOT, only_size
from .images import ImageData, shuffled

_HELD_OUT_DIGITS = 297
_LOCK = ".download.lock"
_WAIT_SECONDS = 3600.0  # for another process that downloads


def digits(*, root: str | None = None, size: int | None = None) -> ImageData:
    """1,797 handwritten digits, 1x8x8, 17 grey levels, 297 held out; they come with scikit-learn."""
    from sklearn.datasets import load_digits

    only_size(size, 8, "digits")
    pixels, labels = load_digits(return_X_y=True)
    images = np.asarray(pixels, dtype=np.uint8).reshape(-1, 1, 8, 8)
    # evenly spaced in a random order sorted by class: each digit is held out in proportion
    order = shuffled(len(images))
    order = order[np.argsort(np.asarray(labels)[order], kind="stable")]
    held_out = np.zeros(len(images), dtype=bool)
    held_out[order[np.arange(_HELD_OUT_DIGITS) * len(images) // _HELD_OUT_DIGITS]] = True
    return ImageData(name="digits", train=images[~held_out], val=images[held_out], shape=(1, 8, 8), levels=17)


def mnist(*, root: str | None = None, download: bool = False, size: int | None = None) -> ImageData:
    """70,000 handwritten digits, 1x28x28; 10,000 of them held out."""
    return _idx_set("mnist", "MNIST", root, download, size)


def fashion_mnist(*, root: str | None = None, download: bool = False, size: int | None = None) -> ImageData:
    """70,000 clothes, 1x28x28; 10,000 of them held out."""
    return _idx_set("fashion-mnist", "FashionMNIST", root, download, size)


def cifar10(*, root: str | None = None, download: bool = False, size: int | None = None) -> ImageData:
    """60,000 photographs, 3x32x32; 10,000 of them held out."""
    from torchvision.datasets import CIFAR10

    def read(base: Path, part: str, download: bool) -> np.ndarray:
        return CIFAR10(str(base), train=part == "train", download=download).data.transpose(0, 3, 1, 2)

    source = _Published("cifar10", (3, 32, 32), "", "cifar-10-batches-py", "cifar-10-python.tar.gz", CIFAR10.url)
    return _load(source, read, root, download, size)


def svhn(*, root: str | None = None, download: bool = False, size: int | None = None) -> ImageData:
    """99,289 house numbers from street views, 3x32x32; 26,032 of them held out."""
    from torchvision.datasets import SVHN

    def read(base: Path, part: str, download: bool) -> np.ndarray:
        return SVHN(str(base), split="train" if part == "train" else "test", download=download).data

    address = "http://ufldl.stanford.edu/housenumbers"
    source = _Published("svhn", (3, 32, 32), "", "train_32x32.mat", "train_32x32.mat and test_32x32.mat", address)
    return _load(source, read, root, download, size)


def _idx_set(name: str, class_name: str, root: str | None, download: bool, size: int | None) -> ImageData:
    """MNIST and Fashion-MNIST, which has MNIST's format."""
    import torchvision.datasets
    from torchvision.datasets.mnist import read_image_file

    published = getattr(torchvision.datasets, class_name)

    def read(base: Path, part: str, download: bool) -> np.ndarray:
        file = base / class_name / "raw" / f"{'train' if part == 'train' else 't10k'}-images-idx3-ubyte"
        if download:
            file.unlink(missing_ok=True)  # torchvision keeps a file that was half unpacked
            published(str(base), download=True)
        images = read_image_file(str(file)).numpy()[:, None]
        if file.stat().st_size != images.size + 16:  # torchvision ignores bytes after the images
            raise ValueError("the file does not have the size that its header gives")
        return images

    files = ", ".join(
        f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    )
    source = _Published(
        name, (1, 28, 28), f"{class_name}/raw", "train-images-idx3-ubyte", files, published.mirrors[0]
    )
    return _load(source, read, root, download, size)


class _Published(NamedTuple):
    """A data set that torchvision reads.

    Attributes:
        folder: below the root, where its files lie.
        marker: name of one of the files or folders there once the set is unpacked.
        files: names of the files as they are published, for messages.
        address: where they are published.
    """

    name: str
    shape: tuple[int, int, int]
    folder: str
    marker: str
    files: str
    address: str


def _load(
    source: _Published,
    read: Callable[[Path, str, bool], np.ndarray],
    root: str | None,
    download: bool,
    size: int | None,
) -> ImageData:
    """The data set whose parts ``read(root, part, download)`` gives. It is fetched only if it cannot be read."""
    only_size(size, source.shape[1], source.name)
    base = Path(root) if root is not None else DEFAULT_ROOT
    place = base / source.folder

    def found(download: bool) -> ImageData:
        train, val = (np.ascontiguousarray(read(base, part, download)) for part in ("train", "val"))
        return ImageData(name=source.name, train=train, val=val, shape=source.shape)

    try:
        return found(False)
    except Exception as error:  # missing, or damaged: then the reader raises anything
        if not download:
            state = "is damaged" if (place / source.marker).exists() else "is not there"
            raise DataError(
                f"the data set {source.name} {state}, in the folder {place}. Leave out --no-download to fetch it "
                "(in Python: download=True); --data-root names another folder."
            ) from error
    try:
        return found(True)
    except Exception as error:
        cause = "its server cannot be reached, or did not send the published files"
        if isinstance(error, OSError) and not isinstance(error, urllib.error.URLError) and error.filename:
            cause = f"the folder cannot be written ({(error.strerror or '').lower()})"
        raise DataError(
            f"the data set {source.name} is not there, and downloading it failed: {cause}. Put {source.files} from "
            f"{source.address} into the folder {place} and run this again, which then needs no network. "
            "--data-root names another folder."
        ) from error


@contextmanager
def one_download(root: str | os.PathLike[str] | None) -> Iterator[Path]:
    """Let one process after the other into the folder of the data sets: the first downloads, the others find.

    Args:
        root: the folder; None for ``data`` in the working directory. It is made.

    Yields:
        the folder.

    Raises:
        DataError: the folder cannot be written, or another process holds it for an hour.
    """
    folder = Path(root) if root is not None else DEFAULT_ROOT
    lock = FileLock(folder.resolve() / _LOCK, is_singleton=True)  # a plugin's data set may call one of ours
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _LOCK).touch()  # FileLock would wait for ever where no file can be made
        lock.acquire(timeout=_WAIT_SECONDS)
    except NotImplementedError:  # a file system without locks
        pass
    except Timeout as error:
        raise DataError(
            f"another process has been downloading to {folder} for an hour. Try again later."
        ) from error
    except OSError as error:
        cause = (error.strerror or "it cannot be written").lower()
        raise DataError(
            f"nothing can be downloaded to {folder}: {cause}. --data-root names another folder."
        ) from error
    try:
        yield folder
    finally:
        lock.release()
