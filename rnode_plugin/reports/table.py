"""The table of a report: one column for each arm, and the paper's own figures in columns marked as such."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..formatting import duration, significant, with_error
from .arms import Arm, solver_text
from .reading import Run

__all__ = ["Column", "Row", "Table", "against_vanilla", "make_table"]

_LAST_PART = 10  # of the steps, over which the NFE of training is averaged: a tenth


@dataclass(frozen=True)
class Column:
    """The head of a column; ``paper`` marks figures that were not measured here."""

    label: str
    paper: bool = False


@dataclass(frozen=True)
class Row:
    """A quantity, its unit or meaning, and one text for each column; an empty one where nothing is known."""

    name: str
    meaning: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Columns and rows as texts, and what has to be known to read them."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Figures:
    """What one run measured; NaN for what it has not."""

    dirty: float
    dirty_error: float
    clean: float
    clean_error: float
    nfe_test: float
    nfe_train: float
    jacfrob: float
    kinetic: float
    gap: float
    train_seconds: float
    seconds_per_step: float
    steps: float


def _figures(run: Run) -> _Figures:
    """The evaluation of the best weights, or the last validation of a run that has not come to it."""
    steps, checks = run.steps, run.checks
    nan = math.nan
    measured = {f"{name}_error": nan for name in ("dirty", "clean")} | {"clean": nan}
    if run.result is not None:
        found = run.result["evaluation"]
        for name in ("dirty", "clean"):
            measured[name], error = found[name]["mean"], found[name]["stderr_images"]
            measured[f"{name}_error"] = nan if error is None else error
        measured["nfe_test"] = found["nfe_mean"]
        measured |= {name: found["penalties"].get(name, nan) for name in ("jacfrob", "kinetic")}
    else:
        names = {"dirty": "val/bpd", "nfe_test": "val/nfe", "jacfrob": "val/jacfrob", "kinetic": "val/kinetic"}
        measured |= {name: _last(checks.get(column)) for name, column in names.items()}
    measured["gap"] = _gap(run)
    nfe = steps.get("train/nfe", np.array([]))
    times = steps.get("seconds_per_step", np.array([]))
    return _Figures(
        **measured,
        nfe_train=float(np.mean(nfe[-max(1, len(nfe) // _LAST_PART) :])) if len(nfe) else nan,
        train_seconds=_last(steps["train_seconds"]),
        seconds_per_step=float(np.median(times)) if len(times) else nan,
        steps=run.done,
    )


def _gap(run: Run) -> float:
    """Of the best validation, whose weights the table is about."""
    gaps, bits = run.checks.get("val/gap"), run.checks["val/bpd"]
    return float(gaps[np.argmin(bits)]) if gaps is not None else math.nan


def _last(values: np.ndarray | None) -> float:
    return float(values[-1]) if values is not None and len(values) else math.nan


def _mean(arm: Arm, name: str) -> float:
    return float(np.mean([getattr(_figures(run), name) for run in arm.runs]))


def _error(arm: Arm, name: str) -> float | None:
    """Standard error over the seeds; over the images of the only seed."""
    figures = [_figures(run) for run in arm.runs]
    if len(figures) == 1:
        error = getattr(figures[0], f"{name}_error")
        return None if math.isnan(error) else error
    return float(np.std([getattr(each, name) for each in figures], ddof=1) / len(figures) ** 0.5)


def make_table(arms: Sequence[Arm]) -> Table:
    """The table of some arms; with the paper's figures where the recipes of all arms carry the same ones."""
    papers = {arm.recipe.paper for arm in arms}
    paper = papers.pop() if len(papers) == 1 else None
    columns = [Column(arm.label) for arm in arms]
    given: list[dict[str, str]] = [{} for _ in arms]
    if paper is not None:
        devices = f" on {paper.gpus} GPU" + ("s" if paper.gpus > 1 else "")
        columns.append(Column("RNODE, the paper", paper=True))
        of_paper = {"dirty": f"{paper.bits_dirty:g}", "clean": f"{paper.bits_clean:g}"}
        given.append({**of_paper, "time": f"{paper.hours:g} h{devices}"})
        if paper.vanilla_bits is not None:
            columns.append(Column("FFJORD, the paper", paper=True))
            given.append({"dirty": f"{paper.vanilla_bits:g}", "time": f"{paper.vanilla_hours:g} h"})

    def row(key: str, name: str, meaning: str, text: Callable[[Arm], str]) -> Row:
        cells = [text(arm) for arm in arms] + [each.get(key, "") for each in given[len(arms) :]]
        return Row(name, meaning, tuple(cells))

    def known(name: str, text: Callable[[float], str] = significant) -> Callable[[Arm], str]:
        return lambda arm: "" if math.isnan(value := _mean(arm, name)) else text(value)

    def bits(name: str) -> Callable[[Arm], str]:
        return lambda arm: known(name, lambda value: with_error(value, _error(arm, name)))(arm)

    rows = [
        row("dirty", "bits/dim, dirty", "held-out images, uniform noise in each bin", bits("dirty")),
        row("clean", "bits/dim, clean", "density at the bins' centres: no bound", bits("clean")),
        row("nfe", "NFE, test", "adaptive solver, a batch, all blocks", known("nfe_test")),
        row("nfe_train", "NFE, training", "a step, all blocks, last tenth of the steps", known("nfe_train")),
        row("jacfrob", "Jacobian norm", "∫ ‖εᵀ∇f‖² dt / dim, test solver", known("jacfrob")),
        row("kinetic", "kinetic energy", "∫ ‖f‖² dt / dim, test solver", known("kinetic")),
        row(
            "gap",
            "solver gap",
            "bits/dim by the training solver, less the accurate ones",
            known("gap", lambda v: f"{v:+.4f}".replace("-", "−")),
        ),
        row("time", "training time", "without validation", known("train_seconds", duration)),
        row("pace", "time a step", "median", known("seconds_per_step", lambda s: f"{significant(s)} s")),
        row("steps", "steps", "", lambda a: f"{_mean(a, 'steps'):,.0f}"),
        row("parameters", "parameters", "", lambda a: f"{a.runs[0].parameters:,}"),
        row("solver", "training solver", "", _training_solver),
        row("test_solver", "test solver", "", lambda a: solver_text(a.recipe.test_solver)),
        row("lambdas", "λ", "kinetic, jacfrob", _lambdas),
        row("seeds", "seeds", "", lambda a: ", ".join(str(run.recipe.training.seed) for run in a.runs)),
        row("state", "state", "", lambda a: "; ".join(dict.fromkeys(run.state for run in a.runs))),
    ]
    return Table(tuple(columns), tuple(rows), tuple(_notes(arms, paper is not None)))


def _training_solver(arm: Arm) -> str:
    found = [_last(run.steps.get("train/step_size")) for run in arm.runs]
    ends = dict.fromkeys(f"{step:g}" for step in found if not math.isnan(step))
    return solver_text(arm.recipe.solver) + (f" ({', '.join(ends)} at the end)" if ends else "")


def _lambdas(arm: Arm) -> str:
    strengths = arm.recipe.regularizers
    more = [f"{name} {value:g}" for name, value in strengths.items() if name not in ("kinetic", "jacfrob")]
    return ", ".join([f"{strengths.get(name, 0):g}" for name in ("kinetic", "jacfrob")] + more)


def _notes(arms: Sequence[Arm], paper: bool) -> list[str]:
    several = any(len(arm.runs) > 1 for arm in arms)
    what = "over the seeds" if several else "over the held-out images of the one run"
    notes = [
        f"± is the standard error {what}. Bits/dim, test NFE, Jacobian norm and kinetic energy are those of the "
        "weights with the lowest validation bits/dim, on the same held-out images.",
        "Dirty bits/dim bound the discrete likelihood of the images from above, in expectation; clean ones bound "
        "nothing and are shown because the paper shows them.",
    ]
    if any(run.result is None for arm in arms for run in arm.runs):
        notes.append("A run that is not finished shows its last validation, without a standard error.")
    if paper:
        notes.append(
            "Columns of the paper hold the paper's own figures (Finlay et al. 2020, tables 1 and 2), of another "
            "machine; nothing in them was measured here."
        )
    return notes


def against_vanilla(arms: Sequence[Arm]) -> list[str]:
    """One sentence for each arm: what its penalties changed against none, once all runs are finished."""
    bases = [arm for arm in arms if arm.name == "vanilla"]
    if len(bases) != 1 or any(run.result is None for arm in arms for run in arm.runs):
        return []
    base, found = bases[0], []
    for arm in (arm for arm in arms if arm is not base and arm.recipe.data == base.recipe.data):
        parts = []
        change = _mean(arm, "dirty") - _mean(base, "dirty")
        if not math.isnan(change):
            parts.append(f"bits/dim {change:+.4f}".replace("-", "−"))
        for name, text in (
            ("nfe_test", "test NFE"), ("jacfrob", "Jacobian norm"), ("kinetic", "kinetic energy"),
            ("seconds_per_step", "time a step"),
        ):  # fmt: skip
            ratio = _mean(arm, name) / _mean(base, name) if _mean(base, name) else math.nan
            if not math.isnan(ratio):
                parts.append(f"{text} × {significant(ratio)}")
        if parts:
            found.append(f"{arm.label} against {base.label}: {', '.join(parts)}.")
    return found
