"""``rnode-cli compare``."""

from __future__ import annotations

import signal

import click

from .options import Duration, data_root, download, given, settings

__all__ = ["compare"]


@click.command()
@click.argument("recipe")
@click.option("--arm", "arms", multiple=True, metavar="ARM",
              help="none (no penalty), ffjord (no penalty, dopri5 at 1e-5), rnode (all of the recipe's), or "
                   "penalties with lambdas: kinetic, kinetic=0.1+jacfrob. May be repeated. [default: none, each "
                   "penalty of the recipe, rnode]")  # fmt: skip
@click.option("--sweep", "sweeps", multiple=True, metavar="PENALTY=L,L,...",
              help="An arm for each lambda: kinetic=0.001,0.01,0.1. Several penalties, joined by +, form a grid. "
                   "May be repeated.")  # fmt: skip
@click.option(
    "--seeds", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Runs of each arm."
)
@click.option("--max-steps", type=click.IntRange(1), metavar="N", help="Steps of each arm. [default: the recipe's]")
@click.option("--max-time", type=Duration(), help="Limit for each arm: 90 (seconds), 20m or 1h30m.")
@click.option("--validations", type=click.IntRange(1), default=20, show_default=True, metavar="N",
              help="Validations of each arm, the marks of the figures.")  # fmt: skip
@settings
@data_root
@given
@download
@click.option("--accelerator", default="auto", show_default=True, help="cpu, gpu, mps or auto.")
@click.option("--devices", default="auto", show_default=True,
              help="Arms that train at the same time: how many, or on which GPUs: 4, or 0,2. auto is one for each "
                   "GPU, or for each core of a CPU.")  # fmt: skip
@click.option("--out", metavar="FOLDER", help="Runs and report. [default: comparison/RECIPE]")
@click.pass_context
def compare(
    ctx: click.Context,
    *,
    recipe: str,
    arms: tuple[str, ...],
    sweeps: tuple[str, ...],
    seeds: int,
    max_steps: int | None,
    max_time: float | None,
    validations: int,
    assignments: tuple[str, ...],
    data_root: str | None,
    given: str | None,
    download: bool,
    accelerator: str,
    devices: str,
    out: str | None,
) -> None:
    """Train RECIPE with different penalties and report what they change.

    All arms begin with the same weights and see the same images and noise. The same command again
    continues, and with more arms trains only those that are new. Writes report.html, report.md, figures/ and runs/
    into one folder. `rnode-cli regularizers` lists the penalties.

    Arms that train at the same time on a CPU take longer steps than one alone.
    """
    from ..comparison.compare import compare
    from ..errors import TrainingError
    from ..recipes.recipe import get_recipe
    from .options import table

    chosen = [] if max_steps is None else [f"training.max_steps={max_steps}", "training.max_epochs=none"]
    chosen += [] if data_root is None else [f"data.root={data_root}"]
    chosen += [] if given is None else [f"data.given={given}"]
    result = compare(
        get_recipe(recipe).override([*chosen, *assignments]),
        arms=[arm.strip() for arm in arms],
        sweeps=sweeps,
        seeds=seeds,
        validations=validations,
        max_time=max_time,
        out=out or f"comparison/{recipe}",
        accelerator=accelerator,
        devices=devices,
        download=download,
        announce=click.echo,
    )
    report = result.report
    heads = ["", *(column.label for column in report.table.columns)]
    click.echo("\n" + table([heads, *([row.name, *row.cells] for row in report.table.rows)]))
    click.echo(f"\n{report.html}\n{report.markdown}")
    if result.failed:
        raise TrainingError(" ".join(result.failed))
    if result.stopped is not None:
        click.echo(f"\n{result.stopped}: the same command goes on.")
        ctx.exit(128 + signal.Signals[result.stopped])
