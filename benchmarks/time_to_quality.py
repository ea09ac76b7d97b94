"""Validation bits/dim against seconds of training, for vanilla FFJORD, the usual RNODE formulation and our paths.

    python benchmarks/time_to_quality.py digits --seconds 600
    python benchmarks/time_to_quality.py mnist --halve --cosine --processor-time --threads 1 --seconds 300

All methods start from the same weights and see the same images with the same noise at the same step. Only
training steps are on the clock; every validation uses the recipe's dopri5 at 1e-5. `fast recipe` takes optimizer
and start from the data set's fast recipe, without its flow matching, all others Adam. Writes a CSV and a plot. With
--method, the other methods keep what an earlier call wrote for them: compare them only if both had the machine
alike.
"""

from __future__ import annotations

import csv
import dataclasses
import time
from pathlib import Path

import click
import numpy as np
from measure import device_option, print_environment, set_up, table, threads_option
from training_runs import ADAM, METHODS, Point, Run, Trainer

from rnode_plugin import get_recipe
from rnode_plugin.core.ops import flush_denormals
from rnode_plugin.data import ImageData
from rnode_plugin.evaluation.loading import load_images

VANILLA = "vanilla FFJORD"


def seconds_to(run: Run, bits: float) -> float | None:
    """Training time to reach ``bits``, interpolated between two validations; None if it never did."""
    for before, after in zip(run.points, run.points[1:], strict=False):
        if after.bits_per_dim <= bits < before.bits_per_dim:
            part = (before.bits_per_dim - bits) / (before.bits_per_dim - after.bits_per_dim)
            return before.seconds + part * (after.seconds - before.seconds)
    return None


def read_csv(path: Path) -> dict[str, Run]:
    """What :func:`write_csv` wrote; nothing where it has not yet."""
    runs: dict[str, Run] = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                point = Point(int(row["step"]), float(row["seconds"]), float(row["bits_per_dim"]))
                runs.setdefault(row["method"], Run([], "earlier call")).points.append(point)
    return runs


def write_csv(path: Path, runs: dict[str, Run]) -> None:
    """One row a validation."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "step", "seconds", "bits_per_dim"])
        for name, run in runs.items():
            writer.writerows([name, p.step, f"{p.seconds:.3f}", f"{p.bits_per_dim:.5f}"] for p in run.points)


def draw(path: Path, runs: dict[str, Run], title: str) -> None:
    """Bits/dim against seconds on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.style.use("rnode_plugin.plots")
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, run in runs.items():
        axes.plot([p.seconds for p in run.points[1:]], [p.bits_per_dim for p in run.points[1:]], ".-", label=name)
    axes.set(xscale="log", xlabel="seconds of training", ylabel="validation bits/dim", title=title)
    axes.legend()
    figure.savefig(path, dpi=120)


def summary(runs: dict[str, Run]) -> str:
    """Where each run ended, and its time to the bits/dim that vanilla FFJORD (else the first run) ends with."""
    goal = runs.get(VANILLA) or next(iter(runs.values()))
    bits = goal.points[-1].bits_per_dim
    slowest = seconds_to(goal, bits) or goal.points[-1].seconds
    rows = []
    for name, run in runs.items():
        last, reached = run.points[-1], seconds_to(run, bits)
        per_step = f"{last.seconds / last.step:.3g} s" if last.step else ""
        times = ["not reached", ""] if reached is None else [f"{reached:.0f} s", f"{slowest / reached:.1f}x"]
        rows.append(
            [name, last.step, per_step, f"{last.seconds:.0f} s", f"{last.bits_per_dim:.4f}", *times, run.ended]
        )
    header = ["method", "steps", "a step", "trained", "bits/dim", f"time to {bits:.4f}", "faster", "ended"]
    return table(header, rows)


def halved(data: ImageData) -> ImageData:
    """Images whose pixels are the means of 2x2 pixels, rounded."""

    def pooled(images: np.ndarray) -> np.ndarray:
        n, channels, height, width = images.shape
        blocks = images.reshape(n, channels, height // 2, 2, width // 2, 2)
        return blocks.mean((3, 5)).round().astype(np.uint8)

    channels, height, width = data.shape
    shape = (channels, height // 2, width // 2)
    return dataclasses.replace(data, train=pooled(data.train[:]), val=pooled(data.val[:]), shape=shape)


@click.command(help=__doc__)
@click.argument("recipe", type=click.Choice(["digits", "mnist", "cifar10"]), default="digits")
@click.option("--method", "methods", multiple=True, type=click.Choice(list(METHODS)), help="[default: all]")
@click.option("--seconds", default=600.0, show_default=True, help="Training time of each method.")
@click.option("--steps", default=100_000, show_default=True, help="Most steps of each method.")
@click.option("--every", default=10, show_default=True, help="Steps between two validations.")
@click.option("--val-images", default=297, show_default=True, help="Held-out images of a validation.")
@click.option("--set", "assignments", multiple=True, metavar="GROUP.KEY=VALUE", help="Change the recipe.")
@click.option("--out", default="benchmarks/results", show_default=True, help="Folder of the CSV and the plot.")
@click.option("--halve", is_flag=True, help="Images of half the width and height: means of 2x2 pixels.")
@click.option("--cosine", is_flag=True, help="Let the learning rates fall to zero at the end of the time.")
@click.option("--processor-time", is_flag=True, help="Count processor time: others may use the machine too.")
@device_option
@threads_option
def main(
    recipe: str, methods: tuple[str, ...], seconds: float, steps: int, every: int, val_images: int,
    assignments: tuple[str, ...], out: str, halve: bool, cosine: bool, processor_time: bool, device: str,
    threads: int,
) -> None:  # fmt: skip
    where = set_up(device, threads)
    print_environment(where)
    # methods stop at different steps: a rate that ends in zero has to follow the clock
    schedule = f"optimizer.schedule={'cosine' if cosine else 'constant'}"
    of_adam = ADAM if recipe == "digits" else []
    settings = get_recipe(recipe).override([schedule, *of_adam, *assignments])
    data = load_images(settings)
    if halve:
        data = halved(data)
        settings = settings.override([f"data.shape={','.join(map(str, data.shape))}"])
    flush_denormals()
    results = Path(out) / f"time_to_quality_{recipe}{'_halved' if halve else ''}.csv"
    earlier = read_csv(results) if methods else {}
    runs: dict[str, Run] = {name: earlier[name] for name in METHODS if name in earlier}
    for name in methods or METHODS:

        def show(point: Point, loss: float, name: str = name) -> None:
            click.echo(
                f"{name:>24}  step {point.step:>5}  {point.seconds:8.1f} s  bits/dim {point.bits_per_dim:.4f}"
            )

        clock = time.process_time if processor_time else time.perf_counter
        trainer = Trainer(settings, data, METHODS[name], steps=steps, device=where, seconds=seconds, clock=clock)
        limit = min(val_images, len(data.val))
        runs[name] = trainer.run(steps=steps, seconds=seconds, every=every, images=limit, show=show)
    results.parent.mkdir(parents=True, exist_ok=True)
    write_csv(results, runs)
    draw(results.with_suffix(".png"), runs, f"{recipe}, batch {settings.data.batch_size}, {where}")
    click.echo("\n" + summary(runs))


if __name__ == "__main__":
    main()
