"""``training.matching``: flow matching through all blocks at once, before maximum likelihood."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import refuses
from regularizer_table import TrainedEnd
from tiny_runs import run, tiny_recipe
from torch import Tensor, nn

from rnode_plugin import MultiscaleFlow, RegularizedCNF
from rnode_plugin.errors import ConfigError
from rnode_plugin.experiments.training.checkpoints import read_checkpoint
from rnode_plugin.experiments.training.module import RnodeModule
from rnode_plugin.flows.multiscale import logit
from rnode_plugin.flows.table import TableFlow

SIGMA, BLOCKS = 1.7, 3
VARIANCE = 0.1**2 / 3  # of the noise around the paths, over samples


class _Best(nn.Module):
    """The field of block ``index`` of BLOCKS for samples of N(0, SIGMA^2), times ``factor``.

    It is the linear function of x = (1 - u) y + u e + n nearest to (e - y) / K, with u = (index + t) / K, and
    carries N(0, SIGMA^2 + VARIANCE) to N(0, 1 + VARIANCE).
    """

    def __init__(self, index: int, factor: float = 1.0) -> None:
        super().__init__()
        self.index = index
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64), requires_grad=False)

    def slope(self, t: Any) -> Any:
        u = (self.index + t) / BLOCKS
        return (u - (1 - u) * SIGMA**2) / ((1 - u) ** 2 * SIGMA**2 + u**2 + VARIANCE) / BLOCKS

    def forward(self, t: Any, z: Tensor) -> Tensor:
        factor: Any = self.factor
        return factor * self.slope(t) * z


def best(factor: float = 1.0) -> TableFlow:
    flow = TableFlow(1, blocks=BLOCKS).double()
    flow.fields = nn.ModuleList(_Best(index, factor) for index in range(BLOCKS))
    return flow


def assert_mean(found: Tensor, wanted: float, resolution: float) -> None:
    """Within five standard errors, each of which is smaller than ``resolution``."""
    error = float(found.detach().std()) / len(found) ** 0.5
    assert abs(float(found.detach().mean()) - wanted) < 5 * error
    assert error < resolution


def test_its_minimum_is_at_those_fields() -> None:
    """Fields too large by c cost c^2 E f^2 more, and not c times something: five standard errors."""
    torch.manual_seed(0)
    x = torch.randn(1600, 1, dtype=torch.float64)
    x = x * SIGMA / x.square().mean().sqrt()  # only its second moment counts
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    for c in (-0.3, 0.3):
        gaps = []
        for seed in range(50):
            pair = []
            for factor in (1.0, 1 + c):
                torch.manual_seed(seed)
                pair.append(best(factor).matching_loss(x).mean())  # with the same noise and times
            gaps.append(pair[1] - pair[0])
        found = torch.stack(gaps)
        wanted = 0.0
        for field in map(_Best, range(BLOCKS)):
            u = (field.index + t) / BLOCKS
            square = (1 - u) ** 2 * SIGMA**2 + u**2 + VARIANCE
            wanted += c**2 * float(torch.trapezoid(field.slope(t) ** 2 * square, t))
        assert_mean(found, wanted, 0.2 * wanted)


class _Early(nn.Module):
    """30 z until time 0.1, then 0."""

    def forward(self, t: Any, z: Tensor) -> Tensor:
        return 30 * z * (t < 0.1)


def test_the_states_lie_around_the_path() -> None:
    """Of y = 0, E (30 (t e + n) - e)^2 until 0.1 and E e^2 from there on: five standard errors."""
    torch.manual_seed(0)
    flow = TableFlow(1, blocks=1).double()
    flow.fields = nn.ModuleList([_Early()])
    x = torch.zeros(8, 1, dtype=torch.float64)
    found = torch.stack([flow.matching_loss(x).mean() for _ in range(3000)])
    wanted = ((30 * 0.1 - 1) ** 3 + 1) / 90 + 0.1 * 30**2 * VARIANCE + 0.9
    assert_mean(found, wanted, 0.1 * 0.1 * 30**2 * VARIANCE)


class _Clock(nn.Module):
    """The velocity is the time."""

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return t.expand_as(z)


def test_blocks_that_end_later_are_slower() -> None:
    """Of y = 0 and a block until T, E (t - e / T)^2 = T^2 / 3 + 1 / T^2 for uniform t: five standard errors."""
    torch.manual_seed(0)
    end = 2.0
    flow = TableFlow(1, blocks=1, regularizers=[TrainedEnd(end)]).double()
    flow.fields = nn.ModuleList([_Clock()])
    x = torch.zeros(16, 1, dtype=torch.float64)
    found = torch.stack([flow.matching_loss(x).mean() for _ in range(3000)])
    assert_mean(found, end**2 / 3 + 1 / end**2, 0.05)


def test_each_coordinate_has_until_its_own_block() -> None:
    """With f = 0 the error is sum (1 + y^2) / k: odd rows of 8x8 leave behind block 4, even ones behind block 6."""
    flow = MultiscaleFlow((1, 8, 8), hidden=4).double()
    x = torch.rand(1, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y, _ = logit(x, flow.alpha)
    k = torch.tensor([6.0, 4.0], dtype=torch.float64).repeat(4)[:, None]
    torch.manual_seed(1)
    with torch.no_grad():
        found = flow.matching_loss(x.expand(4000, -1, -1, -1))
    assert_mean(found, float(((1 + y.square()) / k).sum()), 0.01 * float(found.mean()))


def test_a_gradient_reaches_every_parameter() -> None:
    flow = MultiscaleFlow((1, 8, 8), hidden=4)
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.1)
    flow.matching_loss(torch.rand(5, 1, 8, 8)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in flow.parameters())
    with pytest.raises(ConfigError, match="must lie in"):
        flow.matching_loss(torch.full((5, 1, 8, 8), 2.0))


def test_a_run_with_steps_of_matching(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_recipe(
        "training.matching=4", "training.log_every=1", "optimizer.name=muon", "optimizer.schedule=cooldown",
        "optimizer.lr=1e-2", "optimizer.vector_lr=1e-2", "optimizer.warmup=1",
        "optimizer.cooldown=0.5",
    )  # fmt: skip
    whole = run(recipe, tmp_path, progress=True)
    printed = capsys.readouterr().out
    with whole.run.metrics.open() as file:
        every = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    steps = [row for row in every if "lr" in row]
    assert [set(row) & {"train/matching", "train/bpd", "train/loss"} for row in steps] == (
        4 * [{"train/matching"}] + 4 * [{"train/bpd", "train/loss"}]
    )
    assert {row["train/nfe"] for row in steps[:4]} == {"6.0"}  # one evaluation per block
    rates = [float(row["lr"]) for row in steps]
    assert rates[:4] == pytest.approx(rates[4:])  # the schedule begins again
    assert rates[:3] == [1e-2] * 3 > [rates[3]]
    stages = [(0, "flow matching"), (2, "the learning rate falls until step 4"), (4, "maximum likelihood"),
              (6, "the learning rate falls until step 8")]  # fmt: skip
    assert [line for line in printed.splitlines() if line.startswith("after step")] == [
        f"after step {step}: {what}" for step, what in stages
    ]
    assert printed.index("\nstep 2: the learning rate falls") < printed.index("\nstep 4: maximum likelihood")
    # the optimizer begins again after step 4
    state = read_checkpoint(whole.run.last)["optimizer_states"][0]["state"]
    assert {each["step"] for each in state.values() if "step" in each} == {4}
    times = whole.run.read().metrics.validations["train_seconds"]  # of a validation at step 4 and one at step 8
    seconds = [float(row["train_seconds"]) for row in every if row["step"] in ("4", "8") and "lr" in row]
    assert times.tolist() == pytest.approx(seconds)
    run(recipe.override(["training.max_steps=10"]), tmp_path, resume=whole.run.path, progress=True)
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("after step")] == [
        "after step 4: maximum likelihood", "after step 7: the learning rate falls until step 10",
    ]  # fmt: skip


class _Strict(nn.Module):
    """A user's field, which takes the time as a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.scale * t.expand(len(z)).view(-1, 1, 1, 1) * z


def test_a_field_gets_the_time_as_in_a_solve() -> None:
    flow = MultiscaleFlow((1, 8, 8), field=lambda shape: _Strict())
    assert flow.matching_loss(torch.rand(3, 1, 8, 8)).isfinite().all()


def test_what_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with refuses(ConfigError, "training.matching"):
        run(tiny_recipe("training.matching=8"), tmp_path)
    assert tiny_recipe("training.matching=1", "training.weights=mnist-pretrained").matching == 0
    recipe = tiny_recipe("training.matching=1")
    table = TableFlow(1, blocks=1, regularizers=[TrainedEnd(2.0)])
    monkeypatch.setattr(type(recipe), "build_flow", lambda self: table)
    with refuses(ConfigError, "parameters"):
        RnodeModule(recipe)
    cnf = RegularizedCNF(nn.Linear(2, 2), event_shape=2)
    monkeypatch.setattr(type(recipe), "build_flow", lambda self: cnf)
    with refuses(ConfigError, "training.matching"):
        RnodeModule(recipe)
