"""Commands on the installation: ``recipes``, ``data``, ``plugins``, ``regularizers`` and ``info``."""

from __future__ import annotations

import inspect
import os

import click

from ..core.regularizer import Rate, SpanPolicy
from ..errors import RnodeError, first_line
from ..experiments.text import table
from ..plugins import registry
from .options import as_json, loaded, print_json, settings

_VARIABLES = (
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "CUDA_VISIBLE_DEVICES", "CXX",
    "RNODE_PLUGINS_BLOCK",
)  # fmt: skip


@click.command()
@click.argument("name", required=False)
@click.option("--ffjord", is_flag=True, help="Show the FFJORD baseline of the recipe.")
@settings
@click.option("--json", "as_json", is_flag=True, help="Print JSON, as in the recipe.json of a run.")
def recipes(*, name: str | None, ffjord: bool, assignments: tuple[str, ...], as_json: bool) -> None:
    """List the recipes, or show every setting of one, as --set takes it, and the number of its parameters."""
    from ..experiments.recipes.recipe import as_text, get_recipe

    if name is None:
        if ffjord or assignments or as_json:
            raise click.UsageError("name a recipe to show; without options, the command lists them.")
        click.echo(table(loaded("recipes", lambda name: get_recipe(name).description)))
        return
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


@click.command()
def data() -> None:
    """List the data sets that a recipe or --set data.name=NAME can use, images and tables."""

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
                regularizer = registry.get_regularizer(each)
                needs = sorted(regularizer.needs) if isinstance(regularizer, Rate) else ()
                about = (
                    regularizer.about.or_of(type(regularizer))
                    if isinstance(regularizer, SpanPolicy)
                    else regularizer.about
                )
                row = {
                    "kind": regularizer.kind,
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
        errors = list(each.errors)
        if each.status == "blocked":
            click.echo("  not loaded: blocked")
        for kind, values in each.registers.items():
            if values:
                click.echo(f"  {kind}: {', '.join(sorted(values))}")
            for name in values if each.distribution != "rnode-plugin" else ():
                try:
                    registry.get(kind, name)
                except RnodeError as error:
                    errors.append(str(error))
        for error in errors:
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
