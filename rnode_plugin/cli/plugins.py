"""``rnode-cli plugins``: who registers what, and what went wrong."""

from __future__ import annotations

import dataclasses
import json

import click

from ..errors import RnodeError
from ..plugins import registry as registry

__all__ = ["plugins"]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the tracebacks of plugins that failed.")
def plugins(*, as_json: bool) -> None:
    """List the plugins: distribution, version, what each registers, and errors.

    RNODE_DISABLE_PLUGINS=1 keeps all plugins of other packages out, RNODE_PLUGINS_BLOCK="NAME,..." those whose
    distribution or entry point it names.
    """
    reports = registry.report()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(each) for each in reports], indent=2))
        return
    for each in reports:
        click.echo(f"{each.name} ({each.distribution} {each.version})")
        if each.status in ("blocked", "disabled"):
            click.echo(f"  not loaded: {each.status}")
        for kind, names in each.registers.items():
            shown = map(_with_kind, names) if kind == "regularizers" else names
            click.echo(f"  {kind}: {', '.join(shown)}")
        if each.observes:
            click.echo("  observes: every solve")
        if each.error:
            click.echo(f"  error: {each.error}")


def _with_kind(name: str) -> str:
    from ..core.regularizers import kind_of

    try:
        return f"{name} ({kind_of(registry.get('regularizers', name))})"
    except RnodeError:  # what is wrong with it is told to whoever uses it
        return name
