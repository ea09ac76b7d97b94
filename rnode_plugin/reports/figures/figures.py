"""The figures of a report: likelihood against NFE, and the paper's figures 2, 3 and 5, each panel a drawing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arms import Arm
from .curves import common_time, rolling
from .drawing import Drawing, draw, legend, plain_text
from .trade_off import paint_trade_off, trade_off, trade_off_caption

__all__ = ["Panel", "make_panels"]

_WINDOW = 1 / 20  # of the longest run: the paper averages over three hours of some sixty
_SPAN_UNITS = ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "hours"), (2 * 60, 60, "minutes"), (0, 1, "seconds"))
_JACOBIAN = "Jacobian norm: ∫ ‖εᵀ∇f‖² dt / dim"
_KINETIC = "kinetic energy: ∫ ‖f‖² dt / dim"
_NFE = "NFE of the test solver"


_TRADE = "What the penalties buy"
_TIME = "{} against wall-clock time (the paper's figure 2)"
_NFE_AND_NORM = "NFE against the Jacobian norm (the paper's figure 3)"
_DURING = "What the penalties do during training (the paper's figure 5)"


@dataclass(frozen=True)
class Panel:
    """One figure, drawn.

    Attributes:
        name: of its files.
        title: what it shows.
        caption: what has to be known to read it.
        section: heading of the section that it belongs to.
        drawing: as PNG and SVG.
    """

    name: str
    title: str
    caption: str
    section: str
    drawing: Drawing


def make_panels(arms: Sequence[Arm]) -> list[Panel]:
    """All panels for which the runs hold something."""
    logged = [arm for arm in arms if all(run.has_steps for run in arm.runs)]
    checked = [arm for arm in arms if any(len(run.checks["step"]) for run in arm.runs)]
    panels: list[Panel] = []
    measure = arms[0].measure
    prefix, likelihood = "bits" if measure.metric == "bpd" else measure.metric, measure.likelihood
    in_time = _TIME.format(likelihood[0].upper() + likelihood[1:])
    first = measure.quantities[0].heading if measure.metric != "bpd" else "Dirty bits/dim"

    def add(name: str, title: str, caption: str, section: str, paint: Callable[[Any], None]) -> None:
        panels.append(Panel(name, title, caption, section, draw(name, paint)))

    if len(points := trade_off(arms)) > 1:
        add(f"{prefix}-nfe", f"Held-out {likelihood} against NFE", trade_off_caption(measure), _TRADE,
            lambda axes: paint_trade_off(axes, points))  # fmt: skip
    if logged:
        add(
            f"{prefix}-training",
            f"Training {likelihood} against time",
            "Each training batch: mean (line) and the middle 90 % (band) of the batches in a window of a "
            "twentieth of the longest run. Time without validation; several seeds are averaged at equal steps, up "
            "to the last step that all of them have reached.",
            in_time,
            lambda axes: _scores_of_batches(axes, logged),
        )
    if checked:
        add(
            f"{prefix}-validation",
            f"Held-out {likelihood} against time",
            f"{first} of the held-out {measure.samples} at each validation, with the test solver. Time without "
            "validation.",
            in_time,
            lambda axes: _scores_of_checks(axes, checked),
        )
        add(
            "nfe-jacobian",
            "NFE against the Jacobian norm",
            "One mark for each validation during training: evaluations that the adaptive test solver takes for a "
            "batch, against the Jacobian norm of the same solve. " + _correlations(checked),
            _NFE_AND_NORM,
            lambda axes: _nfe_against_jacobian(axes, checked),
        )
        for name, title, column, label, log in (
            ("jacobian-epoch", "Jacobian norm during training", "val/jacfrob", _JACOBIAN, True),
            ("kinetic-epoch", "Kinetic energy during training", "val/kinetic", _KINETIC, True),
            ("nfe-epoch", "NFE during training", "val/nfe", _NFE, False),
        ):
            add(
                name,
                title,
                f"At each validation, on the held-out {measure.samples}, with the test solver.",
                _DURING,
                lambda axes, column=column, label=label, log=log: _by_epoch(axes, checked, column, label, log=log),
            )
    return panels


def _plain(value: float, position: int) -> str:
    return f"{value:g}"


def _style(arm: Arm, **more: Any) -> dict[str, Any]:
    return {"color": arm.look.colour, "linestyle": arm.look.line, "linewidth": 1.8, **more}


def _marks(arm: Arm) -> dict[str, Any]:
    return {"marker": arm.look.marker, "markersize": 4.5, "markeredgewidth": 0}


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
            [(run.steps["step"], run.steps["train_seconds"], run.steps[column]) for run in arm.runs]
        )
        curve = rolling(time, scores, window=longest * _WINDOW)
        if len(curve.x):
            axes.fill_between(curve.x / unit, curve.low, curve.high, color=arm.look.colour, alpha=0.18, linewidth=0)
            axes.plot(curve.x / unit, curve.mean, label=plain_text(arm.label), **_style(arm))
            settled.append((curve.x, curve.low, curve.high))
    _cut_start(axes, settled)
    axes.set_xlabel(f"training time [{name}]")
    axes.set_ylabel(f"training batches, {arms[0].measure.score}")
    legend(axes)


def _scores_of_checks(axes: Any, arms: Sequence[Arm]) -> None:
    _, unit, name = _time_unit(arms)
    settled = []
    for arm in arms:
        for number, run in enumerate(arm.runs):
            time, scores = run.checks["train_seconds"], run.checks[f"val/{arm.measure.metric}"]
            label = plain_text(arm.label) if number == 0 else None
            axes.plot(time / unit, scores, label=label, **_style(arm), **_marks(arm))
            settled.append((time, scores, scores))
    _cut_start(axes, settled)
    axes.set_xlabel(f"training time [{name}]")
    axes.set_ylabel(f"held-out, {arms[0].measure.score}")
    legend(axes)


def _cut_start(axes: Any, curves: Sequence[tuple[Any, Any, Any]]) -> None:
    """Cut off the fall of the first tenth: it would flatten all differences that come later."""
    late = [(low[x >= x.max() / 10], high[x >= x.max() / 10]) for x, low, high in curves if len(x) > 5]
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
    axes.set_xlabel(_JACOBIAN)
    axes.set_ylabel(f"{_NFE} [evaluations]")
    legend(axes)


def _pairs(arm: Arm) -> tuple[Any, Any]:
    def column(name: str) -> Any:
        return np.concatenate([run.checks.get(name, np.full(len(run.checks["step"]), np.nan)) for run in arm.runs])

    return column("val/jacfrob"), column("val/nfe")


def _correlations(arms: Sequence[Arm]) -> str:
    """The correlation within each arm, if there are enough marks to speak of one."""
    found = []
    for arm in arms:
        jacobian, nfe = _pairs(arm)
        keep = np.isfinite(jacobian) & np.isfinite(nfe)
        if keep.sum() >= 5 and nfe[keep].std() > 0 and jacobian[keep].std() > 0:
            found.append(f"{arm.label} {np.corrcoef(jacobian[keep], nfe[keep])[0, 1]:.2f}".replace("-", "−"))
    return f"Correlation: {', '.join(found)}." if found else ""


def _by_epoch(axes: Any, arms: Sequence[Arm], column: str, label: str, *, log: bool) -> None:
    positive = True
    for arm in arms:
        for number, run in enumerate(arm.runs):
            values = run.checks.get(column)
            if values is None:
                continue
            positive = positive and bool(np.nanmin(values, initial=math.inf) > 0)
            name = plain_text(arm.label) if number == 0 else None
            axes.plot(run.checks["epoch"], values, label=name, **_style(arm), **_marks(arm))
    if log and positive:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_formatter(_plain)
        if high / low < 30:  # one or two powers of ten alone would be too few numbers
            axes.yaxis.set_minor_formatter(_plain)
    axes.set_xlabel(f"epoch [passes over the training {arms[0].measure.samples}]")
    axes.set_ylabel(label + ("" if log else " [evaluations]"))
    legend(axes)
