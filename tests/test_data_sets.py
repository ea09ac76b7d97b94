"""Data sets by name: scikit-learn's, torchvision's, a plugin's."""

from __future__ import annotations

import shutil
import socket
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.datasets
from image_files import random_images, real_data

import rnode_plugin
from rnode_plugin.data import ImageData, get_dataset
from rnode_plugin.errors import ConfigError, DataError, PluginError
from rnode_plugin.plugins import registry as plugins


def test_digits_are_the_real_ones_with_a_fixed_split():
    from sklearn.datasets import load_digits

    data = get_dataset("digits")
    assert data.train.shape == (1500, 1, 8, 8)
    assert data.val.shape == (297, 1, 8, 8)
    assert (data.levels, data.shape, data.flip) == (17, (1, 8, 8), False)
    assert data.train.dtype == np.uint8
    assert data.train[:].max() == 16
    # together they are all images, each once
    original = load_digits().images.astype(np.uint8).reshape(1797, 64)
    split = np.concatenate([data.train[:], data.val[:]]).reshape(1797, 64)
    assert np.array_equal(np.sort(split.view("V64"), axis=0), np.sort(original.view("V64"), axis=0))
    # each class in proportion
    labels = load_digits().target
    where = {row.tobytes(): label for row, label in zip(original, labels, strict=True)}
    held_out = np.bincount([where[row.tobytes()] for row in data.val[:].reshape(297, 64)], minlength=10)
    assert np.abs(held_out - np.bincount(labels) * 297 / 1797).max() <= 1
    # the split itself, so that a change of it cannot go unnoticed
    assert zlib.crc32(data.val[:].tobytes()) == 2049749810
    assert np.array_equal(get_dataset("digits").val, data.val)


def test_mnist_is_read_from_the_real_files():
    data = get_dataset("mnist", root=str(real_data("MNIST").parent), size=28)
    assert data.train.shape == (60000, 1, 28, 28)
    assert data.val.shape == (10000, 1, 28, 28)
    assert (data.levels, data.shape, data.flip) == (256, (1, 28, 28), False)
    # the first image of the raw file, past its header of 16 bytes
    raw = (real_data("MNIST") / "raw" / "train-images-idx3-ubyte").read_bytes()
    assert data.train[0].tobytes() == raw[16 : 16 + 784]


def test_damaged_mnist_is_one_message(tmp_path):
    shutil.copytree(real_data("MNIST"), tmp_path / "MNIST")
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.chmod(0o644)
    with open(file, "r+b") as handle:
        handle.truncate(10_000)
    with pytest.raises(DataError, match="mnist cannot be read from"):
        get_dataset("mnist", root=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "folder", "url"),
    [
        ("mnist", "MNIST/raw", "ossci-datasets"),
        ("fashion-mnist", "FashionMNIST/raw", "fashion-mnist.s3-website"),
        ("cifar10", "cifar-10-batches-py", "cs.toronto.edu"),
        ("svhn", "", "ufldl.stanford.edu"),
    ],
)
def test_a_missing_data_set_says_what_from_where_and_to_which_path(name, folder, url, tmp_path):
    with pytest.raises(DataError) as caught:
        get_dataset(name, root=str(tmp_path))
    message = str(caught.value)
    assert message.startswith(f"{name} cannot be read from {tmp_path}")
    assert "--download" in message
    assert url in message
    assert str(tmp_path / folder) in message
    assert "download=True" not in message
    assert list(tmp_path.iterdir()) == []


class _FakePublished:
    """Stands for a class of torchvision, which would need a network; notes how it is called."""

    calls: list[dict]

    def __init__(self, root, download, **which):
        self.calls.append({"root": root, "download": download, "timeout": socket.getdefaulttimeout(), **which})
        self.data = self.parts["train" if which in ({"train": True}, {"split": "train"}) else "val"]


@pytest.mark.parametrize(
    ("name", "class_name", "layout", "shape", "flip"),
    [
        ("mnist", "MNIST", "nhw", (1, 28, 28), False),
        ("fashion-mnist", "FashionMNIST", "nhw", (1, 28, 28), False),
        ("cifar10", "CIFAR10", "nhwc", (3, 32, 32), True),
        ("svhn", "SVHN", "nchw", (3, 32, 32), False),
    ],
)
def test_published_sets_come_out_channels_first(monkeypatch, tmp_path, name, class_name, layout, shape, flip):
    images = {"train": random_images(5, shape, 1), "val": random_images(3, shape, 2)}
    convert = {
        "nhw": lambda a: torch.from_numpy(a[:, 0]),
        "nhwc": lambda a: a.transpose(0, 2, 3, 1),
        "nchw": lambda a: a,
    }[layout]
    fake = type("Fake", (_FakePublished,), {"parts": {k: convert(v) for k, v in images.items()}, "calls": []})
    monkeypatch.setattr(torchvision.datasets, class_name, fake)
    data = get_dataset(name, root=str(tmp_path), download=True)
    assert np.array_equal(data.train, images["train"])
    assert np.array_equal(data.val, images["val"])
    assert (data.name, data.shape, data.levels, data.flip) == (name, shape, 256, flip)
    assert [(c["root"], c["download"]) for c in fake.calls] == [(str(tmp_path), True)] * 2
    assert all(c["timeout"] for c in fake.calls)  # a silent server must not hang a run
    assert socket.getdefaulttimeout() is None


def test_a_failed_download_is_one_message(monkeypatch, tmp_path):
    def unreachable(**options):
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", unreachable)
    with pytest.raises(DataError, match=r"cifar10: the download to .* failed: .*name resolution.*cs\.toronto\.edu"):
        get_dataset("cifar10", root=str(tmp_path), download=True)
    assert socket.getdefaulttimeout() is None


def test_files_of_another_set_are_refused(monkeypatch, tmp_path):
    other = SimpleNamespace(data=np.zeros((4, 16, 16, 3), np.uint8))
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda **options: other)
    with pytest.raises(DataError, match=r"cifar10: the files in .* hold images of shape \(16, 16, 3\)"):
        get_dataset("cifar10", root=str(tmp_path))


@pytest.mark.parametrize("name", ["digits", "mnist", "cifar10", "imagenet64", "celebahq256"])
def test_a_size_that_does_not_exist_is_refused(name, tmp_path):
    with pytest.raises(ConfigError, match="not 20x20"):
        get_dataset(name, root=str(tmp_path), size=20)


def test_unknown_names_and_options_list_the_known_ones():
    with pytest.raises(ConfigError, match="unknown data set 'mnits'; did you mean 'mnist'"):
        get_dataset("mnits")
    with pytest.raises(ConfigError, match=r"'digits': .*'bits'.* It takes: root, download, size"):
        get_dataset("digits", bits=5)


def test_a_plugins_data_set_is_found_and_checked():
    images = random_images(6, (1, 4, 4))

    class Plugin:
        @rnode_plugin.hookimpl
        def rnode_register_datasets(self):
            return {
                "noise": lambda *, root, download, size: ImageData("noise", images[:4], images[4:], (1, 4, 4)),
                "nothing": lambda *, root, download, size: None,
            }

    plugins.register(Plugin(), name="test-data")
    try:
        assert np.array_equal(get_dataset("noise").train, images[:4])
        with pytest.raises(PluginError, match="returned NoneType"):
            get_dataset("nothing")
    finally:
        plugins.unregister("test-data")


def _data(**changes) -> ImageData:
    images = np.zeros((10, 1, 4, 4), np.uint8)
    return ImageData(**{"name": "x", "train": images, "val": images, "shape": (1, 4, 4), "levels": 17, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": np.zeros((10, 1, 4, 4), np.float32)}, "train images are float32; they must be uint8"),
        ({"val": np.zeros((10, 4, 4), np.uint8)}, r"val images have the shape \(10, 4, 4\), not \(N, 1, 4, 4\)"),
        ({"val": np.zeros((10, 1, 4, 5), np.uint8)}, "val images have the shape"),
        ({"train": np.zeros((0, 1, 4, 4), np.uint8)}, "none at all"),
        ({"train": np.full((10, 1, 4, 4), 17, np.uint8)}, "hold the value 17; with 17 levels the largest is 16"),
        ({"levels": 257}, "levels must be 2 to 256"),
        ({"levels": 1}, "levels must be 2 to 256"),
    ],
)
def test_arrays_that_are_no_such_images_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        _data(**changes)


def test_the_largest_level_is_allowed():
    assert _data(train=np.full((10, 1, 4, 4), 16, np.uint8)).levels == 17


def test_limit_draws_the_same_images_from_the_whole_set():
    images = np.repeat(np.arange(200, dtype=np.uint8), 16).reshape(200, 1, 4, 4)
    data = _data(train=images, val=images, levels=256)
    few, more = data.limit(20), data.limit(60, 5)
    assert few.train.shape == (20, 1, 4, 4)
    assert few.val is data.val
    assert more.val.shape == (5, 1, 4, 4)
    chosen, larger = few.train[:, 0, 0, 0], more.train[:, 0, 0, 0]
    assert len(set(chosen)) == 20
    assert set(chosen) < set(larger)
    assert chosen.min() < 60  # not only one end of a set sorted by class
    assert chosen.max() > 140
    assert np.array_equal(data.limit(20).train, few.train)
    assert data.limit(1000).train is images
    with pytest.raises(ConfigError, match="at least 1"):
        data.limit(0)
