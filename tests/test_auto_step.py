"""``solver.step=auto`` against a linear field, where every figure has a closed form, and in a run; ``val/gap``."""

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
from tiny_runs import rows, run, tiny_recipe
from torch import Tensor, nn

from rnode_plugin import MultiscaleFlow, Solver, get_recipe
from rnode_plugin.errors import ConfigError
from rnode_plugin.flows import multiscale
from rnode_plugin.flows.multiscale import dequantize, inverse_logit, logit
from rnode_plugin.recipes.recipe import Recipe
from rnode_plugin.recipes.task import FlowInput, ImageTask
from rnode_plugin.training import auto_step
from rnode_plugin.training.auto_step import AutoStep, StepRow
from rnode_plugin.training.fit import FitResult

SHAPE, LEVELS, ALPHA = (1, 4, 4), 17, 0.05  # two blocks and no squeeze
TIGHT = Solver(method="dopri5", atol=1e-11, rtol=1e-11)


class Scaling(nn.Module):
    """``f(t, z) = rate * z``: any Runge-Kutta step multiplies by a polynomial, and the divergence is constant."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate, dtype=torch.float64))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.rate * z


class OneWayEach(Scaling):
    """Images whose first pixel is bright grow, the others shrink."""

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.rate * z * torch.where(z[:, :, :1, :1] > 0, 1.0, -1.0)


class Bounded(Scaling):
    """A field that is not defined for states beyond 3.2, where the logit of no image lies."""

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.where(z.abs() < 3.2, self.rate * z, math.nan)


def flow_of(field: nn.Module) -> MultiscaleFlow:
    # signs as noise make the divergence of a linear field exact
    return MultiscaleFlow(
        SHAPE, alpha=ALPHA, levels=LEVELS, trace_noise="rademacher", field=lambda shape: field
    ).double()


def tune_step(
    flow: MultiscaleFlow, x: Tensor, *, max_gap: float = 0.005, max_round_trip: float = 0.5, **options: Any
) -> tuple[StepRow, ...]:
    tolerances = {"step_gap": max_gap, "step_round_trip": max_round_trip}
    task = type("Tolerant", (ImageTask,), tolerances)(SHAPE, LEVELS)
    return auto_step.tune_step(flow, FlowInput(x), task=task, **{"solver": Solver(), **options})


@pytest.fixture
def x() -> Tensor:
    return torch.rand(5, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def growth(method: str, rate: float, step: float) -> float:
    """What ``1 / step`` steps multiply a state by."""
    a = rate * step
    terms = {"euler": 1, "midpoint": 2, "rk4_38": 4}[method]
    return sum(a**k / math.factorial(k) for k in range(terms + 1)) ** round(1 / step)


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4_38"])
def test_every_figure_of_a_linear_field(method: str, x: Tensor) -> None:
    rate = 0.8
    found = tune_step(
        flow_of(Scaling(rate)), x, solver=Solver(method=method), smallest=1 / 8, max_gap=1e-12, reference=TIGHT
    )
    y, logdet = logit(x, ALPHA)
    logdet = logdet + 2 * rate * 16

    def bits(z: Tensor) -> Tensor:
        log_prob = -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1) + logdet
        return math.log2(LEVELS) - log_prob / (16 * math.log(2))

    exact = bits(y * math.exp(2 * rate))
    assert [row.step for row in found] == [0.5, 0.25, 0.125]
    for row in found:
        z = y * growth(method, rate, row.step) ** 2
        back = inverse_logit(z * math.exp(-2 * rate), ALPHA)
        assert row.score == pytest.approx(float(bits(z).mean()), abs=1e-8)
        assert row.gap == pytest.approx(float((bits(z) - exact).abs().mean()), rel=1e-5, abs=1e-8)
        off = float((back - x).square().mean().sqrt()) * LEVELS
        assert row.round_trip == pytest.approx(off, rel=1e-5, abs=1e-8)
        stages = {"euler": 1, "midpoint": 2, "rk4_38": 4}[method]
        assert row.nfe == 2 * stages * round(1 / row.step)
    assert not found[-1].agrees


def test_both_tolerances_count(x: Tensor) -> None:
    flow = flow_of(Scaling(0.8))
    options: dict[str, Any] = {"solver": Solver(method="midpoint"), "reference": TIGHT, "smallest": 0.5}
    for gap, trip, agrees in ((1e9, 1e9, True), (1e9, 1e-9, False), (1e-9, 1e9, False)):
        (row,) = tune_step(flow, x, max_gap=gap, max_round_trip=trip, **options)
        assert row.agrees == agrees


def test_distances_of_images_do_not_cancel(x: Tensor) -> None:
    """What the midpoint rule gives one image in bits/dim it takes from another, so the mean says little."""
    pair = x[:2].clone()
    pair[0, 0, 0, 0], pair[1, 0, 0, 0] = 0.9, 0.1
    rows = tune_step(flow_of(OneWayEach(1.6)), pair, solver=Solver(method="midpoint"), max_gap=0, reference=TIGHT)
    accurate = rows[-1].score  # of 32 steps a block
    assert rows[0].gap > abs(rows[0].score - accurate) + 0.01


def test_a_step_so_coarse_that_the_solve_fails(x: Tensor) -> None:
    reference = dataclasses.replace(TIGHT, first_step=1e-3)
    found = tune_step(flow_of(Bounded(-8.0)), x, reference=reference)
    assert math.isinf(found[0].gap)
    assert not found[0].agrees
    assert found[-1].agrees


def test_the_noise_is_drawn_once(x: Tensor) -> None:
    flow = MultiscaleFlow(SHAPE, field=lambda shape: Scaling(0.8)).double()
    rows = []
    for _ in range(2):
        torch.manual_seed(3)
        rows.append(tune_step(flow, x, reference=TIGHT))
    one, other = rows
    assert one == other
    # with its own noise each solve would be off by the variance of the divergence, about 0.1 bits/dim
    assert one[-1].gap < 0.005


# the step while a flow changes ------------------------------------------------------------------------------------

CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, LEVELS, (20, *SHAPE), dtype=np.uint8)
TASK = ImageTask(SHAPE, LEVELS)


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
    flow, auto = flow_of(field), AutoStep(Solver(), TASK, seed=0)
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


def test_where_no_step_agrees_the_smallest_is_taken_and_printed_once(short: None) -> None:
    flow, auto = flow_of(Scaling(1.0)), AutoStep(Solver(method="euler"), TASK, seed=0)
    first, second = (auto.take(auto.measure(flow, IMAGES, CPU), at) for at in (10, 20))
    assert first is not None
    assert first.startswith("solver.step 0.5 -> 0.125 at step 10:\n")
    assert first.endswith("\nNo step agrees with an adaptive solve: raise the lambdas.")
    assert (auto.step, second) == (1 / 8, None)


def test_where_the_adaptive_solve_fails_the_step_stays() -> None:
    auto = AutoStep(Solver(), TASK, seed=0)
    auto.step = 0.25
    line = auto.take(auto.measure(flow_of(Bounded(8.0)), IMAGES, CPU), 10)
    assert "stays 0.25 at step 10" in str(line)
    assert auto.step == 0.25


def test_a_measurement_is_a_function_of_the_weights() -> None:
    flow = MultiscaleFlow((1, 4, 4), levels=LEVELS, field=lambda shape: Scaling(0.8)).double()
    auto = AutoStep(Solver(), TASK, seed=0)
    before = torch.get_rng_state()
    one = auto.measure(flow, IMAGES, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert flow.training
    torch.rand(3)
    assert one == auto.measure(flow, IMAGES, CPU)
    assert one != AutoStep(Solver(), TASK, seed=1).measure(flow, IMAGES, CPU)


# the gap -------------------------------------------------------------------------------------------------------


def gaps(result: FitResult) -> list[float]:
    return [float(row["val/gap"]) for row in rows(result.folder.path) if "val/gap" in row]


def test_the_step_is_measured_in_double_precision(tmp_path: Path) -> None:
    result = run(tiny_recipe("solver.step=auto", "training.precision=64-true", "training.max_steps=1"), tmp_path)
    assert result.step_size in (0.5, 0.25)


def test_a_large_gap_gives_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert result.evaluation is not None
    assert result.evaluation.gap == pytest.approx(gap, rel=0.5)


def test_a_training_solver_that_fails_on_held_out_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe("training.max_steps=1")
    original = MultiscaleFlow.encode

    def encode(self: MultiscaleFlow, x: torch.Tensor, **options: Any) -> Any:
        if not self.training and options.get("solver") is not None:
            options["solver"] = dataclasses.replace(options["solver"], max_nfe=2)
        return original(self, x, **options)

    monkeypatch.setattr(MultiscaleFlow, "encode", encode)
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
