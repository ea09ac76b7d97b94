"""``rnode-cli sample``: images from a run as one PNG."""

from __future__ import annotations

import click

from .options import denormals, device

__all__ = ["sample"]


@click.command()
@click.argument("run")
@click.option("-t", "--temperature", "temperatures", type=click.FloatRange(0, min_open=True), multiple=True,
              default=(1.0,), show_default=True, help="Standard deviation of the latent; repeatable.")  # fmt: skip
@click.option(
    "--count", "-n", type=click.IntRange(1), default=64, show_default=True, help="Images per temperature."
)
@click.option("--columns", type=click.IntRange(1), help="Images in a row of the grid.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the latents.")
@click.option("--batch-size", type=click.IntRange(1), default=256, show_default=True, help="Images per solve.")
@click.option("--out", default="samples.png", show_default=True, metavar="PNG", help="File to write.")
@device
@denormals
def sample(
    *,
    run: str,
    temperatures: tuple[float, ...],
    count: int,
    columns: int | None,
    seed: int,
    batch_size: int,
    out: str,
    device: str,
) -> None:
    """Draw images from RUN, a run folder or a checkpoint, into one PNG.

    Each temperature is a block of rows, made from the same latents.
    """
    from ..evaluation.images import pick_device
    from ..evaluation.sampling import sample_images, save_grid
    from ..training.runs.checkpoints import load_with_recipe

    flow, recipe = load_with_recipe(run, map_location=pick_device(device))
    images = sample_images(flow, count, temperatures=temperatures, seed=seed, batch_size=batch_size)
    save_grid(out, images, levels=recipe.data.levels, columns=columns)
    shown = ", ".join(f"{temperature:g}" for temperature in images)
    averaged = "" if recipe.training.ema is None else f", weights: {recipe.weights}"
    click.echo(f"{count} images at temperature {shown}{averaged}: {out}")
