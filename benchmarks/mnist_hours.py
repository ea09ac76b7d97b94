"""Draw the bits/dim of held-out images against the hours of a core, with the two results of the paper.

    python benchmarks/mnist_hours.py runs/mnist-fast/0 --out mnist-hours.png

Several runs are one curve: each starts from the weights at the end of the one before it. The hours are without
validations, and the axis leaves out what is above 1.3 bits/dim.
"""

from __future__ import annotations

from pathlib import Path

import click

from rnode_plugin.experiments.runs.run import Run

# hours and dirty bits/dim of all test images, of the paper by its Table 1
POINTS = {"mnist-pretrained": (21.4, 0.994), "RNODE, one GPU": (24.4, 0.97), "FFJORD, one GPU": (68.5, 0.97)}

TOP = 1.3  # bits/dim


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--cores", default=1, show_default=True, help="Cores that trained RUNS.")
@click.option("--out", required=True, type=click.Path(path_type=Path))
def main(runs: tuple[Path, ...], cores: int, out: Path) -> None:
    """Draw the curve of RUNS, which continue one another."""
    import matplotlib.pyplot as plt

    plt.style.use("rnode_plugin.plots")
    points: list[tuple[float, float]] = []
    for run in (Run(path).read() for path in runs):
        offset = points[-1][0] if points else 0.0
        hours = offset + cores * run.metrics.validations["train_seconds"] / 3600
        points += zip(hours, run.metrics.validations["val/bpd"], strict=True)
    for hours, bits in points:
        click.echo(f"{hours:8.3f} h  {bits:.4f} bits/dim")

    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    axes.plot(*zip(*points, strict=True), "o-", markersize=3, label="mnist-fast")
    for (label, (hours, bits)), marker in zip(POINTS.items(), "sD^", strict=True):
        axes.plot(hours, bits, marker, label=label)
    shown = [hours for hours, bits in points if bits < TOP]
    axes.set(xscale="log", xlim=(shown[0] / 2, 100), xlabel="hours of one CPU core, or of one GPU")
    axes.set(ylim=(0.95, TOP), ylabel="bits/dim, MNIST, held out")
    axes.legend()
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    main()
