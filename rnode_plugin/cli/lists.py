"""Commands on the installation: ``recipes``, ``data``, ``plugins``, ``regularizers``, ``info`` and ``exec``."""

from __future__ import annotations

import inspect
import os
import runpy
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..core.regularizer import Rate, SpanPolicy
from ..core.schedules import DEFAULT_LAMBDA
from ..errors import ConfigError, RnodeError, first_line
from ..plugins import registry
from ..text import count_of, significant, table
from .options import (
    as_json,
    loaded,
    print_json,
    read_regularizers,
    settings,
)

_VARIABLES = (
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "CUDA_VISIBLE_DEVICES", "CXX",
    "RNODE_PLUGINS_BLOCK",
)  # fmt: skip

if TYPE_CHECKING:
    from ..core.history import SolveCounter


class _Advising(click.Group):
    """A group that says what to use in place of a command that people look for in it."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.name == "recipes" and args[0] in registry.names("recipes"):
            raise click.UsageError(f"{args[0]} is no command: rnode-cli recipes show {args[0]} shows it.", ctx)
        if (self.name, args[0]) == ("data", "prepare"):
            raise click.UsageError(
                "pictures need no preparation: give their folder by --data-root, and --set data.workers=2 if there "
                "are many. examples/imagenet64.py writes the arrays of imagenet64.",
                ctx,
            )
        return super().resolve_command(ctx, args)


@click.group(cls=_Advising, invoke_without_command=True)
@click.pass_context
def recipes(ctx: click.Context) -> None:
    """List the recipes, or show every setting of one."""
    if ctx.invoked_subcommand is not None:
        return
    from ..experiments.recipes.recipe import get_recipe

    click.echo(table(loaded("recipes", lambda name: get_recipe(name).description)))


@recipes.command(short_help="Show every setting of a recipe.")
@click.argument("name")
@click.option("--ffjord", is_flag=True, help="Show the FFJORD baseline of the recipe.")
@settings
@click.option("--json", "as_json", is_flag=True, help="Print JSON, as in the recipe.json of a run.")
def show(*, name: str, ffjord: bool, assignments: tuple[str, ...], as_json: bool) -> None:
    """Print every setting of the recipe NAME, as --set takes it, and the number of its parameters."""
    from ..experiments.recipes.recipe import as_text, get_recipe

    recipe = get_recipe(name)
    recipe = (recipe.ffjord() if ffjord else recipe).override(assignments)
    if as_json:
        print_json(recipe.to_plain())
        return
    click.echo(f"{recipe.name}: {recipe.description}\n")
    click.echo(table((path, as_text(value)) for path, value in recipe.settings()))
    import torch  # this takes seconds, so what is known without it was printed before

    try:
        with torch.device("meta"):  # shapes without values
            count = sum(parameter.numel() for parameter in recipe.build_flow().parameters())
        click.echo(f"\n{count:,} parameters")
    except (RnodeError, RuntimeError) as error:  # from a model that needs values to be built
        click.echo(f"\nThe number of parameters is not known: {first_line(error)}")


@click.group(cls=_Advising)
def data() -> None:
    """List the data sets, images and tables."""


@data.command("list", short_help="Show the data sets that can be used.")
def list_datasets() -> None:
    """Show the data sets that a recipe or --set data.name=NAME can use."""

    def summary(name: str) -> str:
        return (inspect.getdoc(registry.get("datasets", name)) or "").partition("\n")[0]

    click.echo(table(loaded("datasets", summary)))


@click.command()
@click.argument("name", required=False)
@as_json
def regularizers(*, name: str | None, as_json: bool) -> None:
    """List the regularizers, or show one: kind, what each penalizes, its cost, its source, and the package.

    Use a name in NeuralODE(..., regularizers=[NAME]), or in `rnode-cli train digits --regularizer NAME=LAMBDA`.
    Names can have options: taylor:3, steer:0.25. LAMBDA is a number, or linear_warmup(STEPS)*NUMBER.
    """
    plugins = registry.report()
    if name is not None:
        plugins = [registry.check_name("regularizers", name := name.partition(":")[0])]
    rows: list[dict[str, str]] = []
    for plugin in plugins:
        for each in sorted(plugin.registers["regularizers"]) if name is None else [name]:
            try:
                found = registry.get_regularizer(each)
                needs = sorted(found.needs) if isinstance(found, Rate) else ()
                about = found.about.or_of(type(found)) if isinstance(found, SpanPolicy) else found.about
                row = {
                    "kind": found.kind,
                    "formula": about.formula,
                    "cost": about.cost or ", ".join(needs) or "none",
                    "source": str(about.source),
                }
            except RnodeError as error:
                row = {"kind": "?", "formula": str(error), "cost": "?", "source": "?"}
            source = plugin.name if plugin.distribution is None else f"{plugin.distribution} {plugin.version}"
            rows.append({"name": each, **row, "installed_from": source})
    rows.sort(key=lambda row: row["kind"])
    if as_json:
        print_json(rows)
        return
    if name is not None:
        click.echo(table((key.replace("_", " "), text) for key, text in rows[0].items()))
        return
    header = ("name", "kind", "what it penalizes", "cost", "source", "installed from")
    click.echo(table([header, *(tuple(row.values()) for row in rows)]))


@click.command()
def plugins() -> None:
    """List the plugins: distribution, version, what each registers, and errors.

    RNODE_PLUGINS_BLOCK="NAME,..." excludes plugins of other packages whose distribution or entry point has one of
    the names, and "*" all of them.
    """
    for each in registry.report():
        click.echo(f"{each.name} ({each.distribution} {each.version})")
        if each.status == "blocked":
            click.echo("  not loaded: blocked")
        for kind, values in each.registers.items():
            if values:
                click.echo(f"  {kind}: {', '.join(sorted(values))}")
        for error in each.errors:
            click.echo(f"  error: {error}")


@click.command()
def info() -> None:
    """Show versions, devices, threads and plugins, for a bug report.

    It shows none of your paths or names, unless one of the listed environment variables holds it.
    """
    import torch

    from ..experiments.runs.environment import Environment

    facts = Environment.of(torch.device("cuda" if torch.cuda.is_available() else "cpu")).to_plain()
    facts["gpus"] = torch.cuda.device_count()
    del facts["devices"]  # of a run
    facts |= {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    del facts["plugins"]
    for each in registry.report():
        facts[f"plugin {each.name}"] = f"{each.distribution} {each.version}, {each.status}"
    click.echo(table((name, "none" if value is None else str(value)) for name, value in facts.items()))


def _penalized(text: str) -> slice | tuple[int, ...]:
    """The tensors or the columns that ``--penalized`` names. click turns a ValueError into a message."""
    if ":" in text:
        return slice(*(int(each) if each.strip() else None for each in text.split(":", 1)))
    return tuple(int(each) for each in text.split(","))


def _batch_dim(text: str) -> int | None:
    return None if text == "none" else int(text)


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
    sys.path.insert(0, str(script.resolve().parent))  # first, since the script may have a copy of torchdiffeq
    try:
        from .. import install, torchdiffeq
    except ImportError as error:
        raise ConfigError(str(error)) from None
    source = click.get_current_context().get_parameter_source
    if spec is None and any(source(name) is not ParameterSource.DEFAULT for name in of_torchdiffeq):
        raise click.UsageError("--penalized, --batch-dim and --trace-noise need a --regularizer.")
    counter = install(torchdiffeq=True, regularizers=spec)
    torchdiffeq.install(spec, counter=counter, **of_torchdiffeq)
    sys.argv = [str(script), *args]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except Exception as error:
        # The traceback is shown here, because the command line would turn an RnodeError into a message. It begins
        # at the script, without the frames of this function and of runpy.
        frames = error.__traceback__
        while frames is not None and Path(frames.tb_frame.f_code.co_filename) != script:
            frames = frames.tb_next
        error = error.with_traceback(frames or error.__traceback__)
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)
    finally:
        for name in ("torchdiffeq", "torchdyn"):
            if copy := _copy_passed_over(name):
                click.echo(
                    f"rnode: the script put {copy} on sys.path, but got {sys.modules[name].__file__}, which exec "
                    "imports first. Put the folder of the other copy on PYTHONPATH to exchange the two.",
                    err=True,
                )
        click.echo(f"rnode: {_penalized_solves(counter) if spec else _NOT_ASKED}", err=True)


def _copy_passed_over(name: str) -> str:
    """The file of a package that sys.path finds first, if it is another one than the imported one; else ``""``."""
    # a script may have removed the module, to import another copy later
    found, imported = PathFinder.find_spec(name, sys.path), getattr(sys.modules.get(name), "__file__", None)
    if found is None or found.origin is None or imported is None:
        return ""
    return "" if os.path.realpath(found.origin) == os.path.realpath(imported) else found.origin


_NOT_ASKED = "no penalty was added to a gradient, since no --regularizer was given."


def _penalized_solves(counter: SolveCounter) -> str:
    """A sentence with the number of penalized solves and the mean penalties; for no solve, what may be wrong."""
    others = (
        "For torchdyn.numerics.odeint, ODEProblem or another solver add rnode_plugin.penalties_along to the loss"
    )
    if not counter.solves:
        return (
            "no solve was penalized: in this process no gradient went through a solve by torchdiffeq, or by a "
            f"torchdyn NeuralODE without regularizers=. {others}, and for flow matching, which trains without "
            "solves, rnode_plugin.penalties_at."
        )
    means = ", ".join(f"{name} {significant(mean)}" for name, mean in counter.means.items())
    return f"{count_of(counter.solves, 'solve')} penalized. Mean integrals per sample: {means}. {others}."
