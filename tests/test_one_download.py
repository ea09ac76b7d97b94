"""Two processes that want the same data set at once: one downloads it, the other waits and finds it."""

from __future__ import annotations

import gzip
import hashlib
import os
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from child_runs import CONTEXT

from rnode_plugin import get_recipe

pytestmark = pytest.mark.ddp

_COUNTS = {"train": 20, "t10k": 10}


def published() -> dict[str, bytes]:
    """A small MNIST as its publisher has it: four gzipped IDX files."""
    files = {}
    draw = np.random.default_rng(0)
    for part, count in _COUNTS.items():
        pixels = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8).tobytes()
        sizes = np.array([count, 28, 28], dtype=">i4").tobytes()
        files[f"{part}-images-idx3-ubyte.gz"] = gzip.compress(bytes([0, 0, 8, 3]) + sizes + pixels)
        labels = np.array([count], dtype=">i4").tobytes() + bytes(count)
        files[f"{part}-labels-idx1-ubyte.gz"] = gzip.compress(bytes([0, 0, 8, 1]) + labels)
    return files


def fetch(root: str, url: str, sums: dict[str, str], barrier: Any, result: str) -> None:
    os.environ["no_proxy"] = "127.0.0.1"
    from torchvision.datasets import MNIST

    from rnode_plugin.evaluation.images import load_images

    MNIST.mirrors, MNIST.resources = [url], list(sums.items())
    recipe = get_recipe("mnist").override([f"data.root={root}"])
    barrier.wait(60)
    data = load_images(recipe, download=True)
    np.savez(result, train=np.asarray(data.train), val=np.asarray(data.val))


def test_one_downloads_and_the_other_waits(tmp_path: Path) -> None:
    files, asked = published(), Counter[str]()

    class Publisher(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.strip("/")
            asked[name] += 1
            time.sleep(0.3)  # so that the other process is there before it is done
            self.send_response(200)
            self.send_header("Content-Length", str(len(files[name])))
            self.end_headers()
            self.wfile.write(files[name])

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Publisher)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sums = {name: hashlib.md5(contents).hexdigest() for name, contents in files.items()}
    url = f"http://127.0.0.1:{server.server_port}/"

    def download(name: str, processes: int) -> Counter[str]:
        """What so many processes ask for that start at once."""
        asked.clear()
        barrier = CONTEXT.Barrier(processes)
        started = [
            CONTEXT.Process(
                target=fetch, args=(str(tmp_path / name), url, sums, barrier, str(tmp_path / f"{name}{i}"))
            )
            for i in range(processes)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(100)
        assert [process.exitcode for process in started] == [0] * processes
        return Counter(asked)

    try:
        by_one = download("one", 1)
        assert set(by_one) == set(files)
        assert download("two", 2) == by_one
    finally:
        server.shutdown()
    one, other = (np.load(tmp_path / f"two{i}.npz") for i in range(2))
    assert (len(one["train"]), len(one["val"])) == (20, 10)
    for part in ("train", "val"):
        assert np.array_equal(one[part], other[part])
