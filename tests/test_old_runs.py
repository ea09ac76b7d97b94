"""Runs that version 0.1 wrote: they load, evaluate, report and go on to the same numbers."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from rnode_plugin import Solver, load_flow
from rnode_plugin.cli import main
from rnode_plugin.recipes.recipe import Recipe
from rnode_plugin.training.checkpoints import load_with_recipe

OLD, PACKAGE = Path(__file__).parent / "old_runs", Path(__file__).parents[1] / "rnode_plugin"
# the last bits of a sum depend on the processor and on torch; the steps of training make more of them
CLOSE = 2e-4


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """A run of 8 steps that was stopped after its checkpoint at step 5."""
    return Path(shutil.copytree(OLD / "interrupted", tmp_path / "runs" / "digits" / "0"))


KEPT = sorted(
    file for folder in (OLD, PACKAGE) for kind in ("ckpt", "safetensors") for file in folder.rglob(f"*.{kind}")
)


@pytest.mark.parametrize("file", KEPT, ids=[f"{file.parts[-3]}-{file.name}" for file in KEPT])
def test_every_checkpoint_that_is_kept_opens(file: Path) -> None:
    assert len(KEPT) == 5
    flow, recipe = load_with_recipe(file)
    flow = flow.solved_with(solver=Solver("euler", step=1.0))
    torch.manual_seed(0)
    x = flow.sample(2)
    assert x.numel() == 2 * recipe.dims
    assert bool(flow.log_prob(x).isfinite().all())


def test_it_loads_with_its_numbers() -> None:
    flow = load_flow(OLD / "finished")
    result = json.loads((OLD / "finished" / "result.json").read_text())
    with (OLD / "finished" / "images.csv").open() as file:
        clean = [float(row["clean"]) for row in csv.DictReader(file)]
    done = CliRunner().invoke(main, ["eval", str(OLD / "finished"), "--limit", str(len(clean)), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert flow.dims == 64
    assert found["clean"]["mean"] == pytest.approx(result["evaluation"]["clean"]["mean"], abs=CLOSE)


def test_it_goes_on_where_it_stopped(interrupted: Path) -> None:
    before = rows(interrupted)
    done = CliRunner().invoke(main, ["train", "--resume", str(interrupted), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    after, whole = rows(interrupted), rows(OLD / "finished")
    assert len(before) == 6
    assert after[:6] == [{**row, **dict.fromkeys(after[0].keys() - row.keys(), "")} for row in before]
    assert [row["step"] for row in after] == [row["step"] for row in whole]
    for mine, theirs in zip(after, whole, strict=True):
        for name in ("train/loss", "train/bpd", "train/grad_norm", "train/kinetic", "val/bpd", "lr"):
            if theirs[name]:
                close = pytest.approx(float(theirs[name]), abs=CLOSE, rel=CLOSE)
                assert float(mine[name]) == close, (name, theirs["step"])
    weights = [
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (interrupted, OLD / "finished")
    ]
    mine, theirs = (torch.cat([w.flatten() for w in each["state_dict"].values()]) for each in weights)
    # together: Adam moves a weight whose gradient is rounding alone as far as any other
    assert (mine - theirs).norm() <= CLOSE * theirs.norm()


def test_former_names_of_settings_are_read() -> None:
    plain = json.loads((OLD / "finished" / "recipe.json").read_text())
    assert plain["training"]["check_every_steps"] == 4
    assert Recipe.from_plain(plain).training.val_every_steps == 4
