"""``rnode-cli estimate``."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import click

from .options import device, settings

if TYPE_CHECKING:
    from ..training.estimate import Estimate

__all__ = ["estimate"]


@click.command()
@click.argument("recipe")
@click.option(
    "--devices", type=click.IntRange(1), default=1, show_default=True, help="Devices that train together."
)
@click.option(
    "--batch-size", type=click.IntRange(1), metavar="N", help="Images, or rows, per device. [default: the recipe's]"
)
@click.option(
    "--images", type=click.IntRange(1), metavar="N", help="Training images, or rows. [default: the data set's]"
)
@click.option("--nfe", type=click.IntRange(4), default=20, show_default=True, metavar="N",
              help="Evaluations per block, if the training solver is adaptive.")  # fmt: skip
@settings
@device
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def estimate(
    *,
    recipe: str,
    devices: int,
    batch_size: int | None,
    images: int | None,
    nfe: int,
    assignments: tuple[str, ...],
    device: str,
    as_json: bool,
) -> None:
    """Say what training RECIPE will cost, before it is trained.

    One training step is counted at the recipe's batch, without values and without the data set: parameters, FLOPs,
    kernels and peak memory. A step on a few random images is timed on this machine and scaled to the batch.
    """
    from ..evaluation.loading import pick_device
    from ..recipes.recipe import get_recipe
    from ..training.estimate import estimate

    size = () if batch_size is None else (f"data.batch_size={batch_size}",)
    chosen = get_recipe(recipe).override([*size, *assignments])
    found = estimate(chosen, device=pick_device(device), images=images, devices=devices, nfe_per_block=nfe)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found), indent=2))
        return
    _print(found)
    if chosen.paper is not None:
        click.echo(f"The paper: {chosen.paper.hours:g} hours on {chosen.paper.gpus} GPU(s) of its time.")


def _print(found: Estimate) -> None:
    from .options import table

    counted, samples = found.counted, found.samples
    click.echo(f"{found.recipe}: one training step of {found.batch} {samples} per device\n")
    rows = [
        ("counted", *(step.gradient for step in counted)),
        ("parameters", *(f"{step.parameters:,}" for step in counted)),
        ("NFE, all blocks", *(f"{step.nfe}" for step in counted)),
        ("FLOPs", *(f"{step.cost.flops / 1e9:,.3g} G" for step in counted)),
        ("kernels", *(f"{step.cost.kernels:,}" for step in counted)),
        ("peak memory", *(f"{step.cost.peak_memory / 1e9:.3g} GB" for step in counted)),
    ]
    click.echo(table(rows) + "\n")
    head = ("precision", "gradient", "s/step", "hours in all")
    times = [
        (each.precision, each.gradient, each.problem or _number(each.seconds), _number(each.hours))
        for each in found.timed
    ]
    click.echo(table([head, *times]) + "\n")
    timed = found.timed[0].images
    scaled = "" if timed == found.batch else f" and scaled to {found.batch}"
    where = f"{found.threads} CPU threads" if found.device == "cpu" else found.device
    click.echo(f"Timed on {timed} random {samples} with fresh weights on {where}{scaled}; validations come on top.")
    if found.nfe_per_block is not None:
        click.echo(f"The training solver chooses its steps by the data: counted with {found.nfe_per_block} "
                   "evaluations per block (--nfe).")  # fmt: skip


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3g}"
