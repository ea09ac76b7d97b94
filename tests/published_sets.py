"""Small data sets in the form in which their publishers offer them, and a server that sends them."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import scipy.io
import torchvision.datasets

__all__ = ["publish", "serve"]


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
            name = self.path.strip("/")
            asked[name] += 1
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
