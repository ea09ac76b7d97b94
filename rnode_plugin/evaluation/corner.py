"""A corner plot: the distribution of each column and of each pair of columns, held-out rows beside samples."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_atomically

__all__ = ["save_corner"]

_MOST = 8  # columns: more panels than that show nothing
_DATA, _SAMPLES = "#24292f", "#0072b2"
_BINS = 10, 40  # fewest and most
_INSIDE = 0.5, 99.5  # percentiles of the data that a panel shows, and a margin around them
_DPI = 110


def save_corner(
    path: str | os.PathLike[str], columns: Sequence[str], data: np.ndarray, samples: np.ndarray
) -> None:
    """Write one PNG.

    Args:
        path: of the PNG; written atomically.
        columns: their names; of more than 8 the first 8 are shown.
        data, samples: rows ``(N, len(columns))`` of both.

    Raises:
        CheckpointError: the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = min(len(columns), _MOST)
    side = max(3.5, 1.45 * shown + 0.6)
    with rc_context({"font.size": 8, "axes.linewidth": 0.6, "font.family": "sans-serif"}):
        figure = Figure(figsize=(side, side), layout="constrained")
        FigureCanvasAgg(figure)
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
        encoded = io.BytesIO()
        figure.savefig(encoded, format="png", dpi=_DPI)
    write_atomically(Path(path), lambda file: file.write(encoded.getvalue()))


def _range(data: np.ndarray, samples: np.ndarray) -> tuple[float, float]:
    """What a panel shows: nearly all of the data; a few samples far out would squeeze everything else."""
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
    """A name as matplotlib shows it to the letter, cut if it is long."""
    name = name if len(name) <= 22 else f"{name[:21]}…"
    return name.replace("$", r"\$")
