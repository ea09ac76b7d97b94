"""The commands ``train`` and ``compare``."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError, RnodeError, TrainingError
from ..text import counted, duration, table
from .options import (
    Command,
    Duration,
    RareOption,
    as_json,
    changed,
    complete,
    complete_configuration,
    complete_run,
    device,
    download,
    flush_denormals,
    keep_denormals,
    named_recipe,
    print_json,
    quiet,
    recipe_argument,
    regularizers_option,
    settings,
    short,
)

if TYPE_CHECKING:
    from ..recipes.recipe import Recipe
    from ..training.fit import FitResult


@click.command(cls=Command)
@click.argument("recipe", required=False, shell_complete=complete("recipes"))
@short("data", "data-root", "size", "max-steps", "max-epochs")
@click.option("--max-time", type=Duration(), help="Stop after 90 (seconds), 20m or 1h30m of this call.")
@regularizers_option
@settings
@short("batch-size", "seed")
@click.option("--resume", metavar="RUN", shell_complete=complete_run,
              help="Continue a run from its folder or from a checkpoint.")  # fmt: skip
@device
@click.option("--devices", default="auto", show_default=True, help="How many devices, or which: 4, or 0,2.")
@quiet
@as_json
@click.option("--ffjord", cls=RareOption, is_flag=True,
              help="Train the FFJORD baseline of the recipe: no penalties, dopri5 at 1e-5.")  # fmt: skip
@short("given", "weights", "accumulate", "limit-train", "limit-val", "val-every", "precision", rare=True)
@click.option("--compile/--no-compile", cls=RareOption, default=None,
              help="Use torch.compile, which takes a minute at first.")  # fmt: skip
@click.option("--runs", cls=RareOption, default="runs", show_default=True, metavar="FOLDER",
              help="Folder of all runs.")  # fmt: skip
@click.option("--run-folder", cls=RareOption, metavar="FOLDER",
              help="Folder of a new run, missing or empty, instead of one under --runs.")  # fmt: skip
@click.option("--logger", "loggers", cls=RareOption, multiple=True, metavar="csv|tensorboard|wandb|mlflow",
              help="Log there too, in addition to metrics.csv. May be repeated.")  # fmt: skip
@click.option("--callback", "callbacks", cls=RareOption, multiple=True, metavar="MODULE:NAME",
              help="Use a callback of Lightning: an object, or a class or function that makes one. May be "
                   "repeated.")  # fmt: skip
@click.option("--num-nodes", cls=RareOption, type=int, default=1, show_default=True,
              help="Number of machines of a distributed run.")  # fmt: skip
@download
@keep_denormals
@click.pass_context
def train(
    ctx: click.Context, *, recipe: str | None, resume: str | None, quiet: bool, as_json: bool, **options: Any
) -> None:
    """Train the flow of RECIPE on its data set, and measure its best weights.

    \b
    rnode-cli train digits
    rnode-cli train table --data-root measurements.csv
    rnode-cli train pictures --data-root FOLDER --size 32
    rnode-cli train mnist-fast --regularizer kinetic=0.05 --max-time 1h
    rnode-cli train --resume runs/mnist-fast/0

    RECIPE is a name or a recipe.json of another run. The run's folder is printed first. It holds the recipe,
    metrics, checkpoints and samples. With --resume, RECIPE may be left out. Settings that are given again change
    from there on, and a recipe.json changes all of them.
    """
    if recipe is None and resume is None:
        raise click.UsageError("name a RECIPE; `rnode-cli recipes` lists them.", ctx)
    ffjord = options.pop("ffjord")
    if resume is not None and ffjord:
        raise click.UsageError("--ffjord makes another model of the recipe. It cannot go with --resume.", ctx)
    try:
        chosen, checkpoint = _chosen(recipe, resume, ffjord, ctx)
        chosen = changed(chosen, options)
        options |= _place(options.pop("device"), options["devices"])
        flush_denormals(options)
        # seconds of imports, which a wrong name or setting does not wait for
        from ..training.fit import fit
        from ..training.runs import RunOptions

        made = [_callback(name) for name in options.pop("callbacks")]
        mine = {name: options.pop(name) for name in ("runs", "run_folder", "max_time", "download")}
        run = RunOptions(resume=checkpoint, progress=not (quiet or as_json), **mine)
        result = fit(chosen, run, callbacks=made, **options)
    except RnodeError as error:
        if _reports() or type(error) not in (ConfigError, TrainingError):  # it may be the only one that failed
            raise
        # the first process says the same. Lightning kills it at sight of another exit code, maybe before it could
        ctx.exit(0)
    if not result.first_process:
        return
    if as_json:
        print_json(_as_plain(result, chosen))
    else:
        _report(result, chosen)
    if result.stopped in signal.Signals.__members__:
        ctx.exit(128 + signal.Signals[result.stopped])


def _place(device: str, devices: str) -> dict[str, str]:
    """``accelerator`` and ``devices`` as Lightning's Trainer takes them; a ConfigError for more than there are."""
    name, colon, index = device.partition(":")
    if colon and (devices != "auto" or not index.isdecimal()):
        raise ConfigError(f"--device {device} names one device: leave --devices out, or give --device {name}.")
    import torch

    cores = os.cpu_count() or 1
    on_cpu = name == "cpu" or (name == "auto" and not torch.accelerator.is_available())
    if on_cpu and devices.isdecimal() and int(devices) > cores:
        raise ConfigError(f"--devices {devices} is more than the {counted(cores, 'core')} of this machine.")
    return {"accelerator": {"cuda": "gpu"}.get(name, name), "devices": f"{index}," if colon else devices}


def _reports() -> bool:
    """Whether this process reports an error of all: the first one of its machine, or of srun."""
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "SLURM_PROCID"))


def _callback(name: str) -> Any:
    """The callback of Lightning that ``MODULE:NAME`` means; a ConfigError for anything else."""
    import pkgutil

    from pytorch_lightning.callbacks import Callback

    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a module of one's own lies next to where the command is given
    try:
        found = pkgutil.resolve_name(name)
        made = found if isinstance(found, Callback) else found()
    except Exception as error:  # of the module or the constructor
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"--callback {name} cannot be made: {reason}. Write MODULE:NAME.") from error
    if not isinstance(made, Callback):
        raise ConfigError(f"--callback {name} makes a {type(made).__name__}, not a callback of Lightning.")
    return made


def _chosen(name: str | None, resume: str | None, ffjord: bool, ctx: click.Context) -> tuple[Recipe, Path | None]:
    """The recipe to train, and the newest intact checkpoint of a run to continue."""
    from ..recipes.recipe import is_recipe_file, read_recipe

    if resume is None:
        assert name is not None  # one of both is named
        recipe = read_recipe(name) if is_recipe_file(name) else named_recipe(name, ctx)
        return recipe.ffjord() if ffjord else recipe, None
    from ..training.checkpoints import newest_intact, recipe_of

    path, contents = newest_intact(resume)
    if name is not None and is_recipe_file(name):
        return read_recipe(name), path
    recipe = recipe_of(contents, path)
    if name not in (None, recipe.name):
        raise click.UsageError(f"{resume} is a run of {recipe.name}, not of {name}. Leave the recipe out.", ctx)
    return recipe, path


def _as_plain(result: FitResult, recipe: Recipe) -> dict[str, Any]:
    """The contents of the run's result.json and its places; an evaluation of null after a signal."""
    folder, evaluation = result.folder, result.evaluation
    measured = None if evaluation is None else evaluation.to_plain(recipe.task)
    places = {"folder": folder.path, "checkpoint": folder.best, "samples": result.samples}
    return {**result.ended, **places, "evaluation": measured}


def _report(result: FitResult, recipe: Recipe) -> None:
    folder = result.folder
    if result.evaluation is None:
        click.echo(f"\nStopped by {result.stopped} after step {result.steps} of {result.planned}.")
        command = f"rnode-cli train --resume {folder.path}"
        click.echo(f"Continue with: {command}" if result.steps else "No checkpoint had been written yet.")
        return
    limit = ", time limit" if result.stopped == "max_time" else ""
    rows = [
        ("steps", f"{result.steps} of {result.planned}{limit}"),
        ("training time", f"{duration(result.training_seconds)}  without validation"),
    ]
    if result.step_size is not None:
        rows.append(("solver.step", f"{result.step_size:g} at the end, by measurement"))
    rows += result.evaluation.rows(recipe.task)
    rows += [("checkpoint", str(folder.best)), ("metrics", str(folder.metrics))]
    if result.samples is not None:
        rows.append(("samples", str(result.samples)))
    run = shlex.quote(str(folder.path))
    click.echo(f"\n{table(rows)}\n\nNext: rnode-cli sample {run}\n      rnode-cli diagnose {run}\n"
               f"      rnode-cli report {run}")  # fmt: skip


@click.command(cls=Command)
@recipe_argument
@click.option("--configuration", "configurations", multiple=True, metavar="NAME|FILE",
              shell_complete=complete_configuration,
              help="Train none (no penalty), ffjord (no penalty, dopri5 at 1e-5), rnode (all penalties of the "
                   "recipe), a penalty such as kinetic or taylor:3, or a JSON file of penalties and lambdas, also "
                   "for sweeps. May be repeated. [default: none, each penalty of the recipe, rnode]")  # fmt: skip
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, metavar="N",
              help="Runs of each configuration.")  # fmt: skip
@click.option("--max-steps", type=click.IntRange(1), metavar="N", help="Steps of each run. [default: the recipe's]")
@click.option("--max-time", type=Duration(), help="Limit for each run: 90 (seconds), 20m or 1h30m.")
@click.option("--validations", type=click.IntRange(1), default=20, show_default=True, metavar="N",
              help="Validations of each run, the marks of the figures.")  # fmt: skip
@settings
@short("data-root")
@device
@click.option("--devices", default="auto", show_default=True,
              help="Runs that train at the same time: how many, or on which GPUs: 4, or 0,2. auto is one for each "
                   "GPU, or for each core of a CPU.")  # fmt: skip
@click.option("--out", metavar="FOLDER", help="Folder of the runs and the report. [default: comparison/RECIPE]")
@quiet
@as_json
@short("given", rare=True)
@download
@click.pass_context
def compare(ctx: click.Context, *, recipe: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Train RECIPE with different penalties and report what they change.

    \b
    rnode-cli compare digits --seeds 3
    rnode-cli compare digits --configuration none --configuration kinetic --configuration sweep.json

    All configurations begin with the same weights and see the same images and noise. The same command again
    continues, and with more configurations or seeds trains only the new ones. Writes report.html, figures/ and
    runs/ into one folder. `rnode-cli regularizers` lists the penalties.

    A FILE maps names to penalties: {"weak": {"kinetic": 0.001}, "sweep": {"kinetic": [0.01, 0.1]}}. A list of
    lambdas makes a configuration of each.

    Runs that train at the same time on a CPU take longer steps than one alone.
    """
    silent = quiet or as_json
    if (steps := options.pop("max_steps")) is not None:
        limits = (f"training.max_steps={steps}", "training.max_epochs=none")
        options["assignments"] = (*limits, *options["assignments"])
    chosen = changed(named_recipe(recipe, ctx), options)
    from ..comparison.compare import compare  # seconds of imports, which a wrong name does not wait for

    result = compare(
        chosen,
        accelerator=options.pop("device"),
        out=options.pop("out") or f"comparison/{recipe}",
        progress=not silent,
        announce=(lambda line: None) if silent else click.echo,
        **options,
    )
    report = result.report
    if as_json:
        print_json({"runs": result.runs, "failed": result.failed, **report.to_plain()})
    else:
        click.echo(f"\n{report.as_text()}\n\n{report.html}")
    if result.failed:
        raise TrainingError(" ".join(result.failed))
