"""The step of a fixed grid by measurement: against a linear field, where every figure has a closed form."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rnode_plugin import MultiscaleFlow, Solver
from rnode_plugin.flows.multiscale import inverse_logit, logit
from rnode_plugin.recipes.task import FlowInput, ImageTask
from rnode_plugin.training import auto_step
from rnode_plugin.training.auto_step import StepRow

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
    measure = type("Tolerant", (ImageTask,), tolerances)(SHAPE, LEVELS)
    return auto_step.tune_step(flow, FlowInput(x, {}), measure=measure, **{"solver": Solver(), **options})


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


def test_stops_at_the_coarsest_step_that_agrees(x: Tensor) -> None:
    flow = flow_of(Scaling(0.8))
    options: dict[str, Any] = {"solver": Solver(method="midpoint"), "reference": TIGHT}
    fine = tune_step(flow, x, max_gap=1e-12, **options)
    found = tune_step(flow, x, max_gap=math.sqrt(fine[1].gap * fine[2].gap), max_round_trip=1e9, **options)
    assert [row.step for row in found] == [0.5, 0.25, 0.125]
    assert [row.agrees for row in found] == [False, False, True]


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
    # with noise of its own each solve would be off by the variance of the divergence, about 0.1 bits/dim
    assert one[-1].gap < 0.005
