"""Run folders with known contents, written by the writers of training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rnode_plugin.experiments.data.facts import Facts
from rnode_plugin.experiments.evaluation.measures import Evaluation, Mean
from rnode_plugin.experiments.recipes.recipe import Recipe
from rnode_plugin.experiments.runs.environment import Environment
from rnode_plugin.experiments.runs.metrics import MetricsTable
from rnode_plugin.experiments.runs.results import Result
from rnode_plugin.experiments.runs.run import Run

ENVIRONMENT = Environment(
    packages={"rnode-plugin": "1.0", "torch": "2.9"},
    plugins={"a": "b 1"},
    python="3.12",
    platform="Linux",
    device="cpu",
    cuda=None,
    threads=2,
    cpus=None,
)

FEW: Any = {"steps": 1, "checks": (1,)}
"""Steps of a run that has no curves to draw, which would take longer than all else."""


def write_run(
    path: Path,
    recipe: Recipe,
    *,
    steps: int = 40,
    checks: Sequence[int] = (10, 20, 30, 40),
    bits: float = 2.0,
    jacfrob: float = 1.0,
    nfe: int = 90,
    finished: bool = True,
    stopped: str = "finished",
    images: Sequence[float] = (),
    devices: int = 1,
    facts: Facts | None = None,
    whole_jacobian: bool = False,
) -> Path:
    """A run of ``steps`` steps of half a second, ten to an epoch; its values are functions of the step's number.

    The first step takes nine seconds, as one that compiles. ``images`` are bits/dim of the held-out images.
    """
    path.mkdir(parents=True)
    run = Run(path)
    run.describe(recipe, dataclasses.replace(ENVIRONMENT, devices=devices), facts)
    table = MetricsTable(run.metrics)
    for step in range(1, steps + 1):
        times = {
            "epoch": step / 10,
            "seconds": step / 2,
            "seconds_per_step": 9.0 if step == 1 else 0.5,
            "train_seconds": step / 2,
        }
        table.add({**times, "train/bpd": bits + 10 / step, "train/nfe": 40 + step}, step)
        if step in checks:
            measured = {"val/jacfrob": jacfrob * step / steps, "val/kinetic": step / 100, "val/nfe": nfe + step}
            measured |= {name: times[name] for name in ("epoch", "seconds", "train_seconds")}
            table.add({**measured, "val/bpd": bits + 8 / step, "val/gap": -step / 1e4}, step)
    if finished:
        run.conclude(result_of(steps, stopped, bits, jacfrob, nfe, images, whole_jacobian), recipe)
    run.samples.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90), dtype=np.uint8)
    Image.fromarray(pixels).save(run.picture(None if finished else 30))
    return path


def result_of(
    steps: int,
    stopped: str = "finished",
    bits: float = 2.0,
    jacfrob: float = 1.0,
    nfe: int = 90,
    images: Sequence[float] = (),
    whole_jacobian: bool = False,
) -> Result:
    """A result with numbers that are easy to tell from each other."""
    evaluation = Evaluation(
        samples=len(images) or 297,
        means={
            "dirty": Mean(bits, 0.02, None, tuple(images)),
            "clean": Mean(bits - 0.1, 0.03, None, tuple(each - 0.1 for each in images)),
        },
        draws=1,
        nfe_mean=nfe,
        nfe_min=nfe,
        nfe_max=nfe,
        nfe_batches=2,
        nfe_batch_size=100,
        whole_jacobian=whole_jacobian,
        penalties={"kinetic": 0.4, "jacfrob": jacfrob},
        gap=-0.002,
        seconds=1.0,
    )
    return Result(
        stopped=stopped,
        steps=steps,
        planned=steps,
        skipped=0,
        pictured=True,
        evaluation=evaluation,
        training_seconds=steps / 2,
        processor_seconds=steps / 3,
        run_seconds=float(steps),
    )
