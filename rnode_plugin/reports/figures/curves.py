"""A rolling mean and the band around it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Rolling", "rolling"]

Vector = NDArray[np.float64]


class Rolling(NamedTuple):
    """A smoothed curve: places, the mean around each, and where the band begins and ends."""

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
