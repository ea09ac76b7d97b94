"""The table of a report, a column for each configuration and for the paper, and the sentences around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...core.schedules import strength_text
from ...errors import RnodeError
from ...text import change_with_error, duration, signed, significant, with_error
from ..recipes.settings import Paper
from ..recipes.task import Task
from .configurations import Configuration, Difference, base_of, paired_difference


@dataclass(frozen=True)
class Column:
    """The head of a column; ``paper`` marks the figures that the paper gives."""

    label: str
    paper: bool = False


@dataclass(frozen=True)
class Row:
    """A quantity, its unit or meaning, and the text of each column; an empty one if it is unknown.

    ``detail`` marks a row that a reader needs less often.
    """

    name: str
    meaning: str
    cells: tuple[str, ...]
    detail: bool = False


@dataclass(frozen=True)
class Table:
    """Columns and rows as texts, and notes."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


_Cell = Callable[[Configuration], str]
_Line = tuple[str, str, _Cell]
"""A row's name and meaning, and the text of the cell of a configuration."""


def make_table(configurations: Sequence[Configuration]) -> Table:
    """The table of some configurations; with the paper's figures if all their recipes carry the same ones.

    Quantities that no configuration has measured have no row.
    """
    base, papers = base_of(configurations), _paper_columns(configurations)
    rows = []
    for detail, lines in ((False, _main_lines(configurations, base)), (True, _detail_lines(configurations, base))):
        for name, meaning, cell in lines:
            cells = (*map(cell, configurations), *(known.get(name, "") for known in papers.values()))
            if any(cells):
                rows.append(Row(name, meaning, cells, detail))
    columns = [*(Column(each.label) for each in configurations), *(Column(label, paper=True) for label in papers)]
    return Table(tuple(columns), tuple(rows), tuple(_notes(configurations, base, paper=bool(papers))))


def _main_lines(configurations: Sequence[Configuration], base: Configuration) -> Iterator[_Line]:
    """The rows that are always shown, from the top."""
    task = base.task
    for number, each in enumerate((*task.quantities, *task.baselines)):
        yield each.heading, each.meaning, _score(each.name)
        if number == 0:
            meaning = f"{each.heading}, {task.sample} by {task.sample}"
            yield f"against {base.label}", meaning, lambda one: _difference(one, base)
    sizes = {run.result.evaluation.nfe_batch_size for one in configurations for run in one.runs if run.result}
    batches = f", batches of {' or '.join(map(str, sorted(sizes)))} {task.samples}" if sizes else ""
    yield "NFE, test", f"evaluations of all blocks by the test solver{batches}", _known("nfe_test")
    yield "training time", "without validation", _known("training_seconds", duration)
    yield "λ", "weights of the penalties", lambdas_text


def _detail_lines(configurations: Sequence[Configuration], base: Configuration) -> Iterator[_Line]:
    """The other rows."""
    task, runs = base.task, [run for one in configurations for run in one.runs]
    yield "time per step", "median", _known("seconds_per_step", lambda seconds: f"{significant(seconds)} s")
    yield "NFE, training", "per step, all blocks, last tenth of the steps", _known("nfe_train")
    undivided = {name for run in runs if run.result for name in run.result.evaluation.undivided}
    for name in dict.fromkeys(["jacfrob", "kinetic", *(name for run in runs for name in run.penalties)]):
        heading, meaning = _PENALTIES.get(name, (name, "penalty" if name in undivided else "penalty / dim"))
        yield heading, f"{meaning}, test solver", _known(name)
    likelihood = task.likelihood
    meaning = f"{likelihood} by the training solver minus {likelihood} by the test solver"
    yield "solver gap", meaning, _known("gap", lambda gap: f"{signed(gap)} {task.short_unit}")
    yield "steps", "", _known("steps", lambda steps: f"{steps:,.0f}")
    yield "parameters", "", _parameters
    yield "training solver", "", lambda one: one.recipe.solver.text
    yield "test solver", "", lambda one: one.recipe.test_solver.text
    yield "seeds", "", lambda one: ", ".join(str(run.recipe.training.seed) for run in one.counted)
    yield f"held-out {task.samples}", "measured for the scores and penalties", _held_out
    yield "device", "of each run", _each(lambda run: run.environment.device if run.environment else "")
    yield "threads", "of each run", _each(lambda run: run.environment.threads if run.environment else "")
    yield "state", "", _each(lambda run: run.state)


_PENALTIES = {
    "jacfrob": ("Jacobian norm", "∫ ‖εᵀ∇f‖² dt / dim"),
    "kinetic": ("kinetic energy", "∫ ‖f‖² dt / dim"),
}


def _paper_of(configurations: Sequence[Configuration]) -> Paper | None:
    """The figures of the paper, if the recipes of all configurations carry the same ones."""
    paper, *others = {one.recipe.paper for one in configurations}
    return None if others else paper


def _paper_time(hours: float, gpus: int) -> str:
    """``24.4 h on 1 GPU``."""
    return f"{hours:g} h on {gpus} GPU" + ("s" if gpus > 1 else "")


def _paper_columns(configurations: Sequence[Configuration]) -> Mapping[str, Mapping[str, str]]:
    """The cells by row of the two runs for which the paper gives figures (its tables 1 and 2)."""
    paper = _paper_of(configurations)
    if paper is None:
        return {}
    rnode = {
        "bits/dim, dirty": f"{paper.bits_dirty:g} bits/dim",
        "bits/dim, clean": f"{paper.bits_clean:g} bits/dim",
        "training time": _paper_time(paper.hours, paper.gpus),
        "parameters": f"{paper.parameters:.2e}".replace("e+0", "e"),  # as the paper writes it
    }
    columns = {"RNODE, Finlay et al. 2020": rnode}
    if paper.vanilla_bits is not None and paper.vanilla_hours is not None:
        vanilla_time = _paper_time(paper.vanilla_hours, paper.gpus)
        vanilla = {"bits/dim, dirty": f"{paper.vanilla_bits:g} bits/dim", "training time": vanilla_time}
        columns["FFJORD, Finlay et al. 2020"] = vanilla
    return columns


# cells ---------------------------------------------------------------------------------------------------------


def _known(name: str, text: Callable[[float], str] = significant) -> _Cell:
    """The mean of a quantity as text; empty if it was not measured."""

    def cell(one: Configuration) -> str:
        value = one.mean(name)
        return text(value) if math.isfinite(value) else "" if math.isnan(value) else "infinite"

    return cell


def _score(name: str) -> _Cell:
    return lambda one: _known(name, lambda value: f"{with_error(value, one.error(name))} {one.task.short_unit}")(
        one
    )


def _difference(one: Configuration, base: Configuration) -> str:
    found = _compared(one, base)
    return "" if found is None else f"{_change(found, one.task)}: {found.verdict}"


def _compared(one: Configuration, base: Configuration) -> Difference | None:
    return None if one is base else paired_difference(one, base)


def _change(found: Difference, task: Task) -> str:
    return f"{change_with_error(found.mean, found.error)} {task.short_unit}"


def _each(text: Callable[..., object]) -> _Cell:
    """What ``text`` gives for each run, each once."""
    return lambda one: "; ".join(dict.fromkeys(str(text(run)) for run in one.runs))


def _held_out(one: Configuration) -> str:
    known = [run.result.evaluation.samples for run in one.counted if run.result is not None]
    return " or ".join(dict.fromkeys(f"{count:,}" for count in known))


def _parameters(one: Configuration) -> str:
    try:
        return f"{sum(each.numel() for each in one.recipe.build_flow().parameters()):,}"
    except RnodeError:  # a plugin that is not installed here
        return ""


def lambdas_text(one: Configuration) -> str:
    """``kinetic 0.01, jacfrob 0.01``, or ``none``."""
    terms = [f"{name} {strength_text(strength)}" for name, strength in one.recipe.regularizers.items()]
    return ", ".join(terms) or "none"


# sentences around the table ------------------------------------------------------------------------------------


def _notes(configurations: Sequence[Configuration], base: Configuration, *, paper: bool) -> Iterator[str]:
    """The notes below the table."""
    task, samples = base.task, base.task.samples
    yield (
        f"± is the standard error over the seeds, or over the held-out {samples} if there is one seed. Scores, "
        f"test NFE and penalties are measured with the weights that have the lowest validation {task.likelihood}. "
        "A run that is not finished counts only if its configuration has no finished one, with its last validation "
        "and without an error. Lower is better."
    )
    if any(_difference(one, base) for one in configurations):
        yield (
            f"The row “against {base.label}” compares two configurations {task.sample} by {task.sample}. Errors "
            "that both share drop out of it. It reads “better” or “worse” if the 95 % interval of the mean "
            f"difference excludes zero. With one seed the interval covers the choice of the {samples}, but not the "
            "luck of a training run. Train several seeds (--seeds 3) to cover both."
        )
    if paper:
        yield (
            "Columns in italics are tables 1 and 2 of Finlay et al. (2020), measured by its authors on other "
            "hardware."
        )


def summary(configurations: Sequence[Configuration]) -> list[str]:
    """A sentence on what came out of each configuration, and one on the paper."""
    base, paper = base_of(configurations), _paper_of(configurations)
    sentences = [_sentence(one, base) for one in configurations]
    if paper is not None:
        hours = _paper_time(paper.hours, paper.gpus)
        sentences.append(f"Finlay et al. (2020) report {paper.bits_dirty:g} {base.task.unit} after {hours}.")
    return sentences


def _sentence(one: Configuration, base: Configuration) -> str:
    task = one.task
    if not (score := _score(task.quantities[0].name)(one)):
        return f"{one.label} has not been validated yet ({one.runs[0].state})."
    text = (
        f"{one.label} reaches {score}{task.per_sample} on held-out {task.samples} with {_known('nfe_test')(one)} "
        f"evaluations for a solve, after {_known('training_seconds', duration)(one)} of training"
    )
    if (found := _compared(one, base)) is not None:
        text += f", {_change(found, task)} against {base.label} ({found.verdict})"
    return f"{text}."
