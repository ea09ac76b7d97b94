"""Which images a step takes, on one device and on several, wherever a run was left."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from rnode_plugin.experiments.training.datamodule import StepOrder, ValidationOrder


def order_of(done: int = 0, **options: Any) -> StepOrder:
    return StepOrder(**{"seed": 3, "next_step": lambda: done, **options})


def batches(epochs: int, **options: Any) -> list[list[int]]:
    """The batches that one device takes in so many epochs."""
    endless = iter(order_of(endless=True, **options))
    return list(itertools.islice(endless, epochs * len(order_of(**options))))


@pytest.mark.parametrize(("images", "size"), [(20, 6), (20, 5), (10, 3)])
@pytest.mark.parametrize("world", [1, 2])
def test_each_pass_takes_each_image_once(images: int, size: int, world: int) -> None:
    parts = [batches(9, samples=images * world, batch_size=size, world=world, rank=rank) for rank in range(world)]
    steps = [list(itertools.chain(*of_devices)) for of_devices in zip(*parts, strict=True)]
    assert {len(step) for step in steps} == {world * size}
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
    options: dict[str, Any] = {"samples": 20, "batch_size": 4}
    whole = batches(3, **options)
    end = 5 * (done // 5 + 1)  # of the epoch in which it begins
    assert list(order_of(done, **options)) == whole[done:end]
    rest = iter(order_of(done, endless=True, **options))
    assert list(itertools.islice(rest, 15 - done)) == whole[done:]
    assert order_of(**options).batches_of(done) == whole[done : done + 1]


def test_devices_and_batches_take_the_images_of_one() -> None:
    one = batches(3, samples=40, batch_size=8)
    parts = [batches(3, samples=40, batch_size=2, accumulate=2, world=2, rank=rank) for rank in (0, 1)]
    first, second = ([part[::2], part[1::2]] for part in parts)
    assert [a + b + c + d for a, b, c, d in zip(first[0], second[0], first[1], second[1], strict=True)] == one


@pytest.mark.parametrize("samples", [1, 7, 8, 9, 16, 23])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_devices_together_validate_the_batches_of_one(samples: int, world: int) -> None:
    one = list(ValidationOrder(samples, batch_size=4))
    assert list(itertools.chain(*one)) == list(range(samples))
    orders = [ValidationOrder(samples, batch_size=4, world=world, rank=rank) for rank in range(world)]
    parts = [list(order) for order in orders]
    assert {len(part) for part in parts} == {len(order) for order in orders} == {-(-len(one) // world)}
    by_turns = [batch for turn in zip(*parts, strict=True) for batch in turn]
    assert by_turns == one + [[]] * (len(by_turns) - len(one))
