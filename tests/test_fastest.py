"""training.precision=auto and training.compile=auto: what is tried and taken, kept on resume, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from fake_training import FakeTraining
from run_folders import write_run
from tiny_runs import rows, run, signal_at, tiny_recipe

from rnode_plugin import get_recipe
from rnode_plugin.cli import main
from rnode_plugin.comparison import compare as comparison
from rnode_plugin.comparison.compare import compare
from rnode_plugin.errors import CheckpointError, ConfigError
from rnode_plugin.recipes.recipe import Recipe
from rnode_plugin.reports import page
from rnode_plugin.training import fastest
from rnode_plugin.training.fastest import Choice, StepTimer, TimedStep, Way, choose, read_choice, write_choice

CPU = torch.device("cpu")
PLAIN, BF16 = Way("32-true"), Way("bf16-mixed")
COMPILED, BOTH = Way("32-true", compiled=True), Way("bf16-mixed", compiled=True)
OPEN = ("training.precision=auto", "training.compile=auto")


class FakeTimer:
    """A timer whose steps take what it is told, and that remembers which it was asked for."""

    times: dict[Way, float]
    asked: list[Way]
    can_compile = True

    def __init__(self, recipe: Recipe, **options: object) -> None:
        self._timed: dict[Way, TimedStep] = {}

    def time(self, way: Way) -> TimedStep:
        self.asked.append(way)
        timed = self._timed.get(way, TimedStep(way, 20))
        if math.isinf(self.times[way]):
            timed = dataclasses.replace(timed, problem="it fails")
        elif timed.warm_up is None:
            timed = dataclasses.replace(timed, warm_up=9.0)
        else:
            timed = dataclasses.replace(timed, seconds=(*timed.seconds, self.times[way]))
        self._timed[way] = timed
        return timed

    def drop(self, way: Way, problem: str) -> None:
        self._timed[way] = dataclasses.replace(self._timed.get(way, TimedStep(way, 20)), problem=problem)

    @property
    def results(self) -> tuple[TimedStep, ...]:
        return tuple(self._timed.values())


@pytest.fixture
def decide(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Choice]:
    """choose with seconds for each way instead of measured ones."""

    def decide(times: Sequence[float], *settings: str, steps: float = 1e6, **options: Any) -> Choice:
        FakeTimer.times = dict(zip((PLAIN, BF16, COMPILED, BOTH), times, strict=True))
        FakeTimer.asked = []
        monkeypatch.setattr(fastest, "StepTimer", FakeTimer)
        return choose(tiny_recipe(*OPEN, *settings), device=CPU, steps=steps, **options)

    return decide


def test_the_fastest_is_taken_and_the_others_are_named(decide: Callable[..., Choice]) -> None:
    choice = decide((1.0, 0.8, 0.7, 0.5))
    assert choice.way == BOTH
    assert choice.line() == (
        "training in bf16-mixed compiled: 0.5 s/step, compiled in 9.0 s; 32-true: 1 s/step; "
        "bf16-mixed: 0.8 s/step; 32-true compiled: 0.7 s/step, compiled in 9.0 s"
    )
    assert FakeTimer.asked.count(BF16) == 4


def test_noise_does_not_decide(decide: Callable[..., Choice]) -> None:
    assert decide((1.0, 0.96, 0.97, 0.98)).way == PLAIN
    assert decide((1.0, 0.94, 0.97, 0.98)).way == BF16


def test_what_is_much_slower_is_not_timed_further(decide: Callable[..., Choice]) -> None:
    choice = decide((1.0, 10.0, 0.7, 0.1))
    assert choice.way == COMPILED
    assert FakeTimer.asked.count(BF16) == 2
    assert BOTH not in FakeTimer.asked
    assert "bf16-mixed: 10 s/step, not timed further" in choice.line()


def test_what_fails_is_not_taken(decide: Callable[..., Choice]) -> None:
    assert decide((1.0, math.inf, math.inf, math.inf)).way == PLAIN
    assert decide((math.inf, 0.5, math.inf, math.inf)).way == BF16
    assert decide((math.inf,) * 4).way == PLAIN
    assert "bf16-mixed: it fails" in decide((1.0, math.inf, 1.0, 1.0)).line()


def test_compiling_has_to_be_won_back(decide: Callable[..., Choice]) -> None:
    """At best half of a step's time is saved, so a minute takes 124 steps of a second with four to try it."""
    times = (1.0, 1.0, 0.5, 0.5)
    assert decide(times, steps=128).way == PLAIN
    assert set(FakeTimer.asked) == {PLAIN, BF16}
    assert decide(times, steps=129).way == COMPILED
    assert decide((0.1, 0.1, 0.05, 0.05), steps=1000).way == PLAIN


def test_few_steps_are_not_worth_a_measurement(decide: Callable[..., Choice]) -> None:
    assert decide((1.0, 0.1, 0.1, 0.1), steps=8).way == PLAIN
    assert FakeTimer.asked == []


def test_an_adaptive_solver_trains_in_32_true(decide: Callable[..., Choice]) -> None:
    choice = decide((1.0, 0.1, 0.7, 0.1), "solver.method=dopri5", "solver.trace_quadrature=full")
    assert choice.way == COMPILED
    assert set(FakeTimer.asked) == {PLAIN, COMPILED}


def test_what_the_recipe_fixes_stays(decide: Callable[..., Choice]) -> None:
    assert decide((1.0, 0.9, 0.1, 0.1), "training.compile=false").way == BF16
    assert decide((1.0, 0.1, 0.9, 0.1), "training.precision=32-true").way == COMPILED
    assert decide((9.0, 9.0, 0.9, 0.1), "training.compile=true").way == BOTH


def test_all_processes_take_what_is_fastest_on_the_slowest(decide: Callable[..., Choice]) -> None:
    """Two processes, simulated one after the other: each contributes what the other one measured."""
    other = {PLAIN: 1.0, BF16: 1.4, COMPILED: 0.9, BOTH: math.inf}
    order = iter([PLAIN, BF16, COMPILED, BOTH, PLAIN, BF16, COMPILED])

    def slowest(seconds: Sequence[float]) -> list[float]:
        way = next(order)
        return [max(each, other[way]) for each in seconds]

    choice = decide((1.0, 0.2, 0.8, 0.1), slowest=slowest)
    assert choice.way == COMPILED
    assert [each.seconds for each in choice.measured if each.way == BF16] == [(1.4,) * 3]


def test_real_steps_are_timed_and_leave_the_random_state(tmp_path: Path) -> None:
    recipe = tiny_recipe("training.precision=auto", "data.batch_size=4")
    state = torch.get_rng_state()
    choice = choose(recipe, device=CPU, steps=1000)
    assert torch.equal(state, torch.get_rng_state())
    assert [each.way for each in choice.measured] == [PLAIN, BF16]
    plain, bf16 = choice.measured
    assert len(plain.seconds) == 3
    assert len(bf16.seconds) == (3 if bf16.problem is None else 1)
    write_choice(choice, tmp_path)
    assert read_choice(tmp_path) == choice


def test_a_timed_step_runs_in_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []

    def forward_and_backward(flow: Any, recipe: Recipe, x: torch.Tensor, solver: Any) -> Callable[[], int]:
        fields = [field for field in flow.modules() if hasattr(field, "compiled")]

        def step() -> int:
            seen.append((torch.is_autocast_enabled("cpu"), fields[0].compiled))
            return 1

        return step

    monkeypatch.setattr("rnode_plugin.training.fastest.forward_and_backward", forward_and_backward)
    timer = StepTimer(tiny_recipe(), device=CPU)
    for way in (PLAIN, BF16, BOTH):
        assert timer.time(way).warm_up is not None
    assert seen == [(False, False), (True, False), (True, True)]
    with pytest.raises(ConfigError, match="64-true cannot be timed"):
        timer.time(Way("64-true"))


# runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def takes_bf16(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Runs measure as they do and take bf16; the steps that were left each time."""
    calls: list[float] = []
    measured = choose

    def choose_bf16(recipe: Recipe, *, steps: float, **options: Any) -> Choice:
        calls.append(steps)
        return dataclasses.replace(measured(recipe, steps=1000, **options), way=BF16)

    monkeypatch.setattr(fastest, "choose", choose_bf16)
    return calls


def test_a_run_is_that_of_what_was_chosen_and_keeps_to_it(
    tmp_path: Path, takes_bf16: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """To the bit that of the precision by name: no other order, no other noise; also when it goes on."""
    recipe = tiny_recipe("training.precision=auto")
    named = run(tiny_recipe("training.precision=bf16-mixed"), tmp_path / "a")
    part = run(recipe, tmp_path / "b", callbacks=[signal_at(3)])
    assert "training in bf16-mixed: " in capsys.readouterr().err
    rest = run(recipe, tmp_path, resume=part.folder.path)
    assert "training in bf16-mixed, as chosen before" in capsys.readouterr().err
    assert takes_bf16 == [8]
    assert rows(named.folder.path) == rows(rest.folder.path)
    assert rows(named.folder.path) != rows(run(tiny_recipe(), tmp_path / "c").folder.path)
    folder = rest.folder.path
    assert json.loads((folder / "recipe.json").read_text())["training"]["precision"] == "auto"
    choice = read_choice(folder)
    assert choice is not None
    assert choice.way == BF16


def test_a_new_run_may_be_given_what_to_take(tmp_path: Path, takes_bf16: list[float]) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    write_choice(Choice(BF16, 8, "cpu", ()), folder)
    run(tiny_recipe("training.precision=auto", "training.max_steps=1"), tmp_path, run_folder=folder)
    assert takes_bf16 == []
    # compiled was not among what this recipe leaves open
    other = tmp_path / "other"
    other.mkdir()
    write_choice(Choice(BOTH, 8, "cpu", ()), other)
    run(tiny_recipe("training.precision=auto", "training.max_steps=1"), tmp_path, run_folder=other)
    assert takes_bf16 == [1]


def test_a_damaged_choice_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "chosen.json").write_text('{"way": {"precision": 3}, "measured": []}')
    with pytest.raises(CheckpointError, match=r"chosen.json cannot be read .* remove it"):
        read_choice(tmp_path)
    (tmp_path / "chosen.json").write_text("{")
    with pytest.raises(CheckpointError, match="remove it"):
        read_choice(tmp_path)


# comparisons and the command line ------------------------------------------------------------------------------


def test_the_arms_of_a_comparison_share_one_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTraining(tmp_path / "fake", write_run(tmp_path / "run", get_recipe("digits")))
    monkeypatch.setattr(comparison, "_TRAIN", fake.command)
    monkeypatch.setattr(page, "make_panels", lambda arms: [])
    timed: list[Recipe] = []

    def choose_bf16(recipe: Recipe, **options: Any) -> Choice:
        timed.append(recipe)
        return Choice(BF16, options["steps"], "cpu", ())

    monkeypatch.setattr(comparison, "choose", choose_bf16)
    recipe = tiny_recipe("training.precision=auto")
    lines: list[str] = []

    def again(*arms: str) -> Any:
        out = tmp_path / "out"
        return compare(
            recipe, arms=arms, out=out, accelerator="cpu", devices="1", progress=False, announce=lines.append
        )

    result = again("none", "rnode")
    assert [each.regularizers for each in timed] == [recipe.regularizers]
    assert "all arms: training in bf16-mixed" in lines
    again("none", "rnode", "kinetic")
    assert len(timed) == 1
    for folder in result.runs:
        choice = read_choice(folder)
        assert choice is not None
        assert choice.way == BF16
    with pytest.raises(ConfigError, match=r"digits-ffjord cannot train in bf16-mixed, .* choose another --out"):
        again("none", "ffjord")


@pytest.mark.parametrize(("arguments", "compile_"), [
    (["--compile", "digits"], True), (["digits", "--compile"], True), (["digits", "--compile", "auto"], "auto"),
    (["digits", "--compile=auto"], "auto"), (["digits", "--no-compile"], False), (["digits"], False),
])  # fmt: skip
def test_the_options(arguments: list[str], compile_: object, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Recipe] = []

    def fit(recipe: Recipe, **options: Any) -> None:
        trained.append(recipe)
        raise ConfigError("that will do.")

    monkeypatch.setattr("rnode_plugin.training.fit.fit", fit)
    done = CliRunner().invoke(main, ["train", "--precision", "auto", *arguments])
    assert "that will do" in done.output
    assert trained[0].training.compile == compile_
    assert trained[0].training.precision == "auto"
