"""The commands ``train`` and ``compare``."""

from __future__ import annotations

import importlib.util
import os
import pkgutil
import shlex
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError, TrainingError
from ..experiments.runs.run import LAST, Run, find_checkpoint
from ..experiments.text import count_of, duration, table
from ..experiments.training.loggers import LOGGERS, check_loggers
from .options import (
    InSections,
    WholeNumber,
    as_json,
    changed,
    check_folder,
    device,
    download,
    flush_denormals,
    print_json,
    quiet,
    refuse_path_as_recipe,
    regularizers_option,
    settings,
    short,
    show_next,
    span_of_time,
    written_as,
)

if TYPE_CHECKING:
    from pytorch_lightning.callbacks import Callback

    from ..experiments.recipes.recipe import Recipe
    from ..experiments.training.fit import FitResult


@click.command(cls=InSections, sections={
    "Data": ("data", "data_root", "size", "given", "download"),
    "Length": ("max_steps", "max_epochs", "max_time", "batch_size"),
    "Penalties and other settings": ("regularizers", "ffjord", "assignments", "seed"),
    "Where to begin": ("resume", "weights"),
    "Devices": ("device", "devices", "num_nodes"),
    "Files": ("runs", "run_folder", "loggers", "callbacks"),
    "Output": ("quiet", "as_json", "next_steps"),
})  # fmt: skip
@click.argument("recipe", required=False)
@short("data", "data-root", "size", "max-steps", "max-epochs")
@click.option(
    "--max-time", type=span_of_time, metavar="TIME", help="Stop after 90 (seconds), 20m or 1h30m of this call."
)
@regularizers_option
@settings
@short("batch-size", "seed")
@click.option("--resume", type=click.Path(), metavar="RUN", help="Continue a run or a checkpoint.")
@device
@click.option("--devices", default="auto", show_default=True, metavar="N",
              type=written_as(r"auto|[1-9]\d*|\d+(,\d+)+|\d+,",
                              "--devices takes a number (4), indices (0,2) or auto, not {!r}."),
              help="How many devices, or which: 4, or 0,2.")  # fmt: skip
@quiet
@as_json
@click.option("--ffjord", is_flag=True,
              help="Train the FFJORD baseline: no penalties, no flow matching, dopri5 at 1e-5.")  # fmt: skip
@short("given", "weights")
@click.option("--runs", default="runs", show_default=True, metavar="FOLDER", help="Folder of all runs.")
@click.option("--run-folder", metavar="FOLDER", help="Folder of a new run, instead of one under --runs.")
@click.option("--logger", "loggers", multiple=True, metavar="|".join(LOGGERS),
              help="Also log to this service, in addition to metrics.csv. May be repeated.")  # fmt: skip
@click.option("--callback", "callbacks", multiple=True, metavar="MODULE:NAME",
              help="Use a callback of Lightning: an object, a class or a function. May be repeated.")  # fmt: skip
@click.option("--num-nodes", type=WholeNumber(1), default=1, show_default=True, metavar="N",
              help="Machines of a distributed run.")  # fmt: skip
@download
@click.option("--next/--no-next", "next_steps", default=True, help="Show commands that can follow.")
@click.pass_context
def train(
    ctx: click.Context,
    *,
    recipe: str | None,
    max_time: float | None,
    resume: str | None,
    device: str,
    devices: str,
    quiet: bool,
    as_json: bool,
    ffjord: bool,
    runs: str,
    run_folder: str | None,
    loggers: tuple[str, ...],
    callbacks: tuple[str, ...],
    num_nodes: int,
    download: bool,
    next_steps: bool,
    **changes: Any,
) -> None:
    """Train the flow of RECIPE on its data set, and measure its best weights.

    \b
    rnode-cli train digits
    rnode-cli train table --data-root measurements.csv
    rnode-cli train pictures --data-root FOLDER --size 32
    rnode-cli train mnist-fast --regularizer kinetic=0.05 --max-time 1h
    rnode-cli train --resume runs/mnist-fast/0

    RECIPE is a name or a recipe.json of another run. The first lines name the run's folder. It holds the recipe,
    metrics, checkpoints and samples. With --resume, RECIPE may be left out. Settings that are given again change
    from there on, and a recipe.json changes all of them.
    """
    check_loggers(loggers)
    for name in callbacks:
        _check_callback(name)
    chosen, resume = _chosen(recipe, resume, changes, ffjord=ffjord)
    check_folder(run_folder or _folder_of(resume) or runs)
    used = _devices(device, devices)
    flush_denormals()
    # what cannot work was refused before these imports, which take seconds
    from ..experiments.training.fit import fit
    from ..experiments.training.plan import RunOptions

    options = RunOptions(
        runs=runs,
        run_folder=run_folder,
        resume=resume,
        max_time=max_time,
        download=download,
        progress=not (quiet or as_json),
    )
    made = [_callback(name) for name in callbacks]
    fitted = fit(chosen, options, callbacks=made, loggers=loggers, num_nodes=num_nodes, **used)
    if not fitted.first_process:
        return
    if as_json:
        best = fitted.run.best if fitted.run.best.is_file() else None  # a signal came before the first validation
        folder = fitted.run.path if fitted.run.path.is_dir() else None  # a signal came before the first step
        files = {"folder": folder, "checkpoint": best, "samples": fitted.samples}
        print_json({**fitted.result.to_plain(), **files})
    else:
        _print_result(fitted, chosen, next_steps=next_steps)
    if fitted.result.by_signal:
        ctx.exit(128 + signal.Signals[fitted.result.stopped])


def _chosen(
    name: str | None, resume: str | None, changes: Mapping[str, Any], *, ffjord: bool
) -> tuple[Recipe, str | None]:
    """The recipe to train with all changes, and where to resume from.

    The recipe is named, read from a file, or found in the run to continue. The second value is ``resume``, or the
    checkpoint of it that the recipe was read from.
    """
    from ..experiments.recipes.recipe import get_recipe, is_recipe_file, read_recipe

    if resume is not None and ffjord:
        raise click.UsageError("--ffjord makes another model of the recipe. It cannot go with --resume.")
    if name is not None and is_recipe_file(name):
        recipe = read_recipe(name)
    elif resume is not None:
        find_checkpoint(resume, prefer=LAST)  # refuses a missing run before torch is imported
        from ..experiments.training.checkpoints import newest_intact, recipe_of

        path, contents = newest_intact(resume)
        recipe = recipe_of(contents, path)
        if name not in (None, recipe.name):
            raise click.UsageError(f"{resume} is a run of {recipe.name}, not of {name}. Leave the recipe out.")
        resume = str(path)
    elif name is not None:
        refuse_path_as_recipe(name)
        recipe = get_recipe(name)
    else:
        raise click.UsageError("name a RECIPE; `rnode-cli recipes` lists them.")
    if ffjord:
        recipe = recipe.ffjord()
    if resume is not None:  # the same columns, or the same shape, as the run has, in another file or folder
        recipe = recipe.at_root(changes["data_root"])
        changes = {**changes, "data_root": None}
    recipe = changed(recipe, changes)
    if resume is None and recipe.training.weights is not None:
        find_checkpoint(recipe.training.weights)
    return recipe, resume


def _folder_of(resume: str | None) -> Path | None:
    """The folder of the run that ``resume`` continues; None for a checkpoint in no run, which begins a new one."""
    run = None if resume is None else Run.of_checkpoint(Path(resume)) or Run(Path(resume))
    return run.path if run and run.is_described else None


def _devices(device: str, devices: str) -> dict[str, str]:
    """The options ``accelerator`` and ``devices`` of Lightning's Trainer.

    Raises:
        ConfigError: more devices than the machine has, a device that cannot be used, or both options name devices.
    """
    name, colon, index = device.partition(":")
    if colon and devices != "auto":
        raise ConfigError(f"--device {device} names one device: leave --devices out, or give --device {name}.")
    processes, cores = int(devices) if devices.isdecimal() else 1, os.cpu_count() or 1
    if name == "cpu" and processes > cores:
        raise ConfigError(f"--devices {devices} is more than the {count_of(cores, 'core')} of this machine.")
    if name != "cpu":
        from ..experiments.evaluation.loading import check_device

        check_device(device, processes=processes)
    return {"accelerator": name, "devices": f"{index}," if colon else devices}


def _check_callback(name: str) -> None:
    """Refuse a text other than ``MODULE:NAME``, or a module that does not exist (ConfigError).

    The module is not imported yet, because most modules with callbacks import Lightning.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the user's module may lie in the folder where the command is given
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(f"--callback {name}: write MODULE:NAME.")
    package = module.partition(".")[0]
    if package not in sys.modules and importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"--callback {name}: no module {package!r} is installed or in this folder. Write MODULE:NAME."
        )


def _callback(name: str) -> Callback:
    """The callback that ``MODULE:NAME`` names: an object, or what a class or a function returns.

    Raises:
        ConfigError: it cannot be imported or made, or is not a callback of Lightning.
    """
    from pytorch_lightning.callbacks import Callback

    try:
        named = pkgutil.resolve_name(name)
        made = named if isinstance(named, Callback) else named()
    except Exception as error:  # the user's module or constructor may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"--callback {name} cannot be made: {reason}.") from error
    if not isinstance(made, Callback):
        raise ConfigError(f"--callback {name} makes a {type(made).__name__}, not a callback of Lightning.")
    return made


def _print_result(fitted: FitResult, recipe: Recipe, *, next_steps: bool) -> None:
    from ..experiments.quantities import result_rows

    run, result, samples = fitted.run, fitted.result, fitted.samples
    path = shlex.quote(str(run.path))
    if result.evaluation is None:
        click.echo(f"\nStopped by {result.stopped} after step {result.steps} of {result.planned}.")
        if not result.steps:
            click.echo("No checkpoint had been written yet.")
        elif next_steps:  # a comparison is continued by its own command
            click.echo(f"Continue with: rnode-cli train --resume {path}")
        return
    limit = ", time limit" if result.out_of_time else ""
    skipped = f", {result.skipped} of them without a usable gradient" if result.skipped else ""
    rows = [
        ("steps", f"{result.steps} of {result.planned}{limit}{skipped}"),
        ("training time", f"{duration(result.training_seconds)}  without validation"),
        ("processor time", f"{duration(result.processor_seconds)}  of the training, all threads"),
        *result_rows(result.evaluation, recipe.kind, recipe.test_solver),
        ("checkpoint", str(run.best)),
        ("metrics", str(run.metrics)),
        *([] if samples is None else [("samples", str(samples))]),
    ]
    click.echo(f"\n{table(rows)}")
    if next_steps:
        given = "".join(f" --given-value {shlex.quote(f'{name}=VALUE')}" for name in recipe.data.given)
        show_next(
            *([f"rnode-cli train --resume {path}"] if result.out_of_time else []),
            f"rnode-cli sample {path}{given}",
            f"rnode-cli diagnose {path}",
            f"rnode-cli report {path}",
        )


@click.command()
@click.argument("recipe")
@click.option("--configuration", "configurations", multiple=True, metavar="NAME|FILE",
              help="Train none (no penalty), ffjord (no penalty, no flow matching, dopri5 at 1e-5), rnode (all "
                   "penalties of the recipe), a penalty such as kinetic or taylor:3, or a JSON file of penalties "
                   "and lambdas, also for sweeps. May be repeated. [default: none, each penalty of the recipe, "
                   "rnode]")  # fmt: skip
@click.option("--seeds", type=WholeNumber(1), default=1, show_default=True, help="Runs of each configuration.")
@short("max-steps")
@click.option(
    "--max-time", type=span_of_time, metavar="TIME", help="Limit for each run: 90 (seconds), 20m or 1h30m."
)
@settings
@short("data-root", "given")
@device
@click.option("--out", metavar="FOLDER", help="Folder of the runs and the report. [default: comparison/RECIPE]")
@quiet
@as_json
@download
def compare(
    *,
    recipe: str,
    configurations: tuple[str, ...],
    seeds: int,
    max_time: float | None,
    device: str,
    out: str | None,
    quiet: bool,
    as_json: bool,
    download: bool,
    **changes: Any,
) -> None:
    """Train RECIPE with different penalties and report what they change.

    \b
    rnode-cli compare digits --seeds 3
    rnode-cli compare digits --configuration none --configuration kinetic --configuration sweep.json

    All configurations begin with the same weights and see the same images and noise. The same command again
    continues, and with more configurations or seeds trains only the new ones. Writes report.html, figures/ and
    runs/ into one folder. `rnode-cli regularizers` lists the penalties.

    A FILE maps names to penalties: {"weak": {"kinetic": 0.001}, "sweep": {"kinetic": [0.01, 0.1]}}. A list of
    lambdas makes a configuration of each.
    """
    from ..experiments.comparison.configurations import configured_recipes
    from ..experiments.recipes.recipe import get_recipe

    refuse_path_as_recipe(recipe)
    chosen = changed(get_recipe(recipe), changes)
    out = out or f"comparison/{recipe}"
    check_folder(out)
    recipes = configured_recipes(chosen, configurations, seeds=seeds)
    # what cannot work was refused before these imports, which take seconds
    from ..experiments.comparison.compare import compare

    # the default handler would end this process and leave the process of its run alone
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    click.get_current_context().call_on_close(lambda: signal.signal(signal.SIGTERM, before))
    tell = None if quiet or as_json else click.echo
    result = compare(recipes, max_time=max_time, out=out, accelerator=device, download=download, announce=tell)
    report = result.report
    if as_json:
        print_json({"runs": result.runs, "failed": result.failed, **report.to_plain()})
    else:
        click.echo(f"\n{report.as_text()}")
        diagnoses = [f"rnode-cli diagnose {shlex.quote(str(run))}" for run in result.runs[-1:]]
        show_next(f"open {report.html} in a browser", *diagnoses)
    if result.failed:
        raise TrainingError(" ".join(result.failed))
