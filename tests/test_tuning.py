"""The step of a fixed grid by measurement: against a linear field, where every figure has a closed form."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import as_options, rnode
from torch import Tensor, nn

from rnode_plugin import MultiscaleFlow, Solver, get_recipe
from rnode_plugin.errors import ConfigError
from rnode_plugin.evaluation.step_size import tune_step
from rnode_plugin.flows.multiscale import inverse_logit, logit
from rnode_plugin.training.checkpoints import save_flow

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
    assert found.score == pytest.approx(float(exact.mean()), abs=1e-8)
    assert [row.step for row in found.rows] == [1, 0.5, 0.25, 0.125]
    for row in found.rows:
        z = y * growth(method, rate, row.step) ** 2
        back = inverse_logit(z * math.exp(-2 * rate), ALPHA)
        assert row.score == pytest.approx(float(bits(z).mean()), abs=1e-8)
        assert row.gap == pytest.approx(float((bits(z) - exact).abs().mean()), rel=1e-5, abs=1e-8)
        off = float((back - x).square().mean().sqrt()) * LEVELS
        assert row.round_trip == pytest.approx(off, rel=1e-5, abs=1e-8)
        stages = {"euler": 1, "midpoint": 2, "rk4_38": 4}[method]
        assert row.nfe == 2 * stages * round(1 / row.step)
    assert found.step is None


def test_stops_at_the_coarsest_step_that_agrees(x: Tensor) -> None:
    flow, seen = flow_of(Scaling(0.8)), []
    options: dict[str, Any] = {"solver": Solver(method="midpoint"), "reference": TIGHT}
    fine = tune_step(flow, x, max_gap=1e-12, **options).rows
    found = tune_step(flow, x, max_gap=math.sqrt(fine[1].gap * fine[2].gap), progress=seen.append, **options)
    assert found.step == 0.25
    assert [row.step for row in found.rows] == [1, 0.5, 0.25]
    assert [row.agrees for row in found.rows] == [False, False, True]
    assert tuple(seen) == found.rows


def test_both_tolerances_count(x: Tensor) -> None:
    flow = flow_of(Scaling(0.8))
    options: dict[str, Any] = {"solver": Solver(method="midpoint"), "reference": TIGHT, "smallest": 0.5}
    assert tune_step(flow, x, max_gap=1e9, max_round_trip=1e9, **options).step == 1
    assert tune_step(flow, x, max_gap=1e9, max_round_trip=1e-9, **options).step is None
    assert tune_step(flow, x, max_gap=1e-9, max_round_trip=1e9, **options).step is None


def test_distances_of_images_do_not_cancel(x: Tensor) -> None:
    """What the midpoint rule gives one image in bits/dim it takes from another, so the mean says little."""
    pair = x[:2].clone()
    pair[0, 0, 0, 0], pair[1, 0, 0, 0] = 0.9, 0.1
    found = tune_step(
        flow_of(OneWayEach(0.8)), pair, solver=Solver(method="midpoint"), smallest=1.0, reference=TIGHT
    )
    (row,) = found.rows
    assert row.gap > abs(row.score - found.score) + 0.01


def test_a_step_so_coarse_that_the_solve_fails(x: Tensor) -> None:
    reference = dataclasses.replace(TIGHT, first_step=1e-3)
    found = tune_step(flow_of(Bounded(-8.0)), x, reference=reference)
    assert math.isinf(found.rows[0].gap)
    assert not found.rows[0].agrees
    assert found.step is not None


def test_the_noise_is_drawn_once(x: Tensor) -> None:
    flow = MultiscaleFlow(SHAPE, field=lambda shape: Scaling(0.8)).double()
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    one, other = (tune_step(flow, x, reference=TIGHT, generator=seed) for seed in seeds)
    assert one == other
    # with noise of its own each solve would be off by the variance of the divergence, about 0.1 bits/dim
    assert one.rows[-1].gap < 0.005


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": Solver(method="dopri5")}, "dopri5 chooses its own steps"),
        ({"start": 0.0}, "positive numbers"),
        ({"start": 0.25, "smallest": 0.5}, "start the larger"),
    ],
)
def test_refusals(options: dict[str, Any], message: str, x: Tensor) -> None:
    with pytest.raises(ConfigError, match=message):
        tune_step(flow_of(Scaling(0.8)), x, **options)


# the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = get_recipe("digits").override(["model.hidden=8"])
    torch.manual_seed(0)
    flow: Any = recipe.build_flow()
    for field in flow.fields:
        field.layers[-1].reset_parameters()
    path = tmp_path_factory.mktemp("flow") / "flow.ckpt"
    save_flow(flow, path, recipe=recipe)
    return path


def test_command_prints_the_table(checkpoint: Path) -> None:
    result = rnode("tune-step", str(checkpoint), "--images", "8", "--device", "cpu")
    assert result.exit_code == 0, result.output
    first, *rows, adaptive, _, verdict = result.output.splitlines()
    assert first.split() == ["step", "NFE", "bits/dim", "gap", "round", "trip"]
    step, nfe, bits, gap, trip, agrees = rows[-1].split()
    assert agrees == "agrees"
    assert int(nfe) == 6 * 4 / float(step)
    assert float(gap) <= 0.005
    assert float(trip) <= 0.5
    assert adaptive.split()[0] == "adaptive"
    assert float(bits) == pytest.approx(float(adaptive.split()[2]), abs=0.0051)
    assert verdict.startswith(f"solver.step={step} agrees")


def test_command_trains_a_recipe_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()  # the recipe is meant all the same
    settings = "model.hidden=8", "data.batch_size=20", "optimizer.name=adam", "optimizer.lr=0.02"
    settings += "optimizer.warmup=0", "solver.step=none"
    options = "--train-steps", "3", "--images", "4", "--device", "cpu", "--max-gap", "1e-7", "--smallest", "0.5"
    result = rnode("tune-step", "digits", *options, *as_options(*settings))
    assert result.exit_code == 1  # after three steps the field is no longer zero, and float32 is not that exact
    assert [line.split()[0] for line in result.output.splitlines()[:4]] == ["step", "1", "0.5", "adaptive"]
    assert "Error: no step down to 0.5 agrees with the adaptive solve" in result.output
    assert list(tmp_path.iterdir()) == [tmp_path / "digits"]
