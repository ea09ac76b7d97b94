"""The figures of a report: likelihood against NFE, and the paper's figures 2, 3 and 5, each as PNG and SVG."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..files import write_atomically
from .arms import Arm, by_strength, nfe_batches, settings_of

Vector = NDArray[np.float64]

_WINDOW = 1 / 20  # of the longest run: the paper averages over three hours of some sixty
_SPAN_UNITS = ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "hours"), (2 * 60, 60, "minutes"), (0, 1, "seconds"))
_JACOBIAN = "Jacobian norm: ∫ ‖εᵀ∇f‖² dt / dim"
_KINETIC = "kinetic energy: ∫ ‖f‖² dt / dim"
_NFE = "NFE of the test solver [evaluations]"
STYLE = "rnode_plugin.plots"
"""The style sheet of all figures, for ``matplotlib.style.use``."""


class Drawing(NamedTuple):
    """A figure in two forms, on a transparent ground."""

    png: bytes
    svg: bytes

    def save(self, folder: Path, name: str) -> None:
        """Write ``NAME.png`` and ``NAME.svg``, or raise a CheckpointError."""
        for suffix, contents in self._asdict().items():
            write_atomically(folder / f"{name}.{suffix}", lambda file, contents=contents: file.write(contents))


def draw(
    name: str, paint: Callable[[Any], None], *, size: tuple[float, float] = (4.8, 3.5), **grid: Any
) -> Drawing:
    """Draw a figure: ``paint`` gets the axes, an array of them for a ``grid`` of ``Figure.subplots``.

    The same name and content give the same bytes again. The default size, in inches, suits the width of a phone.
    """
    from matplotlib import rc_context, style
    from matplotlib.figure import Figure

    with style.context(STYLE), rc_context({"svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure.subplots(**grid))
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=160)
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return Drawing(png.getvalue(), svg.getvalue())


def plain_text(label: str) -> str:
    """``label`` for matplotlib, without mathematics, and shown even if it begins with ``_``."""
    text = label.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def legend(axes: Any) -> None:
    """A legend of all labels; of more than six it is small and in two columns."""
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        many = len(handles) > 6
        axes.legend(ncols=2 if many else 1, fontsize=7 if many else None)


def finish(axes: Any, x: str, y: str) -> None:
    """The names of the axes, and a legend."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    legend(axes)


@dataclass(frozen=True)
class Panel:
    """One figure: the name of its files, how to read it, and the heading of its section."""

    name: str
    title: str
    caption: str
    section: str
    drawing: Drawing


def make_panels(arms: Sequence[Arm]) -> list[Panel]:
    """All panels that the runs have numbers for."""
    return [
        Panel(name, title, caption, section, draw(name, paint))
        for name, title, caption, section, paint in _figures(arms)
    ]


def _figures(arms: Sequence[Arm]) -> Iterator[tuple[str, str, str, str, Callable[[Any], None]]]:
    """Name, title, caption, section and painter of each figure."""
    logged = [arm for arm in arms if all(run.has_steps for run in arm.counted)]
    checked = [arm for arm in arms if any(run.has_steps and len(run.checks["step"]) for run in arm.runs)]
    # a curve of one point shows nothing
    if max((len(run.steps["step"]) for arm in logged for run in arm.runs), default=0) < 2:
        logged = []
    if max((len(run.checks["step"]) for arm in checked for run in arm.runs), default=0) < 2:
        checked = []
    measure = arms[0].measure
    likelihood, samples, sample = measure.likelihood, measure.samples, measure.sample
    images = measure.metric == "bpd"
    prefix = "bits" if images else measure.metric
    in_time = f"{likelihood[0].upper()}{likelihood[1:]} against wall-clock time (the paper's figure 2)"

    if len(points := trade_off(arms)) > 1:
        caption = (
            "Down and to the left is better. One mark for each arm, with the test solver, on the held-out "
            f"{samples}; NFE: {nfe_batches(arms)}. Bars are standard errors: over the seeds; with one seed over "
            f"the {samples}, and none for NFE. They hold errors that the arms share; the table compares arms "
            f"{sample} by {sample}. Thin lines "
            "join arms whose penalties differ by lambda only."
        )
        title = f"Held-out {likelihood} against NFE"
        yield f"{prefix}-nfe", title, caption, "What the penalties buy", lambda axes: _trade_off(axes, points)
    if logged:
        caption = (
            "Each training batch: mean (line) and the middle 90 % (band) of the batches in a window of a "
            "twentieth of the longest run. Time without validation; several seeds are averaged at equal steps, up "
            "to the last step that all of them have reached."
        )
        title = f"Training {likelihood} against time"
        yield f"{prefix}-training", title, caption, in_time, lambda axes: _scores_of_batches(axes, logged)
    if not checked:
        return
    nfe_of_checks = nfe_batches(checked, validation=True)
    first = "Dirty bits/dim" if images else measure.quantities[0].heading
    caption = (
        f"{first} of the held-out {samples} at each validation, with the test solver. Time without validation."
    )
    title = f"Held-out {likelihood} against time"
    yield f"{prefix}-validation", title, caption, in_time, lambda axes: _scores_of_checks(axes, checked)
    caption = (
        f"One mark for each validation during training: evaluations of the test solver, {nfe_of_checks}, against "
        f"the Jacobian norm of the same solves. {_correlations(checked)}"
    )
    title, section = "NFE against the Jacobian norm", "NFE against the Jacobian norm (the paper's figure 3)"
    yield "nfe-jacobian", title, caption, section, lambda axes: _nfe_against_jacobian(axes, checked)
    caption = f"At each validation, on the held-out {samples}, with the test solver; NFE: {nfe_of_checks}."
    section = "What the penalties do during training (the paper's figure 5)"
    for name, title, column, label in (
        ("jacobian-epoch", "Jacobian norm during training", "val/jacfrob", _JACOBIAN),
        ("kinetic-epoch", "Kinetic energy during training", "val/kinetic", _KINETIC),
        ("nfe-epoch", "NFE during training", "val/nfe", _NFE),
    ):
        yield name, title, caption, section, lambda axes, c=column, lab=label: _by_epoch(axes, checked, c, lab)


def _style(arm: Arm) -> dict[str, Any]:
    return {"color": arm.look.colour, "linestyle": arm.look.line, "linewidth": 1.8}


def _marks(arm: Arm) -> dict[str, Any]:
    return {**_style(arm), "marker": arm.look.marker, "markersize": 4.5, "markeredgewidth": 0}


def _time_unit(arms: Sequence[Arm]) -> tuple[float, float, str]:
    """The longest training time in seconds, seconds of the unit for it, and the unit's name."""
    longest = max((run.steps["train_seconds"].max(initial=0) for arm in arms for run in arm.runs), default=0)
    return next((longest, size, name) for least, size, name in _SPAN_UNITS if longest >= least)


def _scores_of_batches(axes: Any, arms: Sequence[Arm]) -> None:
    longest, unit, name = _time_unit(arms)
    settled = []
    for arm in arms:
        column = f"train/{arm.measure.metric}"
        time, scores = common_time(
            [(run.steps["step"], run.steps["train_seconds"], run.steps[column]) for run in arm.counted]
        )
        curve = rolling(time, scores, window=longest * _WINDOW)
        if len(curve.x):
            axes.fill_between(curve.x / unit, curve.low, curve.high, color=arm.look.colour, alpha=0.18, linewidth=0)
            axes.plot(curve.x / unit, curve.mean, label=plain_text(arm.label), **_style(arm))
            settled.append((curve.x, curve.low, curve.high))
    _cut_start(axes, settled)
    finish(axes, f"training time [{name}]", f"training batches, {arms[0].measure.score}")


def _scores_of_checks(axes: Any, arms: Sequence[Arm]) -> None:
    _, unit, name = _time_unit(arms)
    curves = _plot_checks(axes, arms, "train_seconds", f"val/{arms[0].measure.metric}", unit)
    _cut_start(axes, [(time, scores, scores) for time, scores in curves])
    finish(axes, f"training time [{name}]", f"held-out, {arms[0].measure.score}")


def _plot_checks(axes: Any, arms: Sequence[Arm], x: str, y: str, unit: float = 1.0) -> list[tuple[Vector, Vector]]:
    """A line for each run that has measured ``y`` at its validations; the first of an arm has its label."""
    curves = []
    for arm in arms:
        label: str | None = plain_text(arm.label)
        for run in arm.runs:
            if y in run.checks:
                curves.append((run.checks[x], run.checks[y]))
                axes.plot(run.checks[x] / unit, run.checks[y], label=label, **_marks(arm))
                label = None
    return curves


def _cut_start(axes: Any, curves: Sequence[tuple[Any, Any, Any]]) -> None:
    """Cut off the fall of the first tenth: it would flatten all differences that come later."""
    late = []
    for x, low, high in curves:
        kept = (x >= x.max(initial=0) / 10) & np.isfinite(low) & np.isfinite(high)
        if len(x) > 5 and kept.any():
            late.append((low[kept], high[kept]))
    if late:
        bottom = min(float(low.min()) for low, _ in late)
        top = max(float(high.max()) for _, high in late)
        margin = 0.05 * (top - bottom) or 0.05
        axes.set_ylim(bottom - margin, top + margin)


def _nfe_against_jacobian(axes: Any, arms: Sequence[Arm]) -> None:
    for arm in arms:
        jacobian, nfe = _pairs(arm)
        axes.scatter(jacobian, nfe, s=26, color=arm.look.colour, marker=arm.look.marker, alpha=0.75, linewidth=0,
                     label=plain_text(arm.label))  # fmt: skip
    finish(axes, _JACOBIAN, _NFE)


def _pairs(arm: Arm) -> tuple[Vector, Vector]:
    def column(name: str) -> Vector:
        return np.concatenate([run.checks.get(name, np.full(len(run.checks["step"]), np.nan)) for run in arm.runs])

    return column("val/jacfrob"), column("val/nfe")


def _correlations(arms: Sequence[Arm]) -> str:
    """The correlation within each arm that has five marks or more."""
    found = []
    for arm in arms:
        jacobian, nfe = _pairs(arm)
        keep = np.isfinite(jacobian) & np.isfinite(nfe)
        if keep.sum() >= 5 and nfe[keep].std() > 0 and jacobian[keep].std() > 0:
            found.append(f"{arm.label} {np.corrcoef(jacobian[keep], nfe[keep])[0, 1]:.2f}".replace("-", "−"))
    return f"Correlation: {', '.join(found)}." if found else ""


def _by_epoch(axes: Any, arms: Sequence[Arm], column: str, label: str) -> None:
    curves = _plot_checks(axes, arms, "epoch", column)
    if column != "val/nfe" and all(np.nanmin(values, initial=math.inf) > 0 for _, values in curves):
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if high / low < 30:  # one or two powers of ten alone would be too few numbers
            axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    finish(axes, f"epoch [passes over the training {arms[0].measure.samples}]", label)


# ---- curves ----


class Rolling(NamedTuple):
    """A smoothed curve: places, the mean around each, and the ends of the band."""

    x: Vector
    mean: Vector
    low: Vector
    high: Vector


def rolling(x: Vector, y: Vector, *, window: float, points: int = 300) -> Rolling:
    """Mean and the middle 90 % of the values of ``y`` whose ``x`` is within half a window.

    Args:
        x: places ``(N,)``, in any order; several curves may be given as one.
        y: values ``(N,)``; those that are not finite are left out.
        window: width in the unit of ``x``.
        points: places at which the curve is evaluated, evenly spread.
    """
    keep = np.isfinite(x) & np.isfinite(y)
    order = np.argsort(x[keep], kind="stable")
    x, y = x[keep][order], y[keep][order]
    places = np.linspace(x[0], x[-1], points) if len(x) > 1 else x
    first = np.searchsorted(x, places - window / 2, side="left")
    last = np.searchsorted(x, places + window / 2, side="right")
    kept = last > first  # a pause longer than the window leaves a gap
    inside = [y[start:stop] for start, stop in zip(first[kept], last[kept], strict=True)]
    bands = [(values.mean(), *np.percentile(values, (5, 95))) for values in inside]
    return Rolling(places[kept], *np.array(bands).reshape(-1, 3).T)


def common_time(seeds: Sequence[tuple[Vector, Vector, Vector]]) -> tuple[Vector, Vector]:
    """The values of several seeds against their mean time at equal steps.

    Seeds take different times for the same steps. Against the time of each, a mean over seeds would mix early steps
    of a slow seed with late steps of a fast one, and jump when the fast one ends. ``seeds`` are steps, seconds and
    values ``(N,)`` of each; the result holds those up to the last step that all seeds have reached.
    """
    end = min(steps[-1] for steps, _, _ in seeds)
    times, values = [], []
    for steps, _, of_seed in seeds:
        shared = steps <= end
        at = [np.interp(steps[shared], other, seconds) for other, seconds, _ in seeds]
        times.append(np.mean(at, axis=0))
        values.append(of_seed[shared])
    return np.concatenate(times), np.concatenate(values)


# ---- likelihood against NFE ----


class Point(NamedTuple):
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
        nfe, score = arm.mean("nfe_test"), arm.mean(name)
        if math.isfinite(nfe) and math.isfinite(score):
            points.append(Point(arm, nfe, arm.error("nfe_test"), score, arm.error(name)))
    return points


def sweeps_of(points: Sequence[Point]) -> list[list[Point]]:
    """Points of arms with the same penalties and settings, two or more, by their lambdas."""
    alike: dict[str, list[Point]] = {}
    for point in points:
        if penalties := sorted(point.arm.recipe.regularizers):
            others = {"name": "sweep", "description": "", "regularizers": dict.fromkeys(penalties, 0.0)}
            alike.setdefault(settings_of(point.arm.recipe, **others), []).append(point)
    sweeps = [sweep for sweep in alike.values() if len(sweep) > 1]
    return [sorted(sweep, key=lambda point: by_strength(point.arm.recipe)) for sweep in sweeps]


def _trade_off(axes: Any, points: Sequence[Point]) -> None:
    """Draw the points with their errors, and a line through those of each sweep."""
    for sweep in sweeps_of(points):
        axes.plot([p.nfe for p in sweep], [p.score for p in sweep], color="#808080", linewidth=0.8, zorder=1)
    for point in points:
        look = point.arm.look
        axes.errorbar(point.nfe, point.score, xerr=point.nfe_error, yerr=point.score_error, color=look.colour,
                      linestyle="none", marker=look.marker, markersize=6, markeredgewidth=0, elinewidth=1,
                      capsize=2, label=plain_text(point.arm.label))  # fmt: skip
    finish(axes, _NFE, f"held-out, {points[0].arm.measure.score}")
