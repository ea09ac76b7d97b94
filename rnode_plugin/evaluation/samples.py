"""Samples of a flow and their pictures: images in a grid, rows of a table in a corner plot."""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..core.random_streams import Stream, seeded
from ..data.table_files import check_written, read_columns, write_rows
from ..errors import ConfigError, suggest
from ..files import write_atomically
from ..recipes.task import ImageTask, TableTask, Task

if TYPE_CHECKING:
    from ..flows.base import BlockFlow
    from ..flows.table import TableFlow
    from ..recipes.recipe import TableData
    from ..recipes.settings import Training

_SHOWN = 64  # pixels: smaller images are enlarged by a whole factor


@functools.singledispatch
def save_samples(task: Task, flow: Any, data: Any, training: Training, path: Path) -> None:
    """Draw samples of a flow of a task into one PNG, by the settings of a training.

    Raises:
        SolverError: a latent cannot be integrated.
        CheckpointError: the file cannot be written.
    """
    raise NotImplementedError(type(task))


@save_samples.register
def _(task: ImageTask, flow: Any, data: Any, training: Any, path: Path) -> None:
    """A grid: one row of images for each temperature, from the same latents."""
    count = training.sample_images
    drawn = sample_images(flow, count, temperatures=training.sample_temperatures, seed=training.seed)
    save_grid(path, drawn, levels=task.levels, columns=count)


@save_samples.register
def _(task: TableTask, flow: Any, data: Any, training: Any, path: Path) -> None:
    """A corner plot: the held-out rows and samples, for a conditional density at the same contexts."""
    held_out = data.held_out[: training.sample_images]
    (temperature,) = training.sample_temperatures
    context = task.context(held_out)
    count = training.sample_images if context is None else len(held_out)
    drawn = sample_rows(flow, count, context=context, temperature=temperature, seed=training.seed)
    save_corner(path, task.columns[0], held_out[:, : task.dims], drawn)


def sample_images(
    flow: BlockFlow,
    count: int,
    *,
    temperatures: Sequence[float] = (1.0,),
    seed: int = 0,
    batch_size: int = 256,
) -> dict[float, Tensor]:
    """Draw images from the same latents scaled by each temperature.

    Args:
        flow: the model.
        count: images per temperature.
        temperatures: standard deviations of the latent.
        seed: of the latents.
        batch_size: images per solve.

    Returns:
        ``(count, C, H, W)`` in [0, 1] on the CPU, by temperature.

    Raises:
        ConfigError: for a temperature that is not positive.
        SolverError: if the integration fails.
    """
    return {each: _drawn(flow, count, each, seed, batch_size) for each in temperatures}


@torch.no_grad()
def _drawn(
    flow: BlockFlow, count: int, temperature: float, seed: int, batch_size: int, context: Tensor | None = None
) -> Tensor:
    """``(count, *event_shape)`` on the CPU; the latents of a batch are a function of the seed and its place."""
    contexts = itertools.repeat(None) if context is None else context.split(batch_size)
    parts = []
    for first, given in zip(range(0, count, batch_size), contexts, strict=False):
        with seeded(seed, Stream.SAMPLE, first):
            size = min(batch_size, count - first)
            parts.append(flow.sample(size, context=given, temperature=temperature).cpu())
    return torch.cat(parts)


def save_grid(
    path: str | os.PathLike[str], samples: Mapping[float, Tensor], *, levels: int = 256, columns: int | None = None
) -> None:
    """Write one PNG: a block of rows for each temperature, in the order of ``samples``.

    Args:
        path: of the PNG; written atomically.
        samples: images ``(N, C, H, W)`` in [0, 1] by temperature, as :func:`sample_images` returns them.
        levels: number of grey levels of the data; a sample is shown as the level of its bin.
        columns: images in a row; None makes the blocks about square, or one row each if there are several.

    Raises:
        CheckpointError: the file cannot be written.
    """
    from torchvision.utils import make_grid, save_image

    count, _, height, _ = next(iter(samples.values())).shape
    if columns is None:
        columns = count if len(samples) > 1 and count <= 20 else math.ceil(math.sqrt(count))
    scale = max(1, _SHOWN // height)
    blocks = []
    for images in samples.values():
        shown = (images * levels).floor().clamp(0, levels - 1) / (levels - 1)
        shown = shown.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        blocks.append(make_grid(shown, nrow=columns, padding=2, pad_value=0.5))
    write_atomically(path, lambda file: save_image(torch.cat(blocks, 1), file, format="png"))


def sample_rows(
    flow: TableFlow,
    count: int,
    *,
    context: np.ndarray | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 10_000,
) -> np.ndarray:
    """Draw rows ``(count, columns)`` in the unit of the data, on the CPU; see :func:`sample_images`.

    A conditional density takes a ``context (count, C)``, one for each row.

    Raises:
        ConfigError: for a context that does not fit, or a temperature that is not positive.
        SolverError: if the integration fails.
    """
    given = None if context is None else torch.from_numpy(context).to(next(flow.parameters()).device)
    return _drawn(flow, count, temperature, seed, batch_size, given).numpy()


def sample_table(
    flow: Any,
    data: TableData,
    path: str | os.PathLike[str],
    count: int | None = None,
    *,
    given: Mapping[str, float] | str | None = None,
    **options: Any,
) -> int:
    """Draw rows of a table into a file, the given columns included, and return their number.

    Args:
        flow: the model.
        data: the columns of the table.
        path: the file to write.
        count: number of rows, by default 1000; for a ``given`` file the rows of each context, by default 1.
        given: the context of a conditional density, as values of the given columns or as a file that has them.
        options: further arguments of :func:`sample_rows`.

    Raises:
        ConfigError: for columns that are missing or that the density is not given, and a file of another kind.
    """
    check_written(path)
    if isinstance(given, str) and data.given:
        context = np.repeat(read_columns(given, data.given).astype(np.float32), count or 1, axis=0)
    else:
        values = given if isinstance(given, Mapping) else {}
        if unknown := [name for name in values if name not in data.given]:
            raise ConfigError(suggest(unknown[0], data.given, "given column"))
        if not data.given and given is not None:
            raise ConfigError("this density is given no columns, so it takes no context.")
        if missing := [name for name in data.given if not math.isfinite(values.get(name, math.nan))]:
            example = ",".join(f"{name}=VALUE" for name in data.given)
            raise ConfigError(
                f"this density is given {', '.join(data.given)}, and {missing[0]} has no value. Name the values "
                f"with --given-values {example!r}, or a file that has these columns with --given-file FILE."
            )
        row = np.array([[values[name] for name in data.given]], dtype=np.float32)
        context = np.repeat(row, count or 1000, axis=0)
    rows = sample_rows(flow, len(context), context=context if data.given else None, **options)
    places = [(*data.modelled, *data.given).index(name) for name in data.columns]
    write_rows(path, data.columns, np.concatenate([rows, context], axis=1)[:, places])
    return len(rows)


_MOST = 8  # columns
_DATA, _SAMPLES = "C1", "C0"  # of the style sheet
_BINS = 10, 40  # fewest and most
_INSIDE = 0.5, 99.5  # percentiles of the data that a panel shows, and a margin around them
_DPI = 110


def save_corner(
    path: str | os.PathLike[str], columns: Sequence[str], data: np.ndarray, samples: np.ndarray
) -> None:
    """Write one PNG: histograms of each of the first 8 columns, and points of each pair of them.

    ``data`` and ``samples`` are rows ``(N, len(columns))``.

    Raises:
        CheckpointError: the file cannot be written.
    """
    from matplotlib import rc_context, style
    from matplotlib.figure import Figure

    shown = min(len(columns), _MOST)
    side = max(3.5, 1.45 * shown + 0.6)
    look: dict[Any, Any] = {"font.size": 8, "axes.labelsize": 8, "axes.linewidth": 0.6, "axes.grid": False}
    with style.context("rnode_plugin.plots"), rc_context(look):
        figure = Figure(figsize=(side, side), layout="constrained")
        grid = figure.subplots(shown, shown, squeeze=False)
        ranges = [_range(data[:, k], samples[:, k]) for k in range(shown)]
        for row in range(shown):
            for column in range(shown):
                axes = grid[row, column]
                if column > row:
                    axes.set_axis_off()
                elif column == row:
                    _paint_one(axes, data[:, row], samples[:, row], ranges[row])
                else:
                    _paint_pair(axes, data[:, [column, row]], samples[:, [column, row]])
                    axes.set_ylim(*ranges[row])
                _label(axes, columns, row, column, shown)
                axes.set_xlim(*ranges[column])
        rest = f" (the first {shown} of {len(columns)} columns)" if shown < len(columns) else ""
        handles = [
            figure.axes[0].plot([], [], color=colour, label=label)[0]
            for colour, label in ((_DATA, f"{len(data):,} held-out rows"), (_SAMPLES, f"{len(samples):,} samples"))
        ]
        place = "upper right" if shown > 1 else "outside upper center"
        figure.legend(handles=handles, loc=place, frameon=False, fontsize=9, title=rest.strip(" ()") or None)
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=_DPI))


def _range(data: np.ndarray, samples: np.ndarray) -> tuple[float, float]:
    """The limits of a panel: nearly all of the data; a few distant samples would squeeze the rest."""
    low, high = np.percentile(data, _INSIDE)
    inner = np.percentile(samples, (5, 95))
    low, high = min(low, inner[0]), max(high, inner[1])
    margin = 0.08 * (high - low) or 1.0
    return float(low - margin), float(high + margin)


def _paint_one(axes: Any, data: np.ndarray, samples: np.ndarray, limits: tuple[float, float]) -> None:
    bins = np.linspace(*limits, int(np.clip(1.5 * len(data) ** 0.5, *_BINS)) + 1).tolist()
    axes.hist(samples, bins, density=True, color=_SAMPLES, alpha=0.35)
    axes.hist(data, bins, density=True, color=_DATA, histtype="step", linewidth=1)


def _paint_pair(axes: Any, data: np.ndarray, samples: np.ndarray) -> None:
    axes.plot(*samples.T, ".", color=_SAMPLES, markersize=2.4, alpha=0.35, markeredgewidth=0, rasterized=True)
    axes.plot(*data.T, ".", color=_DATA, markersize=3, alpha=0.8, markeredgewidth=0, rasterized=True)


def _label(axes: Any, columns: Sequence[str], row: int, column: int, shown: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.tick_params(length=2)
    if row == shown - 1:
        axes.set_xlabel(_plain(columns[column]))
        axes.tick_params(axis="x", rotation=45)
    else:
        axes.set_xticklabels([])
    if column == row:
        axes.set_yticks([])
    elif column == 0:
        axes.set_ylabel(_plain(columns[row]))
    else:
        axes.set_yticklabels([])


def _plain(name: str) -> str:
    """A name for matplotlib, without mathematics, cut if it is long."""
    name = name if len(name) <= 22 else f"{name[:21]}…"
    return name.replace("$", r"\$")
