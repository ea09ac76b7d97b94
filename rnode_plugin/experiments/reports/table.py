"""The table of a report, with a column for each configuration."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...core.schedules import strength_text
from ..quantities import Entry, state_of, table_of
from ..recipes.kind import Kind
from ..text import change_with_error
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


_Line = tuple[bool, str, str, str]
"""Whether a row is a detail, its name and its meaning, and its cell for a configuration."""


def make_table(configurations: Sequence[Configuration]) -> Table:
    """The table of some configurations. A quantity that none of them has measured has no row."""
    base, entries = base_of(configurations), quantities(configurations)
    rows: list[Row] = []
    for lines in zip(*(_column(one, base, entries) for one in configurations), strict=True):
        detail, name, meaning, _ = lines[0]
        cells = tuple(cell for *_, cell in lines)
        if any(cells):
            rows.append(Row(name, meaning, cells, detail))
    return Table(tuple(one.label for one in configurations), tuple(rows))


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


def _column(one: Configuration, base: Configuration, entries: Mapping[str, Entry]) -> Iterator[_Line]:
    """The cells of a configuration, row by row; an empty one for what is not known of it."""
    kind, recipe = one.kind, one.recipe
    for key, entry in entries.items():
        if not entry.folded:
            yield False, entry.heading, entry.meaning, known(one, key, entries)
        if key == kind.quantities[0].name:
            difference = compared(one, base)
            text = "" if difference is None else f"{change(difference, kind)}: {difference.verdict}"
            yield False, f"against {base.label}", f"{entry.heading}, {kind.sample} by {kind.sample}", text
    yield False, "λ", "weights of the penalties", lambdas_text(one)
    for key, entry in entries.items():
        if entry.folded:
            yield True, entry.heading, entry.meaning, known(one, key, entries)
    count = "" if one.flow is None else f"{sum(each.numel() for each in one.flow.parameters()):,}"
    yield True, "parameters", "", count
    yield True, "training solver", "", recipe.solver.text
    yield True, "test solver", "", recipe.test_solver.text
    yield True, "weights", "that are measured", recipe.weights
    yield True, "seeds", "", ", ".join(str(run.recipe.training.seed) for run in one.measured_runs)
    samples = " or ".join(dict.fromkeys(f"{each.samples:,}" for each in one.evaluations))
    yield True, f"held-out {kind.samples}", "measured for the scores and penalties", samples
    places = [run.environment for run in one.runs]
    device = dict.fromkeys(each.device if each else "" for each in places)
    devices = dict.fromkeys(str(each.devices) if each else "" for each in places)
    threads = dict.fromkeys(str(each.threads) if each else "" for each in places)
    yield True, "device", "of each run", "; ".join(device)
    yield True, "devices", "that train a run together", "; ".join(devices)
    yield True, "threads", "of each run", "; ".join(threads)
    yield True, "state", "", "; ".join(dict.fromkeys(map(state_of, one.runs)))


def known(one: Configuration, key: str, entries: Mapping[str, Entry]) -> str:
    """The mean of a quantity with its error, empty if it was not measured."""
    entry = entries[key]
    return entry.text(one.mean(key), one.error(key, over_samples=entry.over_samples))


def compared(one: Configuration, base: Configuration) -> Difference | None:
    """The difference of two configurations; None for one and itself, or if they cannot be paired."""
    return None if one is base else paired_difference(one, base)


def change(difference: Difference, kind: Kind) -> str:
    """A difference with its error, in the unit of the kind."""
    return f"{change_with_error(difference.mean, difference.error)} {kind.short_unit}"


def lambdas_text(one: Configuration) -> str:
    """``kinetic 0.01, jacfrob 0.01``, or ``none``."""
    terms = [f"{name} {strength_text(strength)}" for name, strength in one.recipe.regularizers.items()]
    return ", ".join(terms) or "none"
