"""What training methods reach: bits/dim against seconds of training, on digits and MNIST.

    python benchmarks/quality.py digits --threads 1
    python benchmarks/quality.py mnist14 --data-root data --method likelihood --method "likelihood, no penalties"

The methods of a seed start from the same weights and see the same images with the same noise. Seconds are processor
time of training steps alone. Every run validates as it trains and ends with an accurate evaluation of held-out
images. It appends its points to one CSV and its final figures to another; the table shows all final figures with
the same steps and settings, and the difference to the first method seed by seed.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from measure import print_environment, set_up, table, threads_option
from training_runs import METHODS, Point, Trainer, rk4

from rnode_plugin import Adaptive, FixedGrid, MultiscaleFlow, Solver, get_recipe
from rnode_plugin.core.objective import bits_per_dim
from rnode_plugin.experiments.data import ImageData
from rnode_plugin.experiments.recipes.recipe import Recipe
from rnode_plugin.flows.multiscale import dequantize

BASE = "likelihood"
QUANTITIES = ("dirty", "nfe", "kinetic", "jacfrob")
COLUMNS = ("data", "steps", "settings", "method", "seed", *QUANTITIES, "gap", "images", "seconds", "ended")


def settings(data: str, root: str, assignments: Sequence[str]) -> Recipe:
    """The recipe that the methods change."""
    if data == "digits":
        return get_recipe("digits").override(list(assignments))
    changes = ["training.matching=0", "optimizer.schedule=cosine", "optimizer.clip=none", f"data.root={root}"]
    changes += ["optimizer.matching_factor=1"]
    if data == "mnist14":
        changes += ["data.shape=1,14,14", "model.hidden=32", "optimizer.lr=1e-2", "optimizer.vector_lr=5e-3"]
        changes += ["data.batch_size=50"]
    else:
        changes += ["data.batch_size=32", "optimizer.lr=5e-3", "optimizer.vector_lr=2.5e-3"]
    return get_recipe("mnist-fast").override([*changes, *assignments])


def halved(data: ImageData) -> ImageData:
    """Images whose pixels are the means of 2x2 pixels, rounded."""

    def pooled(images: np.ndarray) -> np.ndarray:
        n, channels, height, width = images.shape
        blocks = images.reshape(n, channels, height // 2, 2, width // 2, 2)
        return blocks.mean((3, 5)).round().astype(np.uint8)

    channels, height, width = data.shape
    shape = (channels, height // 2, width // 2)
    return dataclasses.replace(data, train=pooled(data.train[:]), val=pooled(data.val[:]), shape=shape)


@torch.no_grad()
def measured(flow: MultiscaleFlow, images: Any, levels: int, coarse: Solver) -> dict[str, float]:
    """Means over held-out images of an accurate solve, in independent batches of 100.

    ``gap`` is the bits/dim of the first batch by the ``coarse`` solver less the bits/dim by the accurate one.
    """
    sums: dict[str, float] = dict.fromkeys(QUANTITIES, 0.0)
    gap, accurate = 0.0, Adaptive("dopri5", first_step=1 / 6)
    for first in range(0, len(images), 100):
        torch.manual_seed(first)
        x = dequantize(torch.from_numpy(images[first : first + 100]), levels)
        noise = flow.draw_noise(len(x))
        output = flow.encode(x, noise=noise, solver=accurate, penalties=True)
        bits = bits_per_dim(flow.log_prob_of(output), dims=flow.dims, levels=levels).mean()
        penalties = {name: value.mean() / flow.dims for name, value in output.regularization.items()}
        for key, value in {"dirty": bits, "nfe": output.nfe, **penalties}.items():
            sums[key] += float(value) * len(x) / len(images)
        if first == 0:
            gap = float(flow.solved_with(solver=coarse).bits_per_dim(x, noise=noise).mean() - bits)
    return {**sums, "gap": gap}


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each method: means over seeds, and the difference to :data:`BASE` with its standard error."""
    base = {row["seed"]: float(row["dirty"]) for row in rows if row["method"] == BASE}
    lines = []
    for name in METHODS:
        found = [row for row in rows if row["method"] == name]
        if not found:
            continue
        mean = {key: statistics.mean(float(row[key]) for row in found) for key in COLUMNS[5:-1]}
        gaps = [float(row["dirty"]) - base[row["seed"]] for row in found if row["seed"] in base]
        spread = f" ± {statistics.stdev(gaps) / len(gaps) ** 0.5:.3f}" if len(gaps) > 1 else ""
        lines.append([
            name, len(found), f"{mean['dirty']:.3f}", f"{statistics.mean(gaps):+.3f}{spread}" if gaps else "",
            f"{mean['nfe']:.0f}", f"{mean['kinetic']:.2f}", f"{mean['jacfrob']:.2f}", f"{mean['gap']:+.4f}",
            f"{mean['seconds']:.0f} s",
        ])  # fmt: skip
    header = ["method", "seeds", "bits/dim", "to the first", "NFE", "kinetic", "jacfrob", "gap", "time"]
    return table(header, lines)


def draw(path: Path, rows: Sequence[Mapping[str, Any]], final: Sequence[Mapping[str, Any]], title: str) -> None:
    """Validation bits/dim against seconds of training: a thin line for each seed, a thick one for their mean.

    The legend has the mean NFE of ``final``. Its bits/dim are of another evaluation than the curves.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.style.use("rnode_plugin.plots")
    plt.rcParams.update({"font.size": 12, "axes.labelsize": 12, "axes.titlesize": 13})
    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    for colour, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
        curves = []
        for seed in dict.fromkeys(row["seed"] for row in rows if row["method"] == name):
            points = [row for row in rows if (row["method"], row["seed"]) == (name, seed) and int(row["step"])]
            curves.append([[float(row[key]) for row in points] for key in ("seconds", "bits_per_dim")])
            axes.plot(*curves[-1], color=f"C{colour}", linewidth=0.8, alpha=0.6)
        if len({len(curve[0]) for curve in curves}) == 1:
            nfe = statistics.mean(float(row["nfe"]) for row in final if row["method"] == name)
            penalties = ", both penalties" if METHODS[name].penalties else ""
            label = f"{name}{penalties}: NFE {nfe:.0f} at the end"
            axes.plot(*np.mean(curves, axis=0), color=f"C{colour}", linewidth=2.5, label=label)
    lowest = min(float(row["bits_per_dim"]) for row in rows)
    axes.set(xlabel="processor time of training, seconds", ylabel="held-out bits/dim", title=title)
    axes.set_ylim(lowest - 0.03, lowest + 0.5)  # the first steps fall from 5 to 8 bits/dim
    axes.legend(fontsize=12)
    figure.savefig(path, dpi=120)


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Add rows to a CSV; all of its rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if not file.tell():
            writer.writeheader()
        writer.writerows(rows)
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@click.command(help=__doc__)
@click.argument("data", type=click.Choice(["digits", "mnist14", "mnist"]), default="digits")
@click.option("--method", "methods", multiple=True, type=click.Choice(list(METHODS)), help="[default: all]")
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1, 2), show_default=True)
@click.option("--steps", default=200, show_default=True, help="Steps of likelihood of the first method.")
@click.option("--every", default=25, show_default=True, help="Steps between two validations.")
@click.option("--set", "assignments", multiple=True, metavar="GROUP.KEY=VALUE", help="Change the recipe.")
@click.option("--data-root", default="data", show_default=True)
@click.option("--title", help="Title of the plot. [default: the data and the steps]")
@click.option("--out", default="benchmarks/results", show_default=True, help="Folder of the CSVs and the plot.")
@threads_option
def main(data: str, out: str, assignments: tuple[str, ...], **options: Any) -> None:
    device = set_up("cpu", options["threads"])
    print_environment(device)
    torch.set_flush_denormal(True)
    recipe, folder, steps = settings(data, options["data_root"], assignments), Path(out), options["steps"]
    images: Any = (recipe.override(["data.shape=1,28,28"]) if data == "mnist14" else recipe).load_data(all_val=True)
    images = halved(images) if data == "mnist14" else images
    limit = min(100 if data == "mnist" else 300, len(images.val))
    same = {"data": data, "steps": str(steps), "settings": " ".join(assignments)}
    rows: list[Any] = []
    points: list[Any] = []
    for seed, name in itertools.product(options["seeds"], options["methods"] or METHODS):
        method = METHODS[name]
        changed = recipe.override([*method.settings, f"training.seed={seed}"])
        trainer = Trainer(changed, images, method, steps=steps, device=device, clock=time.process_time)

        def show(point: Point, name: str = name, seed: int = seed) -> None:
            text = f"{name}, seed {seed}: step {point.step}, {point.seconds:.1f} s"
            click.echo(f"{text}, {point.bits_per_dim:.4f} bits/dim")

        found, ended = trainer.run(every=options["every"], images=limit, show=show)
        own = {**same, "method": name, "seed": str(seed)}
        points = append(folder / "quality_points.csv", [{**own, **dataclasses.asdict(point)} for point in found])
        step = method.solver.step if isinstance(method.solver, FixedGrid) else None
        final = measured(trainer.trained().eval(), images.val[:limit], images.levels, rk4(step=step or 0.25))
        last = {"images": trainer.seen, "seconds": trainer.seconds, "ended": ended}
        rows = append(folder / "quality.csv", [{**own, **final, **last}])

    def with_these_settings(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        return [row for row in rows if all(row[key] == value for key, value in same.items())]

    title = options["title"] or f"{data}, {steps} steps"
    draw(folder / f"quality_{data}.png", with_these_settings(points), with_these_settings(rows), title)
    click.echo("\n" + summary(with_these_settings(rows)))


if __name__ == "__main__":
    main()
