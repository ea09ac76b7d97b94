"""Comparisons: the arms differ only by what they are meant to, and go on where they were stopped."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_training import FakeTraining
from run_folders import write_run
from tiny_runs import as_options, rnode, weights

from rnode_plugin import get_recipe, hookimpl
from rnode_plugin.comparison import compare as comparison
from rnode_plugin.comparison.arms import arm_recipes, check_arm
from rnode_plugin.comparison.compare import Comparison, compare, places_of
from rnode_plugin.core.regularizers import FunctionRegularizer
from rnode_plugin.core.schedules import linear_warmup
from rnode_plugin.errors import ConfigError, DataError, TrainingError
from rnode_plugin.files import check_path_name
from rnode_plugin.recipes.recipe import Recipe
from rnode_plugin.reports import page
from rnode_plugin.training.checkpoints import read_checkpoint

TINY = [
    "model.hidden=8", "solver.step=none", "test_solver.method=rk4", "test_solver.step=none", "data.batch_size=50",
    "data.train_images=200", "training.val_images=40", "data.val_batch_size=40", "training.max_steps=4",
    "training.sample_images=2", "training.val_every_steps=none", "training.save_every=1",
]  # fmt: skip


@pytest.fixture
def recipe() -> Recipe:
    return get_recipe("digits").override(TINY)


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTraining:
    """What the comparisons of a test start instead of ``rnode-cli train``."""
    fake = FakeTraining(tmp_path / "fake", write_run(tmp_path / "run", get_recipe("digits")))
    monkeypatch.setattr(comparison, "_TRAIN", fake.command)
    monkeypatch.setattr(page, "make_panels", lambda arms: [])  # drawing takes longer than all else
    return fake


def run(recipe: Recipe, out: Path, **options: Any) -> Comparison:
    options = {"arms": ("none", "rnode"), "validations": 2, "announce": lambda line: None, **options}
    return compare(recipe, out=out, accelerator="cpu", **{"devices": "1", "progress": False, **options})


def folders(result: Comparison) -> list[str]:
    return ["/".join(path.parts[-2:]) for path in result.runs]


# arms ----------------------------------------------------------------------------------------------------------


def penalties(recipe: Recipe, *arms: str, **options: Any) -> dict[str, Mapping[str, Any]]:
    return {arm.name: arm.regularizers for arm in arm_recipes(recipe, arms, **options)}


def test_the_recipes_of_the_arms(recipe: Recipe) -> None:
    none, kinetic, jacfrob, rnode = arm_recipes(recipe)
    assert [each.name for each in (none, rnode)] == ["digits-none", "digits-rnode"]
    assert none.regularizers == {}
    assert kinetic.regularizers == {"kinetic": recipe.regularizers["kinetic"]}
    assert jacfrob.regularizers == {"jacfrob": recipe.regularizers["jacfrob"]}
    assert rnode.regularizers == recipe.regularizers
    assert len({(each.data, each.model, each.solver, each.optimizer, each.training) for each in
                (none, kinetic, jacfrob, rnode)}) == 1  # fmt: skip
    ffjord, same = arm_recipes(recipe, ("ffjord", "none"))
    assert ffjord.solver == recipe.ffjord().solver
    assert ffjord.solver.method == "dopri5"
    assert ffjord.name == "digits-ffjord"
    assert (ffjord.regularizers, same) == ({}, none)
    seeds = [each.training.seed for each in arm_recipes(recipe, ("rnode", "kinetic"), seeds=2)]
    first = recipe.training.seed
    assert seeds == [first, first, first + 1, first + 1]


def test_sets_of_penalties_with_options_and_lambdas(recipe: Recipe) -> None:
    recipe = dataclasses.replace(recipe, regularizers={"kinetic": 0.5, "jacfrob": 0.01})
    arms = ("jacfrob+kinetic", "total_derivative=0.02", "taylor:3", "taylor:order=4=1e+1+kinetic=0.1")
    more = ("trajectory_polynomial:2,points=3=5", "steer:0.25")
    assert penalties(recipe, *arms, *more) == {
        "digits-rnode": {"kinetic": 0.5, "jacfrob": 0.01},  # the recipe's own lambdas, in its order
        "digits-total_derivative-0.02": {"total_derivative": 0.02},
        "digits-taylor-3": {"taylor:3": 0.01},
        "digits-kinetic-0.1+taylor-order-4-10": {"kinetic": 0.1, "taylor:order=4": 10.0},
        "digits-trajectory_polynomial-2-points-3-5": {"trajectory_polynomial:2,points=3": 5.0},
        "digits-steer-0.25": {"steer:0.25": 1.0},
    }  # fmt: skip
    warm = penalties(recipe, "kinetic=linear_warmup(9)*0.1+jacfrob", sweeps=["kinetic=linear_warmup(9)*0.1,0.1"])
    assert list(warm.items()) == [
        ("digits-kinetic-linear_warmup-9--0.1+jacfrob", {"kinetic": linear_warmup(9, 0.1), "jacfrob": 0.01}),
        ("digits-kinetic-linear_warmup-9--0.1", {"kinetic": linear_warmup(9, 0.1)}),
        ("digits-kinetic-0.1", {"kinetic": 0.1}),
    ]
    (long,) = penalties(recipe, "curl+directional+directional_vjp+jacdiag+jacoffdiag+l1+strain+total_derivative")
    (other,) = penalties(recipe, "curl+directional+directional_vjp+jacdiag+jacoffdiag+l1+strain+taylor")
    assert long != other
    for name in (long, other, "digits-taylor-3", "digits-kinetic-0.1+taylor-order-4-10"):
        assert check_path_name(name, "arm") == name


def test_sweeps(recipe: Recipe) -> None:
    assert list(penalties(recipe, sweeps=["kinetic=0.001,0.01,0.1"])) == [
        "digits-none", "digits-kinetic-0.001", "digits-kinetic", "digits-kinetic-0.1",
    ]  # fmt: skip
    grid = penalties(recipe, "kinetic=1+jacfrob=3", sweeps=["kinetic=1,2+jacfrob=3,4", "kinetic=1,2"])
    assert [tuple(each.values()) for each in grid.values()] == [(1, 3), (1, 4), (2, 3), (2, 4), (1,), (2,)]


class Notebook:
    """A plugin that only this process knows."""

    @hookimpl
    def rnode_register_regularizers(self) -> Mapping[str, Any]:
        return {"mine": FunctionRegularizer("mine", lambda evaluation: evaluation.dz.abs().flatten(1).sum(1))}


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        (["nonne"], "unknown arm 'nonne'; did you mean 'none'"),
        (["../kinetic"], "unknown arm"),
        (["rnode", "jacfrob+kinetic"], r"rnode and jacfrob\+kinetic train the same"),
        (["kinetic+kinetic"], "names kinetic twice"),
        (["kinetic="], "lambda of kinetic"),
        (["kinetic=-1"], "must be a finite number"),
        (["kinetic=linear_warmup(0)"], r"or linear_warmup\(STEPS\)\*LAMBDA"),
        (["kinetic=1,2"], "--sweep kinetic=1,2"),
        (["taylor:9"], "order from 2 to 5"),
    ],
)
def test_arms_that_are_refused(recipe: Recipe, arms: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        arm_recipes(recipe, arms)


def test_arms_that_cannot_be_trained(register: Any, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none and ffjord train the same"):
        arm_recipes(get_recipe("imagenet64"), ("none", "ffjord"))
    with pytest.raises(ConfigError, match=r"the arm digits-error cannot be trained: .*rk4_38.*no error estimate"):
        run(recipe, tmp_path / "c", arms=["none", "error"])
    register(Notebook(), "notebook")
    with pytest.raises(ConfigError, match=r"'mine' is registered in this process only.*'notebook'"):
        run(recipe, tmp_path / "c", arms=["none", "mine"])
    assert not list(tmp_path.iterdir())
    for arm in arm_recipes(recipe, ["none", "kinetic+curl"]):
        check_arm(arm)


# what trains when ----------------------------------------------------------------------------------------------


def test_each_arm_is_a_call_of_train(recipe: Recipe, training: FakeTraining, tmp_path: Path) -> None:
    result = run(recipe, tmp_path / "c", seeds=2, devices="2", max_time=90)
    assert (result.failed, result.stopped) == ((), None)
    assert folders(result) == ["digits-none/0", "digits-rnode/0", "digits-none/1", "digits-rnode/1"]
    calls = training.calls()
    assert [call["name"] for call in calls] == ["digits-none", "digits-none", "digits-rnode", "digits-rnode"]
    runs = {str(path) for path in result.runs}
    assert {call.pop("--run-folder") for call in calls} == runs
    share = str(max(1, torch.get_num_threads() // 2))
    fixed = {"--accelerator": "cpu", "--devices": "1", "--max-time": "90.000", "threads": share}
    assert all({**call, "name": ""} == {"name": "", **fixed} for call in calls)
    assert "digits: what the penalties change" in result.report.html.read_text()
    assert [column.label for column in result.report.table.columns] == ["none", "rnode"]


def test_arms_that_exist_are_not_trained_again(recipe: Recipe, training: FakeTraining, tmp_path: Path) -> None:
    first = run(recipe, tmp_path / "c")
    assert len(training.calls()) == 2
    lines: list[str] = []
    more = run(recipe, tmp_path / "c", sweeps=["kinetic=0.01,0.1"], announce=lines.append)
    assert [call["name"] for call in training.calls()] == ["digits-kinetic", "digits-kinetic-0.1"]
    assert [line for line in lines if "done, in" in line] == [
        f"arm {number} of 4: {path.parent.name}, seed 42, rk4_38: done, in {path}"
        for number, path in enumerate(first.runs, 1)
    ]
    assert more.runs[:2] == first.runs
    run(recipe, tmp_path / "c", seeds=2)
    assert [call["name"] for call in training.calls()] == ["digits-none", "digits-rnode"]  # the second seed
    other = run(recipe.override(["optimizer.lr=1e-4"]), tmp_path / "c")
    assert folders(other) == ["digits-none/2", "digits-rnode/2"]


def test_an_interrupted_arm_is_resumed(recipe: Recipe, training: FakeTraining, tmp_path: Path) -> None:
    training.behave({"digits-none": "stop the parent"})
    result = run(recipe, tmp_path / "c")
    assert result.stopped == "SIGTERM"
    assert result.failed == ()
    assert folders(result) == ["digits-none/0"]  # the other one had not begun
    (none,) = result.runs
    assert (none / "stopped").read_text() == "with a checkpoint"
    assert "not finished: step 40" in result.report.html.read_text()
    (call,) = training.calls()
    assert call["--run-folder"] == str(none)

    training.behave({})
    again = run(recipe, tmp_path / "c")
    assert folders(again) == ["digits-none/1", "digits-rnode/0"]  # without a checkpoint it begins again
    shutil.rmtree(none.parent / "1")
    (none / "checkpoints").mkdir()
    (none / "checkpoints" / "last.ckpt").touch()
    training.calls()
    again = run(recipe, tmp_path / "c")
    assert folders(again) == ["digits-none/0", "digits-rnode/0"]
    (call,) = training.calls()
    assert call["--resume"] == str(none)
    assert "--run-folder" not in call


def test_an_arm_that_fails_leaves_the_others_alone(recipe: Recipe, training: FakeTraining, tmp_path: Path) -> None:
    how = {"digits-none": "fail", "digits-kinetic": "die", "digits-jacfrob": "crash", "digits-l1": "refuse"}
    training.behave(how)
    lines: list[str] = []
    arms = ["none", "kinetic", "jacfrob", "l1", "rnode"]
    result = run(recipe, tmp_path / "c", arms=arms, devices="2", progress=True, announce=lines.append)
    log = tmp_path / "c" / "logs" / "digits-jacfrob-42.log"
    assert result.failed == (
        "digits-none, seed 42: training stopped: the gradient is nan.",
        "digits-kinetic, seed 42: its process was ended by SIGKILL. Perhaps the memory did not suffice: "
        "--devices 1 trains one arm at a time.",
        f"digits-jacfrob, seed 42: its process ended with exit code 1; {log} may say why.",
        "digits-l1, seed 42: it cannot work.",
    )
    assert set(result.failed) < set(lines)
    assert result.stopped is None
    assert folders(result) == [f"digits-{name}/0" for name in ("none", "kinetic", "jacfrob", "rnode")]
    assert not (tmp_path / "c" / "runs" / "digits-l1" / "0").exists()  # it had not begun
    text = result.report.markdown.read_text()
    assert "not finished: step 40" in text
    assert "step 40 of 40" in text
    assert "ZeroDivisionError" in log.read_text()


@pytest.mark.parametrize(("how", "error", "message"), [
    ("refuse", ConfigError, r"^digits-none, seed 42: it cannot work\.$"),
    ("fail", TrainingError, "digits-none, seed 42: training stopped: the gradient is nan"),
])  # fmt: skip
def test_nothing_to_report(
    recipe: Recipe, training: FakeTraining, tmp_path: Path, how: str, error: type[Exception], message: str
) -> None:
    shutil.rmtree(tmp_path / "fake" / "template")
    (tmp_path / "fake" / "template").mkdir()
    training.behave({"digits-none": how})
    with pytest.raises(error, match=message):
        run(recipe, tmp_path / "c", arms=["none"])


def test_two_calls_in_one_folder(recipe: Recipe, training: FakeTraining, tmp_path: Path) -> None:
    """The second one is refused while the first trains: otherwise both would train every arm."""
    training.behave({"digits-none": "wait"})
    (tmp_path / "c").mkdir()
    with ThreadPoolExecutor() as threads:
        first = threads.submit(run, recipe, tmp_path / "c", arms=["none"])
        wait_for(lambda: bool(list((tmp_path / "c").glob("runs/*/0/recipe.json"))))
        try:
            with pytest.raises(ConfigError, match="another process"):
                run(recipe, tmp_path / "c", arms=["none", "kinetic"])
        finally:
            training.go_on()
        assert folders(first.result()) == ["digits-none/0"]
    assert [call["name"] for call in training.calls()] == ["digits-none"]


def test_a_time_limit_counts_earlier_calls(recipe: Recipe, training: FakeTraining, tmp_path: Path) -> None:
    result = run(recipe, tmp_path / "c", arms=["none"])
    (folder,) = result.runs
    ended = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**ended, "stopped": "max_time"}))
    (folder / "checkpoints").mkdir()
    checkpoint = Path(__file__).parent / "old_runs" / "finished" / "checkpoints" / "last.ckpt"
    shutil.copy(checkpoint, folder / "checkpoints")
    spent = read_checkpoint(checkpoint)["progress"]["seconds"]
    assert spent > 0
    training.calls()
    run(recipe, tmp_path / "c", arms=["none"], max_time=spent)
    assert training.calls() == []  # its time is spent
    run(recipe, tmp_path / "c", arms=["none"], max_time=spent + 10)
    (call,) = training.calls()
    assert (call["--resume"], call["--max-time"]) == (str(folder), "10.000")


def test_missing_images_are_found_before_anything_is_trained(
    recipe: Recipe, training: FakeTraining, tmp_path: Path
) -> None:
    missing = recipe.override([f"data.root={tmp_path}", "data.name=mnist", "data.shape=1,28,28", "data.levels=256"])
    with pytest.raises(DataError, match="--no-download"):
        run(missing, tmp_path / "out")
    assert training.calls() == []
    assert not (tmp_path / "out").exists()
    (tmp_path / "runs").write_text("a file where the folder of all runs belongs")
    with pytest.raises(OSError, match="runs"):
        run(recipe, tmp_path)


# real training -------------------------------------------------------------------------------------------------


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_arms_begin_alike(recipe: Recipe, tmp_path: Path) -> None:
    """The first step's density and NFE are the same number, the later ones are not."""
    result = run(recipe, tmp_path / "c", devices="2", arms=["none", "taylor:2=5"])
    assert (result.failed, result.stopped) == ((), None)
    assert folders(result) == ["digits-none/0", "digits-taylor-2-5/0"]
    none, taylor = map(rows, result.runs)
    assert none[0]["train/bpd"] == taylor[0]["train/bpd"]
    assert none[-2]["train/bpd"] != taylor[-2]["train/bpd"]
    assert [row["step"] for row in none if row["val/bpd"]] == ["2", "4"]
    assert [column.label for column in result.report.table.columns] == ["none", "taylor:2"]
    ended = json.loads((result.runs[1] / "result.json").read_text())
    assert ended["evaluation"]["penalties"]["taylor:2"] > 0


@pytest.mark.slow
def test_an_interrupted_arm_ends_as_if_nothing_had_been(recipe: Recipe, tmp_path: Path) -> None:
    whole = run(recipe, tmp_path / "whole", devices="2")
    short = run(recipe, tmp_path / "parts", max_time=1e-3)
    assert [json.loads((path / "result.json").read_text())["steps"] for path in short.runs] == [1, 1]
    assert "stopped by its time limit" in short.report.html.read_text()
    longer = run(recipe, tmp_path / "parts", max_time=600)
    assert longer.runs == short.runs
    for one, other in zip(whole.runs, longer.runs, strict=True):
        assert torch.equal(weights(one), weights(other))
        assert (one / "images.csv").read_text() == (other / "images.csv").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_processes_of_the_arms_end_with_the_first(tmp_path: Path, signum: int) -> None:
    """A signal ends them with a checkpoint each: SIGTERM to the first, Ctrl-C to the group of all of them."""
    settings = as_options(*(setting for setting in TINY if "max_steps" not in setting))
    options = ["--max-steps", "100000", "--devices", "2", "--arm", "none", "--arm", "rnode", "--accelerator", "cpu"]
    command = [sys.executable, "-m", "rnode_plugin", "compare", "digits", *options, "--out", str(tmp_path / "c")]
    process = subprocess.Popen([*command, *settings], stdout=subprocess.PIPE, text=True, start_new_session=True)
    folders = [tmp_path / "c" / "runs" / name / "0" for name in ("digits-none", "digits-rnode")]
    wait_for(lambda: all((folder / "checkpoints" / "last.ckpt").is_file() for folder in folders))
    (os.killpg if signum == signal.SIGINT else os.kill)(process.pid, signum)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signum, output
    assert f"{signal.Signals(signum).name}: the same command goes on." in output
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


@pytest.mark.parametrize(
    ("gpus", "accelerator", "devices", "arms", "places"),
    [
        (0, "cpu", "auto", 4, ["1"] * 4),
        (0, "auto", "auto", 16, ["1"] * 8),
        (0, "cpu", "2", 4, ["1", "1"]),
        (0, "mps", "auto", 4, ["1"]),
        (4, "cpu", "2", 4, ["1", "1"]),
        (4, "auto", "auto", 3, ["0,", "1,", "2,"]),
        (4, "gpu", "2", 4, ["0,", "1,"]),
        (4, "gpu", "3,1", 4, ["3,", "1,"]),
        (4, "gpu", "3,", 4, ["3,"]),
        *((0, "cpu", wrong, 4, "devices: expected auto") for wrong in ("0", "two", "", "1.5", "0,x")),
        (0, "cpu", "0,1", 4, "of the 0 GPUs"),
        *((4, "gpu", wrong, 4, "not different ones of the 4 GPUs") for wrong in ("5", "4,", "1,1")),
    ],
)
def test_places(
    monkeypatch: pytest.MonkeyPatch, gpus: int, accelerator: str, devices: str, arms: int, places: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    if isinstance(places, str):
        with pytest.raises(ConfigError, match=places):
            places_of(accelerator, devices, arms)
    else:
        assert places_of(accelerator, devices, arms) == places


def test_the_command(training: FakeTraining, tmp_path: Path) -> None:
    settings = as_options(*(setting for setting in TINY if "max_steps" not in setting))
    options = ["--max-steps", "2", "--validations", "1", "--accelerator", "cpu"]
    options += ["--out", str(tmp_path / "c"), *settings]
    arms = ["--arm", "ffjord", "--sweep", "kinetic=0.1,0.2", "--devices", "1"]
    result = rnode("compare", "digits", *arms, *options)
    assert result.exit_code == 0, result.output
    assert "arm 3 of 3: digits-kinetic-0.2, seed 42" in result.output
    assert str(tmp_path / "c" / "report.html") in result.output
    assert "dopri5, tolerance 1e-05" in result.output
    assert (tmp_path / "c" / "report.md").is_file()
    assert "digits-ffjord, seed 42, dopri5: done" in rnode("compare", "digits", "--arm", "ffjord", *options).output
    for arguments, message in (
        (["digitz"], "did you mean 'digits'"),
        (["digits", "--arm", ""], "unknown arm ''"),
        (["digits", "--seeds", "0"], "--seeds"),
        (["digits", "--devices", "some"], "devices"),
    ):
        refused = rnode("compare", *arguments, "--out", str(tmp_path / "d"))
        assert (refused.exit_code, message in refused.output) == (2, True), refused.output
    assert not (tmp_path / "d").exists()
    training.behave({"digits-l1": "fail", "digits-none": "stop the parent"})
    failed = rnode("compare", "digits", "--arm", "ffjord", "--arm", "l1", *options)
    assert failed.exit_code == 1
    assert "Error: digits-l1, seed 42: training stopped: the gradient is nan." in failed.output
    stopped = rnode("compare", "digits", "--arm", "ffjord", "--arm", "none", *options)
    assert stopped.exit_code == 128 + signal.SIGTERM
    assert "SIGTERM: the same command goes on." in stopped.output
