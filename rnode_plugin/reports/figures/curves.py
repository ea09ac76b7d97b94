"""Curves of noisy values: a rolling mean with the band around it, and several seeds on one axis of time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Rolling", "common_time", "rolling"]

Vector = NDArray[np.float64]


class Rolling(NamedTuple):
    """A smoothed curve: places, the mean around each, and the two ends of the band."""

    x: Vector
    mean: Vector
    low: Vector
    high: Vector


def rolling(x: Vector, y: Vector, *, window: float, band: float = 0.9, points: int = 300) -> Rolling:
    """Mean and central ``band`` of the values of ``y`` whose ``x`` is within half a window.

    Args:
        x: places ``(N,)``, in any order; several curves may be given as one.
        y: values ``(N,)``; those that are not finite are left out.
        window: width in the unit of ``x``.
        band: share of the values between ``low`` and ``high``.
        points: places at which the curve is evaluated, evenly spread.
    """
    keep = np.isfinite(x) & np.isfinite(y)
    order = np.argsort(x[keep], kind="stable")
    x, y = x[keep][order], y[keep][order]
    if not len(x):
        empty = np.array([])
        return Rolling(empty, empty, empty, empty)
    places = np.linspace(x[0], x[-1], points) if len(x) > 1 else x
    first = np.searchsorted(x, places - window / 2, side="left")
    last = np.searchsorted(x, places + window / 2, side="right")
    kept, values = [], []
    tails = [50 * (1 - band), 50 * (1 + band)]
    for place, start, stop in zip(places, first, last, strict=True):
        if stop > start:  # a pause longer than the window leaves a gap
            inside = y[start:stop]
            kept.append(place)
            values.append((inside.mean(), *np.percentile(inside, tails)))
    mean, low, high = np.array(values).T
    return Rolling(np.array(kept), mean, low, high)


def common_time(seeds: Sequence[tuple[Vector, Vector, Vector]]) -> tuple[Vector, Vector]:
    """The values of several seeds against their mean time at equal steps.

    Seeds take different times for the same steps. Against the time of each, a mean over seeds would mix early steps
    of a slow seed with late steps of a fast one, and jump when the fast one ends.

    Args:
        seeds: steps, seconds and values of each seed, each ``(N,)``; N differs between seeds.

    Returns:
        For each value up to the last step that all seeds have reached, the mean over the seeds of the time at its
        step; and the values.
    """
    end = min(steps[-1] for steps, _, _ in seeds)
    times, values = [], []
    for steps, _, of_seed in seeds:
        shared = steps <= end
        at = [np.interp(steps[shared], other, seconds) for other, seconds, _ in seeds]
        times.append(np.mean(at, axis=0))
        values.append(of_seed[shared])
    return np.concatenate(times), np.concatenate(values)
