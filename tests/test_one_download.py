"""Two processes that want the same data set at once: one downloads it, the other waits and finds it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import random_images
from published_sets import publish, serve
from tiny_runs import CONTEXT

from rnode_plugin.data import get_dataset, one_download, sets
from rnode_plugin.errors import DataError

SHAPE = (1, 28, 28)
IMAGES = random_images(20, SHAPE, 1), random_images(10, SHAPE, 2)


def fetch(root: Path, url: str, barrier: Any, result: Path) -> None:
    publish(None, "mnist", *IMAGES, url)
    barrier.wait(60)
    data = get_dataset("mnist", root=str(root), download=True)
    np.savez(result, train=np.asarray(data.train), val=np.asarray(data.val))


@pytest.mark.ddp
def test_one_downloads_and_the_other_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    files = publish(monkeypatch, "mnist", *IMAGES, "unused")
    # so slow that the other process is there before it is done
    with serve(files, delay=0.3) as (url, asked):
        publish(monkeypatch, "mnist", *IMAGES, url)
        barrier = CONTEXT.Barrier(2)
        child = CONTEXT.Process(target=fetch, args=(tmp_path / "data", url, barrier, tmp_path / "child.npz"))
        child.start()
        fetch(tmp_path / "data", url, barrier, tmp_path / "parent.npz")
        child.join(100)
        assert child.exitcode == 0
        together = Counter(asked)
        get_dataset("mnist", root=str(tmp_path / "alone"), download=True)
        assert asked == together + together
    for name in ("child", "parent"):
        for part, images in zip(("train", "val"), IMAGES, strict=True):
            assert np.array_equal(np.load(tmp_path / f"{name}.npz")[part], images)


def test_a_process_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys, time\nfrom filelock import FileLock\n"
        "with FileLock(sys.argv[1]):\n    print('holds', flush=True)\n    time.sleep(60)"
    )
    lock = str(tmp_path / ".download.lock")
    holder = subprocess.Popen([sys.executable, "-c", code, lock], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holds\n"
        monkeypatch.setattr(sets, "_WAIT_SECONDS", 0.2)
        with pytest.raises(DataError, match="has been downloading for an hour"), one_download(tmp_path):
            pytest.fail("two hold it")
    finally:
        holder.kill()
        holder.wait()
    with one_download(tmp_path), one_download(str(tmp_path)):  # free again; and a data set may call another
        pass


@pytest.mark.parametrize("place", ["/proc", "FILE/below"])
def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("in the way")
    root = place.replace("FILE", str(tmp_path / "file"))
    start = time.monotonic()
    with pytest.raises(DataError, match=r"nothing can be downloaded to .*--data-root names another folder"):
        get_dataset("mnist", root=root, download=True)
    assert time.monotonic() - start < 5
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_what_is_on_a_read_only_disk_needs_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = publish(monkeypatch, "mnist", *IMAGES, "unused")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], capture_output=True).returncode:
        pytest.skip("this test may not mount a file system")
    try:
        (disk / "MNIST" / "raw").mkdir(parents=True)
        for name, content in files.items():
            (disk / "MNIST" / "raw" / name).write_bytes(content)
        get_dataset("mnist", root=str(disk), download=True)  # unpacks what lies there
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        data = get_dataset("mnist", root=str(disk), download=True)
        assert np.array_equal(data.train[:], IMAGES[0])
        with pytest.raises(DataError, match=r"nothing can be downloaded to .*: read-only file system"):
            get_dataset("cifar10", root=str(disk), download=True)
    finally:
        subprocess.run(["umount", disk], check=True)
