"""The figures of a diagnosis: one panel for each check that has curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..evaluation.diagnostics.result import Check, Diagnosis
from .figures import Panel, draw, finish, legend

_BLUE, _RED, _GREY = "#0072b2", "#d55e00", "#808080"
_COLOURS = (_BLUE, _RED, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#b8a800", _GREY)
_IN_TWO_ROWS = ("tolerance", "path")


def diagnosis_panels(diagnosis: Diagnosis, *, section: str, prefix: str = "") -> list[Panel]:
    """A panel for each check that has curves, with its verdict in the title and its sentence below."""
    panels = []
    for check in diagnosis.checks:
        paint = _PAINTERS.get(check.name)
        if paint is None or not any(map(len, check.curves.values())):
            continue
        grid: dict[str, Any] = {"nrows": 2, "sharex": True} if check.name in _IN_TWO_ROWS else {}
        name = prefix + check.name.replace(" ", "-")
        title = f"{check.name.capitalize()}: {check.verdict}"
        drawing = draw(name, lambda axes, paint=paint, check=check: paint(axes, check), **grid)
        panels.append(Panel(name, title, check.sentence, section, drawing))
    return panels


def _round_trip(axes: Any, check: Check) -> None:
    error = np.maximum(check.curves["error"], 1e-12)
    axes.step(error, 100 * np.array(check.curves["share"]), where="post", color=_BLUE)
    axes.set_xscale("log")
    for place, text, colour in ((1e-3, "warning", _GREY), (1e-2, "failed", _RED)):
        axes.axvline(place, color=colour, linestyle=":", label=f"{text} above (all samples)")
    tolerance = check.numbers.get("tolerance", math.nan)
    if math.isfinite(tolerance):
        axes.axvline(tolerance, color="#009e73", linestyle="--", label="the solver's tolerance")
    finish(axes, "error after the round trip / spread of the data", "samples with less [%]")


def _trace(axes: Any, check: Check) -> None:
    exact, mean = (np.array(check.curves[name]) for name in ("exact", "mean"))
    axes.errorbar(exact, mean - exact, yerr=check.curves["half_width"], color=_BLUE, linestyle="none", marker="o",
                  markersize=4, elinewidth=1, label="one sample, 99.9 % interval")  # fmt: skip
    bias, interval = check.numbers["bias"], check.numbers["interval"]
    axes.axhspan(bias - interval, bias + interval, color=_RED, alpha=0.25, linewidth=0, label="mean of all samples")
    axes.axhline(0, color=_GREY, linewidth=1)
    finish(axes, "exact log-density [nats]", "estimated − exact [nats]")


def _differences(exact_name: str, other_name: str, label: str, off: str) -> Callable[[Any, Check], None]:
    def paint(axes: Any, check: Check) -> None:
        exact, other = (np.array(check.curves[name]) for name in (exact_name, other_name))
        axes.scatter(exact, other - exact, s=14, color=_BLUE, alpha=0.6, linewidth=0)
        axes.axhline(0, color=_GREY, linewidth=1)
        finish(axes, label, off)

    return paint


def _tolerance(axes: Any, check: Check) -> None:
    above, below = axes
    tolerance, distance = (np.array(check.curves[name]) for name in ("tolerance", "distance"))
    above.plot(tolerance[:-1], np.maximum(distance[:-1], 1e-9), color=_BLUE, marker="o", markersize=4)
    above.axhline(0.005, color=_GREY, linestyle=":", label="enough")
    above.set_yscale("log")
    above.set_ylabel("NLL off the\ntightest [nats/dim]")
    legend(above)
    below.plot(tolerance, check.curves["nfe"], color=_RED, marker="s", markersize=4)
    below.set_xscale("log")
    below.invert_xaxis()
    below.set_xlabel("tolerance of dopri5")
    below.set_ylabel("NFE [evaluations]")


def _path(axes: Any, check: Check) -> None:
    blocks = np.array(check.curves["block"])
    time = np.array(check.curves["time"])
    for each, name, label, colour in zip(
        axes, ("kinetic", "jacobian"), ("‖f‖² / dim", "‖∇f‖² / dim"), (_BLUE, _RED), strict=True
    ):
        values = np.array(check.curves[name])
        for block in np.unique(blocks):
            each.plot(time[blocks == block], values[blocks == block], color=colour)
            if block > 0:
                each.axvline(time[blocks == block][0], color=_GREY, linestyle=":", linewidth=0.8)
        each.set_ylim(bottom=0)
        each.set_ylabel(label)
    axes[-1].set_xlabel("time" if blocks.max() == 0 else "time, block after block")


def _two_samples(axes: Any, check: Check) -> None:
    bins = np.linspace(0, 1, 21).tolist()
    for name, label, colour in (("held_out", "held-out data", _BLUE), ("samples", "samples", _RED)):
        axes.hist(check.curves[name], bins=bins, color=colour, alpha=0.5, label=label)
    finish(axes, "the classifier's probability of being a sample", "how many")


def _distances(axes: Any, check: Check) -> None:
    distance = check.curves["distance"]
    axes.bar(range(len(distance)), distance, color=_BLUE)
    axes.axhline(
        check.numbers["limit"], color=_GREY, linestyle=":", label="chance alone exceeds it once in 1000 times"
    )
    axes.set_ylim(bottom=0)
    x = "dimension" + (" (the last: all together)" if check.name == "latents" else "")
    finish(axes, x, "distance of the distribution functions")


def _training(axes: Any, check: Check) -> None:
    axes.plot(check.curves["step"], check.curves["nll"], color=_BLUE, marker="o", markersize=3)
    axes.axvline(0.75 * check.curves["step"][-1], color=_GREY, linestyle=":", label="last quarter")
    finish(axes, "step", "validation NLL [nats/dim]")


def _ranks(axes: Any, check: Check) -> None:
    rows: dict[str, Sequence[float]] = dict(check.curves)
    bins = len(next(iter(rows.values())))
    expected = sum(next(iter(rows.values()))) / bins
    # the middle 99 % of the count in a bin if ranks are uniform, by the normal approximation
    half = 2.576 * math.sqrt(expected * (1 - 1 / bins))
    axes.axhspan(max(0.0, expected - half), expected + half, color=_GREY, alpha=0.25, linewidth=0)
    edges = np.linspace(0, 1, bins + 1)
    for number, (name, counts) in enumerate(rows.items()):
        axes.stairs(counts, edges, color=_COLOURS[number % len(_COLOURS)], label=name, linewidth=1.5)
    axes.set_ylim(bottom=0)
    finish(axes, "rank of the true value among posterior samples", "pairs")


_PAINTERS: Mapping[str, Callable[[Any, Check], None]] = {
    "round trip": _round_trip,
    "trace": _trace,
    "log-determinant": _differences(
        "by_jacobian", "reported", "log-density by the Jacobian of the map [nats]", "reported is off by"
    ),
    "training solver": _differences(
        "nll_accurate", "nll", "NLL by the accurate solver [nats/dim]", "off by [nats/dim]"
    ),
    "tolerance": _tolerance,
    "path": _path,
    "two samples": _two_samples,
    "columns": _distances,
    "latents": _distances,
    "training": _training,
    "posterior ranks": _ranks,
}
