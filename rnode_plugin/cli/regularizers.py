"""``rnode-cli regularizers``: every regularizer that is installed, in one table."""

from __future__ import annotations

import json

import click

__all__ = ["regularizers"]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def regularizers(*, as_json: bool) -> None:
    """List the regularizers: kind, what each penalizes, products per evaluation, source, and who installed it.

    Use a name with NeuralODE(..., regularizers=[NAME]), or train with --set regularizers.NAME=LAMBDA. Names can
    carry options: taylor:3, steer:0.25, trajectory_polynomial:2,points=3. LAMBDA is a number, or
    linear_warmup(STEPS)*NUMBER.
    """
    from ..core.regularizers import describe
    from ..errors import RnodeError
    from ..plugins import registry
    from .tables import table

    rows: list[dict[str, str]] = []
    for plugin in registry.report():
        for name in plugin.registers.get("regularizers", []):
            try:
                row = describe(registry.get("regularizers", name), name)._asdict()
            except RnodeError as error:
                row = {"kind": "?", "formula": str(error), "products": "?", "source": "?"}
            source = plugin.name if plugin.distribution is None else f"{plugin.distribution} {plugin.version}"
            rows.append({"name": name, **row, "installed_from": source})
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    rows.sort(key=lambda row: ("rate", "step", "trajectory", "span", "?").index(row["kind"]))
    header = ("name", "kind", "what it penalizes", "products", "source", "installed from")
    click.echo(table([header, *(tuple(row.values()) for row in rows)]))
