"""What a training step costs: counted without a device, held against torch's counter and real allocations."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from tiny_runs import tiny_recipe
from torch.utils.flop_counter import FlopCounterMode

from rnode_plugin import get_recipe
from rnode_plugin.cli import main
from rnode_plugin.errors import ConfigError
from rnode_plugin.evaluation.measures import measure_of
from rnode_plugin.training.estimate import count, count_step, estimate
from rnode_plugin.training.fastest import fixed_solver, forward_and_backward

CPU = torch.device("cpu")


def test_kernels_and_memory_of_known_operations() -> None:
    x, w = torch.empty(10, 20, device="meta"), torch.empty(20, 5, device="meta")

    def run() -> None:
        y = x @ w  # 10 x 5
        z = y.t().contiguous()  # a view, then a copy
        z.add_(1)

    cost = count(run, alive=(x, w))
    assert (cost.flops, cost.kernels) == (2 * 10 * 20 * 5, 3)
    assert cost.peak_memory == 4 * (200 + 100 + 50 + 50)

    def again() -> None:
        x = torch.empty(1000, device="meta")
        for _ in range(10):
            x = x * 2

    assert count(again).peak_memory == 2 * 4000, "memory that is freed is used again"


def test_the_device_meta_counts_what_values_do() -> None:
    """FLOPs are those of torch's counter; the CPU's own path to few channels takes more memory."""
    recipe = tiny_recipe("data.batch_size=16")
    flow, inputs = recipe.build_flow(), measure_of(recipe).random_inputs(16)

    def step() -> None:
        forward_and_backward(flow, recipe, inputs, fixed_solver(recipe.solver))

    torch.manual_seed(0)
    with FlopCounterMode(display=False) as counter:
        step()
    torch.manual_seed(0)
    real = count(step, alive=tuple(flow.parameters()))
    count_step(recipe)  # the first step of a process makes tables that the others find
    counted = count_step(recipe)
    assert real.flops == counter.get_total_flops() > 0
    assert counted.parameters == sum(p.numel() for p in flow.parameters())
    assert counted.nfe == 24
    assert counted.cost.peak_memory == pytest.approx(real.peak_memory, rel=0.3)
    assert count_step(recipe) == counted, "the count depends on what was drawn before"


_PEAK_OF_A_PROCESS = """
import dataclasses, resource, torch
from rnode_plugin import get_recipe
from rnode_plugin.evaluation.measures import measure_of
from rnode_plugin.training.fastest import forward_and_backward

torch.set_num_threads(1)
recipe = get_recipe("mnist")
flow = recipe.build_flow()
inputs = measure_of(recipe).random_inputs
coarse = dataclasses.replace(recipe.solver, step=1.0)
forward_and_backward(flow, recipe, inputs(1), coarse)  # loads libraries and makes gradients
with open("/proc/self/statm") as file:
    before = int(file.read().split()[1]) * resource.getpagesize()
forward_and_backward(flow, recipe, inputs(4), recipe.solver)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_that_of_a_process() -> None:
    """The full MNIST model with ``autograd``: what a process really takes more during a step, within 15 %."""
    done = subprocess.run([sys.executable, "-c", _PEAK_OF_A_PROCESS], capture_output=True, text=True, check=True)
    step = count_step(get_recipe("mnist"), batch=4)
    there_before = 4 * 4 * step.parameters  # weights and gradients; Adam's moments are not there
    assert int(done.stdout) == pytest.approx(step.cost.peak_memory - there_before, rel=0.15)


def test_a_checkpointed_step_needs_less_memory_and_more_flops() -> None:
    recipe = tiny_recipe("solver.step=0.5", "data.batch_size=64", "model.layers=3")
    with pytest.raises(ConfigError, match="adjoint cannot be counted"):
        count_step(recipe.override(["solver.quadrature=full"]), gradient="adjoint")
    plain, checkpointed = (count_step(recipe, gradient=mode) for mode in ("autograd", "checkpointed"))
    assert checkpointed.cost.peak_memory < 0.6 * plain.cost.peak_memory
    assert 1.2 * plain.cost.flops < checkpointed.cost.flops < 1.5 * plain.cost.flops


def test_hours_follow_from_the_schedule_and_seconds_from_the_batch() -> None:
    found = estimate(tiny_recipe("model.layers=2", "model.hidden=2"), device=CPU, devices=2)
    assert (found.nfe_per_block, found.steps, found.batch) == (None, 8, 20)
    assert {(each.precision, each.gradient) for each in found.timed} <= {
        (precision, gradient)
        for precision in ("32-true", "bf16-mixed")
        for gradient in ("autograd", "checkpointed")
    }
    assert found.timed[0].seconds is not None
    assert found.timed[0].hours == pytest.approx(8 * found.timed[0].seconds / 3600)


def test_an_adaptive_solver_is_counted_with_a_stated_number_of_evaluations() -> None:
    recipe = tiny_recipe("solver.quadrature=full", "solver.method=dopri5", "model.hidden=2", "model.layers=2")
    found = estimate(recipe, device=CPU, nfe_per_block=8)
    assert found.counted[0].nfe == 6 * 8
    assert found.nfe_per_block == 8
    assert {each.precision for each in found.timed} == {"32-true"}


@pytest.mark.parametrize(("recipe", "samples"), [("digits", "images"), ("table", "rows")])
def test_the_command(recipe: str, samples: str) -> None:
    images = ["--set", "model.hidden=4", "--set", "solver.step=none", "--batch-size", "8"]
    small = images if recipe == "digits" else ["--batch-size", "8"]
    done = CliRunner().invoke(main, ["estimate", recipe, "--device", "cpu", *small])
    assert done.exit_code == 0, done.output
    assert f"random {samples}" in done.stdout
    assert ("images" in done.stdout) == (samples == "images")
    done = CliRunner().invoke(main, ["estimate", recipe, "--device", "cpu", "--json", *small])
    found = json.loads(done.stdout)
    assert found["counted"][0]["cost"].keys() == {"flops", "kernels", "peak_memory"}
    assert found["timed"][0]["seconds"] > 0
