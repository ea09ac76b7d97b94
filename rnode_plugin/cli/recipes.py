"""``rnode-cli recipes``: list the recipes, and show the settings of one."""

from __future__ import annotations

import json

import click

from .options import settings

__all__ = ["recipes"]


@click.group(invoke_without_command=True)
@click.pass_context
def recipes(ctx: click.Context) -> None:
    """List the recipes, or show every setting of one."""
    if ctx.invoked_subcommand is not None:
        return
    from ..errors import RnodeError
    from ..plugins import registry
    from ..recipes.recipe import get_recipe
    from .tables import table

    rows = []
    for name in registry.names("recipes"):
        try:
            rows.append((name, get_recipe(name).description))
        except RnodeError as error:  # one broken plugin must not take the list away
            rows.append((name, f"(cannot be loaded: {error})"))
    click.echo(table(rows))


@recipes.command()
@click.argument("name")
@click.option("--ffjord", is_flag=True, help="The FFJORD baseline of the recipe.")
@settings
@click.option("--json", "as_json", is_flag=True, help="Print JSON, as in the recipe.json of a run.")
def show(*, name: str, ffjord: bool, assignments: tuple[str, ...], as_json: bool) -> None:
    """Print every setting of the recipe NAME, as --set takes it."""
    from ..recipes.recipe import as_text, get_recipe
    from .tables import table

    recipe = get_recipe(name)
    recipe = (recipe.ffjord() if ffjord else recipe).override(assignments)
    if as_json:
        click.echo(json.dumps(recipe.to_plain(), indent=2))
        return
    click.echo(f"{recipe.name}: {recipe.description}\n")
    click.echo(table((path, as_text(value)) for path, value in recipe.settings()))
