"""``rnode-cli eval``: the likelihood of a run on held-out images or rows."""

from __future__ import annotations

import dataclasses
import json

import click

from .options import data_root, denormals, device, download

__all__ = ["eval"]


@click.command()
@click.argument("run")
@click.option("--draws", type=click.IntRange(1), metavar="N",
              help="Draws of noise per sample. [default: so many that the noise's error is at most half of the "
                   "samples']")  # fmt: skip
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Use N of the held-out images or rows.")
@click.option("--batch-size", type=click.IntRange(1), help="Images or rows per solve. [default: the recipe's]")
@click.option("--solver", "solver_settings", multiple=True, metavar="KEY=VALUE",
              help="Change the test solver: method=rk4, step=0.05, atol=1e-6, ... May be repeated.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the noise.")
@data_root
@download
@device
@denormals
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def eval(  # noqa: A001 - the command's name
    *,
    run: str,
    draws: int | None,
    limit: int | None,
    batch_size: int | None,
    solver_settings: tuple[str, ...],
    seed: int,
    data_root: str | None,
    download: bool,
    device: str,
    as_json: bool,
) -> None:
    """Bits/dim of RUN, a run folder or a checkpoint, on held-out images; of a table NLL in nats per row.

    Dirty (uniform noise in each bin) and clean (bins' centres), with standard errors from the choice of images and
    from the noise, the solver's NFE, the penalties, and the time. The trace is exact in up to 16 dimensions (64 of
    a table), else estimated with Rademacher probes. A table's NLL stands beside that of a Gaussian.
    """
    from ..evaluation.likelihood import evaluate_by
    from ..evaluation.loading import load_data, pick_device
    from ..evaluation.measures import measure_of
    from ..training.progress import batch_counter
    from ..training.runs.checkpoints import find_checkpoint, load_with_recipe, training_solver
    from .tables import evaluation_rows, table

    path = find_checkpoint(run)
    flow, recipe = load_with_recipe(path, map_location=pick_device(device))
    recipe = recipe.override([f"test_solver.{change}" for change in solver_settings])
    if data_root is not None:  # with the columns that the run was trained on
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, root=data_root))
    measure = measure_of(recipe)
    data = load_data(recipe, download=download, all_val=True).limit(None, limit)
    result = evaluate_by(
        measure,
        flow,
        data.held_out[:limit],
        batch_size=batch_size or recipe.data.val_batch_size,
        draws=draws,
        solver=recipe.test_solver,
        training_solver=training_solver(path),
        seed=seed,
        progress=batch_counter("evaluating"),
    )
    result = measure.beside_baselines(result, data)
    if as_json:
        summary = {
            "checkpoint": str(path),
            "recipe": recipe.name,
            "weights": recipe.weights,
            **dataclasses.asdict(result),
        }
        click.echo(json.dumps(summary, indent=2))
    else:
        rows = [("checkpoint", str(path)), ("weights", recipe.weights)]
        click.echo(table([*rows, *evaluation_rows(result, measure)]))
