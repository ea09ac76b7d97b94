"""What the runs of an arm measured, as numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .arms import Arm
from .reading import Run

__all__ = ["error_of", "last_steps", "mean_of", "penalties_of"]

_LAST_PART = 10  # of the steps, over which the NFE of training is averaged: a tenth


def mean_of(arm: Arm, name: str) -> float:
    """The mean of a quantity over the runs of an arm; NaN if one of them has not measured it.

    Args:
        arm: some runs.
        name: a quantity of the measure (``dirty`` and ``clean`` of images, ``nll`` of tables) or a baseline,
            ``nfe_test``, ``nfe_train``, ``gap``, ``train_seconds``, ``seconds_per_step``, ``steps``, or the
            name of a penalty.
    """
    return float(np.mean([_figures(run).get(name, math.nan) for run in arm.runs]))


def error_of(arm: Arm, name: str) -> float | None:
    """Standard error of a quantity, a baseline or ``nfe_test``: over the seeds; with one seed over the samples.

    None if it is not known: no error of one NFE, nor of a run that is not finished.
    """
    values = [_figures(run)[name] for run in arm.runs]
    if len(values) > 1:
        return float(np.std(values, ddof=1) / len(values) ** 0.5)
    result = arm.runs[0].result
    if result is None or name == "nfe_test":
        return None
    return result["evaluation"][name][f"stderr_{arm.measure.samples}"]


def penalties_of(arms: Sequence[Arm]) -> list[str]:
    """Names of all penalties that some run has measured, ``kinetic`` and ``jacfrob`` first."""
    names = dict.fromkeys(name for arm in arms for run in arm.runs for name in _penalties(run))
    ours = [name for name in ("jacfrob", "kinetic") if name in names]
    return ours + [name for name in names if name not in ours]


def _penalties(run: Run) -> dict[str, float]:
    """Integrals over dim: of the best weights, or at the last validation of a run that has not come to them."""
    if run.result is not None:
        return run.result["evaluation"]["penalties"]
    followed = dict.fromkeys(["kinetic", "jacfrob", *run.recipe.regularizers])
    return {name: _last(run.checks[f"val/{name}"]) for name in followed if f"val/{name}" in run.checks}


def _figures(run: Run) -> Mapping[str, float]:
    """The evaluation of the best weights, or the last validation of a run that has not come to it."""
    found: dict[str, Any]
    measure = run.measure
    if run.result is not None:
        evaluation = run.result["evaluation"]
        known = [each.name for each in (*measure.quantities, *measure.baselines) if evaluation.get(each.name)]
        found = {name: evaluation[name]["mean"] for name in known}
        found["nfe_test"] = evaluation["nfe_mean"]
    else:
        first, *others = (quantity.name for quantity in measure.quantities)
        columns = {first: f"val/{measure.metric}", "nfe_test": "val/nfe"}
        found = dict.fromkeys(others, math.nan)
        found |= {name: _last(run.checks.get(column)) for name, column in columns.items()}
    nfe = run.steps.get("train/nfe", np.array([]))
    times = run.steps.get("seconds_per_step", np.array([]))
    return {
        **_penalties(run),
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
    gaps, scores = run.checks.get("val/gap"), run.checks[f"val/{run.measure.metric}"]
    return float(gaps[np.argmin(scores)]) if gaps is not None else math.nan


def _last(values: np.ndarray | None) -> float:
    return float(values[-1]) if values is not None and len(values) else math.nan
