"""Comparisons: configurations differ only by what they are meant to, and continue where they were stopped."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from problems import refuses
from run_folders import FEW, write_run
from tiny_runs import SETTINGS, as_options, rnode, rows, tiny_recipe

from rnode_plugin import get_recipe
from rnode_plugin.core.schedules import linear_warmup
from rnode_plugin.errors import ConfigError, DataError, TrainingError
from rnode_plugin.experiments.comparison import compare as comparison
from rnode_plugin.experiments.comparison.compare import Comparison, compare
from rnode_plugin.experiments.comparison.configurations import configured_recipes
from rnode_plugin.experiments.data.facts import Facts
from rnode_plugin.experiments.files import check_path_name
from rnode_plugin.experiments.recipes.recipe import Recipe
from rnode_plugin.experiments.runs.metrics import MetricsTable
from rnode_plugin.experiments.runs.run import Run, training_lock
from rnode_plugin.experiments.training.checkpoints import header_with
from rnode_plugin.experiments.training.plan import ROWS


@pytest.fixture
def recipe() -> Recipe:
    return tiny_recipe()


# configurations ------------------------------------------------------------------------------------------------


def penalties(recipe: Recipe, *configurations: str) -> dict[str, Mapping[str, Any]]:
    return {one.name: one.regularizers for one in configured_recipes(recipe, configurations)}


def test_the_recipes_of_the_configurations(recipe: Recipe) -> None:
    none, kinetic, jacfrob, rnode = configured_recipes(recipe)
    assert [each.name for each in (none, rnode)] == ["digits-none", "digits-rnode"]
    assert none.regularizers == {}
    assert kinetic.regularizers == {"kinetic": recipe.regularizers["kinetic"]}
    assert jacfrob.regularizers == {"jacfrob": recipe.regularizers["jacfrob"]}
    assert rnode.regularizers == recipe.regularizers
    settings = [
        (each.data, each.model, each.solver, each.optimizer, each.training) for each in (none, kinetic, rnode)
    ]
    assert len(set(settings)) == 1
    ffjord, same = configured_recipes(recipe, ("ffjord", "none"))
    assert (ffjord.name, ffjord.solver, ffjord.regularizers) == ("digits-ffjord", recipe.ffjord().solver, {})
    assert same == none
    seeds = [each.training.seed for each in configured_recipes(recipe, ("rnode", "kinetic"), seeds=2)]
    first = recipe.training.seed
    assert seeds == [first, first, first + 1, first + 1]


def test_an_interval_of_validations_that_was_chosen_stays(recipe: Recipe) -> None:
    long = recipe.override(["training.max_steps=60", "training.val_every_steps=none"])
    assert comparison._with_validations(long).training.val_every_steps == 3
    for chosen in (long.override(["training.val_every=2"]), long.override(["training.val_every_steps=7"])):
        assert comparison._with_validations(chosen) == chosen


def test_penalties_by_name_and_in_a_file(recipe: Recipe, tmp_path: Path) -> None:
    recipe = dataclasses.replace(recipe, regularizers={"kinetic": 0.5, "jacfrob": 0.01})
    assert penalties(recipe, "kinetic", "taylor:3", "steer:0.25") == {
        "digits-kinetic": {"kinetic": 0.5},  # the recipe's lambda
        "digits-taylor-3": {"taylor:3": 0.01},
        "digits-steer-0.25": {"steer:0.25": 1.0},
    }
    file = tmp_path / "some.json"
    file.write_text(json.dumps({
        "weak": {"kinetic": 0.001, "jacfrob": 1e-3},
        "warm": {"kinetic": "linear_warmup(9)*0.1"},
        "sweep": {"kinetic": [0.001, 0.1], "jacfrob": 0.01},
        "grid": {"l1": [1, 2], "curl": [3, 4]},
    }))  # fmt: skip
    found = penalties(recipe, "none", str(file))
    assert list(found.values()) == [
        {},
        {"kinetic": 0.001, "jacfrob": 0.001},
        {"kinetic": linear_warmup(9, 0.1)},
        *({"kinetic": each, "jacfrob": 0.01} for each in (0.001, 0.1)),
        *({"l1": one, "curl": other} for one in (1, 2) for other in (3, 4)),
    ]
    assert list(found)[3:5] == ["digits-sweep-kinetic=0.001", "digits-sweep-kinetic=0.1"]
    for name in found:
        assert check_path_name(name, "configuration") == name


# the call of a run follows from its folder ---------------------------------------------------------------------


@pytest.mark.parametrize(("state", "limit", "option", "left"), [
    ("new", 90, "--run-folder", "90.000"),
    ("new", math.inf, "--run-folder", None),
    ("begun", 90, "--run-folder", "90.000"),  # it ended before its first checkpoint
    ("interrupted", 90, "--resume", "88.500"),  # all runs have the same time
    ("interrupted", 1, "--resume", "0.001"),
    ("interrupted", None, "--resume", None),
    ("damaged", 90, "--resume", "90.000"),
    ("foreign", 90, "--resume", "90.000"),  # its checkpoint is of another Trainer
    ("finished", 90, None, None),
    ("max_time", 1, None, None),
    ("max_time", 120, "--resume", "118.500"),
    ("max_time", None, "--resume", None),
])  # fmt: skip
def test_the_options_of_a_run(
    recipe: Recipe, tmp_path: Path, state: str, limit: float | None, option: str | None, left: str | None
) -> None:
    folder = tmp_path / "42"
    (one,) = configured_recipes(recipe, ("none",))
    if state != "new":
        ended = state in ("finished", "max_time")
        write_run(folder, one, finished=ended, **FEW, stopped=state)
        # steps after the checkpoint, which are taken again
        MetricsTable(folder / "metrics.csv", keep=100).add({"train/matching": 0.1, "seconds": 40.0}, 2)
    if state not in ("new", "begun"):
        callbacks = {} if state == "foreign" else {ROWS: {"run_seconds": 1.5}}
        contents = {**header_with(get_recipe("digits")), "state_dict": {}, "callbacks": callbacks}
        torch.save(contents, folder / "checkpoints" / "last.ckpt")
    if state == "damaged":
        os.truncate(folder / "checkpoints" / "last.ckpt", 10)
    found = comparison._options(Run(folder), limit)
    assert found == (None if option is None else [option, str(folder), *(["--max-time", left] if left else [])])
    assert folder.exists() == (state != "new")


@pytest.mark.parametrize(("changed", "message"), [
    ({"optimizer": {"lr": 1e-4}}, r"other settings \(optimizer.lr is 0.0001 there and "),
    ({"facts": Facts("of", "others").to_plain()}, "trained on other data"),
    (None, r"has checkpoints, but no recipe\.json"),
    ({}, None),
])  # fmt: skip
def test_a_run_that_cannot_be_compared(
    recipe: Recipe, tmp_path: Path, changed: dict[str, Any] | None, message: str | None
) -> None:
    (one,) = configured_recipes(recipe, ("none",))
    folder = write_run(tmp_path / "runs" / "digits-none" / "42", one, steps=1, facts=Facts.of(recipe.load_data()))
    (folder / "checkpoints" / "last.ckpt").touch()
    if changed is None:
        (folder / "recipe.json").unlink()
    for name, value in (changed or {}).items():
        file = folder / ("environment.json" if name == "facts" else "recipe.json")
        plain = json.loads(file.read_text())
        file.write_text(json.dumps({**plain, name: {**(plain[name] or {}), **value}}))
    with nullcontext() if message is None else pytest.raises(ConfigError, match=message):
        comparison._planned([one], tmp_path, "cpu", None, download=False)
    assert (folder / "checkpoints" / "last.ckpt").exists()


def test_what_is_found_before_anything_is_trained(recipe: Recipe, tmp_path: Path) -> None:
    missing = recipe.override([f"data.root={tmp_path}", "data.name=mnist", "data.shape=1,28,28", "data.levels=256"])
    with pytest.raises(DataError, match="--no-download"):
        compare([missing], out=tmp_path / "out")
    with refuses(ConfigError, "digits", "42"):
        compare([recipe, recipe.override(["optimizer.lr=1"])], out=tmp_path / "out")
    with refuses(ConfigError, "max_time"):
        compare([recipe], out=tmp_path / "out", max_time=math.nan)
    assert not (tmp_path / "out").exists()
    with training_lock(tmp_path), refuses(ConfigError, str(tmp_path)):
        compare([recipe], out=tmp_path)


# processes -----------------------------------------------------------------------------------------------------

PROGRAM = """
import json, os, shutil, sys
from pathlib import Path

here = Path(HERE)
_, file, option, folder = sys.argv[1:5]
recipe = json.loads(Path(file).read_text())
with (here / "calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
print("the progress of a run")
shutil.copytree(here / "run", folder, dirs_exist_ok=True)
(Path(folder) / "recipe.json").write_text(json.dumps(recipe))
if (here / recipe["name"]).exists():
    (Path(folder) / "result.json").unlink()
    sys.exit("Error: training stopped: the gradient is nan.")
"""

WAITS = """
import json, signal, sys
from pathlib import Path

name, here = json.loads(Path(sys.argv[2]).read_text())["name"], Path(HERE)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
(here / f"{name}.begun").touch()
signal.sigwait([signal.SIGTERM])
(here / f"{name}.ended").touch()
sys.exit(143)
"""


class Training:
    """A stand-in for ``rnode-cli train``, which copies a run folder, and the words it was called with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_run(folder / "run", get_recipe("digits"), **FEW)
        self.program = folder / "rnode_cli.py"
        self.program.write_text(PROGRAM.replace("HERE", repr(str(folder))))

    def calls(self) -> list[list[str]]:
        """The words of each call since the last question."""
        log = self.folder / "calls"
        lines = log.read_text().splitlines() if log.is_file() else []
        log.unlink(missing_ok=True)
        return list(map(json.loads, lines))


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Training:
    """What the comparisons of a test start instead of ``rnode-cli``."""
    fake = Training(tmp_path / "fake")
    monkeypatch.setattr(comparison, "_RNODE_CLI", (sys.executable, str(fake.program)))
    return fake


def run(recipe: Recipe, out: Path, *configurations: str, **options: Any) -> Comparison:
    recipes = configured_recipes(recipe, configurations)
    return compare(recipes, out=out, accelerator="cpu", **{"announce": None, **options})


def test_a_comparison_calls_train_and_continues(
    recipe: Recipe,
    training: Training,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    recipes = configured_recipes(recipe, ("none", "rnode"), seeds=2)
    result = compare(recipes, out=tmp_path / "c", accelerator="cpu", max_time=90.0)
    assert result.failed == ()
    assert ["/".join(path.parts[-2:]) for path in result.runs] == [
        "digits-none/42", "digits-rnode/42", "digits-none/43", "digits-rnode/43",
    ]  # fmt: skip
    files = tmp_path / "c" / "recipes"
    limits = ["--max-time", "90.000", "--device", "cpu", "--devices", "1", "--no-next"]
    for one, folder, call in zip(recipes, result.runs, training.calls(), strict=True):
        file = files / f"{one.name}-{one.training.seed}.json"
        assert call == ["train", str(file), "--run-folder", str(folder), *limits]
        assert Recipe.from_plain(json.loads(file.read_text())) == one
    assert list(result.report.table.columns) == ["none", "rnode"]
    assert [line for line in capfd.readouterr().out.splitlines() if "run " in line and "of 4" in line] == [
        f"run {number} of 4: {path.parent.name}, seed {path.name}" for number, path in enumerate(result.runs, 1)
    ]
    killed = write_run(tmp_path / "c" / "runs" / "digits-kinetic" / "42", recipes[0], finished=False, **FEW)
    (killed / "recipe.json").unlink()  # before its first checkpoint
    (killed / "metrics.csv").write_text("of the first step")
    again = run(recipe, tmp_path / "c", "none", "kinetic", announce=print)
    assert (killed / "metrics.csv").read_bytes() == (training.folder / "run" / "metrics.csv").read_bytes()
    assert [call[1] for call in training.calls()] == [str(tmp_path / "c" / "recipes" / "digits-kinetic-42.json")]
    assert again.runs[0] == result.runs[0]
    shown = capfd.readouterr().out
    assert f"run 1 of 2: digits-none, seed 42: done, in {again.runs[0]}\n" in shown
    assert shown.endswith("run 2 of 2: digits-kinetic, seed 42\nthe progress of a run\n")


def test_a_run_that_fails_leaves_the_others_alone(recipe: Recipe, training: Training, tmp_path: Path) -> None:
    (training.folder / "digits-none").touch()
    result = run(recipe, tmp_path / "c", "none", "rnode")
    assert result.failed == ("run 1 of 2: digits-none, seed 42: its process ended with exit code 1.",)
    assert [path.parent.name for path in result.runs] == ["digits-none", "digits-rnode"]
    assert "not finished: step 1" in result.report.html.read_text()
    shutil.rmtree(training.folder / "run")
    (training.folder / "run").mkdir()
    with pytest.raises(TrainingError, match=r"digits-none, seed 42: its process ended with exit code 1"):
        run(recipe, tmp_path / "d", "none")


def test_a_run_that_was_killed(recipe: Recipe, training: Training, tmp_path: Path) -> None:
    training.program.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    with pytest.raises(TrainingError, match=r"exit code -9\. It was killed: [^.]*\. run 2"):
        run(recipe, tmp_path / "c", "none", "rnode")


def test_a_run_of_another_process_is_refused(recipe: Recipe, training: Training, tmp_path: Path) -> None:
    recipes = configured_recipes(recipe, ("kinetic", "none"))
    busy = write_run(tmp_path / "c" / "runs" / "digits-none" / "42", recipes[1], finished=False, **FEW)
    with (
        training_lock(busy),
        refuses(ConfigError, "digits-none/42"),
    ):
        compare(recipes, out=tmp_path / "c", accelerator="cpu")
    assert training.calls() == []


@pytest.mark.parametrize(("accelerator", "words"), [("gpu", "gpu --devices 1"), ("cuda:1", "cuda:1")])
def test_a_run_takes_one_device(
    recipe: Recipe,
    training: Training,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    accelerator: str,
    words: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    compare([recipe], out=tmp_path, accelerator=accelerator)
    assert " ".join(training.calls()[0]).endswith(f"--device {words} --no-next")


def test_the_command(training: Training, tmp_path: Path) -> None:
    options = ["--max-steps", "2", "--device", "cpu", "--out", tmp_path / "c"]
    options += as_options(*(setting for setting in SETTINGS if "max_steps" not in setting))
    (tmp_path / "some.json").write_text('{"k": {"kinetic": [0.1, 0.2]}}')
    chosen = ["--configuration", "ffjord", "--configuration", tmp_path / "some.json"]
    result = rnode("compare", "digits", *chosen, *options)
    assert result.exit_code == 0, result.output
    assert "run 3 of 3: digits-k-kinetic=0.2, seed 42" in result.output
    report = tmp_path / "c" / "report.html"
    last = tmp_path / "c" / "runs" / "digits-k-kinetic=0.2" / "42"
    assert result.output.count("Next:") == 1
    assert result.output.rstrip().endswith(f"Next: open {report} in a browser\n      rnode-cli diagnose {last}")
    assert "dopri5, tolerance 1e-05" in result.output
    (training.folder / "digits-l1").touch()
    chosen = ["--configuration", "ffjord", "--configuration", "l1"]
    failed = rnode("compare", "digits", *chosen, *options)
    assert failed.exit_code == 1
    assert "run 1 of 2: digits-ffjord, seed 42: done" in failed.output
    assert "Error: run 2 of 2: digits-l1, seed 42: its process ended with exit code 1." in failed.output


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_its_end_is_the_end_of_its_run(training: Training, tmp_path: Path, signum: int) -> None:
    training.program.write_text(WAITS.replace("HERE", repr(str(tmp_path))))

    def end_when_begun() -> None:
        while not list(tmp_path.glob("*.begun")):
            time.sleep(0.01)
        os.kill(os.getpid(), signum)

    threading.Thread(target=end_when_begun, daemon=True).start()
    chosen = [word for name in ("none", "kinetic") for word in ("--configuration", name)]
    result = rnode("compare", "digits", *chosen, "--device", "cpu", "--out", tmp_path / "c")
    assert result.exit_code == 128 + signum
    assert "The same command continues it." in result.output
    assert "exit code" not in result.output, "a run that was ended has not failed"
    assert {each.stem for each in tmp_path.glob("*.ended")} == {"digits-none"}
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.usefixtures("ctrl_c")
def test_a_line_that_cannot_be_printed_leaves_no_process(
    recipe: Recipe, training: Training, tmp_path: Path
) -> None:
    training.program.write_text(WAITS.replace("HERE", repr(str(tmp_path))))

    def announce(line: str) -> None:
        if "run 1" not in line:
            raise BrokenPipeError(line)
        threading.Thread(target=interrupt_when_begun, daemon=True).start()

    def interrupt_when_begun() -> None:
        while not (tmp_path / "digits-none.begun").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(BrokenPipeError):
        run(recipe, tmp_path / "c", "none", "rnode", announce=announce)
    assert (tmp_path / "digits-none.ended").exists()


# real training -------------------------------------------------------------------------------------------------


def test_configurations_begin_equally(recipe: Recipe, tmp_path: Path) -> None:
    """The first step's density is the same number, the later ones are not."""
    recipe = recipe.override(["training.max_steps=3", "training.val_every_steps=3", "optimizer.warmup=0"])
    none, taylor = (rows(tiny_runs.run(one, tmp_path).run.path)
                    for one in configured_recipes(recipe, ("none", "taylor:2")))  # fmt: skip
    assert none[0]["train/bpd"] == taylor[0]["train/bpd"]
    assert none[2]["train/bpd"] != taylor[2]["train/bpd"]
    assert float(taylor[2]["train/taylor:2"]) > 0
