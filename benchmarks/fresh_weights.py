"""Draw the bits/dim and the NFE of image flows against the hours of a core, one curve for each run.

    python benchmarks/fresh_weights.py comparison/mnist/runs/*/* --out fresh-weights.png

Lines are the training steps, averaged over a twentieth of a run. Points are held-out images, measured by the test
solver of the recipe. Where a line and its points part, the model has learned the errors of its training grid. The
hours are without validations.
"""

from __future__ import annotations

from pathlib import Path

import click

from rnode_plugin.experiments.reports.figures import smooth
from rnode_plugin.experiments.reports.runs import penalties_of
from rnode_plugin.experiments.runs.run import Run

LABELS = {
    "ffjord": "FFJORD: dopri5 at 1e-5, no penalties",
    "rnode": "RNODE: step 0.25, both penalties",
    "none": "step 0.25, no penalties",
}


@click.command(help=__doc__)
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--between", type=(float, float), default=(1.05, 1.5), show_default=True, help="Shown bits/dim.")
@click.option("--out", required=True, type=click.Path(path_type=Path))
def main(runs: tuple[Path, ...], between: tuple[float, float], out: Path) -> None:
    import matplotlib.pyplot as plt

    plt.style.use("rnode_plugin.plots")
    figure, (bits, evaluations) = plt.subplots(1, 2, figsize=(9.6, 3.8))
    for number, run in enumerate(Run(path).read() for path in runs):
        color, name = f"C{number}", penalties_of(run.recipe)
        for axes, quantity in ((bits, "bpd"), (evaluations, "nfe")):
            values, seconds = run.steps[f"train/{quantity}"], run.steps["train_seconds"]
            axes.plot(seconds / 3600, smooth(values, max(len(values) // 20, 1)), color=color, linewidth=1)
            points = run.checks["train_seconds"] / 3600, run.checks[f"val/{quantity}"]
            axes.plot(*points, "o", color=color, markersize=5, label=LABELS.get(name, name))
        for hours, value in zip(run.checks["train_seconds"] / 3600, run.checks["val/bpd"], strict=True):
            click.echo(f"{name:8}{hours:8.3f} h  {value:.4f} bits/dim")
    bits.set(xlabel="hours of one CPU core", ylabel="bits/dim", ylim=between)
    evaluations.set(xlabel="hours of one CPU core", ylabel="NFE")
    bits.legend(fontsize=8, loc="upper right")
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    main()
