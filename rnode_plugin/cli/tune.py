"""``rnode-cli tune-step``: find the coarsest step of a fixed grid by measurement."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError, RnodeError
from .options import data_root, denormals, device, download, settings

if TYPE_CHECKING:
    import torch

    from ..evaluation.step_size import StepRow
    from ..flows.multiscale import MultiscaleFlow
    from ..flows.table import TableFlow
    from ..recipes.recipe import Recipe

__all__ = ["tune_step"]


@click.command("tune-step")
@click.argument("run_or_recipe", metavar="RUN_OR_RECIPE")
@click.option(
    "--images", type=click.IntRange(1), default=64, show_default=True, help="Held-out images, or rows, to use."
)
@click.option("--method", default="rk4_38", show_default=True, help="Fixed grid: euler, midpoint, rk4 or rk4_38.")
@click.option("--start", type=float, default=1.0, show_default=True, help="First step to try; halved from there.")
@click.option("--smallest", type=float, default=1 / 32, show_default=True, help="Last step to try.")
@click.option("--max-gap", type=float,
              help="Distance from the adaptive solve that is tolerated. [default: 0.005 bits/dim, or 0.02 nats "
                   "of a table]")  # fmt: skip
@click.option("--max-round-trip", type=float,
              help="Error of the round trip that is tolerated. [default: 0.5 levels of a pixel, or 0.01 deviations "
                   "of a column]")  # fmt: skip
@click.option("--train-steps", type=click.IntRange(1), default=100, show_default=True,
              help="For a recipe: steps of training first, since every step fits a fresh flow.")  # fmt: skip
@settings
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the noise.")
@data_root
@download
@device
@denormals
def tune_step(
    *,
    run_or_recipe: str,
    images: int,
    train_steps: int,
    assignments: tuple[str, ...],
    seed: int,
    data_root: str | None,
    download: bool,
    device: str,
    **options: Any,
) -> None:
    """Find the coarsest step of a fixed grid that RUN_OR_RECIPE can be solved with.

    The step is halved until the discrete flow agrees with a tight adaptive solve on held-out images or rows: in
    their likelihood, and in what comes back when they go to the latent with these steps and back with the adaptive
    solve. A recipe is trained for a few steps first, a run folder or checkpoint is taken as it is.
    """
    from ..core.random_streams import Stream, seeded
    from ..evaluation.loading import load_data, pick_device
    from ..evaluation.measures import batch_of, measure_of
    from ..evaluation.step_size import check_tuning, tune_step
    from ..solvers import Solver

    solver = Solver(method=options.pop("method"))
    check_tuning(solver, **options)
    where = pick_device(device)
    changes = [*assignments, *([f"data.root={data_root}"] if data_root else [])]
    flow, recipe = _flow(run_or_recipe, changes, train_steps, where, download=download)
    held_out = load_data(recipe, download=download, all_val=True).held_out
    measure = measure_of(recipe)
    with seeded(seed, Stream.VALIDATE):
        x = measure.inputs(batch_of(held_out, slice(0, images)).to(where))
        click.echo(f"{'step':>8}  {'NFE':>5}  {measure.likelihood:>8}  {'gap':>8}  {'round trip':>10}")
        found = tune_step(flow, x, measure=measure, solver=solver, progress=_show, **options)
    click.echo(f"{'adaptive':>8}  {found.nfe:>5}  {found.score:>8.4f}")
    if found.step is None:
        raise RnodeError(
            f"no step down to {found.rows[-1].step:g} agrees with the adaptive solve: try a lower --smallest, or "
            f"train with {_adaptive(recipe)}larger lambdas."
        )
    limits = f"{found.max_gap:g} {measure.unit} and {found.max_round_trip:g} {measure.step_unit}"
    click.echo(f"\nsolver.step={found.step:g} agrees with the adaptive solve within {limits}.")


def _adaptive(recipe: Recipe) -> str:
    """The advice to train with an adaptive method, with all settings that go with it; none if it is one already."""
    if recipe.solver.adaptive:
        return ""
    full = "" if recipe.solver.trace_quadrature == "full" else " --set solver.trace_quadrature=full"
    return f"an adaptive method (--set solver.method=dopri5{full}) or "


def _show(row: StepRow) -> None:
    figures = f"{row.step:>8g}  {row.nfe:>5}  {row.score:>8.4f}  {row.gap:>8.4f}  {row.round_trip:>10.3f}"
    click.echo(figures + ("  agrees" if row.agrees else ""))


def _flow(
    run_or_recipe: str, changes: list[str], steps: int, where: torch.device, *, download: bool
) -> tuple[MultiscaleFlow | TableFlow, Recipe]:
    """A trained flow: a run's, or a recipe's after ``steps`` steps."""
    from ..plugins import registry
    from ..recipes.recipe import get_recipe
    from ..training.fit import fit
    from ..training.runs.checkpoints import load_with_recipe

    recipes = registry.names("recipes")
    if run_or_recipe not in recipes:
        if not Path(run_or_recipe).exists():
            raise ConfigError(f"no run, checkpoint or recipe {run_or_recipe!r}. Recipes: {', '.join(recipes)}.")
        flow, recipe = load_with_recipe(run_or_recipe, map_location=where)
        return flow, recipe.override(changes)
    recipe = get_recipe(run_or_recipe).override(changes)
    # the run is thrown away: one validation at its end, of a few images
    short = recipe.override(
        [
            "training.max_epochs=none", f"training.max_steps={steps}", f"training.val_every_steps={steps}",
            "training.val_images=8", "training.sample_images=0",
        ]
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as runs:
        result = fit(short, runs=runs, accelerator=where.type, devices=1, download=download, progress=False)
        if result.evaluation is None:  # a signal ended it
            raise click.Abort
        return load_with_recipe(result.folder.last, map_location=where)[0], recipe
