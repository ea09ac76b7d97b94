"""Which penalty, and how strong: densities in the plane, several penalties, three strengths of each.

    python benchmarks/penalties_2d.py --figure penalties-2d.png

Trains ``RegularizedCNF`` on torchdyn's moons, spirals and Gaussians: the same weights, points and batches for every
penalty of a data set, four steps of the 3/8 rule, exact traces. Then held-out points pass through ``dopri5`` at
1e-5. The table has one row for each penalty and strength: evaluations (NFE), the loss in likelihood against no
penalty, with its standard error over the points, and the bend, the length
of all paths divided by the distance of their ends. Each data set has its own process.
"""

from __future__ import annotations

import math
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from measure import print_environment, set_up, table, threads_option
from torch import Tensor

from rnode_plugin import RegularizedCNF
from rnode_plugin.experiments.reports.configurations import GRAY
from rnode_plugin.experiments.reports.figures import draw, legend

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from figure_1 import TimeField, plane_data  # pyright: ignore[reportMissingImports]

DATA = ("moons", "spirals", "gaussians")
PENALTIES = ("kinetic", "jacfrob", "kinetic+jacfrob", "total_derivative", "straightness", "strain+curl")
STRENGTHS = (0.01, 0.1, 1.0)
SHARES = {"curl": 0.1}  # of the strength: strain harms a solver more than vorticity (Tao and Choi, 2026)
SIZES = (3, 5, 8)  # of a mark, for the strengths
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#24292f")


Case = tuple[str, float | None]  # penalties and their strength; "none" has none


@dataclass(frozen=True)
class Found:
    """What held-out points show of a trained density.

    Attributes:
        nll: negative log-likelihood of each point in nats, ``(N,)``.
        nfe: evaluations of dopri5.
        bend: length of all paths divided by the distance of all their ends.
    """

    nll: Tensor
    nfe: int
    bend: float


def train(data: Tensor, regularizers: dict[str, float], *, steps: int, seed: int, **shape: Any) -> TimeField:
    """A field fitted by equation 17, with options of ``TimeField``."""
    torch.manual_seed(seed)
    field = TimeField(2, **shape)
    model = RegularizedCNF(
        field, event_shape=2, trace_estimator="exact", regularizers=regularizers, solver="rk4_38",
        t_span=torch.linspace(0, 1, 5),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = data[torch.randint(len(data), (256,), generator=batches)]
        loss = -model.log_prob(x).mean() / model.dims + model.reg_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return field


@torch.no_grad()
def measure(field: TimeField, points: Tensor) -> Found:
    """The field as a density with the exact trace and an adaptive solver."""
    model = RegularizedCNF(field, event_shape=2, trace_estimator="exact", regularizers=(), solver="dopri5")
    found = model.encode(points)
    path = model.trajectory(points, torch.linspace(0, 1, 65))
    length, distance = path.diff(dim=0).norm(dim=2).sum(), (path[-1] - path[0]).norm(dim=1).sum()
    return Found(-model.log_prob_of(found), found.nfe, float(length / distance))


def all_cases(data: str, *, cases: Sequence[Case], steps: int, seed: int, threads: int) -> dict[Case, Found]:
    """Train and measure every case on one data set."""
    torch.set_num_threads(threads)
    given, held_out = plane_data(data, 4000, seed=seed), plane_data(data, 1000, seed=seed + 1)
    found = {}
    for name, strength in cases:
        regularizers = {}
        if strength is not None:
            regularizers = {part: SHARES.get(part, 1.0) * strength for part in name.split("+")}
        found[name, strength] = measure(train(given, regularizers, steps=steps, seed=seed), held_out)
        click.echo(f"{data}: {name} {'' if strength is None else strength}", err=True)
    return found


def row(name: str, strength: float | None, found: dict[str, Found], base: dict[str, Found]) -> list[object]:
    """A row of the table: for each data set NFE, difference in nats/dim with its error, and bend."""
    cells: list[object] = [name, "" if strength is None else f"{strength:g}"]
    for data, each in found.items():
        change = (each.nll - base[data].nll) / 2
        mean, error = float(change.mean()), float(change.std()) / math.sqrt(len(change))
        loss = f"{float(each.nll.mean()) / 2:.3f}" if strength is None else f"{mean:+.3f} ± {error:.3f}"
        cells += [each.nfe, loss, f"{each.bend:.2f}"]
    return cells


def paint(panels: Any, found: dict[Case, dict[str, Found]]) -> None:
    """Likelihood against NFE, a panel for each data set and a line for each penalty, over its strengths."""
    for axes, data in zip(panels, DATA, strict=True):
        base = found["none", None][data]
        axes.axhline(0, color="#808080", linewidth=0.6)
        axes.plot(base.nfe, 0, marker="o", color=GRAY, linestyle="none", label="none")
        for color, name in zip(_COLORS, dict.fromkeys(n for n, s in found if s is not None), strict=False):
            points = [each[data] for (n, _), each in found.items() if n == name]
            losses = [float((each.nll - base.nll).mean()) / 2 for each in points]
            axes.plot([each.nfe for each in points], losses, color=color, linewidth=0.8, label=name)
            for each, loss, size in zip(points, losses, SIZES, strict=False):
                axes.plot(each.nfe, loss, marker="o", markersize=size, color=color, linestyle="none")
        axes.set(title=data, xlabel="NFE of dopri5 [evaluations]")
    for strength, size in zip(dict.fromkeys(s for _, s in found if s is not None), SIZES, strict=False):
        panels[-1].plot([], [], "o", markersize=size, color=GRAY, label=f"λ = {strength:g}")
    panels[0].set_ylabel("likelihood lost [nats/dim]")
    legend(panels[-1])


@click.command(help=__doc__)
@click.option("--name", "names", multiple=True, help="Penalties, joined by + into a set. [default: six]")
@click.option("--strength", "strengths", multiple=True, type=float, help="λ. [default: 0.01, 0.1 and 1]")
@click.option("--steps", default=200, show_default=True, help="Steps of Adam.")
@click.option("--seed", default=0, show_default=True, help="Of weights, points and batches.")
@click.option("--figure", type=click.Path(dir_okay=False, path_type=Path), help="A PNG of it.")
@threads_option
def main(
    names: tuple[str, ...],
    strengths: tuple[float, ...],
    steps: int,
    seed: int,
    figure: Path | None,
    threads: int,
) -> None:
    print_environment(set_up("cpu", threads))
    cases: list[Case] = [("none", None)]
    cases += [(name, strength) for name in names or PENALTIES for strength in strengths or STRENGTHS]
    options = {"cases": cases, "steps": steps, "seed": seed, "threads": threads}
    with ProcessPoolExecutor(len(DATA), mp_context=multiprocessing.get_context("spawn")) as pool:
        of_data = dict(zip(DATA, pool.map(partial(all_cases, **options), DATA), strict=True))
    found = {case: {data: each[case] for data, each in of_data.items()} for case in cases}
    heads = [cell for data in DATA for cell in (f"{data}: NFE", "lost [nats/dim]", "bend")]
    base = found["none", None]
    click.echo(table(["penalty", "λ", *heads], [row(*case, found[case], base) for case in cases]))
    if figure is not None:
        files = draw(
            "penalties-2d",
            lambda figure: paint(figure.subplots(ncols=len(DATA), sharey=True), found),
            size=(10, 3.6),
        )
        figure.write_bytes(files["penalties-2d.png"])


if __name__ == "__main__":
    main()
