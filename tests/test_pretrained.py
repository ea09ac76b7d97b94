"""The trained MNIST flow that comes with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from problems import refuses
from safetensors import safe_open
from safetensors.torch import load_file

from rnode_plugin import FixedGrid, load_flow
from rnode_plugin.cli import main
from rnode_plugin.errors import CheckpointError
from rnode_plugin.experiments.data.facts import Facts
from rnode_plugin.experiments.recipes.pretrained import PRETRAINED, pretrained_file
from rnode_plugin.experiments.training.checkpoints import checksum, load_with_recipe

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.parametrize("name", PRETRAINED)
def test_weights_are_small_and_carry_their_recipe(name: str) -> None:
    file = pretrained_file(name)
    assert file is not None
    assert file.stat().st_size < 2_000_000
    flow, recipe, facts = load_with_recipe(name)
    assert recipe.data.root is None
    assert facts == Facts(train="0d4e8b667ff04890", held_out="310a79d8170296fe")
    assert facts is not None
    assert facts.before == ()
    assert all(p.dtype is torch.float32 for p in flow.parameters())


@pytest.mark.parametrize("name", PRETRAINED)
def test_a_new_header_leaves_the_tensors(name: str) -> None:
    """.ci/pretrained.py writes the file again when the form of a recipe has changed."""
    file = pretrained_file(name)
    assert file is not None
    with safe_open(str(file), framework="pt") as opened:
        header = json.loads(opened.metadata()["rnode_plugin"])
    assert header["recipe"] == load_with_recipe(name)[1].to_plain(), "the header has the form of today"
    tensors = load_file(file)
    assert checksum(tensors, "") == "b7b82dbb00592d0889a01fa55e068155fcb679496c90ae2efff6b6f2e2db30c9"


def test_it_draws_digits_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "samples.png"
    few = ["-n", "2", "-t", "0.7"]
    done = CliRunner().invoke(main, ["sample", "mnist-pretrained", *few, "--out", str(out)])
    assert done.exit_code == 0, done.output
    pixels = torch.tensor(np.asarray(Image.open(out).convert("L")), dtype=torch.float)
    assert 0.05 < float((pixels > 128).float().mean()) < 0.5  # strokes on a background, not noise


@pytest.mark.skipif(not (DATA / "MNIST").exists(), reason="needs the MNIST data set")
def test_its_facts_are_those_of_the_data_set() -> None:
    _, recipe, facts = load_with_recipe("mnist-pretrained")
    assert Facts.of(recipe.at_root(str(DATA)).load_data()) == facts


@pytest.mark.skipif(not (DATA / "MNIST").exists(), reason="needs the MNIST data set")
def test_it_knows_real_digits() -> None:
    from torchvision.datasets import MNIST

    images = MNIST(DATA, train=False).data[:8, None].float()
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with torch.no_grad():
        flow: Any = load_flow("mnist-pretrained")
        bits = flow.solved_with(solver=FixedGrid(step=0.5)).bits_per_dim((images + noise) / 256)
    assert float(bits.mean()) < 1.4


def test_a_folder_of_that_name_wins_and_other_names_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with refuses(CheckpointError, "mnist-pretrained"):
        load_flow("mnist-pretraind")
    (tmp_path / "mnist-pretrained").mkdir()
    with refuses(CheckpointError, "mnist-pretrained"):
        load_flow("mnist-pretrained")
