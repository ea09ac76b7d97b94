"""Bits/dim against NFE for all arms, with errors: which penalty buys the most NFE for the least likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..arms import Arm, by_strength
from ..measured import error_of, mean_of
from .drawing import legend, plain_text

__all__ = ["TRADE_OFF_CAPTION", "Point", "paint_trade_off", "sweeps_of", "trade_off"]

TRADE_OFF_CAPTION = (
    "Down and to the left is better. One mark for each arm, with the test solver, on the held-out images. Bars "
    "are standard errors: over the seeds; with one seed over the images, and none for NFE. They hold errors that "
    "the arms share; the table compares arms image by image. Thin lines join arms whose penalties differ by "
    "lambda only."
)


@dataclass(frozen=True)
class Point:
    """An arm in the plane of NFE and dirty bits/dim; None for an error that is not known."""

    arm: Arm
    nfe: float
    nfe_error: float | None
    bits: float
    bits_error: float | None


def trade_off(arms: Sequence[Arm]) -> list[Point]:
    """The arms that have measured both, in their order."""
    points = []
    for arm in arms:
        nfe, bits = mean_of(arm, "nfe_test"), mean_of(arm, "dirty")
        if math.isfinite(nfe) and math.isfinite(bits):
            points.append(Point(arm, nfe, error_of(arm, "nfe_test"), bits, error_of(arm, "dirty")))
    return points


def paint_trade_off(axes: Any, points: Sequence[Point]) -> None:
    """Draw the points with their errors, and a line through those of each sweep."""
    for sweep in sweeps_of(points):
        axes.plot([p.nfe for p in sweep], [p.bits for p in sweep], color="#808080", linewidth=0.8, zorder=1)
    for point in points:
        look = point.arm.look
        axes.errorbar(point.nfe, point.bits, xerr=point.nfe_error, yerr=point.bits_error, color=look.colour,
                      linestyle="none", marker=look.marker, markersize=6, markeredgewidth=0, elinewidth=1,
                      capsize=2, label=plain_text(point.arm.label))  # fmt: skip
    axes.set_xlabel("NFE of the test solver [evaluations]")
    axes.set_ylabel("held-out, dirty [bits/dim]")
    legend(axes)


def sweeps_of(points: Sequence[Point]) -> list[list[Point]]:
    """Points of arms with the same penalties, two or more, by their lambdas."""
    by_penalties: dict[tuple[str, ...], list[Point]] = {}
    for point in points:
        by_penalties.setdefault(tuple(sorted(point.arm.recipe.regularizers)), []).append(point)
    return [
        sorted(sweep, key=lambda point: by_strength(point.arm.recipe))
        for penalties, sweep in by_penalties.items()
        if penalties and len(sweep) > 1
    ]
