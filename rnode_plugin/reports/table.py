"""The table of a report: one column for each arm, and the paper's own figures in columns marked as such."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..core.schedules import strength_text
from ..recipes.recipe import Paper
from ..solvers.config import solver_text
from ..text import change_with_error, duration, significant, with_error
from .arms import Arm
from .differences import base_of, paired_difference
from .measured import error_of, last_steps, mean_of, penalties_of
from .notes import table_notes

__all__ = ["Column", "Row", "Table", "make_table"]


@dataclass(frozen=True)
class Column:
    """The head of a column; ``paper`` marks figures that were not measured here."""

    label: str
    paper: bool = False


@dataclass(frozen=True)
class Row:
    """A quantity, its unit or meaning, and one text for each column; an empty one if nothing is known."""

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
class _Quantity:
    """A row before it is text.

    Attributes:
        name, meaning: see :class:`Row`.
        text: the cell of an arm.
        paper: the cell of a run of the paper; None if the paper does not say it.
        always: whether the row is there even if all of its cells are empty.
    """

    name: str
    meaning: str
    text: Callable[[Arm], str]
    paper: Callable[[_PaperRun], str] | None = None
    always: bool = True


@dataclass(frozen=True)
class _PaperRun:
    """One of the two runs for which the paper gives figures (its tables 1 and 2)."""

    label: str
    dirty: float
    hours: float
    gpus: int
    clean: float | None = None
    parameters: int | None = None


def make_table(arms: Sequence[Arm]) -> Table:
    """The table of some arms; with the paper's figures if the recipes of all arms carry the same ones."""
    base = base_of(arms)
    of_paper = _paper_runs(arms)
    columns = [Column(arm.label) for arm in arms] + [Column(run.label, paper=True) for run in of_paper]
    rows = (_row(quantity, arms, of_paper) for quantity in _quantities(arms, base))
    return Table(
        columns=tuple(columns),
        rows=tuple(row for row in rows if row is not None),
        notes=tuple(table_notes(arms, base, paper=bool(of_paper))),
    )


def _paper_runs(arms: Sequence[Arm]) -> list[_PaperRun]:
    papers: set[Paper | None] = {arm.recipe.paper for arm in arms}
    paper = papers.pop() if len(papers) == 1 else None
    if paper is None:
        return []
    runs = [
        _PaperRun("RNODE, the paper", paper.bits_dirty, paper.hours, paper.gpus, paper.bits_clean, paper.parameters)
    ]
    if paper.vanilla_bits is not None and paper.vanilla_hours is not None:
        runs.append(_PaperRun("FFJORD, the paper", paper.vanilla_bits, paper.vanilla_hours, paper.gpus))
    return runs


def _row(quantity: _Quantity, arms: Sequence[Arm], of_paper: Sequence[_PaperRun]) -> Row | None:
    cells = [quantity.text(arm) for arm in arms]
    cells += [quantity.paper(run) if quantity.paper is not None else "" for run in of_paper]
    return Row(quantity.name, quantity.meaning, tuple(cells)) if quantity.always or any(cells) else None


def _quantities(arms: Sequence[Arm], base: Arm) -> list[_Quantity]:
    """All rows, from the top."""
    return [*_likelihoods(base), *_costs(arms), *_settings()]


def _likelihoods(base: Arm) -> list[_Quantity]:
    measure = base.measure
    rows = [
        _Quantity(each.heading, each.meaning, _score(each.name), _OF_PAPER.get(each.name))
        for each in measure.quantities
    ]
    compared = _Quantity(
        f"against {base.label}",
        f"{rows[0].name}, {measure.sample} by {measure.sample}",
        lambda arm: _difference(arm, base),
        always=False,
    )
    baselines = [
        _Quantity(each.heading, each.meaning, _score(each.name), always=False) for each in measure.baselines
    ]
    return [rows[0], compared, *rows[1:], *baselines]


_OF_PAPER: dict[str, Callable[[_PaperRun], str]] = {
    "dirty": lambda run: f"{run.dirty:g}",
    "clean": lambda run: "" if run.clean is None else f"{run.clean:g}",
}


def _costs(arms: Sequence[Arm]) -> list[_Quantity]:
    return [
        _Quantity("NFE, test", "adaptive solver, per batch, all blocks", _known("nfe_test")),
        _Quantity("NFE, training", "per step, all blocks, last tenth of the steps", _known("nfe_train")),
        *(_penalty(name) for name in penalties_of(arms)),
        _Quantity("solver gap", _less_accurate(arms[0]), _known("gap", _signed)),
        _Quantity(
            "training time",
            "without validation",
            _known("train_seconds", duration),
            lambda run: f"{run.hours:g} h on {run.gpus} GPU" + ("s" if run.gpus > 1 else ""),
        ),
        _Quantity("time per step", "median", _known("seconds_per_step", lambda s: f"{significant(s)} s")),
    ]


def _settings() -> list[_Quantity]:
    return [
        _Quantity("steps", "", lambda arm: f"{mean_of(arm, 'steps'):,.0f}"),
        _Quantity("parameters", "", lambda arm: f"{arm.runs[0].parameters:,}", _parameters_of_paper),
        _Quantity("training solver", "", _training_solver),
        _Quantity("test solver", "", lambda arm: solver_text(arm.recipe.test_solver)),
        _Quantity("λ", "", _lambdas),
        _Quantity("seeds", "", lambda arm: ", ".join(str(run.recipe.training.seed) for run in arm.runs)),
        _Quantity("device", "of each run", _devices),
        _Quantity("state", "", lambda arm: "; ".join(dict.fromkeys(run.state for run in arm.runs))),
    ]


def _known(name: str, text: Callable[[float], str] = significant) -> Callable[[Arm], str]:
    """The mean of a quantity as text; empty if it was not measured."""
    return lambda arm: "" if math.isnan(value := mean_of(arm, name)) else text(value)


def _less_accurate(arm: Arm) -> str:
    accurate = "ones" if arm.measure.metric == "bpd" else "one"
    return f"{arm.measure.likelihood} by the training solver, less the accurate {accurate}"


def _score(name: str) -> Callable[[Arm], str]:
    return lambda arm: _known(name, lambda value: with_error(value, error_of(arm, name)))(arm)


def _penalty(name: str) -> _Quantity:
    known = {
        "jacfrob": ("Jacobian norm", "∫ ‖εᵀ∇f‖² dt / dim, test solver"),
        "kinetic": ("kinetic energy", "∫ ‖f‖² dt / dim, test solver"),
    }
    label, meaning = known.get(name, (name, "penalty / dim, test solver"))
    return _Quantity(label, meaning, _known(name))


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def _parameters_of_paper(run: _PaperRun) -> str:
    return "" if run.parameters is None else f"{run.parameters:.2e}".replace("e+0", "e")  # as the paper writes it


def _difference(arm: Arm, base: Arm) -> str:
    difference = None if arm is base else paired_difference(arm, base)
    if difference is None:
        return ""
    return f"{change_with_error(difference.mean, difference.error)}: {difference.verdict}"


def _training_solver(arm: Arm) -> str:
    ends = dict.fromkeys(f"{step:g}" for step in last_steps(arm))
    return solver_text(arm.recipe.solver) + (f" ({', '.join(ends)} at the end)" if ends else "")


def _lambdas(arm: Arm) -> str:
    terms = [f"{name} {strength_text(strength)}" for name, strength in arm.recipe.regularizers.items()]
    return ", ".join(terms) or "none"


def _devices(arm: Arm) -> str:
    """The devices of the runs, on a CPU with the number of threads; each once."""
    found = {}
    for environment in (run.environment for run in arm.runs if run.environment.get("device")):
        threads = environment.get("threads")
        on_cpu = environment.get("cuda") is None and threads is not None
        found[str(environment["device"]) + (f", {threads} thread{'s' * (threads != 1)}" if on_cpu else "")] = None
    return "; ".join(found)
