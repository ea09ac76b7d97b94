"""``rnode-cli export``: the weights of a run as a safetensors file."""

from __future__ import annotations

import click

__all__ = ["export"]


@click.command()
@click.argument("run")
@click.argument("file", metavar="FILE.safetensors")
@click.option("--last", is_flag=True, help="Of a run folder, the newest checkpoint instead of the best.")
def export(*, run: str, file: str, last: bool) -> None:
    """Write the weights of RUN, a run folder or a checkpoint, as FILE.safetensors.

    The recipe goes along in the file's metadata: `load_flow`, `eval` and `sample` take the file like a run folder,
    and any program that reads safetensors gets the weights.
    """
    from ..training.runs.checkpoints import BEST, LAST, export_flow

    source, recipe = export_flow(run, file, prefer=LAST if last else BEST)
    averaged = "" if recipe.training.ema is None else f" ({recipe.weights})"
    click.echo(f"{recipe.name}, weights of {source}{averaged}: {file}")
