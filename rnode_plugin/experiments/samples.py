"""Draws samples of a flow and their pictures, images in a grid and rows of a table in a corner plot."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from ..analysis.random_streams import Stream, seeded
from ..files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..core.distribution import DensityModel

_SHOWN = 64  # pixels. Smaller images are enlarged by a whole factor


def sample_images(
    flow: DensityModel,
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
        seed: the seed of the latents.
        batch_size: images per solve.

    Returns:
        Images ``(count, C, H, W)`` in [0, 1] on the CPU, by temperature.

    Raises:
        ConfigError: a temperature is not positive.
        SolverError: the integration failed.
    """
    return {each: _draw(flow, count, each, seed, batch_size) for each in temperatures}


@torch.no_grad()
def _draw(
    flow: DensityModel, count: int, temperature: float, seed: int, batch_size: int, context: Tensor | None = None
) -> Tensor:
    """Draw samples ``(count, *event_shape)`` in batches, and collect them on the CPU."""
    contexts = itertools.repeat(None) if context is None else context.split(batch_size)
    parts = []
    # the seed and the number of its first sample decide the latents of a batch. So every temperature scales the
    # same latents, and a larger count only appends batches
    for first, given in zip(range(0, count, batch_size), contexts, strict=False):
        with seeded(seed, Stream.SAMPLE, first):
            size = min(batch_size, count - first)
            parts.append(flow.sample(size, context=given, temperature=temperature).cpu())
    return torch.cat(parts)


def save_grid(
    path: str | os.PathLike[str], samples: Mapping[float, Tensor], *, levels: int = 256, columns: int | None = None
) -> None:
    """Write images into one PNG, with a block of rows for each temperature, in the order of ``samples``.

    Args:
        path: the PNG, which is written whole or not at all.
        samples: images ``(N, C, H, W)`` in [0, 1] by temperature, as :func:`sample_images` returns them.
        levels: number of gray levels in the data. A sample is shown as the level of its bin.
        columns: images in a row. None gives about square blocks, or one row each if there are several blocks.

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
        # bins are half-open, so 1.0 itself would be one level above the last
        shown = (images * levels).floor().clamp(0, levels - 1) / (levels - 1)
        shown = shown.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        blocks.append(make_grid(shown, nrow=columns, padding=2, pad_value=0.5))
    write_atomically(path, lambda file: save_image(torch.cat(blocks, 1), file, format="png"))


def sample_rows(
    flow: DensityModel,
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
        ConfigError: the context does not fit, or the temperature is not positive.
        SolverError: the integration failed.
    """
    given = None if context is None else torch.from_numpy(context).to(next(flow.parameters()).device)
    return _draw(flow, count, temperature, seed, batch_size, given).numpy()


_MOST = 8  # columns in a figure, beyond which its panels are too small to read
_DATA, _SAMPLES = "C1", "C0"  # colors of the style sheet
_INSIDE = 0.5, 99.5  # a panel shows the data between these percentiles, and a margin


def save_corner(
    path: str | os.PathLike[str], columns: Sequence[str], data: np.ndarray, samples: np.ndarray
) -> None:
    """Write a corner plot as one PNG, with histograms of the first 8 columns and points for each pair of them.

    ``data`` and ``samples`` are rows ``(N, len(columns))``.

    Raises:
        CheckpointError: the file cannot be written.
    """
    from matplotlib import rc_context, style
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    shown = min(len(columns), _MOST)
    names = [name.replace("$", r"\$") for name in columns]  # between dollars matplotlib reads mathematics
    ranges = [_range(data[:, k], samples[:, k]) for k in range(shown)]
    side = max(3.5, 1.45 * shown + 0.6)
    small = rc_context({"font.size": 8, "axes.labelsize": 8, "axes.linewidth": 0.6, "axes.grid": False})
    with style.context("rnode_plugin.plots"), small:
        figure = Figure(figsize=(side, side), layout="constrained")
        grid = figure.subplots(shown, shown, squeeze=False, sharex="col")
        for row, column in np.ndindex(shown, shown):
            axes = cast("Axes", grid[row, column])
            low, high = ranges[column]
            if column > row:
                axes.set_axis_off()
                continue
            if column == row:
                bins = np.linspace(low, high, min(40, max(10, round(1.5 * len(data) ** 0.5)))).tolist()
                axes.hist(samples[:, row], bins, density=True, color=_SAMPLES, alpha=0.35)
                axes.hist(data[:, row], bins, density=True, color=_DATA, histtype="step", linewidth=1)
                axes.set_yticks([])
            else:
                for points, color, alpha in ((samples, _SAMPLES, 0.35), (data, _DATA, 0.8)):
                    axes.plot(points[:, column], points[:, row], ".", color=color, alpha=alpha, markersize=2.7,
                              markeredgewidth=0, rasterized=True)  # fmt: skip
                axes.set_ylim(*ranges[row])
                axes.yaxis.set_major_locator(MaxNLocator(3))
                axes.set_ylabel(names[row] if column == 0 else "")
                axes.tick_params(labelleft=column == 0)
            axes.set_xlim(low, high)
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.set_xlabel(names[column] if row == shown - 1 else "")
        counts = (_DATA, f"{len(data):,} held-out rows"), (_SAMPLES, f"{len(samples):,} samples")
        handles = [figure.axes[0].plot([], [], color=color, label=label)[0] for color, label in counts]
        title = f"the first {shown} of {len(columns)} columns" if shown < len(columns) else None
        corner = "upper right" if shown > 1 else "outside upper center"
        figure.legend(handles=handles, loc=corner, frameon=False, fontsize=9, title=title)
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))


def _range(data: np.ndarray, samples: np.ndarray) -> tuple[float, float]:
    """Choose the limits of a panel. They leave out a few distant points, which would squeeze the others."""
    low, high = np.percentile(data, _INSIDE)
    # the bulk of the samples is shown even if it lies elsewhere, because that is what such a plot is to reveal
    inner = np.percentile(samples, (5, 95))
    low, high = min(low, inner[0]), max(high, inner[1])
    margin = 0.08 * (high - low) or 1.0
    return float(low - margin), float(high + margin)
