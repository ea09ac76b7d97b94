"""Comparisons: the arms differ by what they are meant to alone, and go on where they were stopped."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from rnode_plugin import comparison, get_recipe
from rnode_plugin.checkpoints import read_checkpoint
from rnode_plugin.cli import main
from rnode_plugin.comparison import ARMS, Comparison, arm_recipes, compare
from rnode_plugin.errors import ConfigError
from rnode_plugin.flow_module import FlowModule
from rnode_plugin.recipes import Recipe

TINY = [
    "model.hidden=8", "solver.step=none", "test_solver.method=rk4", "test_solver.step=none", "data.batch_size=50",
    "data.train_images=200", "training.val_images=40", "data.val_batch_size=40", "training.max_steps=4",
    "training.sample_images=2", "training.check_every_steps=none", "training.save_every=1",
]  # fmt: skip


@pytest.fixture
def recipe() -> Recipe:
    return get_recipe("digits").override(TINY)


def run(recipe: Recipe, out: Path, **options: Any) -> Comparison:
    options = {"arms": ("vanilla", "rnode"), "checks": 2, "announce": lambda line: None, **options}
    return compare(recipe, out=out, accelerator="cpu", progress=False, **options)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]


def test_the_recipes_of_the_arms(recipe: Recipe) -> None:
    vanilla, kinetic, jacfrob, rnode = arm_recipes(recipe, ARMS)
    assert [each.name for each in (vanilla, rnode)] == ["digits-vanilla", "digits-rnode"]
    assert vanilla.regularizers == {}
    assert kinetic.regularizers == {"kinetic": recipe.regularizers["kinetic"]}
    assert jacfrob.regularizers == {"jacfrob": recipe.regularizers["jacfrob"]}
    assert rnode.regularizers == recipe.regularizers
    assert len({(each.data, each.model, each.solver, each.optimizer, each.training) for each in
                (vanilla, kinetic, jacfrob, rnode)}) == 1  # fmt: skip
    ffjord, same = arm_recipes(recipe, ("vanilla", "rnode"), vanilla_solver="dopri5")
    assert ffjord.solver == recipe.vanilla().solver
    assert ffjord.solver.method == "dopri5"
    assert same == rnode
    seeds = [each.training.seed for each in arm_recipes(recipe, ("rnode", "kinetic"), seeds=2)]
    first = recipe.training.seed
    assert seeds == [first, first, first + 1, first + 1]


def test_what_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown arm 'vanila'; did you mean 'vanilla'"):
        arm_recipes(recipe, ["vanila"])
    with pytest.raises(ConfigError, match="each arm once"):
        arm_recipes(recipe, ["rnode", "rnode"])
    with pytest.raises(ConfigError, match="at least one"):
        arm_recipes(recipe, [])
    with pytest.raises(ConfigError, match="at least one"):
        arm_recipes(recipe, seeds=0)
    with pytest.raises(ConfigError, match="solver of the vanilla arm"):
        arm_recipes(recipe, vanilla_solver="euler")
    with pytest.raises(ConfigError, match="time limit must be positive"):
        run(recipe, tmp_path, max_time=-1)
    with pytest.raises(ConfigError, match="at least one check"):
        run(recipe, tmp_path, checks=0)
    assert not list(tmp_path.iterdir())


def test_arms_begin_alike_and_a_finished_one_is_not_trained_again(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(recipe, tmp_path)
    assert result.stopped is None
    assert [path.parent.name for path in result.runs] == ["digits-vanilla", "digits-rnode"]
    vanilla, rnode = map(rows, result.runs)
    # same weights, images and noise: the first step's density and NFE are the same number, the later ones are not
    assert vanilla[0]["train/bpd"] == rnode[0]["train/bpd"]
    assert vanilla[-2]["train/bpd"] != rnode[-2]["train/bpd"]
    assert [row["step"] for row in vanilla if row["val/bpd"]] == ["2", "4"]
    text = result.report.html.read_text()
    assert "digits: with and without the penalties" in text
    assert [column.label for column in result.report.table.columns] == ["vanilla", "rnode"]
    ended = json.loads((result.runs[1] / "result.json").read_text())
    assert f"{ended['evaluation']['dirty']['mean']:.4f}" in text

    monkeypatch.setattr(comparison, "fit", lambda *args, **options: pytest.fail("trained again"))
    lines: list[str] = []
    again = run(recipe, tmp_path, announce=lines.append)
    assert again.runs == result.runs
    assert all("done, in" in line for line in lines)


def test_an_interrupted_arm_goes_on_and_ends_as_if_nothing_had_been(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(recipe, tmp_path / "whole")
    original = FlowModule.training_step

    def training_step(self: FlowModule, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.recipe.name == "digits-rnode" and batch_idx == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(FlowModule, "training_step", training_step)
        stopped = run(recipe, tmp_path / "parts")
    assert stopped.stopped == "SIGTERM"
    assert [column.label for column in stopped.report.table.columns] == ["vanilla", "rnode"]  # both are reported
    assert "not finished: step 3" in stopped.report.html.read_text()

    resumed = run(recipe, tmp_path / "parts")
    assert resumed.stopped is None
    assert resumed.runs == stopped.runs
    for one, other in zip(whole.runs, resumed.runs, strict=True):
        for name, tensor in weights(one).items():
            assert torch.equal(tensor, weights(other)[name]), name
    assert "not finished" not in resumed.report.html.read_text()


def test_a_time_limit_is_for_each_arm_and_can_be_raised(recipe: Recipe, tmp_path: Path) -> None:
    short = run(recipe, tmp_path, max_time=1e-3)
    assert [json.loads((path / "result.json").read_text())["steps"] for path in short.runs] == [1, 1]
    assert "stopped by its time limit" in short.report.html.read_text()
    lines: list[str] = []
    same = run(recipe, tmp_path, max_time=1e-3, announce=lines.append)
    assert same.runs == short.runs
    assert all("done, in" in line for line in lines)  # their time is spent
    longer = run(recipe, tmp_path, max_time=600)
    assert longer.runs == short.runs
    assert [json.loads((path / "result.json").read_text())["steps"] for path in longer.runs] == [4, 4]


def test_other_settings_are_other_runs(recipe: Recipe, tmp_path: Path) -> None:
    one = run(recipe, tmp_path, arms=["rnode"], seeds=2)
    assert [path.name for path in one.runs] == ["0", "1"]  # one for each seed
    assert [column.label for column in one.report.table.columns] == ["rnode"]
    other = run(recipe.override(["optimizer.lr=1e-4"]), tmp_path, arms=["rnode"])
    assert [path.name for path in other.runs] == ["2"]
    back = run(recipe, tmp_path, arms=["rnode"])
    assert back.runs == one.runs[:1]


def rnode(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["compare", *arguments], prog_name="rnode-cli")


def test_the_command(tmp_path: Path) -> None:
    settings = [part for setting in TINY if "max_steps" not in setting for part in ("--set", setting)]
    options = ["--max-steps", "2", "--checks", "1", "--accelerator", "cpu", "--out", str(tmp_path / "c"), *settings]
    result = rnode("digits", "--arms", "vanilla, kinetic", "--vanilla-solver", "dopri5", *options)
    assert result.exit_code == 0, result.output
    assert "arm 2 of 2: digits-kinetic, seed 42" in result.output
    assert str(tmp_path / "c" / "report.html") in result.output
    assert "dopri5, tolerance 1e-05" in result.output
    assert (tmp_path / "c" / "report.md").is_file()
    assert "digits-vanilla, seed 42, dopri5: done" in rnode(
        "digits", "--arms", "vanilla", "--vanilla-solver", "dopri5", *options
    ).output  # fmt: skip


def test_the_commands_mistakes(tmp_path: Path) -> None:
    for arguments, code, message in (
        (["digitz"], 2, "did you mean 'digits'"),
        (["digits", "--arms", "vanilla,rnod"], 2, "did you mean 'rnode'"),
        (["digits", "--arms", ""], 2, "unknown arm ''"),
        (["digits", "--seeds", "0"], 2, "--seeds"),
        (["digits", "--max-time", "soon"], 2, "no span of time"),
        (["digits", "--set", "optimizer.rate=1"], 2, "optimizer.lr"),
        ([], 2, "RECIPE"),
    ):
        result = rnode(*arguments, "--out", str(tmp_path / "c"))
        assert (result.exit_code, message in result.output) == (code, True), result.output
    assert not (tmp_path / "c").exists()
