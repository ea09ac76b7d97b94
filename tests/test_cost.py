"""What a training step costs: counted without a device, held against torch's counter and real allocations."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from tiny_runs import tiny_recipe
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rnode_plugin import get_recipe
from rnode_plugin.cli import main
from rnode_plugin.errors import ConfigError
from rnode_plugin.evaluation.measures import FlowInput
from rnode_plugin.training.cost.cards import CARDS, get_card
from rnode_plugin.training.cost.counting import Cost, count
from rnode_plugin.training.cost.estimate import estimate, predict_seconds
from rnode_plugin.training.cost.step import count_step, fixed_solver, largest_batch, training_step

CARD = CARDS["a100"]


def test_kernels_bytes_and_memory_of_known_operations() -> None:
    x, w = torch.empty(10, 20, device="meta"), torch.empty(20, 5, device="meta")

    def run() -> None:
        y = x @ w  # 10 x 5
        z = y.t().contiguous()  # a view, then a copy
        z.add_(1)

    cost = count(run, alive=(x, w))
    assert cost.matmul_flops == cost.flops == 2 * 10 * 20 * 5
    assert cost.kernels == sum(cost.by_operation.values()) == 3
    product, copy, in_place = 4 * (200 + 100 + 50), 4 * (50 + 50), 4 * (50 + 50)
    assert cost.bytes == product + copy + in_place
    assert cost.peak_memory == 4 * (200 + 100 + 50 + 50)
    assert cost.host_reads == 0


def test_memory_that_is_freed_is_used_again() -> None:
    def run() -> None:
        x = torch.empty(1000, device="meta")
        for _ in range(10):
            x = x * 2

    assert count(run).peak_memory == 2 * 4000


def test_flops_are_those_of_torchs_counter() -> None:
    recipe = tiny_recipe()
    flow = recipe.build_flow()
    step = training_step(
        flow, recipe, FlowInput(torch.rand(3, *recipe.images.shape), {}), fixed_solver(recipe.solver)
    )
    torch.manual_seed(0)
    with FlopCounterMode(display=False) as counter:
        step()
    torch.manual_seed(0)
    assert count(step).flops == counter.get_total_flops() > 0


def test_the_device_meta_counts_what_values_do() -> None:
    """Peak memory on meta is that of real tensors; the CPU's own path to few channels moves more."""
    recipe = tiny_recipe("data.batch_size=16")
    step = count_step(recipe)
    flow = recipe.build_flow()
    real = count(
        training_step(
            flow, recipe, FlowInput(torch.rand(16, *recipe.images.shape), {}), fixed_solver(recipe.solver)
        ),
        alive=tuple(flow.parameters()),
    )
    assert step.parameters == sum(p.numel() for p in flow.parameters())
    assert step.nfe == 24
    assert step.cost.peak_memory == pytest.approx(real.peak_memory, rel=0.3)


_PEAK_OF_A_PROCESS = """
import dataclasses, resource, torch
from rnode_plugin import get_recipe
from rnode_plugin.training.cost.step import training_step

torch.set_num_threads(1)
recipe = get_recipe("mnist")
flow = recipe.build_flow()
coarse = dataclasses.replace(recipe.solver, step=1.0)
training_step(flow, recipe, torch.rand(1, *recipe.data.shape), coarse)()  # loads libraries and makes gradients
with open("/proc/self/statm") as file:
    before = int(file.read().split()[1]) * resource.getpagesize()
training_step(flow, recipe, torch.rand(BATCH, *recipe.data.shape), recipe.solver)()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("batch", [4, 12])
def test_peak_memory_is_that_of_a_process(batch: int) -> None:
    """The full MNIST model with ``autograd``: what a process really takes more during a step, within 15 %."""
    statements = _PEAK_OF_A_PROCESS.replace("BATCH", str(batch))
    done = subprocess.run([sys.executable, "-c", statements], capture_output=True, text=True, check=True)
    step = count_step(get_recipe("mnist"), batch=batch)
    there_before = 4 * 4 * step.parameters  # weights and gradients; Adam's moments are not there
    assert int(done.stdout) == pytest.approx(step.cost.peak_memory - there_before, rel=0.15)


def test_a_checkpointed_step_needs_less_memory_and_more_flops() -> None:
    recipe = tiny_recipe("solver.step=0.5", "data.batch_size=64", "model.layers=3")
    plain, checkpointed = (count_step(recipe, gradient=mode) for mode in ("autograd", "checkpointed"))
    assert checkpointed.cost.peak_memory < 0.6 * plain.cost.peak_memory
    assert 1.2 * plain.cost.flops < checkpointed.cost.flops < 1.5 * plain.cost.flops


def test_memory_is_affine_in_the_batch() -> None:
    recipe = tiny_recipe("data.batch_size=32")
    count_step(recipe)  # the first step of a process makes tables that the others find
    step, large = count_step(recipe), count_step(recipe, batch=96)
    predicted = step.cost.peak_memory + 64 * step.memory_per_image
    assert large.cost.peak_memory == pytest.approx(predicted, rel=1e-4)
    assert count_step(recipe) == step, "the count depends on what was drawn before"
    assert largest_batch(step, predicted * 1.0001) == 96
    assert largest_batch(step, 1.0) == 0


def test_an_adaptive_solver_is_counted_with_a_stated_number_of_evaluations() -> None:
    recipe = tiny_recipe("solver.trace_quadrature=full", "solver.method=dopri5", "model.hidden=2", "model.layers=2")
    found = estimate(recipe, CARD, nfe_per_block=8, gradients=("autograd",))
    assert found.steps[0].nfe == 6 * 8
    assert found.nfe_per_block == 8


def test_seconds_follow_from_peaks_and_shares() -> None:
    computes = Cost(156_000_000_000_000, 0, 0, 0, 0, 0, {})
    moves = Cost(0, 0, 2_039_000_000_000, 0, 0, 0, {})
    launches = Cost(0, 0, 0, 100_000, 0, 0, {})
    assert predict_seconds(computes, CARD) == pytest.approx((1 / 0.6, 4.0))
    assert predict_seconds(computes, CARD, "bf16-mixed") == pytest.approx((0.5 / 0.6, 2.0))
    assert predict_seconds(moves, CARD) == pytest.approx((1 / 0.85, 2.0))
    assert predict_seconds(launches, CARD) == pytest.approx((0.4, 1.0))
    with pytest.raises(ConfigError, match="no bfloat16"):
        predict_seconds(computes, CARDS["2080ti"], "bf16-mixed")
    with pytest.raises(ConfigError, match="cannot be estimated"):
        predict_seconds(computes, CARD, "64-true")


def test_hours_follow_from_the_schedule() -> None:
    found = estimate(tiny_recipe("model.layers=2"), CARD, devices=2)
    assert found.nfe_per_block is None
    for each in found.predictions:
        assert each.hours_per_epoch is not None
        assert each.hours is not None
        epochs = 8 / (80 / (2 * 20))  # 8 steps of 40 images, 80 images
        for of_epoch, in_all, seconds in zip(each.hours_per_epoch, each.hours, each.seconds_per_step, strict=True):
            assert in_all == pytest.approx(of_epoch * epochs)
            assert in_all == pytest.approx(8 * seconds / 3600)
        assert each.fits
    assert {(each.precision, each.gradient) for each in found.predictions} == {
        (precision, gradient)
        for precision in ("32-true", "bf16-mixed")
        for gradient in ("autograd", "checkpointed")
    }


def test_unknown_cards_are_listed() -> None:
    with pytest.raises(ConfigError, match="did you mean 'h100'"):
        get_card("h10")


def test_the_command_prints_a_table_and_json() -> None:
    small = ["--set", "model.hidden=4", "--set", "model.layers=2", "--batch-size", "8", "--set", "solver.step=none"]
    text = CliRunner().invoke(main, ["estimate", "digits", "--gpu", "a10", *small])
    assert text.exit_code == 0, text.output
    assert "device kernels" in text.stdout
    assert "not measured on the card" in text.stdout
    done = CliRunner().invoke(main, ["estimate", "digits", "--gpu", "a10", "--json", *small])
    found = json.loads(done.stdout)
    keys = {"parameters", "flops", "bytes", "kernels", "host_reads", "peak_memory", "seconds_per_step"}
    assert keys <= found.keys()
    assert found["host_reads"] == 0


def test_the_command_times_this_machine() -> None:
    small = ["--set", "model.hidden=4", "--batch-size", "4", "--set", "solver.step=none"]
    done = CliRunner().invoke(main, ["estimate", "digits", "--json", *small])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [(s["precision"], s["compiled"], s["gradient"]) for s in found["steps"]] == [
        ("32-true", False, "autograd"), ("bf16-mixed", False, "autograd"), ("32-true", True, "autograd"),
        ("bf16-mixed", True, "autograd"), ("32-true", False, "checkpointed"), ("bf16-mixed", False, "checkpointed"),
    ]  # fmt: skip
    plain = [step for step in found["steps"] if not step["compiled"]]
    assert all(step["median"] > 0 for step in plain)
    assert all("not tried" in step["problem"] for step in found["steps"] if step["compiled"])
    assert found["fastest"]["precision"] in ("32-true", "bf16-mixed")


def test_a_model_that_needs_values_is_refused() -> None:
    class Recipe:  # what count_step reads of a recipe
        solver = tiny_recipe().solver
        data = tiny_recipe().data
        model = tiny_recipe().model

        def build_flow(self) -> nn.Module:
            return nn.Linear(1, 1, device="cpu")

    with pytest.raises(ConfigError, match="cannot be estimated"):
        count_step(Recipe())  # pyright: ignore[reportArgumentType]
