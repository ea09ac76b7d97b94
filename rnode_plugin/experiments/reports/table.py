"""The table of a report: rows are quantities, columns are configurations."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pandas

from ...core.schedules import strength_text
from ..quantities import Entry, state_of, table_of
from ..recipes.kind import Kind
from ..recipes.parts import changes_in
from ..text import change_with_error
from .configurations import Configuration, Difference, base_of, paired_difference

_SHOWN = ("nfe_test", "training_seconds", "processor_seconds")
"""Quantities that a page shows beside the scores. It shows others when a reader unfolds them."""


def make_table(configurations: Sequence[Configuration]) -> pandas.DataFrame:
    """The texts of some configurations, with the name, the meaning and ``detail`` of each row as its index.

    A ``detail`` is a row that a reader needs less often. A quantity that no configuration has measured has no row.
    """
    base, entries = base_of(configurations), quantities(configurations)
    columns = [pandas.Series(_column(one, base, entries)) for one in configurations]
    frame = pandas.concat(columns, axis=1, keys=[one.label for one in configurations])
    frame.index.names = ["name", "meaning", "detail"]
    return frame.loc[(frame != "").any(axis=1)]


def quantities(configurations: Sequence[Configuration], *, validated: bool = False) -> dict[str, Entry]:
    """The table of quantities of these configurations, or of their validations for ``validated``."""
    evaluations = [result for one in configurations for result in one.evaluations]
    penalties = *(one.recipe.measured for one in configurations), *(result.penalties for result in evaluations)
    return table_of(
        configurations[0].kind,
        penalties=dict.fromkeys(itertools.chain(*penalties)),
        solvers=[one.recipe.test_solver for one in configurations],
        evaluations=evaluations,
        whole_jacobian=all(one.has_whole_jacobian(validated=validated) for one in configurations),
    )


def _column(
    one: Configuration, base: Configuration, entries: Mapping[str, Entry]
) -> dict[tuple[str, str, bool], str]:
    """The texts of a configuration by name, meaning and detail; an empty one for what is not known of it."""
    kind, recipe, column = one.kind, one.recipe, dict[tuple[str, str, bool], str]()
    scores = {score.name: score in kind.quantities for score in (*kind.quantities, *kind.baselines)}
    for key in (*scores, *_SHOWN):
        entry = entries[key]
        column[entry.heading, entry.meaning, False] = measured(one, key, entries)
        if scores.get(key):
            difference = compared(one, base, key)
            text = "" if difference is None else f"{change(difference, kind)}: {difference.verdict}"
            column[f"{entry.heading} against {base.label}", f"{kind.sample} by {kind.sample}", False] = text
    column["λ", "weights of the penalties", False] = lambdas_text(one)
    for key in (key for key in entries if key not in (*scores, *_SHOWN)):
        column[entries[key].heading, entries[key].meaning, True] = measured(one, key, entries)
    places = [run.environment for run in one.runs]
    for name, meaning, texts in (
        ("parameters", "", [f"{sum(each.numel() for each in one.flow.parameters()):,}"] if one.flow else []),
        ("training solver", "", [recipe.solver.text]),
        ("test solver", "", [recipe.test_solver.text]),
        ("weights", "that are measured", [recipe.weights]),
        ("seeds", "", [", ".join(str(run.recipe.training.seed) for run in one.measured_runs)]),
        (f"held-out {kind.samples}", "measured for the scores and penalties",
         [f"{result.samples:,}" for result in one.evaluations]),
        ("device", "of each run", [place.device if place else "" for place in places]),
        ("devices", "that train a run together", [str(place.devices) if place else "" for place in places]),
        ("threads", "of each run", [str(place.threads) if place else "" for place in places]),
        ("changes", "of settings, in a resumed run", changes_in(one.runs[0].parts)),
        ("state", "", [state_of(run) for run in one.runs]),
    ):  # fmt: skip
        column[name, meaning, True] = "; ".join(dict.fromkeys(texts))
    return column


def measured(one: Configuration, key: str, entries: Mapping[str, Entry]) -> str:
    """The mean of a quantity with its error, if it is a score; empty if it was not measured."""
    return entries[key].text(one.mean(key), None if key == "nfe_test" else one.error(key))


def compared(one: Configuration, base: Configuration, key: str) -> Difference | None:
    """The difference of two configurations; None for one and itself, or if they cannot be paired."""
    return None if one is base else paired_difference(one, base, key)


def change(difference: Difference, kind: Kind) -> str:
    """A difference with its error, in the unit of the kind."""
    return f"{change_with_error(difference.mean, difference.error)} {kind.short_unit}"


def lambdas_text(one: Configuration) -> str:
    """``kinetic 0.01, jacfrob 0.01``, or ``none``."""
    terms = [f"{name} {strength_text(strength)}" for name, strength in one.recipe.regularizers.items()]
    return ", ".join(terms) or "none"
