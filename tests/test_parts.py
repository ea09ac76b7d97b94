"""A run is a list of parts, and in each of them no setting changes that its numbers depend on."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from run_folders import write_run
from tiny_runs import run, tiny_recipe

from rnode_plugin.errors import ConfigError
from rnode_plugin.experiments.comparison.compare import _refuse_other
from rnode_plugin.experiments.data.facts import Facts
from rnode_plugin.experiments.recipes.parts import Part, joined, part_at
from rnode_plugin.experiments.reports.runs import configuration_of, settings_of
from rnode_plugin.experiments.runs.run import Run
from rnode_plugin.experiments.training.checkpoints import parts_of, read_checkpoint
from rnode_plugin.experiments.training.optimizers import rates_before

LONGER = ("training.sample_images=2", "training.max_steps=10")


@pytest.fixture
def done(finished_run: Callable[[str], Path], tmp_path: Path) -> Run:
    """A run of eight steps."""
    shutil.copytree(finished_run("images"), path := tmp_path / "digits" / "0")
    return Run(path)


def part(first: int = 0, *settings: str, devices: int = 1, planned: int = 8) -> Part:
    return Part(first=first, devices=devices, planned=planned, recipe=tiny_recipe(*settings))


@pytest.mark.parametrize(("settings", "changed"), [
    ((), set()),
    (("data.workers=1", "training.log_every=3", "training.save_every=7"), set()),
    (("training.max_steps=12",), {"training.max_steps"}),
    (("optimizer.lr=0.1", "test_solver.step=0.5"), {"optimizer.lr", "test_solver.step"}),
    (("regularizers.l1=2",), {"regularizers.l1"}),
])  # fmt: skip
def test_what_changes_the_numbers(settings: tuple[str, ...], changed: set[str]) -> None:
    before, later = part(), part(5, *settings)
    assert before.changes(later) == changed
    assert before.changes(dataclasses.replace(later, devices=2)) == {*changed, "devices"}
    one = changed <= {"training.max_steps"}
    parts = joined((before,), later, same_rates=True)
    assert parts == ((dataclasses.replace(later, first=0),) if one else (before, later))
    assert len(joined((before,), later, same_rates=False)) == (1 if not changed else 2)
    assert (before.key == parts[-1].key) == one
    assert Part.from_plain(json.loads(json.dumps(later.to_plain()))) == later


def test_steps_that_are_taken_again_leave_their_part() -> None:
    parts = joined((part(), part(5, "optimizer.lr=0.1")), part(5, "optimizer.lr=0.2"), same_rates=True)
    assert parts == (part(), part(5, "optimizer.lr=0.2"))
    assert part_at(parts, 5) == parts[0]
    assert part_at(parts, 6) == parts[1]
    assert part_at((), 6) is None


@pytest.mark.parametrize(("schedule", "step", "equal"), [
    ("constant", 8, True), ("cosine", 8, False), ("cooldown", 6, True), ("cooldown", 8, False),
])  # fmt: skip
def test_a_longer_run_has_the_rates_of_one_that_was_planned_so(schedule: str, step: int, equal: bool) -> None:
    short, long = (part(0, f"optimizer.schedule={schedule}", planned=planned) for planned in (8, 12))
    assert (rates_before(short, step) == rates_before(long, step)) == equal


def test_a_resume_with_other_settings_is_a_part_of_its_own(done: Run, tmp_path: Path) -> None:
    (before,) = done.read().parts
    assert (before.first, before.devices, before.planned) == (0, 1, 8)
    run(tiny_recipe(*LONGER), tmp_path, resume=done.path)
    (longer,) = done.read().parts
    assert (longer.first, longer.planned, longer.recipe) == (0, 10, tiny_recipe(*LONGER))
    faster = tiny_recipe(*LONGER, "training.max_steps=12", "optimizer.lr=0.1")
    fitted = run(faster, tmp_path, resume=done.path)
    contents = done.read()
    assert [each.first for each in contents.parts] == [0, 10]
    assert contents.parts == parts_of(read_checkpoint(done.last))
    assert contents.result is not None
    assert contents.result.part == fitted.result.part == contents.parts[1].key
    assert settings_of(contents)["changes"] == ("step 10: optimizer.lr 0.002 → 0.1, training.max_steps 10 → 12")
    straight = Run(write_run(tmp_path / "straight", faster, steps=1, checks=(), facts=contents.facts)).read()
    assert configuration_of(straight) != configuration_of(contents)


def test_a_result_counts_in_its_part_alone(done: Run, tmp_path: Path) -> None:
    """A part that begins where the result ended has no row yet. One that takes its last step again is another."""
    contents = done.read()
    assert contents.result is not None
    assert contents.environment is not None
    for first, counts in ((8, True), (7, False)):
        parts = (*contents.parts, part(first, "optimizer.lr=0.1"))
        done.describe(contents.recipe, contents.environment, contents.facts, parts)
        assert (done.read().result is not None) == counts


def test_a_comparison_refuses_a_run_of_several_parts(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    folder, facts = tmp_path / "42", Facts("of", "them")
    one = Run(write_run(folder, recipe, steps=1, checks=()))
    contents = one.read()
    assert contents.environment is not None
    _refuse_other(folder, recipe, facts)
    one.describe(recipe, contents.environment, None, (part(0, "optimizer.lr=0.1"), part(5)))
    with pytest.raises(ConfigError, match="at step 5"):
        _refuse_other(folder, recipe, facts)
