"""The figures of a report: likelihood against NFE, and the paper's figures 2, 3 and 5, each as PNG and SVG."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas
from numpy.typing import NDArray

from ..files import write_atomically
from .configurations import Configuration, by_strength, settings_of

Vector = NDArray[np.float64]

_WINDOWS = 20  # in a run: the paper averages over three hours of some sixty
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
    task = configurations[0].task
    likelihood, samples = task.likelihood, task.samples
    section = f"{likelihood[0].upper()}{likelihood[1:]} during training (figure 2 of the paper)"

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
    logged = [one for one in configurations if any(len(run.steps["step"]) > 1 for run in one.runs)]
    checked = [one for one in configurations if any(len(run.checks["step"]) > 1 for run in one.runs)]
    seconds = max((run.steps["train_seconds"].max(initial=0) for one in logged for run in one.runs), default=0)
    unit, name = next((size, name) for least, size, name in _SPAN_UNITS if seconds >= least)
    time = f"training time [{name}]"
    if logged:
        caption = "Each line is a run: the mean over the training batches in a window of a twentieth of its steps."
        batches = _Curve(
            "train_seconds", f"train/{task.metric}", time, f"training batches, {task.score}", unit=unit
        )
        yield "score-training", f"Training {likelihood}", caption, section, lambda axes: batches.paint(axes, logged)
    if checked:
        caption = f"Each mark is a validation on held-out {samples} with the test solver."
        checks = _Curve("train_seconds", f"val/{task.metric}", time, f"held-out, {task.score}", unit=unit)
        title = f"Held-out {likelihood}"
        yield "score-validation", title, caption, section, lambda axes: checks.paint(axes, checked)
    if len(checked) < 2:
        return
    section = "What the penalties do during training (figures 3 and 5 of the paper)"
    caption = f"At each validation, on held-out {samples}, with the test solver."
    epoch = f"epoch [passes over the training {samples}]"
    for name, title, curve in (
        (
            "nfe-jacobian",
            "NFE against the Jacobian norm",
            _Curve("val/jacfrob", "val/nfe", _JACOBIAN, _NFE, line=False),
        ),
        ("jacobian-epoch", "Jacobian norm", _Curve("epoch", "val/jacfrob", epoch, _JACOBIAN, log=True)),
        ("kinetic-epoch", "Kinetic energy", _Curve("epoch", "val/kinetic", epoch, _KINETIC, log=True)),
        ("nfe-epoch", "NFE", _Curve("epoch", "val/nfe", epoch, _NFE)),
    ):
        yield name, title, caption, section, lambda axes, curve=curve: curve.paint(axes, checked)


@dataclass(frozen=True)
class _Curve:
    """What a figure draws of each run: two of its columns, their labels, and how.

    Attributes:
        unit: of ``x``.
        line: join the marks of a run.
        log: a logarithmic scale, if all values are positive.
    """

    x: str
    y: str
    x_label: str
    y_label: str
    unit: float = 1.0
    line: bool = True
    log: bool = False

    def paint(self, axes: Any, configurations: Sequence[Configuration]) -> None:
        """Draw the runs; the first of a configuration has its label, unless it is the only one."""
        late = []
        for one in configurations:
            label = plain_text(one.label) if len(configurations) > 1 else None
            for run in one.runs:
                columns = run.checks if self.y.startswith("val/") else run.steps
                if not columns.keys() >= {self.x, self.y} or not len(columns[self.y]):
                    continue
                x, y, marker = columns[self.x] / self.unit, columns[self.y], one.look.marker
                if columns is run.steps:
                    y, marker = smooth(y, max(1, len(y) // _WINDOWS)), None
                style = one.look.line if self.line else "none"
                axes.plot(x, y, label=label, color=one.look.colour, linestyle=style, linewidth=1.8,
                          marker=marker, markersize=4.5, markeredgewidth=0)  # fmt: skip
                late += [y[x >= x.max() / 10]] if self.x == "train_seconds" and len(x) > 5 else []
                label = None
        values = np.concatenate([*late, np.array([])])
        values = values[np.isfinite(values)]
        if len(values):  # cut off the fall of the first tenth, which would flatten all later differences
            margin = 0.05 * float(np.ptp(values)) or 0.05
            axes.set_ylim(values.min() - margin, values.max() + margin)
        if self.log and all((line.get_ydata() > 0).all() for line in axes.get_lines()):
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            if high / low < 30:  # one or two powers of ten alone would be too few numbers
                axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
        if self.y == "val/nfe":
            axes.yaxis.get_major_locator().set_params(integer=True)
        finish(axes, self.x_label, self.y_label)


def smooth(values: Vector, window: int) -> Vector:
    """The mean of the values in a window around each, of the ones that are finite."""
    finite = pandas.Series(np.where(np.isfinite(values), values, np.nan))
    return np.asarray(finite.rolling(window, center=True, min_periods=1).mean())


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
        name = each.task.quantities[0].name
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
    finish(axes, _NFE, f"held-out, {points[0].configuration.task.score}")
