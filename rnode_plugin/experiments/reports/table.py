"""The table of a report, with a column for each configuration, and the sentences around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from ...core.schedules import strength_text
from ...errors import RnodeError
from ...plugins.registry import resolve_regularizers
from ...text import change_with_error, duration, signed, significant, with_error
from ..recipes.task import Task
from ..runs.contents import RunContents
from .configurations import Configuration, Difference, base_of, jacobian_norm, paired_difference


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: the quantity.
        meaning: its unit or what it means.
        cells: a text for each column, empty for a value that is not known.
        detail: whether a reader needs the row less often.
    """

    name: str
    meaning: str
    cells: tuple[str, ...]
    detail: bool = False


@dataclass(frozen=True)
class Table:
    """The labels of the columns, the rows, and the notes below them."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


_Cell = Callable[[Configuration], str]
_Line = tuple[str, str, _Cell]
"""The name and the meaning of a row, and the function that gives its cell for a configuration."""


def make_table(configurations: Sequence[Configuration]) -> Table:
    """The table of some configurations. A quantity that none of them has measured has no row."""
    base = base_of(configurations)
    rows: list[Row] = []
    for detail, lines in ((False, _main_lines(configurations, base)), (True, _detail_lines(configurations, base))):
        for name, meaning, cell in lines:
            cells = tuple(cell(each) for each in configurations)
            if any(cells):
                rows.append(Row(name, meaning, cells, detail))
    return Table(tuple(each.label for each in configurations), tuple(rows), tuple(_notes(configurations, base)))


def _main_lines(configurations: Sequence[Configuration], base: Configuration) -> Iterator[_Line]:
    """The rows that are always shown, in their order."""
    task = base.task
    for number, each in enumerate((*task.quantities, *task.baselines)):
        yield each.heading, each.meaning, _score(each.name)
        if number == 0:
            meaning = f"{each.heading}, {task.sample} by {task.sample}"
            yield f"against {base.label}", meaning, lambda one: _difference(one, base)
    sizes = {run.evaluation.nfe_batch_size for one in configurations for run in one.runs if run.evaluation}
    batches = f", batches of {' or '.join(map(str, sorted(sizes)))} {task.samples}" if sizes else ""
    yield "NFE, test", f"evaluations of all blocks by the test solver{batches}", _known("nfe_test")
    yield "training time", "without validation", _known("training_seconds", duration)
    yield "λ", "weights of the penalties", lambdas_text


def _detail_lines(configurations: Sequence[Configuration], base: Configuration) -> Iterator[_Line]:
    """The rows that a reader unfolds, in their order."""
    task, runs = base.task, [run for one in configurations for run in one.runs]
    yield "time per step", "median", _known("seconds_per_step", lambda seconds: f"{significant(seconds)} s")
    yield "NFE, training", "per batch, all blocks, last tenth of the steps", _known("nfe_train")
    whole = {name for run in runs for name in _undivided(run)}
    known = {
        "jacfrob": ("Jacobian norm", jacobian_norm(configurations)),
        "kinetic": ("kinetic energy", "∫ ‖f‖² dt / dim"),
    }
    for name in dict.fromkeys(["jacfrob", "kinetic", *(name for run in runs for name in run.penalties)]):
        heading, meaning = known.get(name, (name, "penalty" if name in whole else "penalty / dim"))
        yield heading, f"{meaning}, test solver", _known(name)
    likelihood = task.likelihood
    meaning = f"{likelihood} by the training solver minus {likelihood} by the test solver"
    yield "solver gap", meaning, _known("gap", lambda gap: f"{signed(gap)} {task.short_unit}")
    yield "steps", "", _known("steps", lambda steps: f"{steps:,.0f}")
    yield "parameters", "", _parameters
    yield "training solver", "", lambda one: one.recipe.solver.text
    yield "test solver", "", lambda one: one.recipe.test_solver.text
    yield "weights", "that are measured", lambda one: one.recipe.weights
    yield "seeds", "", lambda one: ", ".join(str(run.recipe.training.seed) for run in one.counted)
    yield f"held-out {task.samples}", "measured for the scores and penalties", _held_out
    yield "device", "of each run", _each(lambda run: run.environment.device if run.environment else "")
    yield "devices", "that train a run together", _each(lambda run: run.devices if run.environment else "")
    yield "threads", "of each run", _each(lambda run: run.environment.threads if run.environment else "")
    yield "state", "", _each(lambda run: run.state)


# cells ---------------------------------------------------------------------------------------------------------


def _known(name: str, text: Callable[[float], str] = significant) -> _Cell:
    """A cell with the mean of a quantity as text, empty if it was not measured."""

    def cell(one: Configuration) -> str:
        value = one.mean(name)
        return text(value) if math.isfinite(value) else "" if math.isnan(value) else "infinite"

    return cell


def _score(name: str) -> _Cell:
    """A cell with the mean of a score, its standard error and the unit."""

    def cell(one: Configuration) -> str:
        return _known(name, lambda value: f"{with_error(value, one.error(name))} {one.task.short_unit}")(one)

    return cell


def _difference(one: Configuration, base: Configuration) -> str:
    found = _compared(one, base)
    return "" if found is None else f"{_change(found, one.task)}: {found.verdict}"


def _compared(one: Configuration, base: Configuration) -> Difference | None:
    return None if one is base else paired_difference(one, base)


def _change(found: Difference, task: Task) -> str:
    return f"{change_with_error(found.mean, found.error)} {task.short_unit}"


def _each(text: Callable[..., object]) -> _Cell:
    """A cell with the text of each run, where equal texts stand once."""
    return lambda one: "; ".join(dict.fromkeys(str(text(run)) for run in one.runs))


def _held_out(one: Configuration) -> str:
    known = [run.evaluation.samples for run in one.counted if run.evaluation is not None]
    return " or ".join(dict.fromkeys(f"{count:,}" for count in known))


def _parameters(one: Configuration) -> str:
    try:
        return f"{sum(each.numel() for each in one.recipe.build_flow().parameters()):,}"
    except RnodeError:  # a plugin that is not installed here
        return ""


def _undivided(run: RunContents) -> Collection[str]:
    """The names of the penalties that are not divided by the number of dimensions."""
    if run.evaluation is not None:
        return run.evaluation.undivided
    try:
        return resolve_regularizers(run.recipe.measured).undivided
    except RnodeError:  # of a plugin that is not installed here
        return ()


def lambdas_text(one: Configuration) -> str:
    """``kinetic 0.01, jacfrob 0.01``, or ``none``."""
    terms = [f"{name} {strength_text(strength)}" for name, strength in one.recipe.regularizers.items()]
    return ", ".join(terms) or "none"


# sentences around the table ------------------------------------------------------------------------------------


def _notes(configurations: Sequence[Configuration], base: Configuration) -> Iterator[str]:
    task, samples = base.task, base.task.samples
    over_samples = "".join(f" The error of “{each.heading}” is over the {samples}." for each in task.baselines)
    yield (
        f"± is the standard error over the seeds, or over the held-out {samples} if there is one seed."
        f"{over_samples} Scores, test NFE and penalties are measured with the weights that have the lowest "
        f"validation {task.likelihood}. A run that is not finished counts only if its configuration has no "
        "finished one, with its last validation and without an error. Lower is better."
    )
    for one in configurations:
        if len(steps := {run.done for run in one.counted}) > 1:
            numbers = ", ".join(f"{each:,}" for each in sorted(steps))
            yield (
                f"The runs of “{one.label}” were trained for different numbers of steps ({numbers}). Its means and "
                "errors therefore show more than the luck of a seed. --resume continues a run."
            )
    if any(_compared(one, base) for one in configurations):
        yield (
            f"The row “against {base.label}” compares two configurations {task.sample} by {task.sample}. Errors "
            "that both share drop out of it. It reads “better” or “worse” if the 95 % interval of the mean "
            f"difference excludes zero. The interval covers the choice of the {samples}. With one seed it does not "
            "cover the luck of a training run. Train several seeds (--seeds 3) to cover both."
        )


def summary(configurations: Sequence[Configuration]) -> list[str]:
    """A sentence on the result of each configuration."""
    base = base_of(configurations)
    return [_sentence(one, base) for one in configurations]


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
