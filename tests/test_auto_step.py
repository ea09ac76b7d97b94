"""``solver.step=auto``, and what a fixed grid is off by: measured while training, the same after a resume."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_tuning import LEVELS, Bounded, Scaling, flow_of
from tiny_runs import rows, run, tiny_recipe

from rnode_plugin import MultiscaleFlow, Solver, get_recipe, load_flow
from rnode_plugin.errors import ConfigError
from rnode_plugin.evaluation.likelihood import evaluate
from rnode_plugin.flows import multiscale
from rnode_plugin.flows.multiscale import dequantize
from rnode_plugin.recipes.recipe import Recipe
from rnode_plugin.recipes.task import ImageTask
from rnode_plugin.training import auto_step
from rnode_plugin.training.auto_step import AutoStep
from rnode_plugin.training.datamodule import ImageDataModule
from rnode_plugin.training.fit import FitResult
from rnode_plugin.training.module import RnodeModule
from rnode_plugin.training.step import gap_warning

CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, LEVELS, (20, 1, 4, 4), dtype=np.uint8)
MEASURE = ImageTask((1, 4, 4), LEVELS)
AUTO = ["solver.step=auto", "training.tune_every=2"]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step below an eighth."""
    tune_step = functools.partial(auto_step.tune_step, smallest=1 / 8)
    monkeypatch.setattr(auto_step, "tune_step", tune_step)


@pytest.fixture(autouse=True)
def in_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    original = dequantize

    def like_the_flow(images: torch.Tensor, levels: int, **options: Any) -> torch.Tensor:
        x = original(images, levels, **options)
        return x.double() if levels == LEVELS and images.shape[-1] == 4 else x

    monkeypatch.setattr(multiscale, "dequantize", like_the_flow)


def test_the_step_follows_the_field() -> None:
    field = Scaling(0.3)
    flow, auto = flow_of(field), AutoStep(Solver(), MEASURE, seed=0)
    said, steps = [], []
    for at, rate in enumerate((0.3, 0.8, 0.8, 1.2, 0.6, 0.5)):
        torch.nn.init.constant_(field.rate, rate)
        found = auto.measure(flow, IMAGES, CPU)
        assert found is not None
        said.append(auto.take(found, at))
        steps.append(auto.solver.step)
        assert auto.solver == dataclasses.replace(Solver(), step=steps[-1])
    assert steps == [0.5, 0.25, 0.25, 0.125, 0.25, 0.5]
    first, _, careful, coarser = (line for line in said if line)
    assert re.fullmatch(
        r"solver.step 0.5 -> 0.25 at step 1:\n"
        r"  step 0.5: NFE 16, gap \S+ bits/dim, round trip \S+ levels\n"
        r"  step 0.25: NFE 32, gap \S+ bits/dim, round trip \S+ levels",
        first,
    )
    # at a rate of 0.6 a step of 0.5 would do, but with more than a quarter of the tolerance and less than a half
    assert 0.00125 < float(careful.split("gap ")[1].split()[0]) < 0.0025
    assert float(coarser.split("gap ")[1].split()[0]) <= 0.00125


def test_where_no_step_agrees_the_smallest_is_taken_and_said_once(short: None) -> None:
    flow, auto = flow_of(Scaling(1.0)), AutoStep(Solver(method="euler"), MEASURE, seed=0)
    first, second = (auto.take(auto.measure(flow, IMAGES, CPU), at) for at in (10, 20))
    assert first is not None
    assert first.startswith("solver.step 0.5 -> 0.125 at step 10:\n")
    assert first.endswith("\nNo step agrees with an adaptive solve: raise the lambdas.")
    assert (auto.step, second) == (1 / 8, None)


def test_where_the_adaptive_solve_fails_the_step_stays() -> None:
    auto = AutoStep(Solver(), MEASURE, seed=0)
    auto.step = 0.25
    line = auto.take(auto.measure(flow_of(Bounded(8.0)), IMAGES, CPU), 10)
    assert "stays 0.25 at step 10" in str(line)
    assert auto.step == 0.25


def test_a_measurement_is_a_function_of_the_weights() -> None:
    flow = MultiscaleFlow((1, 4, 4), levels=LEVELS, field=lambda shape: Scaling(0.8)).double()
    auto = AutoStep(Solver(), MEASURE, seed=0)
    before = torch.get_rng_state()
    one = auto.measure(flow, IMAGES, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert flow.training
    torch.rand(3)
    assert one == auto.measure(flow, IMAGES, CPU)
    assert one != AutoStep(Solver(), MEASURE, seed=1).measure(flow, IMAGES, CPU)


# in a run ------------------------------------------------------------------------------------------------------


def test_all_processes_go_on_with_what_the_first_one_found(tmp_path: Path) -> None:
    recipe = tiny_recipe(*AUTO)
    data = recipe.images.load()
    module: Any = RnodeModule(recipe)
    mine = AutoStep(recipe.solver, recipe.task, seed=42).measure(module.flow, data.val, CPU)
    assert mine is not None
    assert (mine[-1].step, mine[-1].agrees) == (0.5, True)
    theirs = (dataclasses.replace(mine[-1], step=0.125),)

    class Strategy:
        def broadcast(self, found: object) -> object:
            assert found == mine
            return theirs

    module._fabric = None
    images = ImageDataModule(recipe, images=data)
    attributes = {"strategy": Strategy(), "global_rank": 1, "global_step": 0, "datamodule": images}
    module._trainer = type("Trainer", (), attributes)()
    module._tune()
    assert module.solver.step == 0.125


# the gap -------------------------------------------------------------------------------------------------------


def gaps(result: FitResult) -> list[float]:
    return [float(row["val/gap"]) for row in rows(result.folder.path) if "val/gap" in row]


def test_the_step_is_measured_in_double_precision(tmp_path: Path) -> None:
    result = run(tiny_recipe(*AUTO, "training.precision=64-true", "training.max_steps=2"), tmp_path)
    assert result.step_size in (0.5, 0.25)


def test_a_gap_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [
        "optimizer.lr=2e-2", "optimizer.warmup=0", "training.max_steps=1", "solver.method=euler",
        "solver.quadrature=sampled", "test_solver.step=0.25",
    ]  # fmt: skip
    recipe = tiny_recipe(*settings)
    result = run(recipe, tmp_path)
    (gap,) = gaps(result)
    assert abs(gap) > 0.02
    (warning,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: "))
    assert f"at step 1 the training solver is off by {gap:+.3f} bits/dim" in warning
    assert "lower solver.step (or --set solver.step=auto)" in warning
    assert gap_warning(0.0199, MEASURE, at=7, automatic=True) is None
    assert "lower training.tune_every" in str(gap_warning(-0.0201, MEASURE, at=7, automatic=True))
    assert result.evaluation is not None
    assert result.evaluation.gap == pytest.approx(gap, rel=0.5)
    flow, images = load_flow(result.folder.last), recipe.load_data().val
    of_grid = evaluate(flow, images, batch_size=10, seed=42, solver=recipe.solver).dirty.mean
    accurate = evaluate(flow, images, batch_size=10, seed=42).dirty.mean
    both = evaluate(flow, images, batch_size=len(images), seed=42, training_solver=recipe.solver)
    assert both.gap is not None
    assert math.copysign(1, both.gap) == math.copysign(1, of_grid - accurate)


def test_a_training_solver_that_fails_on_held_out_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe("training.max_steps=4")
    original = MultiscaleFlow.forward

    def forward(self: MultiscaleFlow, x: torch.Tensor, **options: Any) -> Any:
        if not self.training and options.get("solver") is not None:
            options["solver"] = dataclasses.replace(options["solver"], max_nfe=2)
        return original(self, x, **options)

    monkeypatch.setattr(MultiscaleFlow, "forward", forward)
    result = run(recipe, tmp_path)
    assert gaps(result) == [math.inf]
    assert result.evaluation is not None
    assert result.evaluation.gap == math.inf
    assert json.loads(result.folder.result.read_text())["evaluation"]["gap"] == math.inf


def test_auto_is_a_value_of_the_step_of_training_alone() -> None:
    recipe = get_recipe("digits").override(["solver.step=auto"])
    assert Recipe.from_plain(recipe.to_plain()) == recipe
    with pytest.raises(ConfigError, match=r"test_solver\.step cannot be auto"):
        recipe.override(["test_solver.method=rk4", "test_solver.step=auto"])
    flow = MultiscaleFlow((1, 4, 4), hidden=2, solver=Solver(step="auto"))
    with pytest.raises(ConfigError, match="Give a number everywhere else"):
        flow(torch.rand(2, 1, 4, 4))
