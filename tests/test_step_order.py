"""Smaller batches and coarser steps at the start: which images a step takes, and resumed to the bit."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import rows, run, tiny_recipe

from rnode_plugin.errors import ConfigError
from rnode_plugin.recipes.recipe import Start
from rnode_plugin.training.datamodule import StepOrder


def order_of(done: int = 0, **options: Any) -> StepOrder:
    return StepOrder(**{"seed": 3, "next_step": lambda: done, **options})


def batches(epochs: int, **options: Any) -> list[list[int]]:
    """The batches that one device takes in so many epochs."""
    endless = iter(order_of(endless=True, **options))
    return list(itertools.islice(endless, epochs * len(order_of(**options))))


@pytest.mark.parametrize(("images", "start", "size"), [
    (20, Start(3, batch_size=2), 6),  # 6 images of the first pass, then two whole steps, then the next pass
    (20, Start(10, batch_size=2), 6),  # the start is just a pass
    (20, Start(23, batch_size=3), 4),  # the start is several passes and a part of one
    (21, Start(5, batch_size=4), 5),  # the start leaves less than a step of its pass
    (20, Start(3, batch_size=7), 2),  # not larger than later
    (20, Start(3, step=1.0), 6),
    (10, Start(), 3),  # without a start, each epoch is a pass
])  # fmt: skip
@pytest.mark.parametrize("world", [1, 2])
def test_each_pass_takes_each_image_once(images: int, start: Start, size: int, world: int) -> None:
    parts = [
        batches(9, samples=images * world, batch_size=size, start=start, world=world, rank=rank)
        for rank in range(world)
    ]
    steps = [list(itertools.chain(*of_devices)) for of_devices in zip(*parts, strict=True)]
    assert [len(step) for step in steps] == [
        world * min(start.batch_size or size, size) if number < start.steps else world * size
        for number in range(len(steps))
    ]
    passes: list[list[int]] = [[]]
    for step in steps:
        if len(passes[-1]) + len(step) > images * world:  # what is left does not fill the step: a new pass
            passes.append([])
        passes[-1] += step
    assert len(passes) > 2
    for each in passes:
        assert len(set(each)) == len(each)
        assert set(each) <= set(range(images * world))
    assert passes[0][:size] != passes[1][:size]


@pytest.mark.parametrize("done", range(15))
def test_an_order_goes_on_wherever_it_was_left(done: int) -> None:
    options: dict[str, Any] = {"samples": 20, "batch_size": 4, "start": Start(4, batch_size=3)}
    whole = batches(3, **options)
    end = 5 * (done // 5 + 1)  # of the epoch in which it begins
    assert list(order_of(done, **options)) == whole[done:end]
    rest = iter(order_of(done, endless=True, **options))
    assert list(itertools.islice(rest, 15 - done)) == whole[done:]
    assert order_of(**options).batches_of(done) == whole[done : done + 1]


def test_two_devices_and_two_batches_a_step_take_the_images_of_one() -> None:
    one = batches(3, samples=40, batch_size=8, start=Start(4, batch_size=4))
    parts = [
        batches(3, samples=40, batch_size=2, accumulate=2, start=Start(4, batch_size=1), world=2, rank=rank)
        for rank in (0, 1)
    ]
    first, second = ([part[::2], part[1::2]] for part in parts)
    assert [a + b + c + d for a, b, c, d in zip(first[0], second[0], first[1], second[1], strict=True)] == one


def test_a_measured_step_is_measured_after_the_start(tmp_path: Path) -> None:
    settings = ("start.steps=2", "start.step=1", "solver.step=auto", "training.max_steps=3")
    result = run(tiny_recipe(*settings), tmp_path)
    steps = [float(row["train/step_size"]) for row in rows(result.folder.path) if "train/step_size" in row]
    assert steps[:2] == [1.0, 1.0]
    assert steps[2] == result.step_size
    assert result.step_size is not None
    assert result.step_size <= 0.5


@pytest.mark.parametrize(("settings", "words"), [
    (["start.steps=3"], "start.steps goes with"),
    (["start.step=1"], "start.steps goes with"),
    (["start.steps=3", "start.step=1", "solver.method=dopri5", "solver.quadrature=full"],
     "start.step needs a fixed grid, but dopri5 chooses its own steps"),
])  # fmt: skip
def test_settings_that_cannot_work(settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_recipe(*settings)


def test_in_words() -> None:
    assert Start(4, 10, 1.0).described(20) == "20 (10 and solver.step 1 in the first 4 steps)"
    assert Start().described(20) == "20"
