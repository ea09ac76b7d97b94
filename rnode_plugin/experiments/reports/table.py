"""The table of a report, with a column for each configuration."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from ...core.schedules import strength_text
from ...text import change_with_error
from ..quantities import Entry, overlap_text, state_of, table_of
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
    """The labels of the columns, and the rows."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]


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
    return Table(tuple(each.label for each in configurations), tuple(rows))


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
            yield entry.heading, entry.meaning, partial(known, key=key, entry=entry)
        if key == kind.quantities[0].name:
            meaning = f"{entry.heading}, {kind.sample} by {kind.sample}"
            yield f"against {base.label}", meaning, lambda one: _difference(one, base)
    yield "λ", "weights of the penalties", lambdas_text


def _detail_lines(configurations: Sequence[Configuration]) -> Iterator[_Line]:
    """The rows that a reader unfolds, in their order."""
    for key, entry in quantities(configurations).items():
        if entry.folded:
            yield entry.heading, entry.meaning, partial(known, key=key, entry=entry)
    yield "parameters", "", _parameters
    yield "training solver", "", lambda one: one.recipe.solver.text
    yield "test solver", "", lambda one: one.recipe.test_solver.text
    yield "weights", "that are measured", lambda one: one.recipe.weights
    yield "seeds", "", lambda one: ", ".join(str(run.recipe.training.seed) for run in one.measured_runs)
    yield f"held-out {configurations[0].kind.samples}", "measured for the scores and penalties", _held_out
    yield "trained on", "held-out samples that the weights have seen", trained_on
    yield "device", "of each run", _each(lambda run: run.environment.device if run.environment else "")
    yield "devices", "that train a run together", _each(lambda run: run.devices if run.environment else "")
    yield "threads", "of each run", _each(lambda run: run.environment.threads if run.environment else "")
    yield "state", "", _each(state_of)


# cells ---------------------------------------------------------------------------------------------------------


def known(one: Configuration, key: str, entry: Entry) -> str:
    """The mean of a quantity with its error, empty if it was not measured."""
    return entry.text(one.mean(key), one.error(key, over_samples=entry.over_samples))


def _difference(one: Configuration, base: Configuration) -> str:
    difference = compared(one, base)
    return "" if difference is None else f"{change(difference, one.kind)}: {difference.verdict}"


def compared(one: Configuration, base: Configuration) -> Difference | None:
    """The difference of two configurations; None for one and itself, or if they cannot be paired."""
    return None if one is base else paired_difference(one, base)


def change(difference: Difference, kind: Kind) -> str:
    """A difference with its error, in the unit of the kind."""
    return f"{change_with_error(difference.mean, difference.error)} {kind.short_unit}"


def _each(text: Callable[[RunContents], object]) -> _Cell:
    """A cell with the text of each run, where equal texts stand once."""
    return lambda one: "; ".join(dict.fromkeys(str(text(run)) for run in one.runs))


def _held_out(one: Configuration) -> str:
    return " or ".join(dict.fromkeys(f"{each.samples:,}" for each in one.evaluations))


def trained_on(one: Configuration) -> str:
    """How many held-out samples the weights of each run were trained on."""
    return "; ".join(dict.fromkeys(overlap_text(each.overlap, one.kind) for each in one.evaluations))


def _parameters(one: Configuration) -> str:
    return "" if one.flow is None else f"{sum(each.numel() for each in one.flow.parameters()):,}"


def lambdas_text(one: Configuration) -> str:
    """``kinetic 0.01, jacfrob 0.01``, or ``none``."""
    terms = [f"{name} {strength_text(strength)}" for name, strength in one.recipe.regularizers.items()]
    return ", ".join(terms) or "none"
