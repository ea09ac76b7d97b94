"""figure_trajectories: the paper's figure 1, toy flows with and without the penalties in one dimension and two."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...evaluation.trajectories import (
    Measured,
    follow,
    log_density,
    measure,
    mixture,
    mixture_log_prob,
    plane_data,
    train_field,
)
from .drawing import draw

__all__ = ["TrajectoryFigure", "figure_trajectories"]

_WITHOUT, _WITH, _TRUE = "#d55e00", "#0072b2", "#808080"
_TRAIN, _TEST = 20_000, 1_000
_Paint = Callable[[Any, nn.Module, Measured, Tensor, str, str], None]
_STEPS = {1: 300, 2: 500}
"""Optimizer steps by dimension."""


@dataclass(frozen=True)
class TrajectoryFigure:
    """One figure and the numbers behind it.

    Attributes:
        data: name of the data.
        png, svg: the files.
        without, with_penalties: what was measured of the two flows on fresh samples, for each seed; the figure
            shows the first.
    """

    data: str
    png: Path
    svg: Path
    without: tuple[Measured, ...]
    with_penalties: tuple[Measured, ...]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Products this small cost more on several threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def figure_trajectories(
    out: str | os.PathLike[str] = "figures",
    *,
    data: str = "moons",
    strength: float = 0.05,
    steps: int | None = None,
    seed: int = 0,
    seeds: int = 1,
    announce: Callable[[str], object] = print,
) -> list[TrajectoryFigure]:
    """Train the flows of figure 1 and draw them: a one-dimensional mixture, and toy data in the plane.

    The two flows of a figure differ by the penalties alone: first weights and batches are the same.

    Args:
        out: folder for ``trajectories-1d`` and ``trajectories-2d``, as PNG and SVG.
        data: of the plane, one of :data:`~rnode_plugin.evaluation.trajectories.PLANE_DATA`.
        strength: lambda of both penalties.
        steps: of each training; None for 300 in one dimension and 500 in two.
        seed: of data, weights and batches.
        seeds: how many, from that one on; the figures are of the first.
        announce: called with a line before each training.

    Raises:
        ConfigError: unknown data, or a number out of range.
        CheckpointError: the figures cannot be written.
        SolverError: a flow that cannot be integrated.
    """
    if strength <= 0 or seeds < 1 or (steps is not None and steps < 1):
        raise ConfigError("a figure needs a positive strength of the penalties, a seed and a step at least.")
    plane_data(data, 2)  # an unknown name is refused before anything is trained
    lambdas = {"no penalty": {}, f"λ = {strength:g}": {"kinetic": strength, "jacfrob": strength}}
    figures = []
    for name, draw_samples, paint, grid in (
        ("mixture", mixture, _paint_line, {"size": (8.0, 5.6), "width_ratios": [1, 3, 1]}),
        (data, partial(plane_data, data), _paint_plane, {"size": (8.6, 5.6)}),
    ):
        every_seed = range(seed, seed + seeds)
        trained = [_train_flows(name, draw_samples, lambdas, steps, each, announce) for each in every_seed]
        fresh = draw_samples(_TEST, seed=seed + 1)
        stem = f"trajectories-{fresh.shape[1]}d"
        looks = zip(trained[0], lambdas, (_WITHOUT, _WITH), strict=True)
        rows = [(*flow, label, colour) for flow, label, colour in looks]
        drawing = draw(stem, partial(_paint_rows, paint=paint, rows=rows, fresh=fresh), nrows=2, ncols=3, **grid)
        drawing.save(Path(out), stem)
        without, with_penalties = (tuple(each[place][1] for each in trained) for place in (0, 1))
        files = Path(out) / f"{stem}.png", Path(out) / f"{stem}.svg"
        figures.append(TrajectoryFigure(name, *files, without, with_penalties))
    return figures


def _train_flows(
    name: str,
    draw_samples: Callable[..., Tensor],
    lambdas: Mapping[str, Mapping[str, float]],
    steps: int | None,
    seed: int,
    announce: Callable[[str], object],
) -> list[tuple[nn.Module, Measured]]:
    """A flow for each set of lambdas, and what it does to fresh samples."""
    x, test = draw_samples(_TRAIN, seed=seed), draw_samples(_TEST, seed=seed + 1)
    dims = x.shape[1]
    flows = []
    for label, strengths in lambdas.items():
        announce(f"{name}, {dims}-D, seed {seed}: training with {label}")
        field = train_field(x, lambdas=strengths, steps=steps or _STEPS[dims], seed=seed)
        flows.append((field, measure(field, test)))
    return flows


def _paint_rows(axes: Any, *, paint: _Paint, rows: list[tuple[Any, ...]], fresh: Tensor) -> None:
    """One flow in each row of axes."""
    for row, (field, found, label, colour) in zip(axes, rows, strict=True):
        paint(row, field, found, fresh, label, colour)


def _caption(label: str, found: Measured) -> str:
    return (
        f"{label}: path / displacement {found.straightness:.2f}, speed variation {found.speed_variation:.2f}, "
        f"NFE {found.nfe}"
    )


def _paint_line(axes: Any, field: nn.Module, found: Measured, fresh: Tensor, label: str, colour: str) -> None:
    """Density of the data, trajectories over the vector field, density of what arrives."""
    left, middle, right = axes
    grid = torch.linspace(-3.2, 3.2, 321)[:, None]
    places = grid[:, 0].numpy()
    left.plot(mixture_log_prob(grid).exp().numpy(), places, color=_TRUE, linewidth=4, alpha=0.5, label="data")
    left.plot(log_density(field, grid).exp().numpy(), places, color=colour, linewidth=1.4, label="model")
    left.invert_xaxis()
    left.set_ylabel("x")
    left.set_xlabel("density at t = 0")
    left.legend(loc="lower left", handlelength=1.2, fontsize=8)
    path = follow(field, fresh).numpy()
    times = np.linspace(0, 1, len(path))
    order = path[0, :, 0].argsort()[:: len(fresh) // 25]
    _arrows(middle, field)
    middle.plot(times, path[:, order, 0], color=colour, linewidth=1.1)
    middle.set_xlim(0, 1)
    middle.set_xlabel("time t")
    middle.set_title(_caption(label, found), fontsize=9)
    right.hist(path[-1, :, 0], bins=40, range=(-3.2, 3.2), density=True, orientation="horizontal",
               color=colour, alpha=0.45, label="arrived")  # fmt: skip
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(grid[:, 0]).exp().numpy()
    right.plot(normal, places, color=_TRUE, linewidth=2, label="N(0, 1)")
    right.set_xlabel("density at t = 1")
    right.legend(loc="lower right", handlelength=1.2, fontsize=8)
    for each in axes:
        each.set_ylim(-3.2, 3.2)


@torch.no_grad()
def _arrows(axes: Any, field: nn.Module) -> None:
    """The directions (1, f) of the field over time and place."""
    times, places = torch.linspace(0, 0.96, 17), torch.linspace(-3, 3, 17)[:, None]
    speed = torch.stack([field(t, places)[:, 0] for t in times], 1)
    norm = (1 + speed.square()).sqrt()  # all arrows of one length; "xy" turns them as the axes show the field
    arrows = (times, places[:, 0], 1 / norm, speed / norm)
    axes.quiver(*(each.numpy() for each in arrows), angles="xy", color=_TRUE, alpha=0.5, width=0.0028, scale=32,
                headwidth=4)  # fmt: skip


def _paint_plane(axes: Any, field: nn.Module, found: Measured, fresh: Tensor, label: str, colour: str) -> None:
    """Density of the model, trajectories, vector field half way."""
    density, paths, arrows = axes
    line = torch.linspace(-2.6, 2.6, 80)
    grid = torch.cartesian_prod(line, line)
    values = log_density(field, grid).exp().reshape(80, 80).numpy()
    density.imshow(values.T, extent=(-2.6, 2.6, -2.6, 2.6), origin="lower", cmap="Greys", aspect="equal")
    density.set_title(f"{label}: density, {found.nll:.3f} nats/dim", fontsize=9)
    path = follow(field, fresh).numpy()
    some = path[:, :60]
    paths.plot(some[:, :, 0], some[:, :, 1], color=colour, linewidth=0.8, alpha=0.8)
    paths.scatter(some[0, :, 0], some[0, :, 1], s=9, color=_TRUE, zorder=3, label="t = 0")
    paths.scatter(some[-1, :, 0], some[-1, :, 1], s=9, color=colour, zorder=3, label="t = 1")
    paths.legend(loc="upper right", handletextpad=0.1, fontsize=8)
    straight = f"path / displacement {found.straightness:.2f}"
    paths.set_title(f"{straight}\nspeed variation {found.speed_variation:.2f}, NFE {found.nfe}", fontsize=9)
    points = torch.cartesian_prod(torch.linspace(-2.4, 2.4, 15), torch.linspace(-2.4, 2.4, 15))
    with torch.no_grad():
        velocity = field(torch.tensor(0.5), points).numpy()
    arrows.quiver(*points.T.numpy(), velocity[:, 0], velocity[:, 1], color=colour, width=0.006)
    arrows.set_title("vector field at t = 0.5", fontsize=9)
    for each in axes:
        each.set_xlim(-2.6, 2.6)
        each.set_ylim(-2.6, 2.6)
        each.set_aspect("equal")
        each.set_xlabel("z₁")
    density.set_ylabel("z₂")
