"""Arms: runs that differ by their seed only, each arm with a label, a colour, a line style and a marker."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..core.schedules import final_strength, strength_text
from ..evaluation.measures import Measure
from ..recipes.recipe import Recipe
from .reading import Run, arm_of

__all__ = ["Arm", "Look", "group_runs"]


class Look(NamedTuple):
    """How an arm is drawn; colours of Okabe and Ito, which colour-blind readers can tell apart."""

    colour: str
    line: str | tuple[int, tuple[int, ...]]
    marker: str


_LOOKS = {
    "none": Look("#d55e00", "--", "o"),
    "ffjord": Look("#e69f00", (0, (6, 2)), "v"),
    "kinetic": Look("#009e73", "-.", "^"),
    "jacfrob": Look("#cc79a7", ":", "s"),
    "rnode": Look("#0072b2", "-", "D"),
}
_COLOURS = ("#56b4e9", "#808080", "#b8a800", "#d55e00", "#009e73", "#cc79a7", "#0072b2", "#e69f00")
_LINES_AND_MARKERS = (
    ((0, (4, 1, 1, 1)), "P"),
    ((0, (1, 1)), "X"),
    ((0, (8, 2, 2, 2)), "*"),
    ((0, (3, 1, 1, 1, 1, 1)), "p"),
    ((0, (10, 3)), "h"),
)


def _more_looks() -> Iterator[Look]:
    """Looks for arms of other names: all different until every colour has had every line."""
    for shift in itertools.cycle(range(len(_LINES_AND_MARKERS))):
        for place, colour in enumerate(_COLOURS):
            yield Look(colour, *_LINES_AND_MARKERS[(place + shift) % len(_LINES_AND_MARKERS)])


@dataclass(frozen=True)
class Arm:
    """Runs of the same settings but for the seed.

    Attributes:
        label: tells it apart from the other arms of a report.
        name: what it trains on, see :func:`~rnode_plugin.reports.reading.arm_of`.
        runs: one for each seed.
        look: how it is drawn.
    """

    label: str
    name: str
    runs: tuple[Run, ...]
    look: Look

    @property
    def measure(self) -> Measure[Any]:
        """What is measured of its kind of data, the same for all arms of a report."""
        return self.runs[0].measure

    @property
    def recipe(self) -> Recipe:
        """The settings that all of its runs share, but for the seed."""
        return self.runs[0].recipe


def group_runs(runs: Sequence[Run]) -> list[Arm]:
    """The arms of some runs: the paper's first, the others as they come, a sweep by its lambdas."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        seedless = dataclasses.replace(run.recipe, training=dataclasses.replace(run.recipe.training, seed=0))
        groups.setdefault(repr(seedless.to_plain()), []).append(run)
    names = [arm_of(group[0].recipe) for group in groups.values()]
    order = list(dict.fromkeys([*_LOOKS, *names]))
    members = sorted(map(tuple, groups.values()), key=lambda group: _place(group[0].recipe, order))
    spare, taken, arms = _more_looks(), set(), []
    for label, group in zip(_labels([group[0] for group in members]), members, strict=True):
        name = arm_of(group[0].recipe)
        look = _LOOKS[name] if name in _LOOKS and name not in taken else next(spare)
        taken.add(name)
        arms.append(Arm(label, name, group, look))
    return arms


def _place(recipe: Recipe, order: Sequence[str]) -> tuple[int, list[tuple[str, float, str]]]:
    return order.index(arm_of(recipe)), by_strength(recipe)


def by_strength(recipe: Recipe) -> list[tuple[str, float, str]]:
    """A key that sorts recipes with the same penalties by their lambdas, schedules by what they end at."""
    return sorted((name, final_strength(each), str(each)) for name, each in recipe.regularizers.items())


def _labels(runs: Sequence[Run]) -> list[str]:
    """For each run the shortest text that tells it apart from the others."""
    texts: tuple[Callable[[Run], str], ...] = (
        lambda run: arm_of(run.recipe),
        lambda run: _with_lambdas(run.recipe),
        lambda run: f"{_with_lambdas(run.recipe)} ({run.recipe.solver.method})",
        lambda run: run.recipe.name,
        lambda run: str(run.path),
    )
    labels = [texts[0](run) for run in runs]
    for text in texts[1:]:
        labels = [text(run) if labels.count(label) > 1 else label for run, label in zip(runs, labels, strict=True)]
    return labels


def _with_lambdas(recipe: Recipe) -> str:
    """``kinetic=0.01+jacfrob=0.1``; the name of the arm if it has no penalty."""
    used = {name: each for name, each in recipe.regularizers.items() if final_strength(each) > 0}
    terms = [f"{name}={strength_text(strength)}" for name, strength in used.items()]
    return "+".join(terms) or arm_of(recipe)
