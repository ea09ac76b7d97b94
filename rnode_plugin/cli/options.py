"""Options that several commands have, and checks of the paths that they name."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..core.schedules import DEFAULT_LAMBDA
from ..errors import CheckpointError, ConfigError, RnodeError
from ..experiments.text import to_json
from ..plugins import registry

if TYPE_CHECKING:
    from ..experiments.recipes.recipe import Recipe

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}  # seconds

_OUTPUT = f"{__name__}.output"  # where standard output is kept in click's context

_F = TypeVar("_F", bound=Callable[..., object])


class InSections(click.Command):
    """A command whose help has its options in sections.

    Args:
        sections: the title of each section and the names of its options, in order. Other options come last.
        options: those of click's Command.
    """

    def __init__(self, *, sections: Mapping[str, Sequence[str]], **options: Any) -> None:
        super().__init__(**options)
        self.sections = sections

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [each for each in self.get_params(ctx) if isinstance(each, click.Option)]
        rows = {each.name: row for each in options if (row := each.get_help_record(ctx)) is not None}
        for title, names in self.sections.items():
            with formatter.section(title):
                formatter.write_dl([rows.pop(name) for name in names])
        with formatter.section("Other"):
            formatter.write_dl(list(rows.values()))


class WholeNumber(click.IntRange):
    """A range of integers. click calls another text "not a valid integer range"."""

    name = "whole number"


def span_of_time(text: str) -> float:
    """The seconds in ``90``, ``20m`` or ``1h30m``."""
    short, seconds = text.strip().lower(), 0.0
    # not 1h30, whose 30 may be minutes, and not 1h1h or 5m3h, in which a letter may be wrong
    if re.fullmatch(r"{0}|({0}d)?({0}h)?({0}m)?({0}s)?".format(r"\d+(\.\d+)?"), short):
        seconds = sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"([\d.]+)([smhd]?)", short))
    if not 0 < seconds < math.inf:
        raise click.BadParameter(f"{text!r} is not a span of time: write 90 (seconds), 20m or 1h30m.")
    return seconds


def written_as(pattern: str, message: str) -> Callable[[str], str]:
    """A type of an option whose text must match ``pattern``. The ``message`` for another one has a place for it."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise click.BadParameter(message.format(text))
        return text

    return check


# options -------------------------------------------------------------------------------------------------------

run_argument = click.argument("run", type=click.Path())  # the shell completes paths
settings = click.option(
    "--set", "assignments", multiple=True, metavar="GROUP.KEY=VALUE",
    help="Change a setting of the recipe. `rnode-cli recipes NAME` lists them. May be repeated.",
)  # fmt: skip
regularizers_option = click.option(
    "--regularizer", "regularizers", multiple=True, metavar="NAME[=LAMBDA]",
    help="Penalize with this strength, as kinetic=0.1. `rnode-cli regularizers` lists the names. May be repeated. "
         f"[default LAMBDA: {DEFAULT_LAMBDA}]",
)  # fmt: skip
download = click.option(
    "--download/--no-download", default=True, show_default=True,
    help="Fetch the data set if it is missing or damaged.",
)  # fmt: skip
device = click.option(
    "--device", default="auto", show_default=True, metavar="NAME",
    type=written_as(r"auto|cpu|mps|cuda(:\d+)?", "{!r} is not a device: write auto, cpu, cuda, cuda:1 or mps."),
    help="Device to use: cpu, cuda, cuda:1, mps or auto.",
)  # fmt: skip
as_json = click.option(
    "--json", "as_json", is_flag=True, is_eager=True, callback=lambda ctx, _, on: _json_alone(ctx) if on else on,
    help="Print JSON.",
)  # fmt: skip
quiet = click.option("--quiet", is_flag=True, help="Show results only, no progress.")
force = click.option("--force", is_flag=True, help="Overwrite a file or folder that exists.")


# Options that are a shorter form of a setting: the setting, the metavar and the help. They have no type in click,
# because the recipe reads and checks the text, as it does for --set.
_SHORT: dict[str, tuple[str, str, str]] = {
    "data": ("data.name", "NAME", "Use another data set than the recipe's, such as folder."),
    "data-root": ("data.root", "PATH", "Folder of the data set, or the file of a table. [default: the recipe's]"),
    "size": ("data.size", "N", "Scale the pictures of a folder to this height and width."),
    "given": ("data.given", "COLUMN,COLUMN", "Model the density of the other columns of a table, given these."),
    "batch-size": ("data.batch_size", "N", "Images, or rows, per device and step. [default: the recipe's]"),
    "max-steps": ("training.max_steps", "N", "Stop after N steps of the run."),
    "max-epochs": ("training.max_epochs", "N", "Stop after N epochs of the run."),
    "seed": ("training.seed", "N", "Seed of the weights, the data order and all noise."),
    "weights": ("training.weights", "RUN", "Start from the weights of a run, a file or a packaged flow. Everything "
                "else starts fresh."),
}  # fmt: skip


def short(*names: str) -> Callable[[_F], _F]:
    """Add the options of these names, each a shorter form of a setting. :func:`changed` applies them."""

    def add(command: _F) -> _F:
        for name in reversed(names):
            _, metavar, text = _SHORT[name]
            command = click.option(f"--{name}", metavar=metavar, help=text)(command)
        return command

    return add


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with the settings that the options of a command change, of which ``--set`` is applied last.

    Args:
        recipe: the recipe to change, which stays as it is.
        changes: the options ``--set``, ``--regularizer`` and those of :func:`short`, by the names of their
            parameters.

    Raises:
        ConfigError: an unknown name or setting, a value that cannot work, or an option of another kind of data.
        DataError: a table or a folder that is named cannot be read.
    """
    kind, penalties = recipe.kind, changes.get("regularizers", ())
    texts = [
        f"regularizers.{each}" if "=" in each else f"regularizers.{each}={DEFAULT_LAMBDA}" for each in penalties
    ]
    for name, (setting, *_) in _SHORT.items():
        if (value := changes.get(name.replace("-", "_"))) is None:
            continue
        if name == "data":
            registry.check_name("datasets", value)
        if (other := kind.refused_options.get(name)) is not None:
            raise ConfigError(f"--{name} is for {other}, and {recipe.name} is a recipe of {kind.data}.")
        texts.append(f"{setting}={value}")
    try:
        new = recipe.override([*texts, *changes["assignments"]])
    except ConfigError as error:  # in the words of the options
        message = str(error)
        for name, (setting, *_) in _SHORT.items():
            if changes.get(name.replace("-", "_")) is not None:
                message = message.replace(f"{setting}:", f"--{name}:")
        raise ConfigError(message) from None
    kind.check_root(new.data)
    return new


def refuse_path_as_recipe(name: str) -> None:
    """Raise a ConfigError if ``name`` is a path and not a recipe. Any other name passes, also an unknown one."""
    if name in registry.names("recipes") or not (os.path.exists(name) or os.sep in name):
        return
    if not os.path.exists(name):
        raise ConfigError(f"{name!r} is not a recipe: no such file or folder exists.")
    quoted = shlex.quote(name)
    raise ConfigError(
        f"{name!r} is not a recipe. A run is continued by --resume {quoted}, its weights begin a new run by "
        f"--weights {quoted}, and your own files are trained on by rnode-cli train table --data-root {quoted}, or "
        "train pictures for a folder of pictures."
    )


# values --------------------------------------------------------------------------------------------------------


def check_folder(path: str | os.PathLike[str]) -> None:
    """Check that files can be written into a folder, before a command computes what it will write there.

    The folder need not exist yet. The check makes a nameless file in it, or in the nearest folder above it that
    exists, because the permissions of a folder do not show that a file system is read-only.

    Raises:
        CheckpointError: the system refuses the file.
    """
    folder = Path(os.path.abspath(path))
    existing = next(each for each in (folder, *folder.parents) if os.path.exists(each))
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise CheckpointError(f"cannot write into {path}: {reason}. Choose a folder that can be written.") from None


def free_path(named: str | None, default: str, *, force: bool) -> Path:
    """The path to write to: ``named``, or ``default`` with the first number that is free.

    With ``force``, a path that is taken is returned as it is named.

    Raises:
        ConfigError: ``named`` is a file, or a folder that is not empty, and ``force`` is not given.
    """
    path = Path(named or default)
    if force or not (path.is_file() or (path.is_dir() and any(path.iterdir()))):
        return path
    if named is not None:
        raise ConfigError(f"{path} exists already: choose another name, or overwrite it with --force.")
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(1))
    return next(each for each in numbered if not each.exists())


def flush_denormals() -> None:
    """Calculate without numbers too small for full precision during a command.

    A denormal, below 1e-38 in float32, is smaller than the rounding error of any sum that it enters, but
    processors are slow on it. softplus of pre-activations near -95 takes 26 times as long as in other places.
    """
    import numpy as np
    import torch

    for kind in (np.float32, np.float64):
        np.finfo(kind)  # numpy 1 computes this once, and would warn later that the smallest number is zero
    if torch.set_flush_denormal(True):
        # a program that calls a command as a function gets its arithmetic back
        click.get_current_context().call_on_close(lambda: torch.set_flush_denormal(False))


def show_next(*steps: str) -> None:
    """Print commands that can follow, one on each line."""
    click.echo("\nNext: " + "\n      ".join(steps))


def _json_alone(ctx: click.Context) -> bool:
    """Keep standard output for :func:`print_json`. What a model or a callback prints goes to standard error."""
    ctx.meta[_OUTPUT] = sys.stdout
    ctx.with_resource(contextlib.redirect_stdout(sys.stderr))
    return True


def print_json(value: object) -> None:
    """Print a value as JSON, see :func:`~rnode_plugin.experiments.text.to_json`."""
    click.echo(to_json(value), file=click.get_current_context().meta.get(_OUTPUT))


def loaded(kind: str, describe: Callable[[str], str]) -> list[tuple[str, str]]:
    """All registered names of a kind with a sentence on each.

    For a name that a broken plugin registers, the sentence is the error, so that the other names stay listed.
    """
    rows = []
    for name in registry.names(kind):
        try:
            rows.append((name, describe(name)))
        except RnodeError as error:
            rows.append((name, f"(cannot be loaded: {error})"))
    return rows
