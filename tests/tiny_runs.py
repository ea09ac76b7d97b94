"""Runs of the digits that take seconds, and a callback that does something to them at a step."""

from __future__ import annotations

import csv
import dataclasses
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as L
import torch
from click.testing import CliRunner, Result

from rnode_plugin import get_recipe
from rnode_plugin.cli import main
from rnode_plugin.experiments.recipes.recipe import Recipe
from rnode_plugin.experiments.training.checkpoints import read_checkpoint
from rnode_plugin.experiments.training.experiment import Experiment
from rnode_plugin.experiments.training.fit import FitResult, fit
from rnode_plugin.experiments.training.plan import RunOptions

SETTINGS = [
    "model.hidden=8", "model.layers=2", "solver.step=none", "test_solver.method=midpoint", "test_solver.step=none",
    "data.batch_size=20", "data.train_images=80", "training.val_images=15", "data.val_batch_size=15",
    "training.max_steps=8", "training.val_every_steps=4", "training.sample_images=0",
    "training.save_every=1", "optimizer.name=adam", "optimizer.schedule=constant", "optimizer.warmup=3",
    "optimizer.lr=2e-3",
]  # fmt: skip

# children of a server that has imported all: a start costs no seconds, and no thread of this process is copied
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["rnode_plugin.experiments.training.fit"])

SHARED: dict[str, tuple[str, ...]] = {
    "images": ("training.sample_images=2",),  # eight steps, with checkpoints of steps 7 and 8
    "averaged": ("training.ema=0.5", "training.max_steps=2"),
}
"""Settings of the runs that the fixture ``finished_run`` trains, by the names of the runs."""

TIMES = {"seconds", "seconds_per_step", "train_seconds"}


def tiny_recipe(*settings: str) -> Recipe:
    """Eight steps of 20 images, four to an epoch, with a validation after every fourth."""
    return get_recipe("digits").override([*SETTINGS, *settings])


def run(recipe: Recipe | Experiment, runs: Path, **options: Any) -> FitResult:
    """Train in this process on one CPU without a word."""
    names = {each.name for each in dataclasses.fields(RunOptions)} & options.keys()
    mine = {"runs": runs, "progress": False, **{name: options.pop(name) for name in names}}
    return fit(recipe, RunOptions(**mine), **{"accelerator": "cpu", "devices": 1, **options})


def as_options(*settings: str) -> list[str]:
    """Settings as the command line takes them."""
    return [word for setting in settings for word in ("--set", setting)]


def train_digits(*arguments: str) -> list[str]:
    """The command that trains the digits' recipe on the CPU."""
    return [sys.executable, "-m", "rnode_plugin", "train", "digits", "--device", "cpu", *arguments]


def rnode(*words: object) -> Result:
    """``rnode-cli`` with these words, in this process."""
    return CliRunner().invoke(main, list(map(str, words)), prog_name="rnode-cli")


def weights(run: Path) -> torch.Tensor:
    """All weights of a run's last checkpoint, one after the other."""
    state = read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]
    return torch.cat([tensor.flatten() for tensor in state.values()])


def rows(run: Path) -> list[dict[str, str]]:
    """The metrics of a run without its times."""
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in TIMES and v} for row in csv.DictReader(file)]


class BeforeStep(L.Callback):
    """Calls ``act(module, step)`` right before each training step, counted from 1."""

    def __init__(self, act: Callable[[Any, int], object]) -> None:
        self._act = act

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._act(pl_module, trainer.global_step + 1)


def signal_at(step: int, signum: int = signal.SIGTERM) -> L.Callback:
    """A callback that sends this process a signal in a step."""
    return BeforeStep(lambda module, at: os.kill(os.getpid(), signum) if at == step else None)


class Loud(L.Callback):
    """A callback that prints."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        print("training starts")


class SpoiltGradient(L.Callback):
    """Multiplies the gradient of some steps, counted from 1."""

    def __init__(self, *steps: int, factor: float = math.inf) -> None:
        self._steps, self._factor = steps, factor

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.global_step + 1 in self._steps:
            for parameter in pl_module.flow.parameters():
                parameter.grad *= self._factor


def train(runs: Path, output: Path, settings: list[str], options: dict[str, Any], before: str = "") -> None:
    """Train in a separate process, as the command line does, with all that is printed in a file.

    Args:
        before: Python statements to run first, whose function ``at(step)`` is called before each training step.
    """
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    names: dict[str, Any] = {"os": os, "signal": signal, "at": lambda step: None}
    exec(before, names)
    callback = BeforeStep(lambda module, step: names["at"](step))
    fitted = run(tiny_recipe(*settings), runs, callbacks=[callback], **options)
    print("ended:", fitted.result.stopped)


def assert_same(one: Path, other: Path) -> None:
    """Weights and their average, optimizer, schedule and metrics, to the bit."""
    a, b = (read_checkpoint(run / "checkpoints" / "last.ckpt") for run in (one, other))
    keys = {"state_dict", "optimizer_states", "lr_schedulers", "callbacks", "global_step"}
    for key in keys | a.keys() & {"current_model_state", "averaging_state"}:
        assert repr_exact(a[key]) == repr_exact(b[key]), key
    assert rows(one) == rows(other)


def repr_exact(value: Any) -> Any:
    """Something that is equal for equal bits, without the times."""
    if isinstance(value, dict):
        return {key: repr_exact(each) for key, each in value.items() if not str(key).endswith("_seconds")}
    if isinstance(value, (list, tuple)):
        return [repr_exact(each) for each in value]
    return value.numpy().tobytes() if hasattr(value, "numpy") else value
