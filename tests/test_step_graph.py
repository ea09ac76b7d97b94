"""The training step as a CUDA graph, on a stand-in: the same numbers, or the step itself after one line."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_stand_in import StandIn
from tiny_runs import BeforeStep, rows, run, tiny_recipe
from torch import Tensor

from rnode_plugin import RnodeModule, Solver
from rnode_plugin.core.regularizers import FunctionRegularizer, kinetic
from rnode_plugin.errors import TrainingError
from rnode_plugin.evaluation.measures import TableMeasure
from rnode_plugin.fields.kernels import compile as compiling
from rnode_plugin.flows.table import TableFlow
from rnode_plugin.recipes.recipe import Recipe
from rnode_plugin.training.runs.checkpoints import read_checkpoint
from rnode_plugin.training.steps.step_graph import StepGraph
from rnode_plugin.training.steps.step_objective import StepObjective, StepTerms

HEAD = "the training step is not replayed as a CUDA graph: "
FULL = "solver.trace_quadrature=full"
SHORT = ["training.max_steps=4", "training.log_every=1", "training.val_images=1"]


@pytest.fixture(autouse=True)
def plain_torch_compile(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pieces that are compiled to themselves."""
    compiling.compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    yield
    compiling.compiled.cache_clear()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(monkeypatch)


class Example:
    """A flow that is not zero, its objective, a batch, and the graph of their step."""

    def __init__(self, recipe: Recipe | None = None, device: str = "cpu") -> None:
        self.recipe = recipe or tiny_recipe(FULL)
        torch.manual_seed(0)
        self.flow: Any = self.recipe.build_flow().to(device)
        for field in self.flow.fields:
            field.layers[-1].reset_parameters()
        self.objective = StepObjective(self.flow, self.recipe)
        self.solver = self.recipe.solver
        self.batch = torch.randint(0, 17, (6, 1, 8, 8), dtype=torch.uint8, device=device)
        self.graph = StepGraph(self.objective, self.flow, seed=3)

    def prepare(self, batch: Tensor | None = None, **options: Any) -> str | None:
        batch = self.batch if batch is None else batch
        return self.graph.prepare(batch, self.solver, **{"precision": nullcontext, **options})

    def step(self, seed: int, batch: Tensor | None = None, *, replayed: bool) -> tuple[StepTerms, list[Tensor]]:
        """Terms and gradients, with the noise of a seed."""
        torch.manual_seed(seed)
        inputs = self.objective.inputs(self.batch if batch is None else batch)
        terms = self.graph(inputs, self.solver) if replayed else self.objective(inputs, self.solver)
        assert terms is not None
        self.flow.zero_grad()
        terms.loss.backward()
        return terms, [p.grad.clone() for p in self.flow.parameters()]

    def move_weights(self) -> None:
        with torch.no_grad():
            for parameter in self.flow.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))


def assert_same(
    one: tuple[StepTerms, list[Tensor]], other: tuple[StepTerms, list[Tensor]], *, rtol: float = 0, atol: float = 0
) -> None:
    (terms, gradients), (expected, true) = one, other
    assert terms.nfe == expected.nfe
    found = [terms.loss, terms.score, terms.penalties, gradients]
    torch.testing.assert_close(
        found, [expected.loss, expected.score, expected.penalties, true], rtol=rtol, atol=atol
    )


# in a run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [[], ["training.accumulate=2"], ["training.precision=bf16-mixed"]])
def test_a_run_is_the_same_to_the_bit(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(FULL, "training.compile=true", *SHORT, *settings)
    plain = run(recipe, tmp_path / "plain")
    stand_in = StandIn(monkeypatch)
    fast = run(recipe, tmp_path / "fast")
    assert stand_in.captures == 1
    assert stand_in.replays == 2 + 4 * recipe.training.accumulate  # two for the check
    assert "CUDA graph" not in capsys.readouterr().err
    assert rows(plain.folder.path) == rows(fast.folder.path)
    a, b = (read_checkpoint(each.folder.last)["state_dict"] for each in (plain, fast))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_start_is_recorded_again_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("start.steps=2", "start.batch_size=10", "start.step=0.5")
    recipe = tiny_recipe(FULL, "training.compile=true", *SHORT, *settings)
    plain = run(recipe, tmp_path / "plain")
    stand_in = StandIn(monkeypatch)
    fast = run(recipe, tmp_path / "fast")
    assert stand_in.captures == 2
    assert stand_in.replays == 2 * 2 + 4
    assert rows(plain.folder.path) == rows(fast.folder.path)


def test_without_compile_nothing_is_recorded(
    stand_in: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny_recipe(FULL, "training.max_steps=1"), tmp_path)
    assert stand_in.captures == 0
    assert "CUDA graph" not in capsys.readouterr().err


def test_on_a_cpu_nothing_is_recorded_or_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No part of torch.cuda that records would work there."""
    run(tiny_recipe(FULL, "training.compile=true", "training.max_steps=1"), tmp_path)
    assert "CUDA graph" not in capsys.readouterr().err
    example = Example()
    assert example.prepare() is None
    assert example.graph(example.objective.inputs(example.batch), example.solver) is None


def test_a_capture_that_breaks_off_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(FULL, "training.compile=true", *SHORT)
    plain = run(recipe, tmp_path / "plain")
    stand_in = StandIn(monkeypatch)
    stand_in.error = RuntimeError("CUDA error: operation not permitted\nCompile with TORCH_USE_CUDA_DSA")
    capsys.readouterr()
    eager = run(recipe, tmp_path / "eager")
    assert stand_in.captures == 1  # and no second try
    assert stand_in.replays == 0
    assert stand_in.mended
    lines = [line for line in capsys.readouterr().err.splitlines() if "graph" in line.lower()]
    assert lines == [HEAD + "CUDA error: operation not permitted"]
    assert rows(plain.folder.path) == rows(eager.folder.path)


def test_a_replayed_solve_that_exploded_is_named(stand_in: StandIn, tmp_path: Path) -> None:
    def explode(module: RnodeModule, step: int) -> None:
        if step == 3:
            with torch.no_grad():
                for parameter in module.flow.parameters():
                    parameter.mul_(1e20).add_(1e20)

    recipe = tiny_recipe(FULL, "training.compile=true", "training.max_skipped=1")
    with pytest.raises(TrainingError, match=r"the solver failed \(the state or its log-determinant is no longer"):
        run(recipe, tmp_path, callbacks=[BeforeStep(explode)])
    assert stand_in.replays == 2 + 3


# what is recorded ----------------------------------------------------------------------------------------------


def test_a_replay_follows_weights_images_and_noise(stand_in: StandIn) -> None:
    example = Example()
    assert example.prepare() is None
    for seed in (5, 6):
        assert_same(example.step(seed, replayed=True), example.step(seed, replayed=False))
        example.move_weights()
        example.batch = 16 - example.batch
    assert stand_in.modes == ["error", 0]


def test_recording_leaves_weights_gradients_and_random_numbers_alone(stand_in: StandIn) -> None:
    example = Example()
    before = [p.detach().clone() for p in example.flow.parameters()]
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    assert example.prepare() is None
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(p, old) for p, old in zip(example.flow.parameters(), before, strict=True))
    assert all(p.grad is None for p in example.flow.parameters())


def test_a_second_replay_spoils_nothing_of_the_first(stand_in: StandIn) -> None:
    example = Example()
    assert example.prepare() is None
    expected = example.step(1, replayed=False)
    torch.manual_seed(1)
    first = example.graph(example.objective.inputs(example.batch), example.solver)
    second, _ = example.step(2, replayed=True)
    assert first is not None
    assert first.loss != second.loss
    example.flow.zero_grad()
    first.loss.backward()
    assert_same((first, [p.grad for p in example.flow.parameters()]), expected)


@pytest.mark.parametrize("trace_noise", ["exact", "rademacher"])
def test_rows_with_a_context_are_replayed(trace_noise: str, stand_in: StandIn) -> None:
    example = Example()
    example.flow = TableFlow(3, context=2, hidden=8, trace_noise=trace_noise)
    example.objective = StepObjective(example.flow, example.recipe)
    example.objective.measure = TableMeasure(("a", "b", "c"), ("d", "e"))
    example.graph = StepGraph(example.objective, example.flow, seed=0)
    example.batch = torch.randn(6, 5)
    assert example.prepare() is None
    example.batch = torch.randn(6, 5)
    example.move_weights()
    assert_same(example.step(5, replayed=True), example.step(5, replayed=False))


def test_what_is_not_as_it_was_recorded_is_left_to_the_step(stand_in: StandIn) -> None:
    example = Example()
    assert example.prepare() is None
    inputs = example.objective.inputs
    assert example.graph(inputs(example.batch[:4]), example.solver) is None
    assert example.graph(inputs(example.batch), Solver("rk4", step=0.5)) is None
    example.flow.eval()
    assert example.graph(inputs(example.batch), example.solver) is None
    example.flow.train()
    assert example.graph(inputs(example.batch), example.solver) is not None
    weight = next(example.flow.parameters())
    weight.data = weight.data.clone()  # in another place, where the graph does not look
    assert example.graph(inputs(example.batch), example.solver) is None


def test_a_smaller_batch_is_not_recorded_but_another_solver_is(stand_in: StandIn) -> None:
    example = Example()
    assert example.prepare(example.batch[:4]) is None
    assert example.prepare(example.batch[:3]) is None
    assert stand_in.captures == 1
    assert example.prepare() is None
    assert stand_in.captures == 2
    example.solver = dataclasses.replace(example.solver, method="euler")
    assert example.prepare() is None
    assert example.prepare() is None
    assert stand_in.captures == 3
    assert_same(example.step(5, replayed=True), example.step(5, replayed=False))


# what is not ---------------------------------------------------------------------------------------------------


def drawn(evaluation: Any) -> Tensor:
    """A penalty with a factor that is drawn."""
    return kinetic(evaluation) * (0.5 + torch.rand(()))


class Remembers:
    """A penalty that computes the norm of a weight again when the weight has changed."""

    def __init__(self, weight: Tensor) -> None:
        self._weight, self._version = weight, -1

    def __call__(self, evaluation: Any) -> Tensor:
        if self._weight._version != self._version:
            self._norm, self._version = self._weight.detach().norm(), self._weight._version
        return kinetic(evaluation) * self._norm


@pytest.mark.parametrize("kind", ["drawn", "remembered"])
def test_what_a_graph_would_get_wrong_is_noticed(kind: str, stand_in: StandIn) -> None:
    example = Example()
    rate = drawn if kind == "drawn" else Remembers(next(example.flow.parameters()))
    example.flow.regularizers = (FunctionRegularizer("kinetic", rate),)
    del example.objective.lambdas["jacfrob"]
    before = [p.detach().clone() for p in example.flow.parameters()]
    line = example.prepare()
    assert line is not None
    assert re.fullmatch(re.escape(HEAD) + r"its (loss|kinetic) would be off by [\d.]+, at a size of [\d.]+", line)
    assert example.graph(example.objective.inputs(example.batch), example.solver) is None
    assert example.prepare() is None  # once is enough
    assert stand_in.captures == 1
    assert all(torch.equal(p, old) for p, old in zip(example.flow.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["solver.method=dopri5"], "dopri5 chooses its steps on the way"),
        ([], "solver.trace_quadrature=sampled draws stages on the host"),
        ([FULL, "solver.gradient=checkpointed"], "solver.gradient=checkpointed asks the host on its way back"),
        ([FULL, "solver.gradient=adjoint"], "solver.gradient=adjoint asks the host on its way back"),
        ([FULL, "regularizers.kinetic=linear_warmup(5)"], "a lambda changes with the step"),
        ([FULL, "regularizers.steer=1"], "a regularizer moves the end of the solves"),
    ],
)
def test_a_step_that_needs_the_host_is_not_tried(settings: list[str], reason: str, stand_in: StandIn) -> None:
    method = ["solver.trace_quadrature=full"] if "solver.method=dopri5" in settings else []
    example = Example(tiny_recipe(*method, *settings))
    assert example.prepare() == HEAD + reason
    assert example.prepare() is None
    assert stand_in.captures == 0


def test_other_models_devices_and_scaled_losses_are_not_tried(stand_in: StandIn) -> None:
    assert Example().prepare(devices=2) == HEAD + "the run has several devices"
    half = Example().prepare(precision=lambda: torch.autocast("cpu", torch.float16))
    assert half == HEAD + "the scale of the loss of 16-mixed changes"
    example = Example()
    other = StepGraph(example.objective, torch.nn.Linear(2, 2), seed=0)
    line = other.prepare(example.batch, example.solver, precision=nullcontext)
    assert line == HEAD + "the model draws its noise itself"
    assert stand_in.captures == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    example = Example(device="cuda")
    assert example.prepare() is None
    for seed in (5, 6):
        found, expected = example.step(seed, replayed=True), example.step(seed, replayed=False)
        assert_same(found, expected, rtol=1e-3, atol=1e-4)  # TF32
        example.move_weights()
