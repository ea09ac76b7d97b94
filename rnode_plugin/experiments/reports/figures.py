"""The figures of a report: curves of a training, and NFE against likelihood and against the Frobenius norm.

The last one is figure 2 of the paper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

import io
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas
from numpy.typing import NDArray

from .configurations import GRAY, Configuration
from .table import quantities

Vector = NDArray[np.float64]

_WINDOWS = 20  # averages over a twentieth of a run, as the paper does with three hours of about sixty
_SPAN_UNITS = ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "hours"), (2 * 60, 60, "minutes"), (0, 1, "seconds"))
_NARROWEST = 4.0  # evaluations that an axis of NFE shows at least
_FEWEST = 3  # points of a curve. Two would be a straight line
STYLE = "rnode_plugin.plots"
"""The style sheet of all figures, for ``matplotlib.style.use``."""

PANELS = ("score-nfe", "score-training", "penalty-.+", "nfe-training", "score-validation", "nfe-jacfrob")
"""The names of all panels that a report may have, as regular expressions."""


def draw(
    name: str, paint: Callable[[Figure], object], *, size: tuple[float, float] = (4.8, 3.5)
) -> dict[str, bytes]:
    """Draw a figure by ``paint``, which gets it empty, on a transparent background.

    The default size, in inches, suits the width of a phone.

    Returns:
        The contents of ``NAME.png`` and ``NAME.svg``. The same name and content give the same bytes again.
    """
    from matplotlib import rc_context, style
    from matplotlib.figure import Figure

    with style.context(STYLE), rc_context({"svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=160)
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return {f"{name}.png": png.getvalue(), f"{name}.svg": svg.getvalue()}


def legend(axes: Axes) -> None:
    """Add a legend above the axes. A mark of a legend inside them could be taken for a measurement."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = 1 if max(map(len, labels)) > 24 else min(3, len(handles))
        axes.figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def finish(axes: Axes, x: str, y: str) -> None:
    """Add the names of the axes and a legend."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    legend(axes)


class Panel(NamedTuple):
    """A figure on the page.

    Attributes:
        name: the name of its files, without a suffix.
        title: its heading.
        caption: how to read it.
        files: the figure, by the names of its files.
    """

    name: str
    title: str
    caption: str
    files: Mapping[str, bytes]


def make_panels(configurations: Sequence[Configuration]) -> list[Panel]:
    """All panels that the runs have numbers for. Panels that compare need two configurations."""
    kind, table = configurations[0].kind, quantities(configurations, validated=True)
    by = " or ".join(dict.fromkeys(one.recipe.solver.text for one in configurations))
    by_test = " or ".join(dict.fromkeys(one.recipe.test_solver.text for one in configurations))
    lines = f"Lines: training solver ({by}), the mean over the batches in a window of a twentieth of the steps."
    marks = f"Marks: test solver ({by_test}), at each validation on held-out {kind.samples}."
    parts, solvers = ("training batches", f"held-out {kind.samples}"), ("training solver", "test solver")
    figures = [
        _Curve("score-training", f"{kind.likelihood[0].upper()}{kind.likelihood[1:]} by step", f"{lines} {marks}",
               "step", _both(kind.metric, parts), "step", kind.score, falls=True),
        *(
            _Curve(f"penalty-{re.sub('[^a-z0-9]+', '-', name.lower())}", f"{table[name].heading} by step",
                   f"{table[name].meaning.removesuffix(', test solver')}. {lines} {marks}",
                   "step", _both(name, parts), "step", table[name].heading)
            for name in dict.fromkeys(itertools.chain(*(one.recipe.measured for one in configurations)))
        ),
        _Curve("nfe-training", "NFE by step", f"{lines} {marks} Evaluations that stay the same are left out.",
               "step", _both("nfe", solvers), "step", "NFE", varies=True),
    ]  # fmt: skip
    panels: list[Panel] = []
    if len(configurations) > 1:
        columns = [run.metrics.steps["train_seconds"] for one in configurations for run in one.runs]
        seconds = max(column.max(initial=0) for column in columns)
        unit, name = next((size, name) for least, size, name in _SPAN_UNITS if seconds >= least)
        norm = table["jacfrob"]
        figures += [
            _Curve("score-validation", f"Held-out {kind.likelihood} by training time", marks, "train_seconds",
                   {f"val/{kind.metric}": ""}, f"training time [{name}]", f"held-out, {kind.score}", unit,
                   falls=True),
            _Curve("nfe-jacfrob", f"NFE against {norm.heading}", f"{norm.meaning}. {marks}",
                   "val/jacfrob", {"val/nfe": ""}, norm.heading, table["nfe_test"].heading),
        ]  # fmt: skip
        both = kind.quantities[0].name, "nfe_test"
        points = [one for one in configurations if all(math.isfinite(one.mean(name)) for name in both)]
        if len(points) > 1:
            caption = (
                f"Marks: test solver ({by_test}), a configuration each, on the held-out {kind.samples}. Further "
                f"down is the better {kind.likelihood}, further left are fewer evaluations. Bars are standard "
                f"errors, over the seeds or, with one seed, over the {kind.samples}."
            )
            files = draw("score-nfe", lambda figure: _trade_off(figure.subplots(), points))
            panels.append(Panel("score-nfe", f"Held-out {kind.likelihood} against NFE", caption, files))
    for curve in figures:
        # one finite point shows nothing, and two are a straight line
        if any(len(x) >= _FEWEST for one in configurations for _, x, _ in curve.points(one)):
            files = draw(curve.name, lambda figure, curve=curve: curve.paint(figure.subplots(), configurations))
            panels.append(Panel(curve.name, curve.title, curve.caption, files))
    return panels


def _both(name: str, labels: tuple[str, str]) -> dict[str, str]:
    """The columns of a value in the steps and in the validations, with what the legend calls them."""
    return {f"train/{name}": labels[0], f"val/{name}": labels[1]}


class _Curve(NamedTuple):
    """A figure that draws columns of the metrics of each run against another one.

    A column of the training steps is a line, and one of the validations is marks, with a line between them if the
    figure has no other. ``ys`` has what the legend calls each column. Values of ``x`` are divided by ``unit``. If
    the curve ``falls`` steeply at first, the axis shows its values after the first tenth. If it shows what
    ``varies``, a column of equal values is left out.
    """

    name: str
    title: str
    caption: str
    x: str
    ys: Mapping[str, str]
    x_label: str
    y_label: str
    unit: float = 1.0
    falls: bool = False
    varies: bool = False

    def points(self, one: Configuration) -> Iterator[tuple[str, Vector, Vector]]:
        """The column and its points for each run that has it, averaged over a window if it has a value a step."""
        for run in one.runs:
            for name in self.ys:
                columns = run.metrics.validations if name.startswith("val/") else run.metrics.steps
                if not columns.keys() >= {self.x, name}:
                    continue
                x, y = columns[self.x] / self.unit, columns[name]
                if (finite := y[np.isfinite(y)]).size and (not self.varies or np.ptp(finite) > 0):
                    yield name, x, y if name.startswith("val/") else smooth(y, max(1, len(y) // _WINDOWS))

    def paint(self, axes: Axes, configurations: Sequence[Configuration]) -> None:
        """Draw the runs. The legend has the configurations, and what ``ys`` calls the columns."""
        size = {"linewidth": 1.8, "markersize": 4.5, "markeredgewidth": 0}
        curves = [(one, *points) for one in configurations for points in self.points(one)]
        names, late = [name for name in self.ys if name in {curve[1] for curve in curves}], [np.array([])]
        for one, name, x, y in curves:
            look = {**one.look, **({"color": f"C{names.index(name)}"} if len(configurations) == 1 else {})}
            axes.plot(x, y, **size, **self._form(name, look, names))
            late += [y[x >= x.max() / 10]] if self.falls and len(x) > 5 else []
        for one in dict.fromkeys(curve[0] for curve in curves) if len(configurations) > 1 else ():
            axes.plot([], [], label=_plain_text(one.label), **size, **one.look)
        for number, name in enumerate(names) if all(self.ys.values()) else ():
            color = f"C{number}" if len(configurations) == 1 else GRAY
            look = {"color": color, "marker": "o", "linestyle": "-"}
            axes.plot([], [], label=self.ys[name], **size, **self._form(name, look, names))
        values = np.concatenate(late)
        values = values[np.isfinite(values)]
        if len(values):  # leave out the first tenth, whose steep fall would flatten all later differences
            margin = 0.05 * float(np.ptp(values)) or 0.05
            axes.set_ylim(values.min() - margin, values.max() + margin)
        if any(name.endswith("/nfe") for name in self.ys):
            whole_numbers(axes, "y")
        finish(axes, self.x_label, self.y_label)

    def _form(self, name: str, look: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """The look of a column: a line for steps, marks for validations."""
        if not name.startswith("val/"):
            return {**look, "marker": "none"}
        # validations have no order along another value, and stand next to the line of the training steps
        return {**look, "linestyle": "none"} if self.x.startswith("val/") or len(names) > 1 else dict(look)


def whole_numbers(axes: Axes, which: Literal["x", "y"]) -> None:
    """Label an axis of counts with whole numbers, also if all of its values are equal."""
    from matplotlib.ticker import MaxNLocator

    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    if (missing := _NARROWEST - (high - low)) > 0:
        axes.set(**{f"{which}lim": (low - missing / 2, high + missing / 2)})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))


def smooth(values: Vector, window: int) -> Vector:
    """The mean of the finite values in a window around each value."""
    finite = pandas.Series(np.where(np.isfinite(values), values, np.nan))
    return np.asarray(finite.rolling(window, center=True, min_periods=1).mean())


def _plain_text(label: str) -> str:
    """``label`` such that matplotlib shows it as it is, with a dollar sign or an underscore in front."""
    text = label.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def _trade_off(axes: Axes, configurations: Sequence[Configuration]) -> None:
    """Draw a mark with error bars for each configuration. Marks are hollow, because one may lie on another."""
    kind = configurations[0].kind
    name = kind.quantities[0].name
    for one in configurations:
        axes.errorbar(one.mean("nfe_test"), one.mean(name), xerr=one.error("nfe_test"), yerr=one.error(name),
                      markersize=7, markerfacecolor="none", markeredgewidth=1.6, elinewidth=1, capsize=2,
                      label=_plain_text(one.label), **{**one.look, "linestyle": "none"})  # fmt: skip
    whole_numbers(axes, "x")
    finish(axes, quantities(configurations)["nfe_test"].heading, f"held-out, {kind.score}")
