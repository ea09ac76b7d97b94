"""What the runs of an arm measured, as numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .arms import Arm
from .reading import Run

__all__ = ["error_of", "last_steps", "mean_of"]

_LAST_PART = 10  # of the steps, over which the NFE of training is averaged: a tenth


def mean_of(arm: Arm, name: str) -> float:
    """The mean of a quantity over the runs of an arm; NaN where one of them has not measured it.

    Args:
        arm: some runs.
        name: ``dirty``, ``clean`` (bits/dim), ``nfe_test``, ``nfe_train``, ``jacfrob``, ``kinetic``, ``gap``,
            ``train_seconds``, ``seconds_per_step`` or ``steps``.
    """
    return float(np.mean([_figures(run)[name] for run in arm.runs]))


def error_of(arm: Arm, name: str) -> float | None:
    """Standard error of ``dirty`` or ``clean``: over the seeds, or over the images of the only seed."""
    values = [_figures(run)[name] for run in arm.runs]
    if len(values) > 1:
        return float(np.std(values, ddof=1) / len(values) ** 0.5)
    result = arm.runs[0].result
    return None if result is None else result["evaluation"][name]["stderr_images"]


def _figures(run: Run) -> Mapping[str, float]:
    """The evaluation of the best weights, or the last validation of a run that has not come to it."""
    found: dict[str, Any]
    if run.result is not None:
        evaluation = run.result["evaluation"]
        penalties = {name: evaluation["penalties"].get(name, math.nan) for name in ("jacfrob", "kinetic")}
        bits = {name: evaluation[name]["mean"] for name in ("dirty", "clean")}
        found = {**bits, **penalties, "nfe_test": evaluation["nfe_mean"]}
    else:
        columns = {"dirty": "val/bpd", "nfe_test": "val/nfe", "jacfrob": "val/jacfrob", "kinetic": "val/kinetic"}
        found = {"clean": math.nan, **{name: _last(run.checks.get(column)) for name, column in columns.items()}}
    nfe = run.steps.get("train/nfe", np.array([]))
    times = run.steps.get("seconds_per_step", np.array([]))
    return {
        **found,
        "gap": _gap(run),
        "nfe_train": float(np.mean(nfe[-max(1, len(nfe) // _LAST_PART) :])) if len(nfe) else math.nan,
        "train_seconds": _last(run.steps["train_seconds"]),
        "seconds_per_step": float(np.median(times)) if len(times) else math.nan,
        "steps": run.done,
    }


def last_steps(arm: Arm) -> list[float]:
    """The step sizes with which runs of ``solver.step=auto`` ended."""
    ends = [_last(run.steps.get("train/step_size")) for run in arm.runs]
    return [step for step in ends if not math.isnan(step)]


def _gap(run: Run) -> float:
    """Of the best validation, whose weights the table is about."""
    gaps, bits = run.checks.get("val/gap"), run.checks["val/bpd"]
    return float(gaps[np.argmin(bits)]) if gaps is not None else math.nan


def _last(values: np.ndarray | None) -> float:
    return float(values[-1]) if values is not None and len(values) else math.nan
