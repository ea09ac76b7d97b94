"""Counted costs against the clock: training steps predicted from four rates of this CPU, and the same steps timed.

    python benchmarks/prediction.py --threads 1
    python benchmarks/prediction.py --case mnist:8 --case cifar10:4:checkpointed

`rnode-cli estimate --gpu` turns counted FLOPs, bytes and kernels into seconds by a card's data sheet. On a CPU the
four rates can be measured: of one convolution with its gradients, of a matrix product, of sums over memory, and the
time of a kernel in a step on one tiny image, where nothing else counts. A prediction that is near the clock here
shows that the counting is right. Times are of the processor.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import click
import torch
from measure import alternate, print_environment, repeats_option, set_up, table, threads_option

from rnode_plugin import get_recipe
from rnode_plugin.core.tensors.denormals import flush_denormals
from rnode_plugin.evaluation.measures import measure_of
from rnode_plugin.recipes.recipe import Recipe
from rnode_plugin.training.cost.counting import Cost
from rnode_plugin.training.cost.step import count_step, fixed_solver, training_step

CASES = ("digits:50", "mnist:8", "mnist:32", "cifar10:8", "cifar10:8:checkpointed", "imagenet64:2:checkpointed")


@dataclass(frozen=True)
class Rates:
    """What this processor does in a second.

    Attributes:
        convolution, matmul: floating-point operations.
        memory: bytes, read and written.
        kernel: seconds of a kernel on a few numbers.
    """

    convolution: float
    matmul: float
    memory: float
    kernel: float

    def seconds(self, cost: Cost) -> float:
        """Of a counted computation, if its parts follow each other."""
        compute = cost.convolution_flops / self.convolution + cost.matmul_flops / self.matmul
        return compute + cost.bytes / self.memory + cost.kernels * self.kernel


def fastest(run: Callable[[], object]) -> float:
    """Median seconds of a call."""
    seconds = []
    run()
    for _ in range(15):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def measure_rates(recipe: Recipe) -> Rates:
    """The rates at the sizes of a recipe's hidden layers in its first block."""
    batch, hidden = recipe.data.batch_size, recipe.model.options["hidden"]
    _, h, w = recipe.images.shape
    weight = torch.randn(hidden, hidden, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    x = torch.randn(batch, hidden, h, w).contiguous(memory_format=torch.channels_last).requires_grad_()
    v = torch.randn_like(x)

    def convolution() -> None:
        torch.autograd.grad(torch.nn.functional.conv2d(x, weight, padding=1), (x, weight), v)

    a, b = torch.randn(9, x.numel() // hidden), torch.randn(x.numel() // hidden, hidden)
    u, out = torch.randn_like(v), torch.empty_like(v)
    tiny = get_recipe("digits").override(["model.hidden=4", "data.batch_size=1", "solver.trace_quadrature=full"])
    launches = training_step(tiny.build_flow().train(), tiny, measure_of(tiny).random_inputs(1), tiny.solver)
    return Rates(
        convolution=3 * 2 * 9 * hidden * x.numel() / fastest(convolution),
        matmul=2 * a.numel() * hidden / fastest(lambda: a @ b),
        memory=3 * 4 * x.numel() / fastest(lambda: torch.add(v, u, out=out)),
        kernel=fastest(launches) / count_step(tiny).cost.kernels,
    )


def compare(case: str, repeats: int, device: torch.device) -> list[str]:
    """One row of the table."""
    name, batch, *gradient = case.split(":")
    recipe = get_recipe(name).override([f"data.batch_size={batch}"])
    cost = count_step(recipe, gradient=gradient[0] if gradient else None)
    solver = dataclasses.replace(fixed_solver(recipe.solver), gradient=cost.gradient)
    torch.manual_seed(0)
    flow = recipe.build_flow().train()
    step = training_step(flow, recipe, measure_of(recipe).random_inputs(int(batch)), solver)
    rates = measure_rates(recipe)
    timing = alternate({"": step}, repeats=repeats, device=device, clock=time.process_time)[""]
    predicted = rates.seconds(cost.cost)
    return [
        name, batch, cost.gradient, f"{cost.cost.flops / 1e9:.0f}", f"{cost.cost.bytes / 1e9:.1f}",
        f"{cost.cost.kernels:,}", f"{predicted:.2f} s", str(timing), f"{timing.median / predicted:.2f}",
    ]  # fmt: skip


@click.command(help=__doc__)
@click.option("--case", "cases", multiple=True, default=CASES, metavar="RECIPE:BATCH[:GRADIENT]", help="A step.")
@repeats_option
@threads_option
def main(cases: tuple[str, ...], repeats: int, threads: int) -> None:
    device = set_up("cpu", threads)
    print_environment(device)
    flush_denormals()
    header = ["recipe", "batch", "gradient", "GFLOP", "GB", "kernels", "predicted", "measured", "ratio"]
    click.echo(table(header, [compare(case, repeats, device) for case in cases]))


if __name__ == "__main__":
    main()
