"""The table of a report, with a column for each configuration, and the sentences around it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...core.schedules import strength_text
from ...text import change_with_error
from ..quantities import Entry, overlap_text, state_of, steps_of, table_of, worse_than_baseline
from ..recipes.kind import Kind
from ..runs.contents import RunContents
from .configurations import Configuration, Difference, base_of, paired_difference


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
    for detail, lines in ((False, _main_lines(configurations, base)), (True, _detail_lines(configurations))):
        for name, meaning, cell in lines:
            cells = tuple(cell(each) for each in configurations)
            if any(cells):
                rows.append(Row(name, meaning, cells, detail))
    return Table(tuple(each.label for each in configurations), tuple(rows), tuple(_notes(configurations, base)))


def quantities(configurations: Sequence[Configuration], *, validated: bool = False) -> dict[str, Entry]:
    """The table of quantities of these configurations, or of their validations for ``validated``."""
    evaluations = [each for one in configurations for each in one.evaluations]
    known = *(one.recipe.measured for one in configurations), *(each.penalties for each in evaluations)
    return table_of(
        configurations[0].kind,
        penalties=dict.fromkeys(itertools.chain(*known)),
        solvers=[one.recipe.test_solver for one in configurations],
        evaluations=evaluations,
        whole_jacobian=all(one.has_whole_jacobian(validated=validated) for one in configurations),
    )


def _main_lines(configurations: Sequence[Configuration], base: Configuration) -> Iterator[_Line]:
    """The rows that are always shown, in their order."""
    kind = base.kind
    for key, entry in quantities(configurations).items():
        if not entry.folded:
            yield entry.heading, entry.meaning, _known(key, entry)
        if key == kind.quantities[0].name:
            meaning = f"{entry.heading}, {kind.sample} by {kind.sample}"
            yield f"against {base.label}", meaning, lambda one: _difference(one, base)
    yield "λ", "weights of the penalties", lambdas_text


def _detail_lines(configurations: Sequence[Configuration]) -> Iterator[_Line]:
    """The rows that a reader unfolds, in their order."""
    for key, entry in quantities(configurations).items():
        if entry.folded:
            yield entry.heading, entry.meaning, _known(key, entry)
    yield "parameters", "", _parameters
    yield "training solver", "", lambda one: one.recipe.solver.text
    yield "test solver", "", lambda one: one.recipe.test_solver.text
    yield "weights", "that are measured", lambda one: one.recipe.weights
    yield "seeds", "", lambda one: ", ".join(str(run.recipe.training.seed) for run in one.measured_runs)
    yield f"held-out {configurations[0].kind.samples}", "measured for the scores and penalties", _held_out
    yield "trained on", "held-out samples that the weights have seen", _trained_on
    yield "device", "of each run", _each(lambda run: run.environment.device if run.environment else "")
    yield "devices", "that train a run together", _each(lambda run: run.devices if run.environment else "")
    yield "threads", "of each run", _each(lambda run: run.environment.threads if run.environment else "")
    yield "state", "", _each(state_of)


# cells ---------------------------------------------------------------------------------------------------------


def _known(key: str, entry: Entry) -> _Cell:
    """A cell with the mean of a quantity, empty if it was not measured."""
    return lambda one: entry.text(one.mean(key), one.error(key, over_samples=entry.over_samples))


def _difference(one: Configuration, base: Configuration) -> str:
    difference = _compared(one, base)
    return "" if difference is None else f"{_change(difference, one.kind)}: {difference.verdict}"


def _compared(one: Configuration, base: Configuration) -> Difference | None:
    return None if one is base else paired_difference(one, base)


def _change(difference: Difference, kind: Kind) -> str:
    return f"{change_with_error(difference.mean, difference.error)} {kind.short_unit}"


def _each(text: Callable[[RunContents], object]) -> _Cell:
    """A cell with the text of each run, where equal texts stand once."""
    return lambda one: "; ".join(dict.fromkeys(str(text(run)) for run in one.runs))


def _held_out(one: Configuration) -> str:
    return " or ".join(dict.fromkeys(f"{each.samples:,}" for each in one.evaluations))


def _trained_on(one: Configuration) -> str:
    return "; ".join(dict.fromkeys(overlap_text(each.overlap, one.kind) for each in one.evaluations))


def _parameters(one: Configuration) -> str:
    return "" if one.flow is None else f"{sum(each.numel() for each in one.flow.parameters()):,}"


def lambdas_text(one: Configuration) -> str:
    """``kinetic 0.01, jacfrob 0.01``, or ``none``."""
    terms = [f"{name} {strength_text(strength)}" for name, strength in one.recipe.regularizers.items()]
    return ", ".join(terms) or "none"


# sentences around the table ------------------------------------------------------------------------------------


def _notes(configurations: Sequence[Configuration], base: Configuration) -> Iterator[str]:
    kind, samples = base.kind, base.kind.samples
    over_samples = "".join(f" The error of “{each.heading}” is over the {samples}." for each in kind.baselines)
    yield (
        f"± is the standard error over the seeds, or over the held-out {samples} if there is one seed."
        f"{over_samples} Scores, test NFE and penalties are measured with the weights that have the lowest "
        f"validation {kind.likelihood}. A run that is not finished counts only if its configuration has no "
        "finished one, with its last validation and without a standard error. Lower is better."
    )
    for one in configurations:
        if len(steps := {steps_of(run) for run in one.measured_runs}) > 1:
            numbers = ", ".join(f"{each:,}" for each in sorted(steps))
            yield (
                f"The runs of “{one.label}” were trained for different numbers of steps ({numbers}). Its means and "
                "errors therefore show more than the luck of a seed. --resume continues a run."
            )
    for one in configurations:
        if any(each.overlap is None for each in one.evaluations):
            yield f"It is not known how many of the held-out {samples} of “{one.label}” were trained on."
        elif any(each.overlap and (each.overlap.held_out or each.overlap.val) for each in one.evaluations):
            yield f"{_trained_on(one)} of “{one.label}” were trained on, so its scores promise too much."
    if any(_compared(one, base) for one in configurations):
        yield (
            f"The row “against {base.label}” compares two configurations {kind.sample} by {kind.sample}. Errors "
            "that both share drop out of it. It reads “better” or “worse” if the 95 % interval of the mean "
            f"difference excludes zero. The interval covers the choice of the {samples}. With one seed it does not "
            "cover the luck of a training run. Train several seeds (--seeds 3) to cover both."
        )


def summary(configurations: Sequence[Configuration]) -> list[str]:
    """A sentence on the result of each configuration."""
    base, table = base_of(configurations), quantities(configurations)
    return [_sentence(one, table, base) for one in configurations]


def _sentence(one: Configuration, table: Mapping[str, Entry], base: Configuration) -> str:
    """A sentence on the scores of a configuration and on its price, or on how far it has come."""
    kind, score, states = one.kind, one.kind.quantities[0].name, ", ".join(map(state_of, one.measured_runs))

    def known(key: str) -> str:
        return _known(key, table[key])(one)

    if not known(score):
        return f"{one.label} has not been validated yet ({states})."
    if not one.evaluations:
        return (
            f"{one.label} is {states}. The last validation of its training has {known(score)}{kind.per_sample} on "
            f"held-out {kind.samples} at {known('nfe_test')} evaluations for a solve, without a standard error."
        )
    limited = any(run.result is not None and run.result.out_of_time for run in one.measured_runs)
    text = (
        f"{one.label}{f' ({states})' if limited else ''} reaches {known(score)}{kind.per_sample} on held-out "
        f"{kind.samples} with {known('nfe_test')} evaluations for a solve, after {known('training_seconds')} of "
        "training"
    )
    if (difference := _compared(one, base)) is not None:
        text += f", {_change(difference, kind)} against {base.label} ({difference.verdict})"
    warning = worse_than_baseline(one.evaluations, kind)
    return f"{text}." if warning is None else f"{text}. It is {warning}."
