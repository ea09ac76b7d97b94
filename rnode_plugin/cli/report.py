"""``rnode-cli report``."""

from __future__ import annotations

import click

__all__ = ["report"]


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--out", default="report", show_default=True, metavar="FOLDER", help="Where the report goes.")
@click.option("--title", help="Of the report. [default: names the data sets]")
def report(*, runs: tuple[str, ...], out: str, title: str | None) -> None:
    """Table and figures of RUN..., finished or still running.

    RUN is a run folder or a folder with run folders below it; of those below, the ones that cannot be read are left
    out. Runs that differ by their seed alone are one arm.
    Writes report.html (one file that opens offline), report.md and figures/ (PNG and SVG).
    """
    from ..reports import write_report
    from .tables import table

    written = write_report(runs, out, title=title)
    heads = ["", *(column.label for column in written.table.columns)]
    click.echo(table([heads, *([row.name, *row.cells] for row in written.table.rows)]))
    for message in written.left_out:
        click.echo(f"left out: {message}", err=True)
    click.echo(f"\n{written.html}\n{written.markdown}")
