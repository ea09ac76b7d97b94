"""``rnode-cli train RECIPE.json --run-folder FOLDER``: how another program starts a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import Result
from problems import refuses
from tiny_runs import rnode, rows, run, tiny_recipe

from rnode_plugin.errors import ConfigError
from rnode_plugin.experiments.recipes.recipe import Recipe, read_recipe
from rnode_plugin.experiments.runs.run import Run, training_lock
from rnode_plugin.experiments.training.checkpoints import read_checkpoint
from rnode_plugin.experiments.training.experiment import Experiment
from rnode_plugin.experiments.training.fit import begin
from rnode_plugin.experiments.training.plan import Resumed, RunOptions


def train(*arguments: object) -> Result:
    return rnode("train", *arguments, "--device", "cpu", "--devices", "1")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(tiny_recipe("training.max_steps=2").to_plain()))
    return file


def test_the_file_decides_what_the_folder_is(file: Path, tmp_path: Path) -> None:
    run = tmp_path / "deep" / "here"
    done = train(file, "--run-folder", run)
    assert done.exit_code == 0, done.output
    assert json.loads((run / "recipe.json").read_text()) == json.loads(file.read_text())
    assert json.loads((run / "result.json").read_text())["steps"] == 2
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.json", "deep"]

    again = train(file, "--run-folder", run)
    assert again.exit_code == 2
    assert "is not empty: it holds" in again.output
    assert "--resume" in again.output
    with training_lock(run):
        assert "is being trained by another process" in train(file, "--run-folder", run).output

    longer = tiny_recipe("training.max_steps=3", "optimizer.lr=1e-3")
    file.write_text(json.dumps(longer.to_plain()))
    refused = train(file, "--resume", run, "--run-folder", tmp_path / "other")
    assert (refused.exit_code, "either run_folder or resume" in refused.output) == (2, True)
    resumed = train(file, "--resume", run)
    assert resumed.exit_code == 0, resumed.output
    assert Recipe.from_plain(json.loads((run / "recipe.json").read_text())) == longer
    assert [row["step"] for row in rows(run) if "train/loss" in row] == ["1", "2", "3"]

    # an experiment may bring the run that it continues
    experiment = Experiment.of(longer, resumed=Resumed.of(run, longer))
    with refuses(ConfigError, "run_folder", "resume"):
        begin(experiment, RunOptions(run_folder=tmp_path / "other"))
    # a checkpoint outside of a run has no folder, so its run gets the one that is named
    lone = Run(run).last.rename(tmp_path / "lone.ckpt")
    longest = Experiment.of(tiny_recipe("training.max_steps=4", "optimizer.lr=1e-3"))
    begun = begin(longest, RunOptions(resume=lone, run_folder=tmp_path / "other"))
    assert (begun.done, begun.resumed is not None and begun.resumed.run) == (3, None)


@pytest.mark.parametrize("text", [None, "{", "[" * 100_000, "\ud800", "[1]", '{"name": "a"}'])
def test_a_file_that_is_not_a_recipe(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "recipe.json"
    if text is not None:
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with refuses(ConfigError, "recipe"):
        read_recipe(file)


def test_a_run_goes_on_with_the_optimizer_of_its_new_settings(tmp_path: Path) -> None:
    done = run(tiny_recipe("training.max_steps=1", "optimizer.warmup=0"), tmp_path)
    changed = tiny_recipe("training.max_steps=2", "optimizer.warmup=0", "optimizer.lr=1e-4", "optimizer.beta1=0.5")
    again = run(changed, tmp_path, resume=done.run.path)
    assert [float(row["lr"]) for row in rows(again.run.path) if "train/loss" in row] == [2e-3, 1e-4]
    (group,) = read_checkpoint(again.run.last)["optimizer_states"][0]["param_groups"]
    assert tuple(group["betas"]) == (0.5, 0.999)


def test_a_run_from_a_checkpoint_has_a_best_one_of_its_own(tmp_path: Path) -> None:
    done = run(tiny_recipe("training.max_steps=1"), tmp_path)
    kept = torch.load(done.run.last, weights_only=True)
    (control,) = (state for state in kept["callbacks"].values() if "best" in state)
    control["best"] -= 5.0  # no validation will beat it
    torch.save(kept, tmp_path / "kept.ckpt")
    again = run(tiny_recipe("training.max_steps=2"), tmp_path / "new", resume=tmp_path / "kept.ckpt")
    assert again.run.path == tmp_path / "new" / "digits" / "0"
    assert [row["step"] for row in rows(again.run.path)] == ["2", "2"]
    assert again.run.best.is_file()
    assert again.result.evaluation is not None
