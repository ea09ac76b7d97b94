"""A run of the digits that takes seconds, for tests that kill, starve and compare runs."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path
from typing import Any

from rnode_plugin import get_recipe
from rnode_plugin.recipes.schema import Recipe

SETTINGS = [
    "model.hidden=8", "solver.step=none", "test_solver.method=rk4", "test_solver.step=none",
    "data.batch_size=20", "data.train_images=80", "training.val_images=31", "data.val_batch_size=10",
    "training.max_steps=8", "training.check_every_steps=4", "training.sample_images=0",
    "training.save_every=1", "optimizer.schedule=constant", "optimizer.warmup=3", "optimizer.lr=2e-3",
]  # fmt: skip

_TIMES = {"seconds", "seconds_per_step", "train_seconds"}


def tiny_recipe(*settings: str) -> Recipe:
    return get_recipe("digits").override([*SETTINGS, *settings])


def rows(run: Path) -> list[dict[str, str]]:
    """The metrics of a run without its times."""
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in _TIMES and v} for row in csv.DictReader(file)]


def train(runs: Path, output: Path, settings: list[str], options: dict[str, Any], before: str = "") -> None:
    """Train in a process of its own, as the command line does, with all that is printed in a file.

    Args:
        before: Python statements to run first, in a function whose ``step`` is called before each training step.
    """
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    from rnode_plugin.training.fit import fit
    from rnode_plugin.training.lightning.module import FlowModule

    torch.set_num_threads(1)
    original = FlowModule.training_step
    names: dict[str, Any] = {"os": os, "signal": signal, "at": lambda step: None}
    exec(before, names)

    def training_step(self: FlowModule, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        names["at"](batch_idx + 1)
        return original(self, batch, batch_idx)

    FlowModule.training_step = training_step  # pyright: ignore[reportAttributeAccessIssue]
    result = fit(tiny_recipe(*settings), runs=runs, accelerator="cpu", devices=1, progress=False, **options)
    print("ended:", result.stopped)
