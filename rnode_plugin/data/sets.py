"""Data sets that are published with a split: digits of scikit-learn, MNIST, Fashion-MNIST, CIFAR10 and SVHN.

torchvision knows the addresses and checksums, and downloads. Arguments, result and errors are those of
:func:`~rnode_plugin.data.get_dataset`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock

from ..errors import DataError, first_line
from .folders import DEFAULT_ROOT, only_size
from .images import ImageData, naming, shuffled

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

    return _load("cifar10", (3, 32, 32), read, root, download, size)


def svhn(*, root: str | None = None, download: bool = False, size: int | None = None) -> ImageData:
    """99,289 house numbers from street views, 3x32x32; 26,032 of them held out."""
    from torchvision.datasets import SVHN

    def read(base: Path, part: str, download: bool) -> np.ndarray:
        return SVHN(str(base), split="train" if part == "train" else "test", download=download).data

    return _load("svhn", (3, 32, 32), read, root, download, size)


def _idx_set(name: str, class_name: str, root: str | None, download: bool, size: int | None) -> ImageData:
    """MNIST and Fashion-MNIST, which has MNIST's format."""
    import torchvision.datasets
    from torchvision.datasets.mnist import read_image_file

    def read(base: Path, part: str, download: bool) -> np.ndarray:
        file = base / class_name / "raw" / f"{'train' if part == 'train' else 't10k'}-images-idx3-ubyte"
        if download:
            file.unlink(missing_ok=True)  # torchvision keeps a file that was half unpacked
            getattr(torchvision.datasets, class_name)(str(base), download=True)
        images = read_image_file(str(file)).numpy()[:, None]
        if file.stat().st_size != images.size + 16:  # torchvision ignores bytes behind the images
            raise ValueError(f"{file} does not have the size that its header says")
        return images

    return _load(name, (1, 28, 28), read, root, download, size)


def _load(
    name: str,
    shape: tuple[int, int, int],
    read: Callable[[Path, str, bool], np.ndarray],
    root: str | None,
    download: bool,
    size: int | None,
) -> ImageData:
    """The data set whose parts ``read(folder, part, download)`` gives; it is fetched only where it is not read."""
    only_size(size, shape[1], name)
    base = Path(root) if root is not None else DEFAULT_ROOT

    def found(download: bool) -> ImageData:
        train, val = (np.ascontiguousarray(read(base, part, download)) for part in ("train", "val"))
        return ImageData(name=name, train=train, val=val, shape=shape)

    try:
        return found(False)
    except Exception as error:  # missing, or damaged: then the reader raises anything
        if not download:
            raise DataError(
                f"{name} is not in {base}, or is damaged: {first_line(error).rstrip('.')}. Leave out --no-download "
                "to fetch it (in Python: download=True); --data-root names another folder."
            ) from error
    with naming(
        f"the download of {name} to {base} failed: it",
        " Put the files there by hand (--data-root names another folder), or try again.",
    ):
        return found(True)


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
    except OSError as error:
        cause = (error.strerror or str(error)).rstrip(".")  # a Timeout has no `strerror`
        raise DataError(
            f"nothing can be downloaded to {folder}: {cause}. --data-root names another folder."
        ) from error
    try:
        yield folder
    finally:
        lock.release()
