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
from .configurations import Configuration, by_strength, settings_of

Vector = NDArray[np.float64]

_WINDOW = 1 / 20  # of the longest run: the paper averages over three hours of some sixty
_SPAN_UNITS = ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "hours"), (2 * 60, 60, "minutes"), (0, 1, "seconds"))
_JACOBIAN = "Jacobian norm: ∫ ‖εᵀ∇f‖² dt / dim"
_KINETIC = "kinetic energy: ∫ ‖f‖² dt / dim"
_NFE = "NFE of the test solver"
STYLE = "rnode_plugin.plots"
"""The style sheet of all figures, for ``matplotlib.style.use``; its colours C0 to C5 are the only palette."""


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
    """A legend of all labels above the axes, where none of its marks can be taken for a measurement."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = 1 if max(map(len, labels)) > 24 else min(3, len(handles))
        axes.figure.legend(handles, labels, loc="outside upper left", ncols=columns, fontsize=8)


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


def make_panels(configurations: Sequence[Configuration]) -> list[Panel]:
    """All panels that the runs have numbers for; the ones that compare need two configurations."""
    return [
        Panel(name, title, caption, section, draw(name, paint))
        for name, title, caption, section, paint in _figures(configurations)
    ]


def _figures(
    configurations: Sequence[Configuration],
) -> Iterator[tuple[str, str, str, str, Callable[[Any], None]]]:
    """Name, title, caption, section and painter of each figure."""
    measure = configurations[0].measure
    likelihood, samples = measure.likelihood, measure.samples
    capitalised = likelihood[0].upper() + likelihood[1:]
    in_time = f"{capitalised} during training (figure 2 of the paper)"

    if len(points := trade_off(configurations)) > 1:
        caption = (
            f"Each mark is a configuration, measured with the test solver on the held-out {samples}. Marks further "
            f"down have the better {likelihood}, marks further left need fewer evaluations. Bars are standard "
            f"errors, over the seeds or, with one seed, over the {samples}. Thin lines join configurations that "
            "differ in lambda only."
        )
        title = f"Held-out {likelihood} against NFE"
        yield "score-nfe", title, caption, "What the penalties buy", lambda axes: _trade_off(axes, points)

    # a curve of one point shows nothing
    logged = [each for each in configurations if all(len(run.steps["step"]) > 1 for run in each.counted)]
    if logged:
        caption = (
            "The line is the mean over the training batches in a window of a twentieth of the longest run, the "
            "band holds the middle 90 % of them. Several seeds are averaged at equal steps."
        )
        title = f"Training {likelihood}"
        yield "score-training", title, caption, in_time, lambda axes: _scores_of_batches(axes, logged)
    checked = [each for each in configurations if any(len(run.checks["step"]) > 1 and run.has_steps
                                                      for run in each.runs)]  # fmt: skip
    if not checked:
        return
    caption = f"Each mark is a validation on held-out {samples} with the test solver."
    yield (
        "score-validation",
        f"Held-out {likelihood}",
        caption,
        in_time,
        lambda axes: _scores_of_checks(axes, checked),
    )
    if len(checked) < 2:
        return
    section = "What the penalties do during training (figures 3 and 5 of the paper)"
    caption = "Each mark is a validation. A smaller Jacobian norm goes with fewer evaluations of the field."
    title = "NFE against the Jacobian norm"
    yield "nfe-jacobian", title, caption, section, lambda axes: _nfe_against_jacobian(axes, checked)
    for name, title, column, label in (
        ("jacobian-epoch", "Jacobian norm", "val/jacfrob", _JACOBIAN),
        ("kinetic-epoch", "Kinetic energy", "val/kinetic", _KINETIC),
        ("nfe-epoch", "NFE", "val/nfe", _NFE),
    ):
        caption = f"At each validation, on held-out {samples}, with the test solver."
        yield name, title, caption, section, lambda axes, c=column, lab=label: _by_epoch(axes, checked, c, lab)


def _style(one: Configuration) -> dict[str, Any]:
    return {"color": one.look.colour, "linestyle": one.look.line, "linewidth": 1.8}


def _marks(one: Configuration) -> dict[str, Any]:
    return {**_style(one), "marker": one.look.marker, "markersize": 4.5, "markeredgewidth": 0}


def _label(one: Configuration, of: Sequence[Any]) -> str | None:
    """The label in a legend; None for the only configuration of a figure."""
    return plain_text(one.label) if len(of) > 1 else None


def _time_unit(configurations: Sequence[Configuration]) -> tuple[float, float, str]:
    """The longest training time in seconds, seconds of the unit for it, and the unit's name."""
    runs = [run for each in configurations for run in each.runs]
    longest = max((run.steps["train_seconds"].max(initial=0) for run in runs), default=0)
    return next((longest, size, name) for least, size, name in _SPAN_UNITS if longest >= least)


def _scores_of_batches(axes: Any, configurations: Sequence[Configuration]) -> None:
    longest, unit, name = _time_unit(configurations)
    settled = []
    for each in configurations:
        column = f"train/{each.measure.metric}"
        time, scores = common_time(
            [(run.steps["step"], run.steps["train_seconds"], run.steps[column]) for run in each.counted]
        )
        curve = rolling(time, scores, window=longest * _WINDOW)
        if len(curve.x):
            x = curve.x / unit
            axes.fill_between(x, curve.low, curve.high, color=each.look.colour, alpha=0.18, linewidth=0)
            axes.plot(x, curve.mean, label=_label(each, configurations), **_style(each))
            settled.append((curve.x, curve.low, curve.high))
    _cut_start(axes, settled)
    finish(axes, f"training time [{name}]", f"training batches, {configurations[0].measure.score}")


def _scores_of_checks(axes: Any, configurations: Sequence[Configuration]) -> None:
    _, unit, name = _time_unit(configurations)
    curves = _plot_checks(axes, configurations, "train_seconds", f"val/{configurations[0].measure.metric}", unit)
    _cut_start(axes, [(time, scores, scores) for time, scores in curves])
    finish(axes, f"training time [{name}]", f"held-out, {configurations[0].measure.score}")


def _plot_checks(
    axes: Any, configurations: Sequence[Configuration], x: str, y: str, unit: float = 1.0
) -> list[tuple[Vector, Vector]]:
    """A line for each run that has measured ``y`` at its validations; one of a configuration has its label."""
    curves = []
    for each in configurations:
        label = _label(each, configurations)
        for run in each.runs:
            if y in run.checks:
                curves.append((run.checks[x], run.checks[y]))
                axes.plot(run.checks[x] / unit, run.checks[y], label=label, **_marks(each))
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


def _nfe_against_jacobian(axes: Any, configurations: Sequence[Configuration]) -> None:
    for each in configurations:
        label = _label(each, configurations)
        for run in each.runs:
            if run.checks.keys() >= {"val/jacfrob", "val/nfe"}:
                axes.scatter(run.checks["val/jacfrob"], run.checks["val/nfe"], s=26, color=each.look.colour,
                             marker=each.look.marker, alpha=0.75, linewidth=0, label=label)  # fmt: skip
                label = None
    axes.yaxis.get_major_locator().set_params(integer=True)
    finish(axes, _JACOBIAN, _NFE)


def _by_epoch(axes: Any, configurations: Sequence[Configuration], column: str, label: str) -> None:
    curves = _plot_checks(axes, configurations, "epoch", column)
    if column != "val/nfe" and all(np.nanmin(values, initial=math.inf) > 0 for _, values in curves):
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if high / low < 30:  # one or two powers of ten alone would be too few numbers
            axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    finish(axes, f"epoch [passes over the training {configurations[0].measure.samples}]", label)


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
    """A configuration in the plane of NFE and score; None for an error that is not known."""

    configuration: Configuration
    nfe: float
    nfe_error: float | None
    score: float
    score_error: float | None


def trade_off(configurations: Sequence[Configuration]) -> list[Point]:
    """The configurations that have measured both, in their order."""
    points = []
    for each in configurations:
        name = each.measure.quantities[0].name
        nfe, score = each.mean("nfe_test"), each.mean(name)
        if math.isfinite(nfe) and math.isfinite(score):
            points.append(Point(each, nfe, each.error("nfe_test"), score, each.error(name)))
    return points


def sweeps_of(points: Sequence[Point]) -> list[list[Point]]:
    """Points of configurations with the same penalties and settings, two or more, by their lambdas."""
    same: dict[str, list[Point]] = {}
    for point in points:
        recipe = point.configuration.recipe
        if penalties := sorted(recipe.regularizers):
            others = {"name": "sweep", "description": "", "regularizers": dict.fromkeys(penalties, 0.0)}
            same.setdefault(settings_of(recipe, **others), []).append(point)
    sweeps = [sweep for sweep in same.values() if len(sweep) > 1]
    return [sorted(sweep, key=lambda point: by_strength(point.configuration.recipe)) for sweep in sweeps]


def _trade_off(axes: Any, points: Sequence[Point]) -> None:
    """Draw the points with their errors, and a line through the points of each sweep."""
    for sweep in sweeps_of(points):
        axes.plot([p.nfe for p in sweep], [p.score for p in sweep], color="0.5", linewidth=0.8, zorder=1)
    for point in points:
        look = point.configuration.look
        axes.errorbar(point.nfe, point.score, xerr=point.nfe_error, yerr=point.score_error, color=look.colour,
                      linestyle="none", marker=look.marker, markersize=6, markeredgewidth=0, elinewidth=1,
                      capsize=2, label=plain_text(point.configuration.label))  # fmt: skip
    axes.xaxis.get_major_locator().set_params(integer=True)
    finish(axes, _NFE, f"held-out, {points[0].configuration.measure.score}")
