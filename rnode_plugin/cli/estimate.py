"""``rnode-cli estimate``."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import click

from .options import settings

if TYPE_CHECKING:
    from ..recipes.recipe import Recipe
    from ..training.cost.estimate import Estimate, Prediction
    from ..training.cost.timing import TimedStep

__all__ = ["estimate"]


@click.command()
@click.argument("recipe")
@click.option("--gpu", metavar="NAME", help="h100, a100, a10, rtx4090 or 2080ti. [default: time this machine]")
@click.option("--devices", type=click.IntRange(1), default=1, show_default=True, help="GPUs that train together.")
@click.option(
    "--batch-size", type=click.IntRange(1), metavar="N", help="Images per device. [default: the recipe's]"
)
@click.option("--images", type=click.IntRange(1), metavar="N", help="Training images. [default: the data set's]")
@click.option("--nfe", type=click.IntRange(4), default=20, show_default=True, metavar="N",
              help="Evaluations per block, if the training solver is adaptive.")  # fmt: skip
@settings
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def estimate(
    *,
    recipe: str,
    gpu: str | None,
    devices: int,
    batch_size: int | None,
    images: int | None,
    nfe: int,
    assignments: tuple[str, ...],
    as_json: bool,
) -> None:
    """Say what training RECIPE will cost, before it is trained.

    With --gpu one training step is counted at the real batch, without values and without the data set: parameters,
    FLOPs, bytes, kernels and memory, and from the card's data sheet a range of seconds per step and hours. Without
    --gpu the real step is timed on this machine's CPU: in each precision, compiled if the run can win that back,
    and in the other gradient mode.
    """
    from ..recipes.recipe import get_recipe

    size = () if batch_size is None else (f"data.batch_size={batch_size}",)
    chosen = get_recipe(recipe).override([*size, *assignments])
    if gpu is None:
        _time(chosen, images, nfe, as_json=as_json)
        return
    from ..training.cost.cards import get_card
    from ..training.cost.estimate import estimate

    found = estimate(chosen, get_card(gpu), images=images, devices=devices, nfe_per_block=nfe)
    if as_json:
        click.echo(json.dumps(_plain(found), indent=2))
    else:
        _print(found, chosen)


def _plain(found: Estimate) -> dict[str, object]:
    """The estimate as JSON, the counts of the recipe's own gradient mode on top."""
    first = found.steps[0]
    return {
        "parameters": found.parameters,
        "flops": first.cost.flops,
        "bytes": first.cost.bytes,
        "kernels": first.cost.kernels,
        "host_reads": first.cost.host_reads,
        "peak_memory": first.cost.peak_memory,
        "seconds_per_step": found.predictions[0].seconds_per_step,
        **dataclasses.asdict(found),
    }


def _print(found: Estimate, recipe: Recipe) -> None:
    from .options import table

    card = found.card
    click.echo(f"{found.recipe} on {found.devices} x {card.name}, batch {found.steps[0].batch} per device\n")
    rows = [("one step, counted", *(step.gradient for step in found.steps))]
    rows += [
        ("NFE, all blocks", *(f"{step.nfe}" for step in found.steps)),
        ("FLOPs", *(f"{step.cost.flops / 1e12:.2f} T" for step in found.steps)),
        ("bytes moved", *(f"{step.cost.bytes / 1e9:.0f} GB" for step in found.steps)),
        ("device kernels", *(f"{step.cost.kernels:,}" for step in found.steps)),
        ("host reads", *(f"{step.cost.host_reads}" for step in found.steps)),
        ("peak memory", *(f"{step.cost.peak_memory / 1e9:.1f} GB" for step in found.steps)),
    ]
    click.echo(table([("parameters", f"{found.parameters:,}", *[""] * (len(found.steps) - 1)), *rows]) + "\n")
    head = ("precision", "gradient", "s/step", "hours/epoch", "hours in all", "largest batch")
    click.echo(table([head, *map(_row, found.predictions)]) + "\n")
    if recipe.paper is not None:
        click.echo(f"The paper: {recipe.paper.hours:g} hours on {recipe.paper.gpus} GPU(s) of its time.")
    if found.nfe_per_block is not None:
        click.echo(
            f"{recipe.solver.method} chooses its steps by the data: counted with {found.nfe_per_block} evaluations "
            "per block (--nfe)."
        )
    click.echo(f"Predicted from peak numbers ({card.source}) and assumed efficiencies, not measured on the card.")


def _row(each: Prediction) -> tuple[str, ...]:
    largest = f"{each.largest_batch:,}" if each.fits else f"{each.largest_batch:,} (the batch does not fit)"
    ranges = (each.seconds_per_step, each.hours_per_epoch, each.hours)
    return (each.precision, each.gradient, *map(_range, ranges), largest)


def _range(values: tuple[float, float] | None) -> str:
    return "not known" if values is None else f"{values[0]:.3g} to {values[1]:.3g}"


def _time(recipe: Recipe, images: int | None, nfe: int, *, as_json: bool) -> None:
    import torch

    from ..training.cost.estimate import planned_steps
    from ..training.cost.fastest import choose, time_gradients
    from .options import table

    device, threads = torch.device("cpu"), torch.get_num_threads()
    training = dataclasses.replace(recipe.training, precision="auto", compile="auto")
    left_open = dataclasses.replace(recipe, training=training)
    choice = choose(left_open, device=device, steps=planned_steps(recipe, images=images), nfe_per_block=nfe)
    others = time_gradients(left_open, device=device, nfe_per_block=nfe)
    steps = [*choice.measured, *others]
    if as_json:
        found = [_timed(each, recipe) for each in steps]
        fastest = dataclasses.asdict(choice.way)
        click.echo(
            json.dumps({"recipe": recipe.name, "threads": threads, "fastest": fastest, "steps": found}, indent=2)
        )
        return
    click.echo(
        f"{recipe.name}: training steps of batch {recipe.data.batch_size} on {threads} CPU threads, random images, "
        "fresh weights\n"
    )
    rows = [(str(each.way), each.way.gradient or recipe.solver.gradient, each.cost()) for each in steps]
    click.echo(table([("precision", "gradient", "cost"), *rows]))
    click.echo(f"\n--precision auto --compile auto trains in {choice.way} here.")


def _timed(each: TimedStep, recipe: Recipe) -> dict[str, object]:
    """One timed way for JSON."""
    plain = dataclasses.asdict(each)
    way = {**plain.pop("way"), "gradient": each.way.gradient or recipe.solver.gradient}
    return {**way, **plain, "median": each.median if each.seconds else None}
