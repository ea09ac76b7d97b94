"""Comparisons: the arms differ by what they are meant to alone, and go on where they were stopped."""

from __future__ import annotations

import csv
import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from rnode_plugin import get_recipe
from rnode_plugin.cli import main
from rnode_plugin.comparison import scheduler as arm_schedule
from rnode_plugin.comparison.compare import ARMS, Comparison, arm_recipes, compare
from rnode_plugin.comparison.scheduler import places_of
from rnode_plugin.comparison.worker import ArmProcess
from rnode_plugin.errors import ConfigError, DataError, TrainingError
from rnode_plugin.recipes.schema import Recipe
from rnode_plugin.training.lightning.module import RnodeModule
from rnode_plugin.training.runs.checkpoints import read_checkpoint

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
    return compare(recipe, out=out, accelerator="cpu", progress=False, **{"devices": "1", **options})


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
    ffjord, same = arm_recipes(recipe, ("ffjord", "vanilla"))
    assert ffjord.solver == recipe.ffjord().solver
    assert ffjord.solver.method == "dopri5"
    assert ffjord.name == "digits-ffjord"
    assert (ffjord.regularizers, same) == ({}, vanilla)
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
    with pytest.raises(ConfigError, match="vanilla and ffjord are the same for imagenet64"):
        arm_recipes(get_recipe("imagenet64"), ("vanilla", "ffjord"))
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

    monkeypatch.setattr(arm_schedule, "train_arm", lambda *args: pytest.fail("trained again"))
    lines: list[str] = []
    again = run(recipe, tmp_path, announce=lines.append)
    assert again.runs == result.runs
    assert all("done, in" in line for line in lines)


def test_an_interrupted_arm_goes_on_and_ends_as_if_nothing_had_been(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(recipe, tmp_path / "whole")
    original = RnodeModule.training_step

    def training_step(self: RnodeModule, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.recipe.name == "digits-rnode" and self.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(RnodeModule, "training_step", training_step)
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


@pytest.mark.slow
def test_other_settings_are_other_runs(recipe: Recipe, tmp_path: Path) -> None:
    one = run(recipe, tmp_path, arms=["rnode"], seeds=2)
    assert [path.name for path in one.runs] == ["0", "1"]  # one for each seed
    assert [column.label for column in one.report.table.columns] == ["rnode"]
    other = run(recipe.override(["optimizer.lr=1e-4"]), tmp_path, arms=["rnode"])
    assert [path.name for path in other.runs] == ["2"]
    back = run(recipe, tmp_path, arms=["rnode"])
    assert back.runs == one.runs[:1]


def test_arms_at_the_same_time_are_the_same_arms(recipe: Recipe, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        lines: list[str] = []
        in_turn = run(recipe, tmp_path / "1")
        at_once = run(recipe, tmp_path / "2", devices="2", announce=lines.append)
    finally:
        torch.set_num_threads(threads)
    assert at_once.failed == ()
    assert at_once.stopped is None
    for one, other in zip(in_turn.runs, at_once.runs, strict=True):
        assert one.parent.name == other.parent.name
        for name, tensor in weights(one).items():
            assert torch.equal(tensor, weights(other)[name]), name
        assert (one / "images.csv").read_text() == (other / "images.csv").read_text()
    assert [line for line in lines if line.startswith("arm ")] == [
        "arm 1 of 2: digits-vanilla, seed 42, rk4_38",
        "arm 2 of 2: digits-rnode, seed 42, rk4_38",
    ]


def test_an_arm_that_fails_leaves_the_others_alone(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = RnodeModule.training_step

    def training_step(self: RnodeModule, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = original(self, batch, batch_idx)
        return loss * float("nan") if self.recipe.name == "digits-vanilla" and self.global_step > 0 else loss

    monkeypatch.setattr(RnodeModule, "training_step", training_step)
    result = run(recipe.override(["training.max_skipped=1"]), tmp_path)
    (message,) = result.failed
    assert message.startswith("digits-vanilla, seed 42: training stopped: the gradient's norm is nan")
    assert [path.parent.name for path in result.runs] == ["digits-vanilla", "digits-rnode"]
    text = result.report.markdown.read_text()
    assert "not finished: step 1" in text
    assert "step 4 of 4" in text


def test_what_concerns_all_arms_ends_the_comparison(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = recipe.override([f"data.root={tmp_path}", "data.name=mnist", "data.shape=1,28,28", "data.levels=256"])
    monkeypatch.setattr(arm_schedule, "train_arm", lambda *args: pytest.fail("trained without images"))
    with pytest.raises(DataError, match="--no-download"):
        run(missing, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_error_of_an_arms_process_is_that_error(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder of all runs belongs")
    with pytest.raises(ConfigError, match="cannot make a run folder"):
        run(recipe, tmp_path, devices="2")


def test_a_process_that_is_killed_is_told_from_one_that_ends(recipe: Recipe, tmp_path: Path) -> None:
    lines: queue.SimpleQueue[Any] = queue.SimpleQueue()
    arm = ArmProcess(recipe, {"runs": str(tmp_path)}, threads=1, lines=lines)
    os.kill(arm._process.pid, signal.SIGKILL)
    ended = arm.ended()
    assert isinstance(ended.error, TrainingError)
    assert "was ended by SIGKILL. Maybe the memory" in str(ended.error)
    assert lines.get(timeout=60) == (arm, None)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_the_processes_of_the_arms_end_with_the_first(tmp_path: Path, signum: int) -> None:
    """A signal ends them with a checkpoint each, and so does the end of the process that started them."""
    settings = [part for setting in TINY if "max_steps" not in setting for part in ("--set", setting)]
    options = ["--max-steps", "100000", "--devices", "2", "--arms", "vanilla,rnode", "--accelerator", "cpu"]
    command = [sys.executable, "-m", "rnode_plugin", "compare", "digits", *options, "--out", str(tmp_path / "c")]
    process = subprocess.Popen([*command, *settings], stdout=subprocess.PIPE, text=True)
    folders = [tmp_path / "c" / "runs" / name / "0" for name in ("digits-vanilla", "digits-rnode")]
    wait_for(lambda: all((folder / "checkpoints" / "last.ckpt").is_file() for folder in folders))
    process.send_signal(signum)
    output, _ = process.communicate(timeout=120)
    if signum == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM, output
        assert "SIGTERM: the same command goes on." in output
        assert "digits-rnode, seed 42: steps 0 to 100000" in output
    sizes: list[int] = []

    def quiet() -> bool:
        time.sleep(1)
        sizes.append(sum((folder / "metrics.csv").stat().st_size for folder in folders))
        return len(sizes) > 3 and sizes[-1] == sizes[-4]  # nobody writes on

    wait_for(quiet)


def wait_for(condition: Callable[[], bool], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.2)


def test_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert places_of("cpu", "auto", 4) == ["1"] * 4
    assert places_of("auto", "auto", 16) == ["1"] * 8
    assert places_of("cpu", "2", 4) == ["1", "1"]
    assert places_of("cpu", "9", 4) == ["1"] * 4
    assert places_of("mps", "auto", 4) == ["1"]
    for wrong in ("0", "two", "", "1.5", "-1", "0,x"):
        with pytest.raises(ConfigError, match="devices: expected auto"):
            places_of("cpu", wrong, 4)
    with pytest.raises(ConfigError, match="no GPUs to choose 0,1 from"):
        places_of("cpu", "0,1", 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert places_of("auto", "auto", 3) == ["0,", "1,", "2,"]
    assert places_of("gpu", "2", 4) == ["0,", "1,"]
    assert places_of("gpu", "3,1", 4) == ["3,", "1,"]
    assert places_of("gpu", "3,", 4) == ["3,"]
    assert places_of("cpu", "2", 4) == ["1", "1"]
    for wrong in ("5", "4,", "1,1"):
        with pytest.raises(ConfigError, match="not different ones of the 4 GPUs"):
            places_of("gpu", wrong, 4)


def rnode(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["compare", *arguments], prog_name="rnode-cli")


def test_the_command(tmp_path: Path) -> None:
    settings = [part for setting in TINY if "max_steps" not in setting for part in ("--set", setting)]
    options = ["--max-steps", "2", "--checks", "1", "--accelerator", "cpu", "--out", str(tmp_path / "c"), *settings]
    result = rnode("digits", "--arms", "ffjord, kinetic", "--devices", "1", *options)
    assert result.exit_code == 0, result.output
    assert "arm 2 of 2: digits-kinetic, seed 42" in result.output
    assert str(tmp_path / "c" / "report.html") in result.output
    assert "dopri5, tolerance 1e-05" in result.output
    assert (tmp_path / "c" / "report.md").is_file()
    assert "digits-ffjord, seed 42, dopri5: done" in rnode("digits", "--arms", "ffjord", *options).output


def test_the_commands_mistakes(tmp_path: Path) -> None:
    for arguments, code, message in (
        (["digitz"], 2, "did you mean 'digits'"),
        (["digits", "--arms", "vanilla,rnod"], 2, "did you mean 'rnode'"),
        (["digits", "--arms", ""], 2, "unknown arm ''"),
        (["digits", "--seeds", "0"], 2, "--seeds"),
        (["digits", "--devices", "some"], 2, "devices: expected auto"),
        (["digits", "--max-time", "soon"], 2, "no span of time"),
        (["digits", "--set", "optimizer.rate=1"], 2, "optimizer.lr"),
        ([], 2, "RECIPE"),
    ):
        result = rnode(*arguments, "--out", str(tmp_path / "c"))
        assert (result.exit_code, message in result.output) == (code, True), result.output
    assert not (tmp_path / "c").exists()
