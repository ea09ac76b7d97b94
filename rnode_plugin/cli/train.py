"""``rnode-cli train``."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError, RnodeError, TrainingError
from .options import Duration, data_root, denormals, download, given, settings

if TYPE_CHECKING:
    from pathlib import Path

    from ..recipes.recipe import Recipe
    from ..training.fit import FitResult

__all__ = ["train"]

# options that are nothing but a shorter way to write a setting of the recipe
_SHORT = {
    "data": "data.name",
    "data_root": "data.root",
    "given": "data.given",
    "batch_size": "data.batch_size",
    "limit_train": "data.train_images",
    "limit_val": "training.val_images",
    "max_steps": "training.max_steps",
    "max_epochs": "training.max_epochs",
    "val_every": "training.val_every_steps",
    "accumulate": "training.accumulate",
    "precision": "training.precision",
    "compile": "training.compile",
    "seed": "training.seed",
    "weights": "training.weights",
}


class _TrainCommand(click.Command):
    """A command whose ``--compile`` stands alone or before ``auto``: what else follows is not its value."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        values = {"--compile": "--compile=true", "--no-compile": "--compile=false"}
        followed = zip(args, [*args[1:], ""], strict=False)
        return super().parse_args(ctx, [arg if then == "auto" else values.get(arg, arg) for arg, then in followed])


@click.command(cls=_TrainCommand)
@click.argument("recipe", required=False)
@click.option("--ffjord", is_flag=True, help="The FFJORD baseline of the recipe: no penalties, dopri5 at 1e-5.")
@settings
@click.option("--data", metavar="NAME", help="Another data set than the recipe's, such as folder.")
@data_root
@given
@download
@click.option("--batch-size", type=int, help="Images, or rows, per device and step.")
@click.option("--accumulate", type=int, metavar="N", help="Average the gradients of N batches for one step.")
@click.option("--limit-train", type=int, metavar="N", help="Train on N images or rows only.")
@click.option("--limit-val", type=int, metavar="N", help="Validate on N images or rows only.")
@click.option("--max-steps", type=int, metavar="N", help="Stop after N steps of the run.")
@click.option("--max-epochs", type=int, metavar="N", help="Stop after N epochs of the run.")
@click.option("--max-time", type=Duration(), help="Stop after 90 (seconds), 20m or 1h30m of this call.")
@click.option("--val-every", type=int, metavar="N", help="Validate every N steps instead of by epochs.")
@click.option("--seed", type=int, help="Of the weights, the data order and all noise.")
@click.option(
    "--weights",
    metavar="RUN",
    help="Start from the weights of a run, a file, or the package; optimizer and schedule start anew.",
)
@click.option(
    "--precision", help="As Lightning names it: 32-true, bf16-mixed, ...; auto: the faster of these two, measured."
)
@click.option(
    "--compile",
    type=click.Choice(["true", "false", "auto"]),
    metavar="[auto]",
    help="Train with torch.compile, which takes a minute at first. auto: if that is measured to pay.",
)
@click.option("--no-compile", is_flag=True, expose_value=False, help="Train without torch.compile.")
@click.option("--accelerator", default="auto", show_default=True, help="cpu, gpu, mps or auto.")
@click.option("--devices", default="auto", show_default=True, help="How many, or which: 4, or 0,2.")
@click.option("--num-nodes", type=int, default=1, show_default=True, help="Machines of a distributed run.")
@denormals
@click.option("--runs", default="runs", show_default=True, metavar="FOLDER", help="Folder of all runs.")
@click.option(
    "--run-folder",
    metavar="FOLDER",
    help="Exact folder of a new run, missing or empty, instead of one under --runs.",
)
@click.option("--resume", metavar="RUN", help="Go on with a run: its folder, or a checkpoint.")
@click.option(
    "--logger",
    "loggers",
    multiple=True,
    metavar="csv|tensorboard|wandb|mlflow",
    help="Log there too, besides metrics.csv. May be repeated.",
)
@click.option(
    "--callback",
    "callbacks",
    multiple=True,
    metavar="MODULE:NAME",
    help="A callback of Lightning: an object, or a class or function that makes one. May be repeated.",
)
@click.pass_context
def train(
    ctx: click.Context,
    *,
    recipe: str | None,
    ffjord: bool,
    assignments: tuple[str, ...],
    download: bool,
    max_time: float | None,
    accelerator: str,
    devices: str,
    num_nodes: int,
    runs: str,
    run_folder: str | None,
    resume: str | None,
    loggers: tuple[str, ...],
    callbacks: tuple[str, ...],
    **short: Any,
) -> None:
    """Train the flow of RECIPE on its data set. RECIPE is a name or a recipe.json, such as that of another run.

    A table of your own: `rnode-cli train table --data-root measurements.csv`.

    The run's folder is printed first and holds everything: recipe, metrics, checkpoints, samples. With --resume,
    RECIPE may be left out; settings that are given again change from there on, all of them with a recipe.json.
    """
    if recipe is None and resume is None:
        raise click.UsageError("name a RECIPE; `rnode-cli recipes` lists them.", ctx)
    if resume is not None and run_folder is not None:
        raise click.UsageError(
            "a run that is resumed stays in its folder: --run-folder cannot go with --resume.", ctx
        )
    if resume is not None and ffjord:
        raise click.UsageError("--ffjord makes another model of the recipe; it cannot go with --resume.", ctx)
    from ..training.fit import fit

    try:
        if resume is not None:
            chosen, checkpoint = _run(resume, recipe, ctx)
        else:
            chosen, checkpoint = _recipe(str(recipe), ffjord), None
        chosen = chosen.override([*_settings(short, chosen), *assignments])
        result = fit(
            chosen,
            runs=runs,
            run_folder=run_folder,
            resume=checkpoint,
            max_time=max_time,
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            download=download,
            loggers=loggers,
            callbacks=[_callback(name) for name in callbacks],
        )
    except RnodeError as error:
        if _reports() or type(error) not in (ConfigError, TrainingError):  # it may be the only one that failed
            raise
        # the first process says the same. Lightning kills it at sight of another exit code, maybe before it could
        ctx.exit(0)
    if not result.first_process:
        return
    _print(result, chosen)
    if result.stopped in signal.Signals.__members__:
        ctx.exit(128 + signal.Signals[result.stopped])


def _settings(short: dict[str, Any], recipe: Recipe) -> list[str]:
    """What the short options mean for a recipe, as assignments."""
    from ..recipes.recipe import TableData

    names = dict(_SHORT)
    if isinstance(recipe.data, TableData):
        names["limit_train"] = "data.train_rows"
    elif short["given"] is not None:
        raise ConfigError(f"--given is for tables, and {recipe.name} is a recipe of images.")
    return [f"{names[name]}={value}" for name, value in short.items() if value is not None]


def _reports() -> bool:
    """Whether this process says what stopped all of them: the first of its machine, or of what srun shows."""
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "SLURM_PROCID"))


def _callback(name: str) -> Any:
    """The callback of Lightning that ``MODULE:NAME`` means.

    Raises:
        ConfigError: it cannot be imported, or is something else.
    """
    import importlib

    from pytorch_lightning.callbacks import Callback

    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a module of one's own lies next to where the command is given
    try:
        found = getattr(importlib.import_module(module), attribute)
        made = found if isinstance(found, Callback) else found()
    except Exception as error:  # whatever the module or the constructor raises
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"--callback {name} cannot be made: {reason}. Write MODULE:NAME.") from error
    if not isinstance(made, Callback):
        raise ConfigError(f"--callback {name} makes a {type(made).__name__}, not a callback of Lightning.")
    return made


def _recipe(name: str, ffjord: bool) -> Recipe:
    from ..recipes.recipe import get_recipe, is_recipe_file, read_recipe

    recipe = read_recipe(name) if is_recipe_file(name) else get_recipe(name)
    return recipe.ffjord() if ffjord else recipe


def _run(resume: str, name: str | None, ctx: click.Context) -> tuple[Recipe, Path]:
    """The recipe of a run to go on with, and its newest intact checkpoint."""
    from ..recipes.recipe import is_recipe_file, read_recipe
    from ..training.runs.checkpoints import recipe_of
    from ..training.runs.resume import newest_intact

    path, contents = newest_intact(resume)
    if name is not None and is_recipe_file(name):
        return read_recipe(name), path
    recipe = recipe_of(contents, path)
    if name is not None and name != recipe.name:
        raise click.UsageError(f"{resume} is a run of {recipe.name}, not of {name}; leave the recipe out.", ctx)
    return recipe, path


def _print(result: FitResult, recipe: Recipe) -> None:
    from ..evaluation.measures import measure_of
    from ..text import duration
    from .tables import evaluation_rows, table

    folder = result.folder
    if result.evaluation is None:
        how = "ended it at once; the last checkpoint is of step" if result.at_once else "after step"
        goes_on = f"--resume {folder.path} goes on." if result.steps else "No checkpoint had been written yet."
        click.echo(f"\n{result.stopped} {how} {result.steps} of {result.planned}; {goes_on}")
        return
    limit = ", time limit" if result.stopped == "max_time" else ""
    rows = [
        ("steps", f"{result.steps} of {result.planned}{limit}"),
        ("training", duration(result.seconds)),
        *(
            []
            if result.step_size is None
            else [("solver.step", f"{result.step_size:g} at the end, by measurement")]
        ),
        *evaluation_rows(result.evaluation, measure_of(recipe)),
        ("checkpoint", str(folder.best)),
        ("metrics", str(folder.metrics)),
    ]
    if result.samples is not None:
        rows.append(("samples", str(result.samples)))
    click.echo("\n" + table(rows))
