"""Data sets by name: scikit-learn's and torchvision's, downloaded once and by one process."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib.abc
import io
import pickle
import re
import subprocess
import sys
import tarfile
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import scipy.io
import torchvision.datasets
from image_files import random_images, real_data
from problems import refuses
from tiny_runs import as_options, rnode

from rnode_plugin.errors import ConfigError, DataError
from rnode_plugin.experiments.data import ImageData, Table, catalog, get_dataset, one_download, sets


def test_digits_are_the_real_ones_with_a_fixed_split():
    from sklearn.datasets import load_digits

    data = get_dataset("digits")
    assert data.train.shape == (1500, 1, 8, 8)
    assert data.val.shape == (297, 1, 8, 8)
    assert (data.levels, data.shape) == (17, (1, 8, 8))
    assert data.train.dtype == np.uint8
    assert data.train[:].max() == 16
    # together they are all images, each once
    published: Any = load_digits()
    original = published.images.astype(np.uint8).reshape(1797, 64)
    split = np.concatenate([data.train[:], data.val[:]]).reshape(1797, 64)
    assert np.array_equal(np.sort(split.view("V64"), axis=0), np.sort(original.view("V64"), axis=0))
    # each class in proportion
    labels = published.target
    where = {row.tobytes(): label for row, label in zip(original, labels, strict=True)}
    held_out = np.bincount([where[row.tobytes()] for row in data.val[:].reshape(297, 64)], minlength=10)
    assert np.abs(held_out - np.bincount(labels) * 297 / 1797).max() <= 1
    # the split itself, so that a change of it cannot go unnoticed
    assert zlib.crc32(data.val[:].tobytes()) == 2049749810
    assert np.array_equal(get_dataset("digits").val[:], data.val[:])


def test_mnist_is_read_from_the_real_files():
    data = get_dataset("mnist", root=str(real_data("MNIST").parent))
    assert data.train.shape == (60000, 1, 28, 28)
    assert data.val.shape == (10000, 1, 28, 28)
    assert (data.levels, data.shape) == (256, (1, 28, 28))
    # the first image of the raw file, past its header of 16 bytes
    raw = (real_data("MNIST") / "raw" / "train-images-idx3-ubyte").read_bytes()
    assert data.train[0].tobytes() == raw[16 : 16 + 784]


# published sets, in the form in which their publishers offer them -----------------------------------------------


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def idx_images(images: np.ndarray) -> bytes:
    """Grey images (N, 1, H, W) as an IDX file."""
    sizes = np.array([len(images), *images.shape[2:]], dtype=">i4").tobytes()
    return bytes([0, 0, 8, 3]) + sizes + images.tobytes()


def mnist_files(train: np.ndarray, val: np.ndarray) -> dict[str, bytes]:
    """MNIST as its publisher has it: four gzipped IDX files by name."""
    files = {}
    for part, images in (("train", train), ("t10k", val)):
        files[f"{part}-images-idx3-ubyte.gz"] = gzip.compress(idx_images(images), mtime=0)
        labels = np.array([len(images)], dtype=">i4").tobytes() + bytes(len(images))
        files[f"{part}-labels-idx1-ubyte.gz"] = gzip.compress(bytes([0, 0, 8, 1]) + labels, mtime=0)
    return files


def cifar10_archive(train: np.ndarray, val: np.ndarray) -> tuple[bytes, dict[str, bytes]]:
    """``cifar-10-python.tar.gz`` and its members by name: five training batches, one for testing, labels."""

    def batch(images: np.ndarray, name: str) -> bytes:
        fields = {"batch_label": name, "labels": [0] * len(images), "data": images.reshape(len(images), -1)}
        return pickle.dumps(fields, protocol=2)

    parts = np.array_split(train, 5)
    members = {f"data_batch_{i}": batch(part, f"training batch {i} of 5") for i, part in enumerate(parts, 1)}
    members["test_batch"] = batch(val, "testing batch 1 of 1")
    members["batches.meta"] = pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}, protocol=2)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in {**members, "readme.html": b"<html>"}.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue(), members


def svhn_files(train: np.ndarray, val: np.ndarray) -> dict[str, bytes]:
    """Two MATLAB files, in which the images have the order (H, W, C, N)."""
    files = {}
    for part, images in (("train", train), ("test", val)):
        file = io.BytesIO()
        labels = np.ones((len(images), 1), np.uint8)
        scipy.io.savemat(file, {"X": images.transpose(2, 3, 1, 0), "y": labels}, do_compression=True)
        files[f"{part}_32x32.mat"] = file.getvalue()
    return files


def publish(monkeypatch: pytest.MonkeyPatch, name: str, train: np.ndarray, val: np.ndarray, url: str) -> dict:
    """Make these images the published ones, at ``url``: torchvision's checksums and addresses are theirs from here.

    Returns:
        what the publisher sends, by name.
    """

    def put(owner: Any, **values: Any) -> None:
        for key, value in values.items():
            monkeypatch.setattr(owner, key, value)

    if name in ("mnist", "fashion-mnist"):
        files = mnist_files(train, val)
        cls = torchvision.datasets.MNIST if name == "mnist" else torchvision.datasets.FashionMNIST
        put(cls, mirrors=[url], resources=[(name, md5(content)) for name, content in files.items()])
        return files
    if name == "svhn":
        files = svhn_files(train, val)
        entries = [[url + name, name, md5(content)] for name, content in files.items()]
        put(torchvision.datasets.SVHN, split_list=dict(zip(("train", "test"), entries, strict=True)))
        return files
    archive, members = cifar10_archive(train, val)
    sums = [[name, md5(content)] for name, content in members.items()]
    cls = torchvision.datasets.CIFAR10
    put(cls, url=url + cls.filename, tgz_md5=md5(archive), train_list=sums[:5], test_list=sums[5:6])
    put(cls, meta={**cls.meta, "md5": sums[6][1]})
    return {cls.filename: archive}


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[tuple[str, Counter[str]]]:
    """A server of these files: its address, which ends in ``/``, and how often each file was asked for."""
    asked = Counter[str]()

    class Publisher(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked[name := self.path.strip("/")] += 1
            if name not in files:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(files[name])))
            self.end_headers()
            self.wfile.write(files[name])

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Publisher)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", asked
    finally:
        server.shutdown()
        server.server_close()


def sample_images(name: str) -> tuple[np.ndarray, np.ndarray]:
    shape = (1, 28, 28) if name in ("mnist", "fashion-mnist") else (3, 32, 32)
    return random_images(15, shape, 1), random_images(4, shape, 2)


FILES = {
    "mnist": ["MNIST/raw/t10k-images-idx3-ubyte", "MNIST/raw/train-images-idx3-ubyte"],
    "fashion-mnist": ["FashionMNIST/raw/t10k-images-idx3-ubyte", "FashionMNIST/raw/train-images-idx3-ubyte"],
    "cifar10": [
        "cifar-10-batches-py/batches.meta",
        *(f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)),
        "cifar-10-batches-py/test_batch",
    ],
    "svhn": ["test_32x32.mat", "train_32x32.mat"],
}


@pytest.fixture(params=sorted(FILES))
def published(request, monkeypatch):
    """``(name, what its publisher sends, address, how often each was asked for)`` of each published data set."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    files: dict[str, bytes] = {}
    with serve(files) as (url, asked):
        files |= publish(monkeypatch, request.param, *sample_images(request.param), url)
        yield request.param, files, url, asked


def assert_right(name: str, data: ImageData) -> None:
    train, val = sample_images(name)
    assert np.array_equal(data.train[:], train)
    assert np.array_equal(data.val[:], val)
    assert (data.name, data.shape, data.levels) == (name, train.shape[1:], 256)


def test_a_published_set_is_downloaded_once_and_whole(published, tmp_path, monkeypatch):
    name, files, _, asked = published
    root = tmp_path / "new" / "data"
    with pytest.raises(
        DataError, match=rf"{name} is missing or damaged in the folder .*--no-download.*--data-root"
    ) as caught:
        get_dataset(name, root=str(root))
    assert str(caught.value).count(str(tmp_path)) == 1
    assert not asked
    assert list(tmp_path.iterdir()) == []
    assert_right(name, get_dataset(name, root=str(root), download=True))
    assert all((root / file).is_file() for file in FILES[name])
    assert set(asked) == set(files)
    before = dict(asked)
    monkeypatch.setattr(catalog, "one_download", None)  # what is there needs no lock, as on a read-only disk
    assert_right(name, get_dataset(name, root=str(root), download=True))
    assert_right(name, get_dataset(name, root=str(root)))
    assert asked == before


def test_archives_put_there_by_hand_need_no_network(published, tmp_path):
    name, files, _, asked = published
    folder = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw"}.get(name, "")
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (tmp_path / folder / file).write_bytes(content)
    assert_right(name, get_dataset(name, root=str(tmp_path), download=True))
    assert not asked


def test_a_damaged_file_is_refused_and_fetched_again(published, tmp_path):
    name, *_ = published
    get_dataset(name, root=str(tmp_path), download=True)
    file = tmp_path / FILES[name][1]
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with refuses(DataError, name):
        get_dataset(name, root=str(tmp_path))
    assert_right(name, get_dataset(name, root=str(tmp_path), download=True))
    assert file.read_bytes() == whole


def test_what_is_sent_must_be_the_published_file(published, tmp_path):
    name, files, *_ = published
    first = next(file for file in files if "labels" not in file)
    whole = files[first]
    files[first] = b"<html>Please log in</html>"
    with refuses(DataError, name):
        get_dataset(name, root=str(tmp_path / "data"), download=True)
    files[first] = whole
    assert_right(name, get_dataset(name, root=str(tmp_path / "data"), download=True))


@pytest.mark.parametrize(("name", "file", "folder"), [
    ("mnist", "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k", "MNIST/raw"),
    ("fashion-mnist", "train-images-idx3-ubyte.gz", "FashionMNIST/raw"),
    ("cifar10", "cifar-10-python.tar.gz", ""), ("svhn", "train_32x32.mat and test_32x32.mat", ""),
])  # fmt: skip
def test_without_a_network_it_names_the_files(name, file, folder, tmp_path, monkeypatch):
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(DataError) as caught:
        get_dataset(name, root=str(tmp_path), download=True)
    message = str(caught.value)
    place = tmp_path / folder
    assert f"Put {file}" in message
    assert f"into the folder {place} and run this again" in message
    assert message.count(str(tmp_path)) == 1
    assert not re.search(r"urlopen|Errno|refused|Tried", message)


@pytest.mark.parametrize("download", [True, False])
def test_a_torchvision_that_is_broken_is_no_missing_server(tmp_path, monkeypatch, download):
    class Broken(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name.partition(".")[0] == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist")

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with refuses(ConfigError, "torchvision::nms"):
        get_dataset("mnist", root=str(tmp_path), download=download)


def _data(**changes) -> ImageData:
    images = np.zeros((10, 1, 4, 4), np.uint8)
    return ImageData(**{"name": "x", "train": images, "val": images, "shape": (1, 4, 4), "levels": 17, **changes})


def test_a_shape_that_is_no_tuple_equals_that_of_a_recipe():
    assert _data(shape=[1, 4, 4]).shape == (1, 4, 4)


def test_limit_draws_the_same_images_from_the_whole_set():
    images = np.repeat(np.arange(200, dtype=np.uint8), 16).reshape(200, 1, 4, 4)
    data = _data(train=images, val=images, levels=256)
    few, more = data.limit(train=20), data.limit(train=60, val=5)
    assert few.train.shape == (20, 1, 4, 4)
    assert few.val is data.val
    assert more.val.shape == (5, 1, 4, 4)
    chosen, larger = few.train[:][:, 0, 0, 0], more.train[:][:, 0, 0, 0]
    assert len(set(chosen)) == 20
    assert set(chosen) < set(larger)
    assert chosen.min() < 60 < 140 < chosen.max()  # not only one end of a set sorted by class
    assert data.limit(train=1000).train is images
    with refuses(ConfigError, "1"):
        data.limit(train=0)


def test_held_out_samples_are_drawn_from_all_of_them():
    """Also rows, which a published table may have in an order, such as the one of their times."""
    rows = np.linspace(0, 1, 200)[:, None]
    table = Table("t", ("a",), rows, rows, rows)
    few, numbered = (
        table.limit(held_out=20),
        dataclasses.replace(table, numbers=np.arange(1, 201)).limit(held_out=20),
    )
    assert len(few.held_out) == 20
    assert few.held_out.min() < 0.3 < 0.7 < few.held_out.max()
    assert (few.identity, few.numbers) == (table.identity, None)
    assert numbered.numbers is not None
    np.testing.assert_array_equal(rows[numbered.numbers - 1], few.held_out)
    assert table.limit().held_out is table.limit(held_out=200).held_out is rows
    images = np.arange(200, dtype=np.uint8).repeat(16).reshape(200, 1, 4, 4)
    some = _data(train=images, val=images, levels=256).limit(held_out=60)
    np.testing.assert_array_equal(images[some.numbers], some.val[:])
    fewer = some.limit(held_out=20)
    np.testing.assert_array_equal(images[fewer.numbers], fewer.val[:])


# one process downloads


def test_a_process_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = (
        "import sys\nfrom filelock import FileLock\n"
        "with FileLock(sys.argv[1]):\n    print('holds', flush=True)\n    input()"
    )
    lock = str(tmp_path / ".download.lock")
    holder = subprocess.Popen(
        [sys.executable, "-c", code, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holds\n"
        monkeypatch.setattr(sets, "_WAIT_SECONDS", 0.2)
        with refuses(DataError, str(tmp_path)), one_download(tmp_path):
            pytest.fail("two hold it")
        assert f"Waiting for another process that downloads to {tmp_path}" in capsys.readouterr().err
    finally:
        holder.kill()
        holder.wait()
    with one_download(tmp_path), one_download(str(tmp_path)):  # free again; and a data set may call another
        pass


def test_a_file_system_without_locks_takes_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets.FileLock, "acquire", Mock(side_effect=NotImplementedError("no locks here")))
    with one_download(tmp_path) as folder:
        assert folder == tmp_path


@pytest.mark.parametrize("place", ["/proc", "FILE/below"])
def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("in the way")
    root = place.replace("FILE", str(tmp_path / "file"))
    with refuses(DataError, "--data-root"):
        get_dataset("mnist", root=root, download=True)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


# ``rnode-cli train cifar10`` as written, from the publisher's archive to the run folder

# the recipe's flow with fewer channels and longer steps, so that two steps take seconds on a CPU
SMALL = [
    "--batch-size", "4", "--set", "training.val_images=4", "--max-steps", "1", "--device", "cpu", "--devices", "1",
    *as_options("model.hidden=8", "model.layers=2", "solver.step=1", "test_solver.method=rk4_38",
                "test_solver.step=1", "training.sample_images=0", "data.val_batch_size=4"),
]  # fmt: skip


def test_the_command_downloads_trains_and_evaluates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    train, val = random_images(25, (3, 32, 32), 1), random_images(6, (3, 32, 32), 2)
    files: dict[str, bytes] = {}
    with serve(files) as (url, asked):
        files |= publish(monkeypatch, "cifar10", train, val, url)
        done = rnode("train", "cifar10", *SMALL)
        assert done.exit_code == 0, done.output
        assert set(asked) == {"cifar-10-python.tar.gz"}
        assert re.search(r"^steps +1 of 1$", done.output, re.MULTILINE), done.output
        assert "25 training and 4 held-out images" in done.output
    # the data lies where torchvision looks for it
    assert (tmp_path / "data" / "cifar-10-batches-py").is_dir()
    data = get_dataset("cifar10")
    assert np.array_equal(data.train[:], train)
    assert np.array_equal(data.val[:], val)
