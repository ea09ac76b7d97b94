"""``rnode-cli sample``: images from a run as one PNG, or rows of a table as a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError
from .options import denormals, device

if TYPE_CHECKING:
    import numpy as np

    from ..recipes.recipe import Recipe, TableData

__all__ = ["sample"]

_COUNT = 64, 1000  # of images, of rows


@click.command()
@click.argument("run")
@click.option("-t", "--temperature", "temperatures", type=click.FloatRange(0, min_open=True), multiple=True,
              default=(1.0,), show_default=True,
              help="Standard deviation of the latent; repeatable for images.")  # fmt: skip
@click.option("--count", "-n", type=click.IntRange(1),
              help="Images per temperature, or rows (of each context of a file). [default: 64 images, 1000 rows, "
                   "1 of each context]")  # fmt: skip
@click.option("--columns", type=click.IntRange(1), help="Images in a row of the grid.")
@click.option("--given-values", metavar="COLUMN=VALUE,...",
              help="Of a conditional density: the values of the given columns, the same for all rows.")  # fmt: skip
@click.option("--given-file", metavar="FILE",
              help="Of a conditional density: a table with the given columns, a context in each row.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the latents.")
@click.option("--batch-size", type=click.IntRange(1), help="Images or rows per solve. [default: 256, 10000]")
@click.option("--out", metavar="FILE",
              help="File to write; of rows .csv, .tsv, .npy, .npz or .parquet. [default: samples.png, "
                   "samples.csv]")  # fmt: skip
@device
@denormals
def sample(*, run: str, device: str, **options: Any) -> None:
    """Draw images from RUN, a run folder or a checkpoint, into one PNG; or rows of a table into a file.

    Each temperature is a block of rows of images, made from the same latents. The rows of a conditional density
    have the given columns beside the drawn ones.
    """
    from ..evaluation.loading import pick_device
    from ..recipes.recipe import TableData
    from ..training.runs.checkpoints import load_with_recipe

    flow, recipe = load_with_recipe(run, map_location=pick_device(device))
    draw = _draw_rows if isinstance(recipe.data, TableData) else _draw_images
    what, file = draw(flow, recipe, **options)
    averaged = "" if recipe.training.ema is None else f", weights: {recipe.weights}"
    click.echo(f"{what}{averaged}: {file}")


def _draw_images(
    flow: Any,
    recipe: Recipe,
    *,
    temperatures: tuple[float, ...],
    count: int | None,
    columns: int | None,
    given_values: str | None,
    given_file: str | None,
    seed: int,
    batch_size: int | None,
    out: str | None,
) -> tuple[str, str]:
    from ..evaluation.samples import sample_images, save_grid

    if given_values is not None or given_file is not None:
        raise ConfigError("--given-values and --given-file are for tables, and this is a run on images.")
    count, out = count or _COUNT[0], out or "samples.png"
    images = sample_images(flow, count, temperatures=temperatures, seed=seed, batch_size=batch_size or 256)
    save_grid(out, images, levels=recipe.images.levels, columns=columns)
    shown = ", ".join(f"{temperature:g}" for temperature in images)
    return f"{count} images at temperature {shown}", out


def _draw_rows(
    flow: Any,
    recipe: Recipe,
    *,
    temperatures: tuple[float, ...],
    count: int | None,
    columns: int | None,
    given_values: str | None,
    given_file: str | None,
    seed: int,
    batch_size: int | None,
    out: str | None,
) -> tuple[str, str]:
    import numpy as np

    from ..data.tables.files import check_written, write_rows
    from ..evaluation.samples import sample_rows

    if columns is not None:
        raise ConfigError("--columns is for grids of images, and this is a run on a table.")
    temperature, *others = temperatures
    if others:
        raise ConfigError("rows of a table are drawn at one temperature: give --temperature once.")
    out = out or "samples.csv"
    check_written(out)
    context = _contexts(recipe.table, given_values, given_file, count)
    number = len(context) if context is not None else count or _COUNT[1]
    rows = sample_rows(
        flow, number, context=context, temperature=temperature, seed=seed, batch_size=batch_size or 10_000
    )
    if context is not None:
        rows = np.concatenate([rows, context], axis=1)
    places = [(*recipe.table.modelled, *recipe.table.given).index(name) for name in recipe.table.columns]
    write_rows(out, recipe.table.columns, rows[:, places])
    return f"{number:,} rows at temperature {temperature:g}", out


def _contexts(data: TableData, values: str | None, file: str | None, count: int | None) -> np.ndarray | None:
    """The given columns ``(rows, given)`` of all rows to draw; None for a density without any."""
    import numpy as np

    from ..data.tables.files import read_columns

    if not data.given:
        if values is not None or file is not None:
            raise ConfigError("this density is given no columns: it was trained without --given.")
        return None
    if (values is None) == (file is None):
        example = ",".join(f"{name}=VALUE" for name in data.given)
        raise ConfigError(
            f"this density is given {', '.join(data.given)}: say where with --given-values {example!r}, or with "
            "--given-file FILE, not both."
        )
    if file is not None:
        return np.repeat(read_columns(file, data.given).astype(np.float32), count or 1, axis=0)
    return np.tile(np.array(_values(data.given, str(values)), dtype=np.float32), (count or _COUNT[1], 1))


def _values(given: tuple[str, ...], text: str) -> list[float]:
    """The values of the given columns, in their order, from ``COLUMN=VALUE,COLUMN=VALUE``."""
    import math

    from ..errors import suggest

    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = part.rpartition("=")
        name = name.strip()
        if equals and name not in given:
            raise ConfigError(f"--given-values: {suggest(name, given, 'column')}")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = math.nan
        if not equals or not math.isfinite(found[name]):
            raise ConfigError(f"--given-values: {part.strip()!r} is not COLUMN=NUMBER.")
    if missing := [name for name in given if name not in found]:
        raise ConfigError(f"--given-values: a value is missing for {', '.join(missing)}.")
    return [found[name] for name in given]
