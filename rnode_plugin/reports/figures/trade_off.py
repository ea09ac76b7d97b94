"""Likelihood against NFE for all arms, with errors: which penalty buys the most NFE for the least likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...evaluation.measures import Measure
from ..arms import Arm, by_strength
from ..measured import error_of, mean_of
from .drawing import legend, plain_text

__all__ = ["Point", "paint_trade_off", "sweeps_of", "trade_off", "trade_off_caption"]


def trade_off_caption(measure: Measure[Any]) -> str:
    """The caption of the figure."""
    samples, sample = measure.samples, measure.sample
    return (
        f"Down and to the left is better. One mark for each arm, with the test solver, on the held-out {samples}. "
        f"Bars are standard errors: over the seeds; with one seed over the {samples}, and none for NFE. They hold "
        f"errors that the arms share; the table compares arms {sample} by {sample}. Thin lines join arms whose "
        "penalties differ by lambda only."
    )


@dataclass(frozen=True)
class Point:
    """An arm in the plane of NFE and score; None for an error that is not known."""

    arm: Arm
    nfe: float
    nfe_error: float | None
    score: float
    score_error: float | None


def trade_off(arms: Sequence[Arm]) -> list[Point]:
    """The arms that have measured both, in their order."""
    points = []
    for arm in arms:
        name = arm.measure.quantities[0].name
        nfe, score = mean_of(arm, "nfe_test"), mean_of(arm, name)
        if math.isfinite(nfe) and math.isfinite(score):
            points.append(Point(arm, nfe, error_of(arm, "nfe_test"), score, error_of(arm, name)))
    return points


def paint_trade_off(axes: Any, points: Sequence[Point]) -> None:
    """Draw the points with their errors, and a line through those of each sweep."""
    for sweep in sweeps_of(points):
        axes.plot([p.nfe for p in sweep], [p.score for p in sweep], color="#808080", linewidth=0.8, zorder=1)
    for point in points:
        look = point.arm.look
        axes.errorbar(point.nfe, point.score, xerr=point.nfe_error, yerr=point.score_error, color=look.colour,
                      linestyle="none", marker=look.marker, markersize=6, markeredgewidth=0, elinewidth=1,
                      capsize=2, label=plain_text(point.arm.label))  # fmt: skip
    axes.set_xlabel("NFE of the test solver [evaluations]")
    axes.set_ylabel(f"held-out, {points[0].arm.measure.score}")
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
