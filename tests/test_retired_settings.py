"""Files of earlier versions: their retired settings are read, or refused by name, and all else is as it was.

``golden/pictures`` is a run that the package at commit 43574927 trained for three steps on the pictures of
``write_pictures``: ``train pictures --data-root /data/pictures --device cpu --batch-size 4 --max-steps 3`` with
``training.val_every_steps=3``, ``model.hidden=2``, ``model.layers=2``, ``training.sample_images=0``,
``data.val_batch_size=4``, ``training.save_every=2`` and ``optimizer.warmup=0``.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import rnode, rows

from rnode_plugin import get_recipe
from rnode_plugin.errors import ConfigError
from rnode_plugin.experiments.recipes.recipe import Recipe, read_recipe
from rnode_plugin.experiments.training.checkpoints import load_with_recipe, read_checkpoint

STORED = Path(__file__).parent / "golden" / "pictures"


def write_pictures(folder: Path) -> Path:
    """Twelve training and four held-out pictures of 4x4 pixels."""
    for index in range(16):
        part = folder / ("train" if index < 12 else "val")
        part.mkdir(parents=True, exist_ok=True)
        pixels = (np.arange(48) * (7 * index + 3) % 256).astype(np.uint8)
        Image.fromarray(pixels.reshape(4, 4, 3)).save(part / f"{index}.png")
    return folder


@pytest.fixture
def stored_run(tmp_path: Path) -> Path:
    """The folder of the stored run, whose only validation came after its last step."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(STORED / "recipe.json", run)
    for name in ("last.ckpt", "best.ckpt"):
        shutil.copy(STORED / "last.ckpt", run / "checkpoints" / name)
    return run


RETIRED = {("training", "precision"): ("auto", "32-true"), ("training", "compile"): ("auto", False)}


@pytest.mark.parametrize(("group", "key"), RETIRED)
def test_a_retired_value_is_read_as_what_stands_for_it(group: str, key: str) -> None:
    recipe = get_recipe("digits")
    plain = recipe.to_plain()
    retired, today = RETIRED[group, key]
    plain[group][key] = retired
    assert Recipe.from_plain(plain) == recipe.override([f"{group}.{key}={str(today).lower()}"])
    assert plain[group][key] == retired, "the caller's recipe is untouched"
    with pytest.raises(ConfigError, match=f"{group}.{key}"):
        recipe.override([f"{group}.{key}={retired}"])
    plain[group][key] = "sometimes"
    with pytest.raises(ConfigError, match="sometimes"):
        Recipe.from_plain(plain)


def test_an_earlier_checkpoint_has_the_same_weights(stored_run: Path, tmp_path: Path) -> None:
    assert json.loads((stored_run / "recipe.json").read_text())["training"]["precision"] == "auto"
    assert read_recipe(stored_run / "recipe.json").training.precision == "32-true"
    flow, recipe, _ = load_with_recipe(stored_run / "checkpoints" / "best.ckpt")
    assert (recipe.training.precision, recipe.training.compile) == ("32-true", False)
    kept = read_checkpoint(STORED / "last.ckpt")["state_dict"]
    for name, tensor in flow.state_dict().items():
        assert torch.equal(tensor, kept[f"flow.{name}"]), name
    data = write_pictures(tmp_path / "pictures")
    done = rnode("eval", stored_run, "--data-root", data, "--device", "cpu", "--draws", 2, "--json")
    assert done.exit_code == 0, done.output
    means = json.loads(done.stdout)["means"]
    with (STORED / "images.csv").open() as file:
        scores = list(csv.DictReader(file))
    for name in ("dirty", "clean"):  # equal to the bit on the processor that wrote them
        assert means[name]["samples"] == pytest.approx([float(row[name]) for row in scores], rel=2e-6)


def test_an_earlier_checkpoint_is_resumed(stored_run: Path, tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "pictures")
    options = ["--data-root", data, "--max-steps", 5, "--device", "cpu", "--set", "training.val_every_steps=1"]
    done = rnode("train", "--resume", stored_run, *options)
    assert done.exit_code == 0, done.output
    assert "steps 3 to 5" in done.output
    assert "32-true" in done.output
    assert [row["step"] for row in rows(stored_run) if "val/bpd" in row] == ["4", "5"]
    recipe = json.loads((stored_run / "recipe.json").read_text())
    assert (recipe["training"]["precision"], recipe["training"]["compile"]) == ("32-true", False)
