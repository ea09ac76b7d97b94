"""Training: what a run writes, that it repeats and resumes to the bit, and skips bad steps."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import pytorch_lightning as L
import tiny_runs
import torch
from problems import refuses
from pytorch_lightning.callbacks import EarlyStopping
from tiny_runs import BeforeStep, SpoiltGradient, assert_same, run, signal_at, tiny_recipe, weights
from torch.utils._python_dispatch import TorchDispatchMode

from rnode_plugin import get_recipe, load_flow
from rnode_plugin.errors import CheckpointError, ConfigError, RnodeError, SolverError, TrainingError
from rnode_plugin.experiments.data.batches import ArrayDataset
from rnode_plugin.experiments.data.identity import of_samples
from rnode_plugin.experiments.random_streams import Stream, seeded
from rnode_plugin.experiments.recipes.recipe import Optimizer, Recipe
from rnode_plugin.experiments.runs.run import Run
from rnode_plugin.experiments.training import fit as fit_module
from rnode_plugin.experiments.training import processes, progress, stop
from rnode_plugin.experiments.training.checkpoints import read_checkpoint
from rnode_plugin.experiments.training.experiment import Experiment
from rnode_plugin.experiments.training.failures import add_resume_hint
from rnode_plugin.experiments.training.fit import FitResult
from rnode_plugin.experiments.training.folder import RunFolder
from rnode_plugin.experiments.training.module import RnodeModule
from rnode_plugin.experiments.training.optimizers import learning_rate_factor
from rnode_plugin.experiments.training.plan import ROWS, Resumed, RunOptions, RunPlan
from rnode_plugin.experiments.training.saves import Checkpoints
from rnode_plugin.experiments.training.step import LikelihoodLoss, StepTerms
from rnode_plugin.experiments.training.stop import StopAt, TrainingInterrupted
from rnode_plugin.experiments.training.trainer import Hooks
from rnode_plugin.flows.multiscale import dequantize

SETTINGS = [
    "data.batch_size=50", "data.train_images=200", "training.val_images=60", "data.val_batch_size=40",
    "training.max_steps=6", "training.sample_images=2",
]  # fmt: skip


@pytest.fixture
def recipe() -> Recipe:
    """Six steps, four to an epoch, with a validation after the fourth and the last."""
    return tiny_recipe(*SETTINGS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    """A finished run of the recipe above, which tests leave as it is."""
    return run(tiny_recipe(*SETTINGS), tmp_path_factory.mktemp("whole") / "runs")


def copy_of(fitted: FitResult, folder: Path) -> FitResult:
    """The same run in another folder, to change."""
    shutil.copytree(fitted.run.path, folder / "digits" / "0")
    return fitted._replace(run=Run(folder / "digits" / "0"))


def rows(fitted: FitResult) -> list[dict[str, str]]:
    return tiny_runs.rows(fitted.run.path)


def test_a_run_and_what_it_leaves(recipe: Recipe, whole: FitResult) -> None:
    fitted, folder = whole, whole.run.path
    assert folder.parts[-3:] == ("runs", "digits", "0")
    assert (fitted.result.steps, fitted.result.planned, fitted.result.stopped) == (6, 6, "finished")
    assert fitted.run.recipe() == recipe
    checkpoints = sorted(each.name for each in (folder / "checkpoints").iterdir())
    assert checkpoints == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    grids = ["best.png", "step-0000004.png", "step-0000006.png"]
    assert sorted(each.name for each in (folder / "samples").iterdir()) == grids
    assert sorted(p.name for p in folder.iterdir()) == [
        ".lock", "checkpoints", "environment.json", "images.csv", "metrics.csv", "recipe.json", "result.json",
        "samples",
    ]  # fmt: skip
    assert fitted.result.evaluation is not None
    read = fitted.run.read()
    assert read.result == fitted.result
    assert read.picture == (fitted.samples, None)
    assert [len(mean.samples) for mean in fitted.result.evaluation.means.values()] == [60, 60]
    found = rows(fitted)
    assert [int(row["step"]) for row in found] == [1, 2, 3, 4, 4, 5, 6, 6]
    train = {"epoch", "lr", "step", "train/bpd", "train/grad_norm", "train/jacfrob", "train/kinetic", "train/loss",
             "train/nfe", "train/skipped"}  # fmt: skip
    assert set(found[0]) == train
    assert set(found[4]) == {"step", "val/bpd", "val/gap", "val/jacfrob", "val/kinetic", "val/nfe", "epoch"}
    assert [float(row["lr"]) for row in found[:3]] == pytest.approx([2e-3 / 3, 2e-3 * 2 / 3, 2e-3])
    assert float(found[-1]["val/bpd"]) < float(found[0]["train/bpd"])
    assert fitted.result.evaluation.means["dirty"].mean == pytest.approx(float(found[-1]["val/bpd"]), abs=0.02)
    assert fitted.result.run_seconds > 0


def test_the_numbers_of_a_row(whole: FitResult) -> None:
    """The loss is eq. 17 of the other columns; a validation has all held-out images and the weights of its step."""
    found = rows(whole)
    for row in found:
        if "train/loss" in row:
            nll = (float(row["train/bpd"]) - math.log2(17)) * math.log(2)
            weight = 0.01 * (float(row["train/kinetic"]) + float(row["train/jacfrob"]))
            assert float(row["train/loss"]) == pytest.approx(nll + weight, abs=1e-5)
    recipe, flow = tiny_recipe(*SETTINGS), load_flow(whole.run.last)
    coarse = dataclasses.replace(recipe.solver, quadrature="full")  # not the random products of a step
    held_out = recipe.load_data().val[:60]
    bits, gaps, costs = [], [], []
    penalties: dict[str, list[float]] = {"kinetic": [], "jacfrob": []}
    for index, batch in enumerate((held_out[:40], held_out[40:])):
        for solver in (None, coarse):
            with torch.no_grad(), seeded(recipe.training.seed, Stream.VALIDATE, 0, index):
                x = dequantize(torch.from_numpy(np.array(batch)), 17)
                output = flow.encode(x, solver=solver, penalties=True)
            log_prob = output.logdet - (output.z**2 + math.log(2 * math.pi)).sum(1) / 2
            (gaps if solver else bits).extend((math.log2(17) - log_prob / (64 * math.log(2))).tolist())
            if solver is None:
                costs += [output.nfe] * len(batch)
                for name, values in penalties.items():
                    values += (output.regularization[name] / 64).tolist()
    last = {name: float(value) for name, value in found[-1].items()}
    assert last["val/bpd"] == pytest.approx(np.mean(bits), abs=1e-5)
    assert last["val/gap"] == pytest.approx(np.mean(gaps[:40]) - np.mean(bits[:40]), abs=1e-5)
    assert last["val/nfe"] == pytest.approx(np.mean(costs))
    for name, values in penalties.items():
        assert last[f"val/{name}"] == pytest.approx(np.mean(values), rel=1e-4)


def test_more_validations_change_no_number(recipe: Recipe, whole: FitResult, tmp_path: Path) -> None:
    torch.rand(3)
    often = run(recipe.override(["training.val_every_steps=1", "training.sample_images=0"]), tmp_path)
    assert torch.equal(weights(often.run.path), weights(whole.run.path))
    steps = [[row for row in rows(each) if "lr" in row] for each in (often, whole)]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("settings", [
    # in single precision are runs of test_killed_runs and test_table_runs
    ("training.precision=64-true",),
    ("solver.method=dopri5", "solver.quadrature=full", "training.accumulate=2", "training.warm_start=true"),
])  # fmt: skip
def test_interrupted_and_resumed_equals_uninterrupted(settings: tuple[str, ...], tmp_path: Path) -> None:
    recipe = tiny_recipe("training.ema=0.9", "optimizer.name=muon", "training.matching=4", *settings)
    before = signal.getsignal(signal.SIGTERM)
    whole = run(recipe, tmp_path / "a")
    part = run(recipe, tmp_path / "b", callbacks=[signal_at(2)])  # inside of the flow matching
    assert (part.result.stopped, part.result.steps, part.result.evaluation) == ("SIGTERM", 2, None)
    assert signal.getsignal(signal.SIGTERM) == before  # the run's own handlers are gone again
    for at in (4, 6):  # its last step, which is right before a validation, and after it
        part = run(recipe, tmp_path, resume=part.run.path, callbacks=[signal_at(at)])
    rest = run(recipe, tmp_path / "elsewhere", resume=part.run.path)
    assert rest.run == part.run
    assert rest.result.run_seconds > part.result.run_seconds
    assert rest.result.processor_seconds >= part.result.processor_seconds > 0
    assert_same(whole.run.path, rest.run.path)


@pytest.mark.usefixtures("ctrl_c")
def test_a_signal_during_the_last_validation_waits_for_it(recipe: Recipe, tmp_path: Path) -> None:
    class InTheLastValidation(L.Callback):
        def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.global_step == 6:
                os.kill(os.getpid(), signal.SIGINT)

    fitted = run(recipe, tmp_path, callbacks=[InTheLastValidation()])
    assert (fitted.result.stopped, fitted.result.steps, fitted.result.evaluation) == ("SIGINT", 6, None)
    assert "val/bpd" in rows(fitted)[-1]
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_ffjord_measures_penalties_without_training_them(recipe: Recipe, tmp_path: Path) -> None:
    ffjord = recipe.ffjord().override(["solver.atol=1e-3", "solver.rtol=1e-3", "training.max_steps=2"])
    fitted = run(ffjord, tmp_path)
    assert fitted.run.path.parent.name == "digits-ffjord"
    first, *_, last = rows(fitted)
    assert "train/kinetic" not in first
    assert "val/gap" not in last, "an adaptive training solver has none"
    assert float(first["train/loss"]) == pytest.approx(
        (float(first["train/bpd"]) - math.log2(17)) * math.log(2), abs=1e-5
    )
    assert float(last["val/kinetic"]) > 0
    assert load_flow(fitted.run.path).solver == ffjord.test_solver


def test_a_lambda_that_warms_up_follows_the_steps_of_likelihood(tmp_path: Path) -> None:
    recipe = tiny_recipe(
        "training.matching=3", "training.max_steps=7", "training.accumulate=2",
        "regularizers.kinetic=0", "regularizers.jacfrob=0", "regularizers.l1=linear_warmup(2)*30",
        "solver.quadrature=full", "training.log_every=1",
    )  # fmt: skip
    fitted = run(recipe, tmp_path)
    steps = [{name: float(value) for name, value in row.items()} for row in rows(fitted) if "train/l1" in row]
    assert len(steps) == 4
    for done, row in enumerate(steps):
        nll = (row["train/bpd"] - math.log2(17)) * math.log(2)
        assert row["train/loss"] - nll == pytest.approx(min(done / 2, 1) * 30 * row["train/l1"], abs=1e-5)
    assert steps[-1]["train/l1"] > 1e-4
    stored = json.loads((fitted.run.path / "recipe.json").read_text())
    assert stored["regularizers"]["l1"] == "linear_warmup(2)*30.0"


def test_going_back_begins_a_new_run(recipe: Recipe, whole: FitResult, tmp_path: Path) -> None:
    """The score of a run is one of its steps, also where an abandoned continuation was better."""
    folder = copy_of(whole, tmp_path).run
    before = {each: each.read_bytes() for each in folder.path.rglob("*") if each.is_file()}
    worse = recipe.override(["training.max_steps=7", "optimizer.lr=0.12"])
    copied = shutil.copy(folder.previous, tmp_path / "copied.ckpt")
    fitted = run(worse, tmp_path, resume=folder.previous)
    assert {each: each.read_bytes() for each in before} == before
    assert fitted.run.path == tmp_path / "digits" / "1"
    done = read_checkpoint(folder.previous)["global_step"]
    kept = [row for row in tiny_runs.rows(folder.path) if int(row["step"]) <= done]
    assert rows(fitted)[: len(kept)] == kept
    assert [row["step"] for row in rows(fitted) if "train/loss" in row] == list("1234567")
    assert read_checkpoint(fitted.run.best)["global_step"] == fitted.result.steps == 7
    elsewhere = run(worse, tmp_path, resume=copied)
    assert [row["step"] for row in rows(elsewhere) if "train/loss" in row] == ["6", "7"]


def test_damaged_weights_are_written_again(
    recipe: Recipe, whole: FitResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run could not end with a damaged best.ckpt, nor go on from a damaged last.ckpt."""
    folder = copy_of(whole, tmp_path).run
    os.truncate(folder.best, 100)
    os.truncate(folder.last, 100)
    seen: list[int] = []
    looks = BeforeStep(lambda module, step: seen.append(folder.last.stat().st_size))
    longer = recipe.override(["training.max_steps=8", "training.save_every=100", "optimizer.lr=0.2"])
    fitted = run(longer, tmp_path, resume=folder.path, callbacks=[looks])
    assert (fitted.run, fitted.result.steps) == (folder, 8)
    assert (seen[0], seen[1]) == (100, folder.previous.stat().st_size)
    assert read_checkpoint(folder.best)["global_step"] == 8
    assert "best.ckpt cannot be read" in (said := capsys.readouterr().err)
    assert "The next validation writes it again." in said


def test_the_newest_intact_checkpoint_continues_in_place(recipe: Recipe, whole: FitResult, tmp_path: Path) -> None:
    folder = copy_of(whole, tmp_path).run
    for checkpoint, damage, run_of in (
        (folder.last, None, folder), (folder.previous, None, None), (folder.best, None, None),
        (folder.previous, lambda: os.truncate(folder.last, 9), folder), (folder.best, None, None),
        (folder.previous, folder.last.unlink, folder), (folder.best, folder.previous.unlink, folder),
    ):  # fmt: skip
        if damage is not None:
            damage()
        resumed = Resumed.of(checkpoint, recipe)
        assert (resumed.run, resumed.metrics) == (run_of, folder.metrics)


def test_epochs_of_other_batches_count_in_full_after_a_resume(tmp_path: Path) -> None:
    """Four steps of 20 images are an epoch of 80, and eight steps of 10 are the second one."""
    recipe = tiny_recipe("training.max_steps=none", "training.max_epochs=2", "training.log_every=2")
    part = run(recipe, tmp_path, callbacks=[signal_at(4)])
    halved = recipe.override(["data.batch_size=10"])
    part = run(halved, tmp_path, resume=part.run.path, callbacks=[signal_at(6)])
    rest = run(halved, tmp_path, resume=part.run.path)
    assert (rest.result.steps, rest.result.planned) == (12, 12)
    epochs = [(int(row["step"]), float(row["epoch"])) for row in rows(rest) if "lr" in row]
    assert epochs == [(2, 0.5), (4, 1.0), (6, 1.25), (8, 1.5), (10, 1.75), (12, 2.0)]


@pytest.mark.parametrize(("settings", "message"), [
    (["model.hidden=9", "model.alpha=0.1"], r"model\.hidden is 8 there and 9 here, model\.alpha is 0\.05 there"),
    (["training.matching=7", "training.max_steps=9"], r"settings: training\.matching is 0 there and 7 here"),
    (["training.weights=mnist-pretrained"], r"settings: training\.weights is None there"),
    (["data.name=mnist"], r"data\.name is digits there and mnist here"),  # before a download
])  # fmt: skip
def test_a_resume_that_makes_no_sense_is_refused(
    recipe: Recipe, whole: FitResult, tmp_path: Path, settings: list[str], message: str
) -> None:
    fitted = copy_of(whole, tmp_path)
    with pytest.raises(RnodeError, match=message):
        run(recipe.override(settings), tmp_path, resume=fitted.run.path, download=True)
    assert fitted.run.result.exists()
    assert len(list((tmp_path / "digits").iterdir())) == 1  # nothing was begun


def test_a_checkpoint_of_another_trainer_is_not_resumed(recipe: Recipe, whole: FitResult, tmp_path: Path) -> None:
    """It has neither the epochs nor the best score of the run, which would count as zero and as infinite."""
    contents = read_checkpoint(whole.run.last)
    del contents["callbacks"][ROWS]
    torch.save(contents, file := tmp_path / "theirs.ckpt")
    with refuses(CheckpointError, "--weights"):
        run(recipe.override(["training.max_steps=9"]), tmp_path / "runs", resume=file)
    assert not (tmp_path / "runs").exists()


def test_a_run_killed_during_its_evaluation_is_evaluated(recipe: Recipe, whole: FitResult, tmp_path: Path) -> None:
    """Again, if its evaluation has failed, and also with another test solver."""
    fitted = copy_of(whole, tmp_path)
    assert fitted.result.evaluation is not None
    for settings, factor in (([], 1), (["test_solver.step=0.5"], 2)):
        fitted.run.result.unlink()
        again = run(recipe.override(settings), tmp_path, resume=fitted.run.path)
        assert (again.result.steps, again.run, again.result.stopped) == (6, fitted.run, "finished")
        assert again.result.evaluation is not None
        assert (again.result.evaluation.means["dirty"] == fitted.result.evaluation.means["dirty"]) == (factor == 1)
        assert again.result.evaluation.nfe_mean == factor * fitted.result.evaluation.nfe_mean
        assert fitted.run.result.exists()


def saves(recipe: Recipe, *, devices: int = 1, validated: slice = slice(60)) -> Checkpoints:
    plan, val = RunPlan.of(recipe, 200, devices), recipe.load_data().val[validated]
    data = SimpleNamespace(val=val, identity=("of the training", of_samples(val)))
    experiment: Any = SimpleNamespace(recipe=recipe, data=data, resumed=None)
    return Hooks.of(experiment, plan, RunOptions(progress=False)).saves


def test_another_validation_chooses_the_best_weights_again(recipe: Recipe) -> None:
    """The lowest value of easier images would keep weights that are no longer the best."""
    before = saves(recipe)
    before.best = 1.0
    # a validation takes signs whatever the training does
    same = saves(recipe.override(["training.max_steps=9", "model.trace_estimator=gaussian"]))
    settings = ("training.val_images=30", "test_solver.step=0.5", "data.val_batch_size=5")
    others = [saves(recipe.override([each])) for each in settings]
    assert saves(recipe, devices=2).state_dict()["validation"] == before.state_dict()["validation"]
    others += [saves(recipe, validated=slice(59)), saves(recipe, validated=slice(59, None, -1))]
    for later, best in ((same, 1.0), *((other, math.inf) for other in others)):
        later.load_state_dict(before.state_dict())
        assert later.best == best


def test_a_process_with_another_checkpoint_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each machine of a run may have its own copy, of the same step or of another one."""
    monkeypatch.setattr(processes, "of_all", lambda trainer, own: [{"the SHA-256 of its checkpoint": "a"}, own])
    resumed = SimpleNamespace(sha256="a")
    experiment: Any = SimpleNamespace(resumed=resumed)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(broadcast=lambda run: run))
    RunFolder(experiment).setup(trainer, trainer, "fit")
    resumed.sha256 = "b"
    with refuses(ConfigError, "checkpoint"):
        RunFolder(experiment).setup(trainer, trainer, "fit")


@pytest.mark.parametrize(("signum", "again"), [
    (signal.SIGINT, "Press Ctrl-C again to stop at once."), (signal.SIGTERM, "A second SIGTERM stops it at once."),
])  # fmt: skip
def test_the_first_signal_is_answered(
    signum: signal.Signals, again: str, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = RunPlan(4, 8, 4)
    for each, said in (
        (StopAt(plan), ""),
        (StopAt(plan, tells=True), f"\nStopping after this step or validation. {again}\n"),
    ):
        each.receive(signum)
        assert capfd.readouterr().err == said


def test_a_second_signal_ends_at_once_but_no_echo_does(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(stop, "time", SimpleNamespace(monotonic=lambda: now[0]))
    for signum, later, ends in (
        (signal.SIGTERM, 0.0, False),
        (signal.SIGTERM, 2.0, True),
        (signal.SIGINT, 0.0, True),
    ):
        decides = StopAt(RunPlan(4, 8, 4))
        decides.receive(signum)
        now[0] += later
        with pytest.raises(TrainingInterrupted) if ends else nullcontext():
            decides.receive(signum)


def test_a_run_with_all_steps_was_not_stopped_by_its_limit(recipe: Recipe) -> None:
    module: Any = None
    for step, out_of_time in ((1, True), (6, False)):
        decides = StopAt(RunPlan.of(recipe, 200), max_time=1e-9)
        trainer: Any = SimpleNamespace(global_step=step, world_size=1, should_stop=False, accumulate_grad_batches=1)
        decides.on_train_batch_end(trainer, module, None, None, 0)
        assert (trainer.should_stop, decides.out_of_time) == (True, out_of_time)


def test_processes_ask_each_other_about_once_a_second(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the same number of steps in each, by the slowest, before each validation and at the last step."""
    longest, asked, clock = [0.0], list[int](), [0.0]
    monkeypatch.setattr(stop.time, "monotonic", lambda: clock[0])
    longer = recipe.override(["training.max_steps=60", "training.val_every_steps=25"])
    decides = StopAt(RunPlan.of(longer, 200, 2))

    def reduce(values: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert reduce_op == "max"
        asked.append(trainer.global_step)
        return values.maximum(torch.tensor([0.0, 0.0, longest[0]]))  # of another process

    module: Any = None
    trainer: Any = SimpleNamespace(
        global_step=0, world_size=2, should_stop=False, accumulate_grad_batches=1,
        strategy=SimpleNamespace(reduce=reduce, root_device=torch.device("cpu")),
    )  # fmt: skip
    for step in range(1, 61):
        clock[0] += 0.05
        longest[0] = 0.1 if step < 30 else 0.4
        trainer.global_step = step
        decides.on_train_batch_end(trainer, module, None, None, 0)
    assert asked == [1, 11, 21, 25, 35, 38, 41, 44, 47, 50, 53, 56, 59, 60]
    assert not decides.out_of_time


def test_a_step_logs_on_the_cpu_or_where_it_computes(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning copies a number to the device, which waits for it."""
    module, seen = RnodeModule(recipe), dict[str, Any]()
    monkeypatch.setattr(RnodeModule, "_logs", True)
    monkeypatch.setattr(module, "log", lambda name, value, **_: seen.update({name: value}))
    module.to("meta")
    norm = torch.zeros((), device="meta")
    module._terms = [StepTerms(norm, {"loss": norm, "nfe": 8.0})]
    module._log_step(module.configure_optimizers()["optimizer"], norm=norm)  # pyright: ignore
    assert {name: value.device.type for name, value in seen.items()} == {
        "train/loss": "meta", "train/nfe": "cpu", "train/grad_norm": "meta", "train/skipped": "cpu", "lr": "cpu",
    }  # fmt: skip
    assert seen["train/nfe"] == 8.0


@pytest.mark.parametrize(("matching", "ends", "last"), [
    (0, [(1, 300.0)], "step 1/8  bits/dim 3.5000  300.00 s/step, about 35 min 00 s left"),
    # the pace of later lines leaves the first step out, and that of likelihood the steps of flow matching
    (0, [(1, 300.0), (2, 310.0)], "step 2/8  bits/dim 3.5000  10.00 s/step, about 1 min 00 s left"),
    (4, [(3, 0.3), (4, 0.4)], "step 4/8  bits/dim 3.5000  0.10 s/step"),
    (4, [(1, 0.1), (4, 0.4), (5, 10.4)], "step 5/8  bits/dim 3.5000  10.00 s/step, about 30.0 s left"),
    # of a resumed run
    (0, [(5, 10.0)], "step 5/8  bits/dim 3.5000  2.00 s/step, about 6.0 s left"),
    (4, [(5, 10.0)], "step 5/8  bits/dim 3.5000"),
])  # fmt: skip
def test_a_line_of_progress_has_the_pace_of_its_stage(
    recipe: Recipe,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    matching: int,
    ends: list[tuple[int, float]],
    last: str,
) -> None:
    terminal = progress.Terminal(recipe.override([f"training.matching={matching}"]), RunPlan(4, 8, 4))
    for step, spent in ends:
        monkeypatch.setattr(progress, "_INTERVAL", 0.0 if matching == 0 or step == ends[-1][0] else math.inf)
        terminal(step, {"train/bpd": 3.5}, train_seconds=spent, validates=False, ends=False, seconds_left=math.inf)
    assert [line for line in capsys.readouterr().out.splitlines() if "/8  " in line][-1] == last


@pytest.mark.parametrize(
    ("world", "accumulate", "threads", "device", "batch"),
    [(1, 1, 1, "cpu", "batch 50"), (4, 1, 2, "cpu", "batch 50 x 4 devices = 200 images a step"),
     (1, 3, 2, "cuda", "batch 50 x 3 times = 150 images a step"),
     (2, 2, 2, "cpu", "batch 50 x 2 devices x 2 times = 200 images a step")],
)  # fmt: skip
def test_the_first_lines_have_the_batch_and_the_threads(
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    world: int,
    accumulate: int,
    threads: int,
    device: str,
    batch: str,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    recipe = recipe.override(["data.batch_size=50", f"training.accumulate={accumulate}", "data.train_images=none"])
    strategy = SimpleNamespace(root_device=torch.device(device))
    trainer: Any = SimpleNamespace(world_size=world, strategy=strategy, precision="32-true")
    experiment = Experiment.of(recipe)
    plan = experiment.plan(world)
    fit_module._announce(experiment, plan, trainer, Run(Path("runs/digits/0")))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == (
        f"steps 0 to 6 ({plan.steps_per_epoch} an epoch), {batch}, 32-true, {world} x {device}, in runs/digits/0"
    )
    named = "2 threads: OMP_NUM_THREADS=1 is faster while other programs need the processor"
    assert (named in lines) == (threads > 1 and device == "cpu")


@pytest.mark.parametrize(("name", "settings", "gigabytes"), [
    ("mnist", (), 13), ("cifar10", (), 17), ("mnist", ("data.batch_size=20",), 1),
    ("mnist", ("solver.gradient=checkpointed",), 0), ("mnist", ("solver.method=dopri5",), 0), ("table", (), 0),
])  # fmt: skip
def test_the_memory_of_a_step_is_estimated(name: str, settings: tuple[str, ...], gigabytes: int) -> None:
    """A step of mnist was measured to need 12.3 GB, and one of 8 images 474 MB."""
    recipe = get_recipe(name).override(settings)
    needed = fit_module._step_memory(recipe, getattr(recipe.data, "batch_size", None) or 1)
    assert round(needed / 1e9) == gigabytes


def test_training_time_has_waits_and_no_validation(tmp_path: Path) -> None:
    class Slow(L.Callback):
        def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            time.sleep(0.4)

    def slow(self: Any, indices: Any) -> Any:
        time.sleep(0.1 * (len(indices) == 40))  # a training batch
        return original(self, indices)

    original = ArrayDataset.__getitems__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArrayDataset, "__getitems__", slow)
        settings = "data.val_batch_size=15", "data.batch_size=40", "training.max_steps=4", "training.log_every=1"
        fitted = run(tiny_recipe(*settings), tmp_path, callbacks=[Slow()])
    steps = [row for row in csv.DictReader(fitted.run.metrics.open()) if row["lr"]]
    seconds = [float(row["train_seconds"]) for row in steps]
    assert seconds == pytest.approx(list(itertools.accumulate(float(row["seconds_per_step"]) for row in steps)))
    assert 0.4 < seconds[-1] < fitted.result.run_seconds - 0.4


# the plan ------------------------------------------------------------------------------------------------------


def test_plan(recipe: Recipe) -> None:
    plan = RunPlan.of(recipe.override(["training.max_steps=none", "training.max_epochs=3"]), 230)
    assert (plan.steps_per_epoch, plan.total, plan.val_every) == (4, 12, 4)
    by_epochs = recipe.override(["training.val_every_steps=none", "training.val_every=2", "training.max_steps=9"])
    assert RunPlan.of(by_epochs, 230).val_every == 8
    assert RunPlan.of(by_epochs, 230, devices=2).steps_per_epoch == 2
    first = by_epochs.override(["training.max_epochs=1"])
    assert RunPlan.of(first, 230).total == 4  # the first limit stops
    equal = first.override(["training.max_steps=4"])
    fewer = first.override(["training.max_steps=3"])  # three quarters of the epoch
    limits = [RunPlan.of(each, 230).limited_by(each) for each in (recipe, first, equal, fewer)]
    assert limits == ["--max-steps", "--max-epochs", "--max-steps and --max-epochs", "--max-steps"]
    with refuses(ConfigError, "--max-epochs"):
        RunPlan.of(first.override(["training.matching=4"]), 230)
    assert RunPlan.of(by_epochs, 2000).val_every == 9  # never longer than the run
    short = recipe.override([
        "training.matching=2", "training.max_steps=12", "optimizer.schedule=cooldown", "optimizer.cooldown=0.3",
    ])  # fmt: skip
    # three tenths of two steps are none
    stages = {0: "flow matching", 2: "maximum likelihood", 9: "the learning rate falls until step 12"}
    for done in (0, 1, 2, 11):  # a run that is resumed there
        wanted = {first: what for first, what in stages.items() if first or done < 2}
        assert RunPlan.of(short, 230).stages(short, done=done) == wanted


def test_an_evaluation_that_fails_leaves_the_trained_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = SolverError("underflow", "the step size fell to 0", "Loosen atol.", t=0.0, step=1, nfe=6)
    monkeypatch.setattr(fit_module, "evaluate", Mock(side_effect=error))
    with pytest.raises(TrainingError, match=r"training is done, .* not be evaluated: .*fell to 0.*best\.ckpt"):
        run(tiny_recipe("training.max_steps=1"), tmp_path)
    (found,) = (tmp_path / "digits").iterdir()
    load_flow(found)


def test_samples_that_fail_do_not_cost_the_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    far = ["training.max_steps=1", "training.sample_images=1", "training.sample_temperatures=1e38"]
    fitted = run(tiny_recipe(*far), tmp_path)
    assert "no picture of samples of the best weights" in capsys.readouterr().err
    assert fitted.samples is None
    found = fitted.run.read()
    assert found.result is not None
    assert found.evaluation == fitted.result.evaluation
    assert found.picture is None


def test_the_scores_of_some_held_out_images_have_their_numbers(recipe: Recipe, whole: FitResult) -> None:
    with (whole.run.path / "images.csv").open() as file:
        numbers = [int(row["image"]) for row in csv.DictReader(file)]
    assert len(numbers) == 60  # of 297
    some, every = recipe.load_data(), recipe.load_data(all_val=True)
    np.testing.assert_array_equal(every.val[np.array(numbers)], some.val[:])


def test_learning_rate() -> None:
    constant = learning_rate_factor(Optimizer(warmup=4), lambda: 100)
    assert [constant(step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert learning_rate_factor(Optimizer(warmup=0), lambda: 100)(0) == 1
    cosine = learning_rate_factor(Optimizer(warmup=4, schedule="cosine"), lambda: 104)
    assert [cosine(step) for step in (0, 4, 54, 104)] == pytest.approx([0.25, 1, 0.5, 0])
    assert cosine(200) == pytest.approx(0)
    settings = Optimizer(warmup=2, schedule="cooldown", cooldown=0.5)
    falling = learning_rate_factor(settings, lambda: 8)
    assert [falling(step) for step in range(9)] == pytest.approx([0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    both = learning_rate_factor(settings, lambda: 12, matching=4)
    assert [both(step) for step in range(4, 13)] == [falling(step) for step in range(9)]
    assert [both(step) for step in range(4)] == [0.5, 1, 1, 0.5]
    faster = learning_rate_factor(dataclasses.replace(settings, matching_factor=2), lambda: 12, matching=4)
    assert [faster(step) for step in range(13)] == [1, 2, 2, 1, *(both(step) for step in range(4, 13))]


@pytest.mark.parametrize(("short", "long", "then"), [
    (("training.max_steps=4",), ("training.max_steps=6",), []),
    (("training.matching=4", "training.max_steps=6"), ("training.matching=6", "training.max_steps=8"), [1, 1]),
])  # fmt: skip
def test_a_run_whose_cooldown_has_not_begun_can_be_made_longer(
    short: tuple[str, ...], long: tuple[str, ...], then: list[float], tmp_path: Path
) -> None:
    cooldown = ("optimizer.warmup=1", "optimizer.schedule=cooldown", "optimizer.cooldown=0.5")
    planned = run(tiny_recipe(*cooldown, *long), tmp_path / "a")
    part = run(tiny_recipe(*cooldown, *short), tmp_path / "b", callbacks=[signal_at(2)])
    longer = run(tiny_recipe(*cooldown, *long), tmp_path / "b", resume=part.run.path)
    assert_same(planned.run.path, longer.run.path)
    rates = [float(row["lr"]) / 2e-3 for row in rows(longer) if "lr" in row]
    assert rates == pytest.approx([1, 1, 1, 1, 2 / 3, 1 / 3, *then])


@pytest.mark.parametrize("seconds", [math.nan, 0.0, -1.0])
def test_an_impossible_time_limit_is_refused(seconds: float) -> None:
    with refuses(ConfigError, "max_time", str(seconds)):
        RunOptions(max_time=seconds)


def test_the_last_step_is_logged(tmp_path: Path) -> None:
    """Also if it is not a multiple of ``log_every``, and if a time limit or a validation makes it the last one."""
    recipe = tiny_recipe("training.log_every=5", "training.max_steps=3")
    whole, cut = run(recipe, tmp_path / "steps"), run(recipe, tmp_path / "time", max_time=1e-6)
    good = EarlyStopping("val/bpd", stopping_threshold=100.0)
    early = run(recipe.override(["training.val_every_steps=2"]), tmp_path / "early", callbacks=[good])
    ends = ((whole, "finished", "3"), (cut, "max_time", "1"), (early, "early", "2"))
    for fitted, stopped, last in ends:
        assert fitted.result.stopped == stopped
        assert [row["step"] for row in rows(fitted) if "train/loss" in row] == [last]
        assert "val/bpd" in rows(fitted)[-1]
        assert read_checkpoint(fitted.run.last)["global_step"] == int(last)


# steps without a usable gradient -------------------------------------------------------------------------------


def states(folder: Run) -> tuple[dict, dict]:
    contents = read_checkpoint(folder.last)
    return contents["state_dict"], contents["optimizer_states"][0]["state"]


def test_a_bad_gradient_changes_neither_weights_nor_moments(tmp_path: Path) -> None:
    short = run(tiny_recipe("training.max_steps=1"), tmp_path / "short")
    fitted = run(tiny_recipe("training.max_steps=2"), tmp_path / "bad", callbacks=[SpoiltGradient(2)])
    assert fitted.result.stopped == "finished"
    for one, other in zip(states(short.run), states(fitted.run), strict=True):
        assert str(one) == str(other)
    train = [row for row in rows(fitted) if "train/loss" in row]
    assert [float(row["train/skipped"]) for row in train] == [0, 1]
    assert not math.isfinite(float(train[-1]["train/grad_norm"]))
    assert read_checkpoint(fitted.run.last)["progress"]["skipped"] == fitted.result.skipped == 1


class _FirstMoments(L.Callback):
    """Norm of Adam's first moment after each step."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        moments = [state["exp_avg"].flatten() for state in trainer.optimizers[0].state.values()]
        self.norms.append(float(torch.cat(moments).norm()))


def test_the_gradient_of_the_likelihood_is_clipped(tmp_path: Path) -> None:
    """The first moment of an optimizer is a tenth of the gradient. Matching and likelihood have one each."""
    settings = ("training.matching=1", "training.max_steps=2", "training.log_every=1")
    plain, clipped = _FirstMoments(), _FirstMoments()
    run(tiny_recipe(*settings), tmp_path / "plain", callbacks=[plain])
    fitted = run(tiny_recipe(*settings, "optimizer.clip=0.5"), tmp_path / "clipped", callbacks=[clipped])
    assert clipped.norms == pytest.approx([plain.norms[0], 0.05], rel=1e-5)
    logged = [float(row["train/grad_norm"]) for row in rows(fitted) if "train/grad_norm" in row]
    assert logged == pytest.approx([10 * norm for norm in plain.norms], rel=1e-5)  # before it is clipped
    assert min(plain.norms) > 0.05


def test_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    """A good step in between starts the count again."""
    recipe = tiny_recipe("training.max_skipped=2")
    with pytest.raises(TrainingError) as caught:
        run(recipe, tmp_path, callbacks=[SpoiltGradient(2, 6, 7)])
    message = str(caught.value)
    assert "the gradient is not finite at training step 7, and 2 steps in a row were skipped" in message
    folder = Run(tmp_path / "digits" / "0")
    assert f"The last good checkpoint is {folder.last}" in message
    contents = read_checkpoint(folder.last)
    assert (contents["global_step"], contents["progress"]["skipped"]) == (5, 1)
    assert all(p.isfinite().all() for p in load_flow(folder.last).parameters())
    fitted = run(recipe, tmp_path, resume=folder.path)  # without the cause
    assert (fitted.result.stopped, fitted.result.steps) == ("finished", 8)
    assert [row["step"] for row in rows(fitted) if "train/loss" in row] == list("12345678")


@pytest.mark.parametrize(
    ("files", "advice"),
    [
        ((), "No checkpoint had been written yet."),
        (("best.ckpt",), "The last good checkpoint is {best}; --resume {run} continues from it."),
        (("last.ckpt",), "The last good checkpoint is {last}; --resume {run} continues from it."),
        (("last.ckpt", "best.ckpt"), " continues from it, and --resume {best} begins a new run with the best one."),
    ],
)  # fmt: skip
def test_an_error_names_the_checkpoint_that_a_resumed_run_finds(
    tmp_path: Path, files: tuple[str, ...], advice: str
) -> None:
    """A full disk may have room for the best.ckpt of the first validation alone."""
    folder = Run(tmp_path / "run")
    folder.last.parent.mkdir(parents=True)
    for name in files:
        (folder.last.parent / name).touch()
    written: Any = SimpleNamespace(opened=folder, begun=True)
    with pytest.raises(TrainingError) as caught, add_resume_hint(written):
        raise TrainingError("the disk is full.")
    paths = {"best": folder.best, "last": folder.last, "run": folder.path}
    assert str(caught.value).startswith("training stopped: the disk is full. ")
    assert str(caught.value).endswith(advice.format(**paths))


def test_an_adaptive_solver_at_its_budget(tmp_path: Path) -> None:
    recipe = tiny_recipe("solver.quadrature=full").ffjord().override(["solver.max_nfe=3"])
    with pytest.raises(TrainingError, match=r"solver failed \(the budget of 3 evaluations.* 5 steps in a row"):
        run(recipe, tmp_path)
    failing = ["solver.method=dopri5", "solver.quadrature=full", "solver.max_nfe=3", "training.max_steps=2"]
    place = ["--device", "cpu", "--run-folder", tmp_path / "short"]
    shown = tiny_runs.rnode("train", "digits", *tiny_runs.as_options(*tiny_runs.SETTINGS, *failing), *place)
    assert "2 of 2, 2 of them without a usable gradient" in shown.output


def fail(*args: Any, **options: Any) -> Any:
    raise SolverError("underflow", "it stopped", "Do something.", t=0.5, step=3, nfe=77)


def test_a_failed_solve_is_skipped(tmp_path: Path) -> None:
    def at(module: Any, step: int) -> None:
        module.flow.__dict__.pop("encode", None)
        if step == 2:
            module.flow.encode = fail

    fitted = run(tiny_recipe("training.max_steps=3"), tmp_path, callbacks=[BeforeStep(at)])
    train = [row for row in rows(fitted) if "train/loss" in row]
    assert [row["train/nfe"] for row in train] == ["24.0", "77.0", "24.0"]
    assert [float(row["train/skipped"]) for row in train] == [0, 1, 1]
    assert set(train[0]) == set(train[1])  # in a run of several processes, means are taken over equal rows


def test_a_failed_solve_of_a_validation_ends_the_run(tmp_path: Path) -> None:
    class Fails(L.Callback):
        def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            pl_module.flow.encode = fail

    with refuses(TrainingError, "step 4"):
        run(tiny_recipe(), tmp_path, callbacks=[Fails()])


def test_a_solve_that_exploded_is_named(tmp_path: Path) -> None:
    def explode(module: Any, step: int) -> None:
        if step == 1:
            with torch.no_grad():
                for parameter in module.flow.parameters():
                    parameter.mul_(1e20)
                    parameter.add_(1e20)

    with pytest.raises(TrainingError, match=r"the solver failed \(the state or its log-determinant is no longer"):
        run(tiny_recipe("training.max_skipped=1"), tmp_path, callbacks=[BeforeStep(explode)])


class Copies(TorchDispatchMode):
    """Copies of the host's tensors to the device: the host waits for each, and no CUDA graph can hold one."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_) and result.is_meta:
            self.shapes += [x.shape for x in args if isinstance(x, torch.Tensor) and not x.is_meta]
        return result


@pytest.mark.parametrize("quadrature", ["full", "sampled"])
def test_a_step_copies_nothing_to_the_device(quadrature: str) -> None:
    recipe = tiny_recipe("solver.step=0.5", f"solver.quadrature={quadrature}", "data.shape=1,4,4")
    with torch.device("meta"):
        flow = recipe.build_flow()
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8, device="meta")
    with Copies() as copies:
        torch.zeros(3).to("meta")  # shows that copies are seen
        LikelihoodLoss(flow, recipe)(images, 0).loss.backward()
    assert copies.shapes == [(3,)]
