"""The figures of a report: likelihood against NFE, and the paper's figures 2, 3 and 5, each as PNG and SVG."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas
from numpy.typing import NDArray

from .configurations import Configuration, jacobian_norm

Vector = NDArray[np.float64]

_WINDOWS = 20  # averages over a twentieth of a run, as the paper does with three hours of about sixty
_SPAN_UNITS = ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "hours"), (2 * 60, 60, "minutes"), (0, 1, "seconds"))
_KINETIC = "kinetic energy: ∫ ‖f‖² dt / dim"
_NFE = "NFE of the test solver"
STYLE = "rnode_plugin.plots"
"""The style sheet of all figures, for ``matplotlib.style.use``."""

PANELS = (
    "score-nfe", "score-training", "score-validation", "nfe-jacobian", "jacobian-epoch", "kinetic-epoch",
    "nfe-epoch",
)  # fmt: skip
"""The names of all panels that a report may have."""


class Drawing(NamedTuple):
    """A figure in two formats, on a transparent background."""

    png: bytes
    svg: bytes

    def files(self, name: str) -> dict[str, bytes]:
        """The contents of ``NAME.png`` and ``NAME.svg``."""
        return {f"{name}.{suffix}": contents for suffix, contents in self._asdict().items()}


def draw(name: str, paint: Callable[[Figure], object], *, size: tuple[float, float] = (4.8, 3.5)) -> Drawing:
    """Draw a figure by ``paint``, which gets it empty. The same name and content give the same bytes again.

    The default size, in inches, suits the width of a phone.
    """
    from matplotlib import rc_context, style
    from matplotlib.figure import Figure

    with style.context(STYLE), rc_context({"svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=160)
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return Drawing(png.getvalue(), svg.getvalue())


def legend(axes: Axes) -> None:
    """Add a legend above the axes. A mark of a legend inside them could be taken for a measurement."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = 1 if max(map(len, labels)) > 24 else min(3, len(handles))
        axes.figure.legend(handles, labels, loc="outside upper left", ncols=columns, fontsize=8)


def finish(axes: Axes, x: str, y: str) -> None:
    """Add the names of the axes and a legend."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    legend(axes)


@dataclass(frozen=True)
class Panel:
    """A figure on the page.

    Attributes:
        name: the name of its files, without a suffix.
        title: its heading.
        caption: how to read it.
        section: the heading above this figure and others.
        drawing: the figure.
    """

    name: str
    title: str
    caption: str
    section: str
    drawing: Drawing


def make_panels(configurations: Sequence[Configuration]) -> list[Panel]:
    """All panels that the runs have numbers for. Panels that compare need two configurations."""
    return list(_panels(configurations))


def _panels(configurations: Sequence[Configuration]) -> Iterator[Panel]:
    task = configurations[0].task
    likelihood, samples = task.likelihood, task.samples
    both = task.quantities[0].name, "nfe_test"
    points = [one for one in configurations if all(math.isfinite(one.mean(name)) for name in both)]
    if len(points) > 1:
        caption = (
            f"Each mark is a configuration, measured with the test solver on the held-out {samples}. Marks further "
            f"down have the better {likelihood}, marks further left need fewer evaluations. Bars are standard "
            f"errors, over the seeds or, with one seed, over the {samples}."
        )
        drawing = draw("score-nfe", lambda figure: _trade_off(figure.subplots(), points))
        title, section = f"Held-out {likelihood} against NFE", "What the penalties buy"
        yield Panel("score-nfe", title, caption, section, drawing)

    seconds = max(run.steps["train_seconds"].max(initial=0) for one in configurations for run in one.runs)
    unit, name = next((size, name) for least, size, name in _SPAN_UNITS if seconds >= least)
    time, epoch = f"training time [{name}]", f"epoch [passes over the training {samples}]"
    section = f"{likelihood[0].upper()}{likelihood[1:]} during training"
    window = "Each line is a run: the mean over the training batches in a window of a twentieth of its steps."
    check = f"Each mark is a validation on held-out {samples} with the test solver."
    curves = [
        _Curve("score-training", f"Training {likelihood}", "train_seconds", f"train/{task.metric}", time,
               f"training batches, {task.score}", section, window, unit),
        _Curve("score-validation", f"Held-out {likelihood}", "train_seconds", f"val/{task.metric}", time,
               f"held-out, {task.score}", section, check, unit),
    ]  # fmt: skip
    if len(configurations) > 1:
        section = "What the penalties do during training"
        jacobian = f"Jacobian norm: {jacobian_norm(configurations, validated=True)}"
        curves += [
            _Curve(name, title, x, f"val/{y}", x_label, y_label, section, check)
            for name, title, x, y, x_label, y_label in (
                ("nfe-jacobian", "NFE against the Jacobian norm", "val/jacfrob", "nfe", jacobian, _NFE),
                ("jacobian-epoch", "Jacobian norm", "epoch", "jacfrob", epoch, jacobian),
                ("kinetic-epoch", "Kinetic energy", "epoch", "kinetic", epoch, _KINETIC),
                ("nfe-epoch", "NFE", "epoch", "nfe", epoch, _NFE),
            )
        ]
    for curve in curves:
        if any(len(x) > 1 for one in configurations for x, _ in curve.points(one)):  # one point shows nothing
            drawing = draw(curve.name, lambda figure, curve=curve: curve.paint(figure.subplots(), configurations))
            yield Panel(curve.name, curve.title, curve.caption, curve.section, drawing)


class _Curve(NamedTuple):
    """A figure that draws one column of the metrics of each run against another.

    Values of ``x`` are divided by ``unit``.
    """

    name: str
    title: str
    x: str
    y: str
    x_label: str
    y_label: str
    section: str
    caption: str
    unit: float = 1.0

    def points(self, one: Configuration) -> Iterator[tuple[Vector, Vector]]:
        """The two columns of each run that has them. ``y`` is averaged over a window if it has a value a step."""
        for run in one.runs:
            columns = run.validations if self.y.startswith("val/") else run.steps
            if columns.keys() >= {self.x, self.y}:
                x, y = columns[self.x] / self.unit, columns[self.y]
                yield x, y if columns is run.validations else smooth(y, max(1, len(y) // _WINDOWS))

    def paint(self, axes: Axes, configurations: Sequence[Configuration]) -> None:
        """Draw the runs. The first run of each configuration has its label, if there are several configurations."""
        late = [np.array([])]
        for one in configurations:
            label = _plain_text(one.label) if len(configurations) > 1 else None
            look = one.look
            if self.x.startswith("val/"):  # the validations are in no order along this axis
                look["linestyle"] = "none"
            if not self.y.startswith("val/"):
                look["marker"] = None
            for x, y in self.points(one):
                axes.plot(x, y, label=label, linewidth=1.8, markersize=4.5, markeredgewidth=0, **look)
                late += [y[x >= x.max() / 10]] if self.x == "train_seconds" and len(x) > 5 else []
                label = None
        values = np.concatenate(late)
        values = values[np.isfinite(values)]
        if len(values):  # leave out the first tenth, whose steep fall would flatten all later differences
            margin = 0.05 * float(np.ptp(values)) or 0.05
            axes.set_ylim(values.min() - margin, values.max() + margin)
        if self.y == "val/nfe":
            axes.locator_params(axis="y", integer=True)
        finish(axes, self.x_label, self.y_label)


def smooth(values: Vector, window: int) -> Vector:
    """The mean of the finite values in a window around each value."""
    finite = pandas.Series(np.where(np.isfinite(values), values, np.nan))
    return np.asarray(finite.rolling(window, center=True, min_periods=1).mean())


def _plain_text(label: str) -> str:
    """``label`` such that matplotlib shows it as it is, with a dollar sign or an underscore in front."""
    text = label.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def _trade_off(axes: Axes, configurations: Sequence[Configuration]) -> None:
    """Draw a mark with error bars for each configuration."""
    task = configurations[0].task
    name = task.quantities[0].name
    for one in configurations:
        axes.errorbar(one.mean("nfe_test"), one.mean(name), xerr=one.error("nfe_test"), yerr=one.error(name),
                      markersize=6, markeredgewidth=0, elinewidth=1, capsize=2, label=_plain_text(one.label),
                      **{**one.look, "linestyle": "none"})  # fmt: skip
    axes.locator_params(axis="x", integer=True)
    finish(axes, _NFE, f"held-out, {task.score}")
