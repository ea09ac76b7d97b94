"""The figures of a diagnosis: one for each check that has curves."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

from collections.abc import Callable, Mapping

import numpy as np

from ...analysis import texts
from ...analysis.checks import LOST
from ...analysis.result import Check
from ..runs.results import DiagnosedWeights
from ..runs.run import Run
from .configurations import GRAY
from .figures import draw, finish, legend

_Painter = Callable[["Figure", Check], None]


def save_diagnosis(diagnosed: DiagnosedWeights, run: Run) -> None:
    """Write a diagnosis and its figures into the folder of a run."""
    figures: dict[str, bytes] = {}
    for check in diagnosed.checks:
        figures |= draw_check(check, check.file_name)
    run.add_diagnosis(diagnosed, figures)


def draw_check(check: Check, name: str) -> dict[str, bytes]:
    """The figure of a check, in files of this name; empty for a check without curves."""
    paint = _PAINTERS.get(check.name)
    if paint is None or not any(map(len, check.curves.values())):
        return {}
    return draw(name, lambda figure: paint(figure, check))


def _tolerance(figure: Figure, check: Check) -> None:
    above, below = figure.subplots(nrows=2, sharex=True)
    tolerance, distance = (np.array(check.curves[name]) for name in ("tolerance", "distance"))
    above.plot(tolerance[:-1], np.maximum(distance[:-1], 1e-9), color="C0", marker="o", markersize=4)
    above.axhline(check.numbers["limit"], color=GRAY, linestyle=":", label="small enough")
    above.set_yscale("log")
    above.set_ylabel("error of the NLL\n[nats/dim]")
    below.plot(tolerance, check.curves["nfe"], color="C1", marker="s", markersize=4)
    below.set_xscale("log")
    below.invert_xaxis()
    below.set_xlabel("tolerance of dopri5")
    below.set_ylabel("NFE")
    legend(above)


def _invertibility(figure: Figure, check: Check) -> None:
    axes = figure.subplots()
    error = np.maximum(check.curves["error"], 1e-12)
    axes.step(error, np.linspace(0, 100, len(error) + 1)[1:], where="post", color="C0")
    axes.set_xscale("log")
    for lost, text, color in zip(LOST, ("warning", "failed"), (GRAY, "C1"), strict=True):
        axes.axvline(lost, color=color, linestyle=":", label=f"{text}, if the root mean square is larger")
    finish(axes, "error after the round trip / spread of the data", "samples with a smaller error [%]")


def _differences(one_name: str, other_name: str, x: str, y: str) -> _Painter:
    """A painter of one curve minus another, against the other."""

    def paint(figure: Figure, check: Check) -> None:
        axes = figure.subplots()
        one, other = (np.array(check.curves[name]) for name in (one_name, other_name))
        axes.scatter(one, other - one, s=14, color="C0", alpha=0.6, linewidth=0)
        axes.axhline(0, color=GRAY, linewidth=1)
        finish(axes, x, y)

    return paint


def _samples(figure: Figure, check: Check) -> None:
    axes = figure.subplots()
    bins = np.linspace(0, 1, 21).tolist()
    for name, label, color in (("held_out", "held-out data", "C0"), ("samples", "samples", "C1")):
        axes.hist(check.curves[name], bins=bins, color=color, alpha=0.5, label=label)
    finish(axes, "probability of being a sample, by the classifier", "count")


_PAINTERS: Mapping[str, _Painter] = {
    texts.SOLVER_GAP: _differences(
        "nll_accurate", "nll", "NLL by the accurate solver [nats/dim]", "solver gap [nats/dim]"
    ),
    texts.TOLERANCE: _tolerance,
    texts.INVERTIBILITY: _invertibility,
    texts.NORMALIZATION: _differences(
        "by_jacobian", "reported", "log-density by the Jacobian of the map [nats]", "model minus Jacobian [nats]"
    ),
    texts.GRADIENT: _differences(
        "by_differences",
        "by_autograd",
        "slope of the log-density by differences [nats]",
        "autograd minus differences",
    ),
    texts.SAMPLES: _samples,
    texts.GAUSSIAN: _differences(
        "nll_gaussian", "nll", "NLL of a Gaussian [nats/dim]", "model minus Gaussian [nats/dim]"
    ),
}
