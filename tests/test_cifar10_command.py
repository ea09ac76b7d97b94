"""``rnode-cli train cifar10`` as written, from the publisher's archive to the run folder."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from image_files import random_images, real_data
from PIL import Image
from published_sets import publish, serve

from rnode_plugin.cli import main
from rnode_plugin.data import get_dataset

# the recipe's flow with fewer channels and longer steps, so that two steps take seconds on a CPU
SMALL = [
    "--batch-size", "4", "--limit-val", "4", "--max-steps", "2", "--accelerator", "cpu", "--devices", "1",
    *(part for setting in ("model.hidden=8", "solver.step=1", "test_solver.method=rk4_38", "test_solver.step=1",
                           "training.sample_images=1", "data.val_batch_size=4")
      for part in ("--set", setting)),
]  # fmt: skip


def pictures(part: str, count: int) -> np.ndarray:
    """Photographs of 32x32 pixels, (N, 3, 32, 32); noise if there are none at hand."""
    try:
        source = real_data("cifar10-jpeg.tar")
    except pytest.skip.Exception:
        return random_images(count, (3, 32, 32))
    images: list[np.ndarray] = []
    with tarfile.open(source) as archive:
        for member in archive:
            if member.isfile() and f"/{part}/" in member.name and len(images) < count:
                content = archive.extractfile(member)
                assert content is not None
                images.append(np.asarray(Image.open(io.BytesIO(content.read())).convert("RGB")).transpose(2, 0, 1))
    return np.stack(images)


def test_it_downloads_trains_and_evaluates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    train, val = pictures("train", 25), pictures("test", 6)
    files: dict[str, bytes] = {}
    with serve(files) as (url, asked):
        files |= publish(monkeypatch, "cifar10", train, val, url)
        done = CliRunner().invoke(main, ["train", "cifar10", *SMALL])
        assert done.exit_code == 0, done.output
        assert set(asked) == {"cifar-10-python.tar.gz"}
        assert re.search(r"^steps +2 of 2$", done.output, re.MULTILINE), done.output
        assert "25 training and 6 held-out images" in done.output or "25 training and 4 held-out" in done.output
    # the data lies where torchvision looks for it, and a second run needs no network
    assert (tmp_path / "data" / "cifar-10-batches-py").is_dir()
    data = get_dataset("cifar10")
    assert np.array_equal(data.train[:], train)
    assert np.array_equal(data.val[:], val)
    again = CliRunner().invoke(main, ["train", "cifar10", *SMALL, "--no-download"])
    assert again.exit_code == 0, again.output
    losses = [re.search(r"bits/dim, dirty +(\S+)", each.output) for each in (done, again)]
    assert losses[0] is not None
    assert losses[1] is not None
    assert losses[0][1] == losses[1][1]


@pytest.mark.parametrize("options", [["--no-download"], []])
def test_without_a_network_it_is_one_message(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    with serve({}) as (url, _):
        publish(monkeypatch, "cifar10", random_images(5, (3, 32, 32)), random_images(2, (3, 32, 32)), url)
    done = CliRunner().invoke(main, ["train", "cifar10", *SMALL, *options])  # the server is gone
    output = " ".join(done.output.split())
    assert done.exit_code == 1, output
    assert output.count("Error:") == 1
    assert "--data-root names another folder" in output
    assert ("Connection refused" in output) == (not options)
    assert ("--no-download" in output) == bool(options)
    assert {each.name for each in tmp_path.rglob("*") if each.is_file()} <= {".download.lock"}
