"""Data sets of a user: ``folder``, ``imagenet64`` and ``celebahq256``, as pictures or packed arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import ConfigError, DataError
from .downloads import DEFAULT_ROOT
from .images import ImageArray, ImageData
from .packing.packed import TRAIN_FILE, VAL_FILE, PackedImages
from .packing.pictures import ImageFiles, files_in, is_picture
from .splits import VAL_FRACTION, assign, split_named

__all__ = ["celebahq256", "folder", "imagenet64"]

# pictures that fit are decoded once; more than that are decoded batch by batch, which workers and packing speed up
_IN_MEMORY_BYTES = 2**30


def folder(
    *,
    root: str | None = None,
    size: int | None = None,
    channels: int | None = None,
    bits: int = 8,
    val_fraction: float = VAL_FRACTION,
) -> ImageData:
    """Any folder of pictures (--data-root), or what `data prepare` made of one.

    Args:
        root: the folder. Subfolders for training and for validation (``train`` and ``val`` or ``test``) make the
            split; without them a fixed random ``val_fraction`` is held out. ``train.npy`` and ``val.npy`` come
            before pictures.
        size: height and width that pictures are scaled to; None: all have the same already.
        channels: 3 or 1; None: 3 for pictures, what they have for packed images.
        bits: per value, 1 to 8; 8 bits ``x`` become ``floor(x / 2**(8 - bits))``.

    Raises:
        ConfigError: an option that cannot work.
        DataError: nothing there, or not what it should be.
    """
    if root is None:
        raise ConfigError("the data set 'folder' needs the folder of your pictures: --data-root DIRECTORY.")
    where = Path(root)
    if not where.is_dir():
        raise DataError(
            f"folder: {where} is not a folder; --data-root must name one that holds pictures. An archive goes "
            "through `rnode-cli data prepare` first."
        )
    return _read("folder", where, size=size, channels=channels, bits=bits, val_fraction=val_fraction)


def imagenet64(*, root: str | None = None, size: int | None = None) -> ImageData:
    """ImageNet at 3x64x64, 8 bits: train/ and val/ of pictures, or packed by `data prepare`."""
    return _user_provided(
        "imagenet64",
        root,
        size,
        native=64,
        bits=8,
        flip=False,
        source="Imagenet64_train_part1_npz.zip, Imagenet64_train_part2_npz.zip and Imagenet64_val_npz.zip from "
        "https://image-net.org/download-images (free, after registration)",
        command="rnode-cli data prepare Imagenet64_*_npz.zip {target} --size 64",
    )


def celebahq256(*, root: str | None = None, size: int | None = None) -> ImageData:
    """CelebA-HQ at 3x256x256, 5 bits (when read): train/ and val/ of pictures, or packed by `data prepare`."""
    return _user_provided(
        "celebahq256",
        root,
        size,
        native=256,
        bits=5,
        flip=True,
        source="the 30,000 CelebA-HQ pictures of 256x256 pixels or more (the folder CelebA-HQ-img of "
        "CelebAMask-HQ.zip, celebahq-r08.tfrecords of progressive growing, celeba-tfr.tar of Glow from "
        "https://openaipublic.azureedge.net/glow-demo/data, or parquet files of the Hugging Face Hub)",
        command="rnode-cli data prepare PICTURES_OR_ARCHIVE {target} --size 256",
    )


def _user_provided(
    name: str, root: str | None, size: int | None, *, native: int, bits: int, flip: bool, source: str, command: str
) -> ImageData:
    """A set with a fixed size, in the folder of its name below the root."""
    if size not in (None, native):
        raise ConfigError(f"{name} has {native}x{native} pixels, not {size}x{size}; use the data set 'folder'.")
    where = (Path(root) if root is not None else DEFAULT_ROOT) / name
    if not where.is_dir():
        raise DataError(
            f"{name} is not there: no folder {where}. It cannot be downloaded for you. Get {source}, then run "
            f"`{command.format(target=where)}`, or put pictures into {where / 'train'} and {where / 'val'}."
        )
    return _read(name, where, size=native, channels=3, bits=bits, val_fraction=VAL_FRACTION, flip=flip)


def _read(
    name: str,
    where: Path,
    *,
    size: int | None,
    channels: int | None,
    bits: int,
    val_fraction: float,
    flip: bool = False,
) -> ImageData:
    if not 1 <= bits <= 8:
        raise ConfigError(f"{name}: bits must be 1 to 8, not {bits}.")
    if channels not in (None, 1, 3):
        raise ConfigError(f"{name}: channels must be 1 or 3, not {channels}.")
    if size is not None and size < 1:
        raise ConfigError(f"{name}: the size must be at least 1 pixel, not {size}.")
    packed = [(where / file).exists() for file in (TRAIN_FILE, VAL_FILE)]
    train: ImageArray
    val: ImageArray
    if any(packed):
        if not all(packed):
            raise DataError(f"{name}: {where} holds only one of {TRAIN_FILE} and {VAL_FILE}; make both again with "
                            "`rnode-cli data prepare --overwrite`.")  # fmt: skip
        train, val = (PackedImages(where / file, shift=8 - bits) for file in (TRAIN_FILE, VAL_FILE))
        _check_packed(name, where, train.shape, val.shape, size, channels)
    else:
        names = [file for file in files_in(where) if is_picture(file)]
        if not names:
            raise DataError(f"{name}: {where} holds no pictures (png, jpg, webp, ...) and no {TRAIN_FILE}.")
        splits = assign([split_named(n) for n in names], names, val_fraction=val_fraction, where=str(where))
        chosen = ([n for n, s in zip(names, splits, strict=True) if s == part] for part in ("train", "val"))
        train, val = (_pictures(where, part, size, channels or 3, 8 - bits) for part in chosen)
    _, c, h, w = train.shape
    return ImageData(name=name, train=train, val=val, shape=(c, h, w), levels=2**bits, flip=flip)


def _pictures(where: Path, names: Sequence[str], size: int | None, channels: int, shift: int) -> ImageArray:
    files = ImageFiles(where, names, size=size, channels=channels, shift=shift)
    return files[:] if np.prod(files.shape, dtype=np.int64) <= _IN_MEMORY_BYTES else files


def _check_packed(
    name: str,
    where: Path,
    train: tuple[int, ...],
    val: tuple[int, ...],
    size: int | None,
    channels: int | None,
) -> None:
    _, c, h, w = train
    wanted = (channels or c, size or h, size or w)
    for file, shape in ((TRAIN_FILE, train), (VAL_FILE, val)):
        if shape[1:] != wanted:
            raise DataError(
                f"{name}: the images in {where / file} are {'x'.join(map(str, shape[1:]))}, not "
                f"{'x'.join(map(str, wanted))}; pack them again with `rnode-cli data prepare --overwrite`."
            )
