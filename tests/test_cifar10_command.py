"""``rnode-cli train cifar10`` as written, from the publisher's archive to the run folder."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from image_files import random_images
from published_sets import publish, serve
from tiny_runs import as_options, rnode

from rnode_plugin.data import get_dataset

# the recipe's flow with fewer channels and longer steps, so that two steps take seconds on a CPU
SMALL = [
    "--batch-size", "4", "--limit-val", "4", "--max-steps", "2", "--device", "cpu", "--devices", "1",
    *as_options("model.hidden=8", "solver.step=1", "test_solver.method=rk4_38", "test_solver.step=1",
                "training.sample_images=1", "data.val_batch_size=4"),
]  # fmt: skip


def test_it_downloads_trains_and_evaluates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    train, val = random_images(25, (3, 32, 32), 1), random_images(6, (3, 32, 32), 2)
    files: dict[str, bytes] = {}
    with serve(files) as (url, asked):
        files |= publish(monkeypatch, "cifar10", train, val, url)
        done = rnode("train", "cifar10", *SMALL)
        assert done.exit_code == 0, done.output
        assert set(asked) == {"cifar-10-python.tar.gz"}
        assert re.search(r"^steps +2 of 2$", done.output, re.MULTILINE), done.output
        assert "25 training and 6 held-out images" in done.output or "25 training and 4 held-out" in done.output
    # the data lies where torchvision looks for it, and a second run needs no network
    assert (tmp_path / "data" / "cifar-10-batches-py").is_dir()
    data = get_dataset("cifar10")
    assert np.array_equal(data.train[:], train)
    assert np.array_equal(data.val[:], val)
    again = rnode("train", "cifar10", *SMALL, "--no-download")
    assert again.exit_code == 0, again.output
    losses = [re.search(r"bits/dim, dirty +(\S+)", each.output) for each in (done, again)]
    assert losses[0] is not None
    assert losses[1] is not None
    assert losses[0][1] == losses[1][1]
