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
from tiny_runs import rows, run, signal_at, tiny_recipe

from rnode_plugin.cli import main
from rnode_plugin.errors import CheckpointError, ConfigError, RnodeError
from rnode_plugin.recipes.recipe import Recipe
from rnode_plugin.training import fastest
from rnode_plugin.training.fastest import Choice, StepTimer, Way, choose, read_choice, write_choice

CPU = torch.device("cpu")
PLAIN, BF16 = Way("32-true"), Way("bf16-mixed")
COMPILED, BOTH = Way("32-true", compiled=True), Way("bf16-mixed", compiled=True)
OPEN = ("training.precision=auto", "training.compile=auto")

Decide = Callable[..., tuple[Choice, list[Way]]]


@pytest.fixture
def decide(monkeypatch: pytest.MonkeyPatch) -> Decide:
    """choose with seconds for each way instead of measured ones, infinite ones fail; and which steps were taken."""

    def decide(times: Sequence[float], *settings: str, steps: float = 1e6, **options: Any) -> Any:
        seconds, taken = dict(zip((PLAIN, BF16, COMPILED, BOTH), times, strict=True)), list[Way]()

        def step(self: StepTimer, way: Way) -> float:
            taken.append(way)
            if math.isinf(seconds[way]):
                raise RnodeError("it fails")
            return seconds[way]

        monkeypatch.setattr(StepTimer, "step", step)
        return choose(tiny_recipe(*OPEN, *settings), device=CPU, steps=steps, **options), taken

    return decide


ADAPTIVE = ("solver.method=dopri5", "solver.quadrature=full")


@pytest.mark.parametrize(("times", "settings", "way", "calls"), [
    ((1.0, 0.8, 0.7, 0.5), (), BOTH, [4, 4, 4, 4]),
    ((1.0, 0.96, 0.97, 0.98), (), PLAIN, None),  # noise does not decide
    ((1.0, 0.94, 0.97, 0.98), (), BF16, None),
    ((1.0, 10.0, 0.7, 8.0), (), COMPILED, [4, 2, 4, 2]),  # a much slower way is not timed further
    ((1.0, math.inf, math.inf, math.inf), (), PLAIN, [4, 1, 1, 1]),  # a way that fails is not taken
    ((math.inf, 0.5, math.inf, math.inf), (), BF16, None),
    ((math.inf,) * 4, (), PLAIN, None),
    ((1.0, 0.1, 0.7, 0.1), ADAPTIVE, COMPILED, [4, 0, 4, 0]),  # an adaptive solver trains in 32-true
    ((1.0, 0.9, 0.1, 0.1), ("training.compile=false",), BF16, None),  # the recipe's own choice stays
    ((1.0, 0.1, 0.9, 0.1), ("training.precision=32-true",), COMPILED, None),
    ((9.0, 9.0, 0.9, 0.1), ("training.compile=true",), BOTH, None),
])  # fmt: skip
def test_the_fastest_way_is_taken(
    decide: Decide, times: Sequence[float], settings: tuple[str, ...], way: Way, calls: list[int] | None
) -> None:
    choice, taken = decide(times, *settings)
    assert choice.way == way
    assert calls in (None, [taken.count(each) for each in (PLAIN, BF16, COMPILED, BOTH)])
    assert ("it fails" in choice.line()) == any(math.isinf(each) for each in times)
    assert choice.line().startswith(f"training in {way} (")


def test_what_a_short_run_cannot_win_back_is_not_tried(decide: Decide) -> None:
    """At best half of a step's time is saved, so a minute takes 124 steps of a second with four to try it."""
    times = (1.0, 1.0, 0.5, 0.5)
    choice, taken = decide(times, steps=128)
    assert (choice.way, set(taken)) == (PLAIN, {PLAIN, BF16})
    assert "too short" in choice.line()
    assert decide(times, steps=129)[0].way == COMPILED
    assert decide((1.0, 0.1, 0.1, 0.1), steps=8)[1] == []


def test_all_processes_take_what_is_fastest_on_the_slowest(decide: Decide) -> None:
    """Two processes, simulated one after the other: each contributes what the other one measured."""
    other = iter([1.0, 1.4, 0.9, math.inf])
    choice, _ = decide((1.0, 0.2, 0.8, 0.1), slowest=lambda seconds: max(seconds, next(other)))
    assert choice.way == COMPILED
    assert choice.measured["bf16-mixed"] == "1.4 s/step"
    assert "another process" in choice.measured["bf16-mixed compiled"]


def test_real_steps_are_timed_and_leave_the_random_state(tmp_path: Path) -> None:
    recipe = tiny_recipe("training.precision=auto", "data.batch_size=4")
    state = torch.get_rng_state()
    choice = choose(recipe, device=CPU, steps=1000)
    assert torch.equal(state, torch.get_rng_state())
    assert list(choice.measured) == ["32-true", "bf16-mixed"]
    write_choice(choice, tmp_path)
    assert read_choice(tmp_path) == choice


def test_a_timed_step_runs_in_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []

    def forward_and_backward(flow: Any, recipe: Recipe, x: torch.Tensor, solver: Any) -> int:
        fields = [field for field in flow.modules() if hasattr(field, "compiled")]
        seen.append((torch.is_autocast_enabled("cpu"), fields[0].compiled))
        return 1

    monkeypatch.setattr(fastest, "forward_and_backward", forward_and_backward)
    timer = StepTimer(tiny_recipe(), device=CPU)
    for way in (PLAIN, BF16, BOTH):
        assert timer.step(way) >= 0
    assert seen == [(False, False), (True, False), (True, True)]


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
    assert "training in bf16-mixed (32-true: " in capsys.readouterr().err
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
    write_choice(Choice(BF16), folder)
    run(tiny_recipe("training.precision=auto", "training.max_steps=1"), tmp_path, run_folder=folder)
    assert takes_bf16 == []
    # compiled was not among what this recipe leaves open
    other = tmp_path / "other"
    other.mkdir()
    write_choice(Choice(BOTH), other)
    run(tiny_recipe("training.precision=auto", "training.max_steps=1"), tmp_path, run_folder=other)
    assert takes_bf16 == [1]


def test_choices_of_earlier_versions_and_damaged_ones(tmp_path: Path) -> None:
    file = tmp_path / "chosen.json"
    old = {"way": {"precision": "bf16-mixed", "gradient": "autograd", "compiled": True}, "steps": 8, "where": "cpu"}
    file.write_text(json.dumps({**old, "measured": [{"way": old["way"], "batch": 20, "seconds": [1.0]}]}))
    assert read_choice(tmp_path) == Choice(BOTH, "cpu")
    for text in ('{"way": {"precision": 3}, "measured": []}', "{"):
        file.write_text(text)
        with pytest.raises(CheckpointError, match=r"chosen.json cannot be read .* remove it"):
            read_choice(tmp_path)


# the command line ------------------------------------------------------------------------------


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
