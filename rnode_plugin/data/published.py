"""Data sets with a publisher's split: scikit-learn's digits, MNIST, Fashion-MNIST, CIFAR10 and SVHN."""

from __future__ import annotations

import gzip
import os
import shutil
import sys
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError
from .downloads import DEFAULT_ROOT, fetch, has_md5, one_download
from .idx import read_idx_images
from .images import ImageData, shuffled

__all__ = ["cifar10", "digits", "fashion_mnist", "mnist", "svhn"]

_HELD_OUT_DIGITS = 297
_DRAFT = ".download"  # in the data folder while a download runs


def digits(*, root: str | None = None, size: int | None = None) -> ImageData:
    """1,797 handwritten digits, 1x8x8, 17 grey levels, 297 held out; they come with scikit-learn."""
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
class _Download:
    """A file that the publisher offers.

    Attributes:
        urls: where it is, the preferred place first.
        path: where it belongs, relative to the data folder.
        md5: of the file.
        unpack: what makes the data set's files of it, next to it; None if it is one of them itself.
    """

    urls: tuple[str, ...]
    path: str
    md5: str
    unpack: Callable[[Path], None] | None = None


@dataclass(frozen=True)
class _Published:
    """A data set in torchvision's layout.

    Attributes:
        files: the files to read, relative to the data folder, with their checksum if it is known.
        downloads: what is downloaded to get them.
        read: reads the training or the held-out images ``(N, C, H, W)`` from the data folder.
    """

    shape: tuple[int, int, int]
    files: Mapping[str, str | None]
    downloads: tuple[_Download, ...]
    read: Callable[[Path, str], np.ndarray]
    flip: bool = False


def mnist(*, root: str | None = None, download: bool = False, size: int | None = None) -> ImageData:
    """70,000 handwritten digits, 1x28x28; 10,000 of them held out."""
    return _load("mnist", _idx_set("MNIST"), root, download, size)


def fashion_mnist(*, root: str | None = None, download: bool = False, size: int | None = None) -> ImageData:
    """70,000 pieces of clothing, 1x28x28; 10,000 of them held out."""
    return _load("fashion-mnist", _idx_set("FashionMNIST"), root, download, size)


def cifar10(*, root: str | None = None, download: bool = False, size: int | None = None) -> ImageData:
    """60,000 photographs, 3x32x32; 10,000 of them held out."""
    from torchvision.datasets import CIFAR10

    batches = {f"{CIFAR10.base_folder}/{name}": md5 for name, md5 in [*CIFAR10.train_list, *CIFAR10.test_list]}
    batches[f"{CIFAR10.base_folder}/{CIFAR10.meta['filename']}"] = CIFAR10.meta["md5"]
    archive = _Download((CIFAR10.url,), CIFAR10.filename, CIFAR10.tgz_md5, _untar)

    def read(base: Path, part: str) -> np.ndarray:
        return CIFAR10(str(base), train=part == "train").data.transpose(0, 3, 1, 2)

    published = _Published((3, 32, 32), batches, (archive,), read, flip=True)
    return _load("cifar10", published, root, download, size)


def svhn(*, root: str | None = None, download: bool = False, size: int | None = None) -> ImageData:
    """99,289 house numbers from street views, 3x32x32; 26,032 of them held out."""
    from torchvision.datasets import SVHN

    entries = [SVHN.split_list[part] for part in ("train", "test")]
    downloads = tuple(_Download((url,), name, md5) for url, name, md5 in entries)

    def read(base: Path, part: str) -> np.ndarray:
        return SVHN(str(base), split="train" if part == "train" else "test").data

    published = _Published((3, 32, 32), {name: md5 for _, name, md5 in entries}, downloads, read)
    return _load("svhn", published, root, download, size)


def _idx_set(class_name: str) -> _Published:
    """MNIST and what was made in its form; torchvision knows the addresses and the checksums."""
    import torchvision.datasets

    cls: Any = getattr(torchvision.datasets, class_name)
    folder = f"{class_name}/raw"
    downloads = tuple(
        _Download(tuple(f"{mirror}{name}" for mirror in cls.mirrors), f"{folder}/{name}", md5, _gunzip)
        for name, md5 in cls.resources
        if "images" in name
    )

    def read(base: Path, part: str) -> np.ndarray:
        name = "train" if part == "train" else "t10k"
        return read_idx_images(base / folder / f"{name}-images-idx3-ubyte")

    files = {each.path.removesuffix(".gz"): None for each in downloads}
    return _Published((1, 28, 28), files, downloads, read)


def _load(name: str, published: _Published, root: str | None, download: bool, size: int | None) -> ImageData:
    _only_size(size, published.shape[1], name)
    base = Path(root) if root is not None else DEFAULT_ROOT
    archives = [base / each.path for each in published.downloads if each.unpack is not None]
    try:
        return _read(name, published, base)
    except DataError as error:
        if not download and not (archives and all(each.is_file() for each in archives)):
            raise DataError(
                f"{error} Leave out --no-download to fetch it (in Python: download=True), or "
                f"{_by_hand(published, base)}."
            ) from error
    with one_download(base):
        try:
            return _read(name, published, base)  # another process has fetched it in the meantime
        except DataError as error:
            if any((base / file).exists() for file in published.files):
                print(f"{error} Fetching it again.", file=sys.stderr, flush=True)
        try:
            _fetch(name, published, base, download=download)
        except (DataError, OSError, tarfile.TarError, EOFError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise DataError(
                f"{name}: the download to {base} failed: {reason.rstrip('.')}. Try again, or "
                f"{_by_hand(published, base)}."
            ) from error
        return _read(name, published, base)


def _by_hand(published: _Published, base: Path) -> str:
    """How to get the files without this package; it takes the publisher's archives as they are."""
    names = " and ".join(PurePosixPath(each.path).name for each in published.downloads)
    place = published.downloads[0].urls[0].rpartition("/")[0]
    where = (base / published.downloads[0].path).parent
    return f"put {names} from {place} into {where} by hand; --data-root names another folder"


def _read(name: str, published: _Published, base: Path) -> ImageData:
    """The data set from files that are there.

    Raises:
        DataError: one is missing, damaged, or holds other images.
    """
    missing = [file for file in published.files if not (base / file).is_file()]
    if missing:
        raise DataError(f"{name} is not in {base}, which lacks {', '.join(missing)}.")
    try:
        damaged = [base / file for file, md5 in published.files.items() if md5 and not has_md5(base / file, md5)]
        if damaged:
            raise DataError(
                f"{name}: {', '.join(map(str, damaged))} is damaged: its checksum is not the published one."
            )
        train, val = (np.ascontiguousarray(published.read(base, part)) for part in ("train", "val"))
    except OSError as error:
        raise DataError(f"{name} cannot be read from {base}: {error.strerror or error}.") from error
    for images in (train, val):
        if images.shape[1:] != published.shape:
            raise DataError(
                f"{name}: the files in {base} hold images of shape {images.shape[1:]}, not {published.shape}."
            )
    return ImageData(name=name, train=train, val=val, shape=published.shape, flip=published.flip)


def _fetch(name: str, published: _Published, base: Path, *, download: bool) -> None:
    """Download and unpack beside the data, then move every finished file to its place.

    Without ``download``, only archives that lie there are unpacked.
    """
    draft = base / _DRAFT
    shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed; the lock is ours
    try:
        for each in published.downloads:
            target = draft / each.path
            if has_md5(base / each.path, each.md5):  # put there by hand, or by torchvision
                target.parent.mkdir(parents=True, exist_ok=True)
                _link_or_copy(base / each.path, target)
            elif not download:
                raise DataError(f"{base / each.path} is damaged: its checksum is not the published one")
            else:
                fetch(each.urls, target, md5=each.md5, what=name)
            if each.unpack is not None:
                each.unpack(target)
                target.unlink()
        _read(name, published, draft)
        for file in published.files:
            (base / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(draft / file, base / file)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _gunzip(archive: Path) -> None:
    with gzip.open(archive) as source, archive.with_suffix("").open("wb") as target:
        shutil.copyfileobj(source, target, 2**20)


def _untar(archive: Path) -> None:
    with tarfile.open(archive) as source:  # its checksum is the published one
        source.extractall(archive.parent, filter="data")


def _only_size(size: int | None, native: int, name: str) -> None:
    if size not in (None, native):
        raise ConfigError(f"{name} comes in {native}x{native} pixels only, not {size}x{size}.")
