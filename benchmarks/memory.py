"""Peak memory of a training step with ``gradient="checkpointed"`` against the number of steps and the batch size.

python benchmarks/memory.py steps
python benchmarks/memory.py batch celebahq256 --first-block
python benchmarks/memory.py saved celebahq256
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import click
import torch
from measure import device_option, peak_memory, print_environment, set_up, table, threads_option

from rnode_plugin import Dynamics, Solver, get_recipe, objective
from rnode_plugin.core.objective import output_log_prob
from rnode_plugin.fields import conv_field
from rnode_plugin.plugins.registry import resolve_regularizers
from rnode_plugin.solvers import solve

_PENALTIES = tuple(entry.regularizer for entry in resolve_regularizers(["kinetic", "jacfrob"]).values())
_EVALUATIONS = 6  # of a step of dopri5; its first is the last of the step before


def build_block(shape: Sequence[int], batch: int, solver: Solver, device: str) -> Callable[[], None]:
    """One block's solve and its gradient."""
    torch.manual_seed(0)
    field: Any = conv_field(shape[0])
    field.layers[-1].reset_parameters()
    field.to(device)
    dynamics = Dynamics(field, regularizers=_PENALTIES)
    x = torch.randn(batch, *shape).to(device)

    def run() -> None:
        field.zero_grad()
        z = x.clone().requires_grad_()  # as for any block but the first
        solution = solve(dynamics.bind(dynamics.draw(z)), z, z.new_tensor([0.0, 1.0]), solver)
        assert solution.logdet is not None
        parts = [solution.z[-1].square().flatten(1).sum(1), -solution.logdet[-1], *solution.penalties.values()]
        torch.stack(parts).sum().backward()

    return run


def saved_by_evaluation(shape: Sequence[int]) -> int:
    """Bytes that autograd keeps of one evaluation of a block's field, product and penalties, an image."""
    storages: dict[int, Any] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()  # held, so that no address is used twice
        return x

    field: Any = conv_field(shape[0])
    field.layers[-1].reset_parameters()
    dynamics = Dynamics(field, regularizers=_PENALTIES)
    kept = []
    # differences leave out what is there once a solve, and what does not depend on the batch
    for batch, steps in ((1, 1), (1, 2), (2, 1), (2, 2)):
        storages.clear()
        z = torch.randn(batch, *shape).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            solve(dynamics.bind(dynamics.draw(z)), z, z.new_tensor([0.0, 1.0]), Solver(step=1 / steps))
        kept.append(sum(storage.nbytes() for storage in storages.values()))
    return ((kept[3] - kept[2]) - (kept[1] - kept[0])) // 4  # evaluations in a step of RK4


def build_flow(recipe_name: str, batch: int, device: str) -> Callable[[], None]:
    """A recipe's training step, with last layers that are not zero."""
    torch.manual_seed(0)
    recipe = get_recipe(recipe_name)
    flow: Any = recipe.build_flow()
    for field in flow.fields:
        field.layers[-1].reset_parameters()
    flow.to(device)
    solver = dataclasses.replace(recipe.solver, gradient="checkpointed")
    x = torch.rand(batch, *recipe.images.shape).to(device)

    def run() -> None:
        flow.zero_grad()
        out = flow(x, solver=solver)
        objective(
            output_log_prob(out), out.regularization, lambdas=recipe.lambdas, dims=recipe.dims
        ).loss.backward()

    return run


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@click.option("--count", "counts", multiple=True, type=int, default=(4, 16, 64), show_default=True)
@click.option("--size", default=64, show_default=True, help="Height and width of the block's images.")
@click.option("--batch-size", default=2, show_default=True)
@device_option
@threads_option
def steps(counts: tuple[int, ...], size: int, batch_size: int, device: str, threads: int) -> None:
    """One block (3 channels, hidden width 64) with 4, 16 and 64 steps of the 3/8 rule."""
    where = set_up(device, threads)
    print_environment(where)
    shape = (3, size, size)
    rows, first = [], None
    for gradient in ("checkpointed", "autograd"):
        for count in counts:
            if gradient == "autograd" and count > min(counts):
                continue  # it is known to grow in proportion
            solver = Solver(step=1 / count, gradient=gradient)
            peak = peak_memory(build_block, shape, batch_size, solver, device, device=where)
            states = count * batch_size * 4 * torch.Size(shape).numel()
            first = first or peak.above
            rows.append([gradient, count, _mb(peak.above), _mb(peak.above - first), _mb(states)])
    click.echo(f"batch {batch_size} of {'x'.join(map(str, shape))}\n")
    click.echo(table(["gradient", "steps", "peak of the step", "more than the first", "all states"], rows))


@main.command()
@click.argument(
    "recipe", type=click.Choice(["mnist", "cifar10", "imagenet64", "celebahq256"]), default="imagenet64"
)
@click.option("--batch-size", "batches", multiple=True, type=int, default=(1, 2), show_default=True)
@click.option("--first-block", is_flag=True, help="The first block alone, which has the largest activations.")
@device_option
@threads_option
def batch(recipe: str, batches: tuple[int, ...], first_block: bool, device: str, threads: int) -> None:
    """A recipe's step, or its first block, for several batch sizes, and the slope per image."""
    where = set_up(device, threads)
    print_environment(where)
    settings = get_recipe(recipe)
    solver = dataclasses.replace(settings.solver, gradient="checkpointed")
    peaks = {}
    for size in batches:
        if first_block:
            peaks[size] = peak_memory(build_block, settings.images.shape, size, solver, device, device=where)
        else:
            peaks[size] = peak_memory(build_flow, recipe, size, device, device=where)
    click.echo(f"{recipe}, {'first block' if first_block else 'whole flow'}, {solver.method}, checkpointed\n")
    click.echo(table(["batch", "peak of the step"], [[size, _mb(peak.above)] for size, peak in peaks.items()]))
    low, high = min(batches), max(batches)
    if high > low:
        slope = (peaks[high].above - peaks[low].above) / (high - low)
        full = settings.data.batch_size
        expected = peaks[low].above + (full - low) * slope
        click.echo(
            f"\nslope {_mb(slope)} an image; extrapolated to the recipe's batch of {full}: {expected / 1e9:.1f} GB"
        )


@main.command()
@click.argument("recipe", type=click.Choice(["imagenet64", "celebahq256"]))
@click.option("--size", "sizes", multiple=True, type=int, default=(16, 32, 64), show_default=True)
@threads_option
def saved(recipe: str, sizes: tuple[int, ...], threads: int) -> None:
    """What a checkpointed step of the first block keeps, counted, against the measured slope at smaller sizes.

    The count is proportional to the number of pixels, so the full size needs no run.
    """
    where = set_up("cpu", threads)
    print_environment(where)
    settings = get_recipe(recipe)
    channels, full = settings.images.shape[:2]
    solver = dataclasses.replace(settings.solver, gradient="checkpointed")
    rows, of_pixel = [], 0.0
    for size in sizes:
        shape = (channels, size, size)
        of_pixel = saved_by_evaluation(shape) / size**2
        low, high = (peak_memory(build_block, shape, n, solver, "cpu", device=where).above for n in (1, 9))
        step = _EVALUATIONS * of_pixel * size**2
        rows.append([size, f"{of_pixel:.0f}", _mb(step), _mb((high - low) / 8), f"{(high - low) / 8 / step:.2f}"])
    click.echo(f"{recipe}, first block, {solver.method}, checkpointed; bytes an image\n")
    columns = ["size", "an evaluation keeps, a pixel", "a step keeps", "measured slope", "measured / counted"]
    click.echo(table(columns, rows))
    click.echo(f"\nat {full}: a step keeps {_mb(_EVALUATIONS * of_pixel * full**2)} an image")


def _mb(size: float) -> str:
    return f"{size / 1e6:.0f} MB"


if __name__ == "__main__":
    main()
