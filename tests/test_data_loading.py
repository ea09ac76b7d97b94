"""Batches: the right images, once each, in one piece."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from image_files import random_images, write_picture
from torch.utils.data import DataLoader

from rnode_plugin.data import ArrayDataset
from rnode_plugin.data.folders import ImageFiles, PackedImages
from rnode_plugin.data.images import Selection, keep_batch
from rnode_plugin.errors import DataError


def loader(images, **options):
    """Batches of images, as a training asks for them."""
    return DataLoader(ArrayDataset(images), collate_fn=keep_batch, **options)


@pytest.fixture(params=["memory", "packed", "files", "selection"])
def stored(request, tmp_path):
    """The same twenty images, wherever they lie, and as they should come out."""
    images = random_images(20, (3, 4, 4))
    if request.param == "memory":
        return images, images
    if request.param == "files":
        names = [f"{i:02}.png" for i in range(20)]
        for name, image in zip(names, images, strict=True):
            write_picture(tmp_path / name, image)
        return ImageFiles(tmp_path, names, size=None, channels=3), images
    np.save(tmp_path / "train.npy", images)
    packed = PackedImages(tmp_path / "train.npy")
    if request.param == "packed":
        return packed, images
    chosen = np.array([1, 4, 5, 9, 17])
    return Selection(packed, chosen), images[chosen]


def test_a_batch_is_a_slice_in_the_order_asked_for(stored):
    images, expected = stored
    dataset = ArrayDataset(images)
    wanted = [3, 0, 4, 0, 2]
    batch = dataset.__getitems__(wanted)
    assert batch.dtype == torch.uint8
    assert torch.equal(batch, torch.from_numpy(expected[wanted]))
    assert torch.equal(dataset[1], torch.from_numpy(expected[1]))
    assert len(dataset) == len(expected)
    batch.zero_()
    assert np.array_equal(images[:], expected), "a batch is a copy"


def test_an_epoch_has_each_image_once_in_a_seeded_order(stored):
    images, expected = stored
    n = len(expected)
    runs = []
    for _ in range(2):
        batches = loader(images, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(7))
        runs.append([torch.cat(list(batches)), torch.cat(list(batches))])
    (first, second), again = runs
    rows = {row.tobytes() for row in expected}
    assert len(rows) == n
    assert [len(b) for b in loader(images, batch_size=4)] == [4] * (n // 4) + ([n % 4] if n % 4 else [])
    assert {row.numpy().tobytes() for row in first} == rows
    assert len(first) == n
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, second)
    assert torch.equal(torch.cat(list(loader(images, batch_size=4))), torch.from_numpy(expected))


def test_workers_open_a_packed_file_themselves(tmp_path):
    import pickle

    images = random_images(12)
    np.save(tmp_path / "train.npy", images)
    packed = PackedImages(tmp_path / "train.npy", shift=3)
    assert len(pickle.dumps(packed)) < 1000
    assert np.array_equal(pickle.loads(pickle.dumps(packed))[:], images >> 3)
    batches = loader(packed, batch_size=5, num_workers=1)
    assert torch.equal(torch.cat(list(batches)), torch.from_numpy(images >> 3))


def test_a_picture_that_breaks_while_training_is_named(tmp_path):
    names = ["a.png", "b.png"]
    for name in names:
        write_picture(tmp_path / name, random_images(1)[0])
    files = ImageFiles(tmp_path, names, size=None, channels=3)
    (tmp_path / "b.png").write_bytes(b"gone")
    with pytest.raises(DataError, match=r"b\.png cannot be read: "):
        ArrayDataset(files).__getitems__([0, 1])
    (tmp_path / "b.png").unlink()
    with pytest.raises(DataError, match=r"b\.png does not exist"):
        files[1:2]
