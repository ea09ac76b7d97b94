"""Folders to pack, and what must come of them."""

from __future__ import annotations

import io

import numpy as np
from image_files import picture_bytes, random_images

from rnode_plugin.data import pack

__all__ = [
    "SHAPE",
    "assert_nothing",
    "assert_packed",
    "npz_batch",
    "prepare",
    "split_pictures",
    "write_files",
]

SHAPE = (3, 8, 8)


def prepare(*sources, target, **options):
    return pack(sources, target, **options)


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def split_pictures(n_train=6, n_val=3):
    """Files by name in a folder, and the images."""
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
