"""Draw the bits/dim and the NFE of image flows on held-out images against the hours of a core.

    python benchmarks/fresh_weights.py --out fresh-weights.png
    python benchmarks/fresh_weights.py comparison/mnist/runs/*/* --out fresh-weights.png

Without RUNS it draws results/fresh_weights_28x28.csv. Points are validations, and the hours are without them. Runs
on RNODE's grid without penalties are printed, and not drawn.
"""

from __future__ import annotations

from pathlib import Path

import click
import pandas as pd

from rnode_plugin.experiments.reports.configurations import GRAY
from rnode_plugin.experiments.reports.runs import penalties_of
from rnode_plugin.experiments.runs.run import Run

MEASURED = Path(__file__).parent / "results" / "fresh_weights_28x28.csv"
DRAWN = {"ffjord": ("FFJORD, no penalties", GRAY, "s"), "rnode": ("RNODE, both penalties", "C0", "o")}


def rows(run: Path) -> pd.DataFrame:
    """The validations of a run, with columns of the stored table."""
    read = Run(run).read()
    columns = {"seconds": "train_seconds", "bits_per_dim": "val/bpd", "nfe": "val/nfe"}
    values = {name: read.metrics.validations[key] for name, key in columns.items()}
    return pd.DataFrame({"run": penalties_of(read.recipe), **values})


@click.command(help=__doc__)
@click.argument("runs", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path))
def main(runs: tuple[Path, ...], out: Path) -> None:
    import matplotlib.pyplot as plt

    table = pd.concat([rows(run) for run in runs]) if runs else pd.read_csv(MEASURED)
    click.echo(table.to_string(index=False))
    plt.style.use("rnode_plugin.plots")
    figure, panels = plt.subplots(1, 2, figsize=(6.4, 2.9))
    for axes, column, title in zip(panels, ("nfe", "bits_per_dim"), ("NFE", "bits/dim"), strict=True):
        for run, (label, color, marker) in DRAWN.items():
            shown = table.loc[table["run"] == run]
            axes.plot(shown["seconds"] / 3600, shown[column], f"{marker}-", color=color, markersize=4, label=label)
        axes.set(title=title, xlabel="hours of one CPU core", xlim=(0, None))
    panels[0].set(ylim=(0, None))
    panels[1].legend()
    figure.savefig(out, dpi=200)


if __name__ == "__main__":
    main()
