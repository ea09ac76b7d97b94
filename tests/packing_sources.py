"""Archives to pack, and what must come of them."""

from __future__ import annotations

import io
import tarfile
import zipfile
from typing import Any

import numpy as np
from image_files import picture_bytes, random_images

from rnode_plugin.data import pack, plan_packing

__all__ = [
    "SHAPE",
    "assert_nothing",
    "assert_packed",
    "npz_batch",
    "prepare",
    "split_pictures",
    "write_tar",
    "write_zip",
]

SHAPE = (3, 8, 8)


def prepare(*sources, target, val_fraction=0.1, **options):
    return pack(plan_packing(sources, val_fraction=val_fraction), target, **options)


def write_tar(path, files, mode: Any = "w"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def write_zip(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def split_pictures(n_train=6, n_val=3):
    """Files by name as an archive has them, and the images."""
    train, val = random_images(n_train, SHAPE, 1), random_images(n_val, SHAPE, 2)
    files = {f"set/train/{i}.png": picture_bytes(image) for i, image in enumerate(train)}
    files |= {f"set/val/{i}.png": picture_bytes(image) for i, image in enumerate(val)}
    return files, train, val


def npz_batch(images, *, compressed=False, **arrays):
    file = io.BytesIO()
    save = np.savez_compressed if compressed else np.savez
    save(file, **({"data": images.reshape(len(images), -1), "labels": np.arange(len(images))} | arrays))
    return file.getvalue()


def assert_packed(target, train, val):
    for name, images in (("train", train), ("val", val)):
        packed = np.load(target / f"{name}.npy", allow_pickle=False)
        assert packed.dtype == np.uint8
        assert np.array_equal(packed, images)
    assert sorted(path.name for path in target.iterdir()) == ["train.npy", "val.npy"]


def assert_nothing(target):
    assert not target.exists() or list(target.iterdir()) == []
