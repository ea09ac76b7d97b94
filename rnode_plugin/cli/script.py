"""The command ``exec``, which runs a script with penalties."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..core.schedules import DEFAULT_LAMBDA
from ..errors import ConfigError
from ..plugins import registry
from .options import read_regularizers


def _penalized(text: str) -> slice | tuple[int, ...]:
    """The tensors or the columns that ``--penalized`` names."""
    try:
        if ":" in text:
            return slice(*(int(each) if each.strip() else None for each in text.split(":", 1)))
        return tuple(int(each) for each in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no index: write 3 or 0,1 for tensors, or :2 for columns.") from None


def _batch_dim(text: str) -> int | None:
    try:
        return None if text == "none" else int(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no dimension: write a number, as 0, or none.") from None


@click.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "--regularizer", "regularizers", multiple=True, metavar="NAME[=LAMBDA]",
    help="Penalize every NeuralODE and every solve by torchdiffeq, as kinetic=0.1. May be repeated. "
         f"[default LAMBDA: {DEFAULT_LAMBDA}]",
)  # fmt: skip
@click.option(
    "--penalized", type=_penalized, metavar="INDEX",
    help="Penalize these tensors of a tuple in solves by torchdiffeq, as 3 or 0,1 (default: 0), or columns of one "
    "tensor, as :2.",
)  # fmt: skip
@click.option(
    "--batch-dim", type=_batch_dim, default="0", metavar="DIM",
    help="Take this dimension of the state as the samples in solves by torchdiffeq (default: 0); none: the whole "
    "state is one sample.",
)  # fmt: skip
@click.option(
    "--trace-noise", default="rademacher", metavar="NAME",
    help="Noise of jacfrob in solves by torchdiffeq: rademacher (signs, the default), gaussian, exact, and more.",
)  # fmt: skip
@click.argument("script", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def exec_script(script: Path, args: tuple[str, ...], regularizers: tuple[str, ...], **of_torchdiffeq: Any) -> None:
    """Run SCRIPT with ARGS as `python SCRIPT ARGS...` would, after rnode_plugin.install(torchdiffeq=True).

    torchdyn's own NeuralODE and torchdiffeq's odeint then accept regularizers=. With --regularizer the gradient of
    the penalties is added to the gradient of the script's loss. The loss that the script prints does not contain
    them. Each backward pass through a solution adds their gradient once: a script that accumulates the gradients of
    k batches needs LAMBDA / k, and one with a GradScaler needs bf16 instead. At the end, one line on standard error
    has the number of solves that were penalized and the mean of each penalty. The exit code and the traceback are
    the script's. Processes that the script starts run without penalties, unless they are forked.
    """
    spec = read_regularizers(regularizers) or None
    for name in spec or ():
        registry.check_name("regularizers", name.partition(":")[0])  # before torch is imported
    source = click.get_current_context().get_parameter_source
    if spec is None and any(source(name) is not ParameterSource.DEFAULT for name in of_torchdiffeq):
        raise click.UsageError("--penalized, --batch-dim and --trace-noise need a --regularizer.")
    sys.path.insert(0, str(script.resolve().parent))  # first, since the script may have a copy of torchdiffeq
    try:
        from .. import install, torchdiffeq
        from ..torchdiffeq.script import run_script
    except ImportError as error:
        raise ConfigError(str(error)) from None
    counter = install(torchdiffeq=True, regularizers=spec)
    torchdiffeq.install(spec, counter=counter, **of_torchdiffeq)
    run_script(script, args, counter if spec else None)
