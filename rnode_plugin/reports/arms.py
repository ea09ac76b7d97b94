"""Arms: runs that differ by their seed only, their means and errors, and the difference of two arms."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..core.schedules import final_strength, strength_text
from ..evaluation.measures import Measure
from ..recipes.recipe import Recipe, TableData
from .runs import Run, arm_of

_LEVEL = 0.95
_RESOLUTION = 1e-5  # bits/dim, nats: single precision tells no smaller differences apart


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
        name: see :func:`~rnode_plugin.reports.runs.arm_of`.
        runs: one for each seed.
        look: how it is drawn.
    """

    label: str
    name: str
    runs: tuple[Run, ...]
    look: Look

    @property
    def measure(self) -> Measure:
        """The measure of its kind of data, the same for all arms of a report."""
        return self.runs[0].measure

    @property
    def recipe(self) -> Recipe:
        """The settings that all of its runs share, but for the seed."""
        return self.runs[0].recipe

    @property
    def finished(self) -> bool:
        """Whether all of its runs have a result."""
        return all(run.result is not None for run in self.runs)

    @property
    def counted(self) -> tuple[Run, ...]:
        """The runs whose figures are shown: those with a result, or all if none has one."""
        return tuple(run for run in self.runs if run.result is not None) or self.runs

    def mean(self, name: str) -> float:
        """The mean of a quantity over the counted runs; NaN if one of them has not measured it.

        Args:
            name: a quantity of the measure (``dirty`` and ``clean`` of images, ``nll`` of tables) or a baseline,
                ``nfe_test``, ``nfe_train``, ``gap``, ``train_seconds``, ``seconds_per_step``, ``steps``, or the
                name of a penalty.
        """
        return float(np.mean([run.numbers.get(name, math.nan) for run in self.counted]))

    def error(self, name: str) -> float | None:
        """Standard error of a score or of ``nfe_test``: over the seeds; with one seed over the samples.

        None if it is not known: no error of one NFE, nor of runs that are not finished.
        """
        result, values = self.counted[0].result, [run.numbers[name] for run in self.counted]
        if result is None or (len(values) == 1 and name == "nfe_test"):
            return None
        if len(values) > 1:
            return float(np.std(values, ddof=1) / len(values) ** 0.5)
        return result["evaluation"][name][f"stderr_{self.measure.samples}"]


def nfe_batches(arms: Sequence[Arm], *, validation: bool = False) -> str:
    """The batches of the test NFE, in words: those of the best weights, or of a validation during training."""
    sizes = {
        run.recipe.data.val_batch_size if validation or run.result is None
        else run.result["evaluation"].get("nfe_batch_size", run.recipe.data.val_batch_size)
        for arm in arms for run in arm.counted
    }  # fmt: skip
    return f"batches of {' or '.join(map(str, sorted(sizes)))} {arms[0].measure.samples}, each solved alone"


def penalties_of(arms: Sequence[Arm]) -> list[str]:
    """Names of all measured penalties, ``jacfrob`` and ``kinetic`` first."""
    names = dict.fromkeys(name for arm in arms for run in arm.runs for name in run.penalties)
    return sorted(names, key=lambda name: {"jacfrob": 0, "kinetic": 1}.get(name, 2))


def settings_of(recipe: Recipe, **changes: Any) -> str:
    """A text of all settings but the seed, with some of them changed: equal for recipes that are alike."""
    training = dataclasses.replace(recipe.training, seed=0)
    return repr(dataclasses.replace(recipe, training=training, **changes).to_plain())


def group_runs(runs: Sequence[Run]) -> list[Arm]:
    """The arms of some runs: the paper's first, the others as they come, a sweep by its lambdas."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(settings_of(run.recipe), []).append(run)
    order = list(dict.fromkeys([*_LOOKS, *(arm_of(group[0].recipe) for group in groups.values())]))
    members = sorted(
        groups.values(), key=lambda group: (order.index(arm_of(group[0].recipe)), by_strength(group[0].recipe))
    )
    spare, taken, arms = _more_looks(), set(), []
    for label, group in zip(_labels([group[0] for group in members]), members, strict=True):
        name = arm_of(group[0].recipe)
        look = _LOOKS[name] if name in _LOOKS and name not in taken else next(spare)
        taken.add(name)
        arms.append(Arm(label, name, tuple(group), look))
    return arms


def by_strength(recipe: Recipe) -> list[tuple[str, float, str]]:
    """A key that sorts recipes with the same penalties by their lambdas, schedules by their last value."""
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


# ---- differences ----


@dataclass(frozen=True)
class Difference:
    """A mean difference in the unit of the measure, and its standard error.

    Attributes:
        mean: negative if the arm is better than the one it is compared with.
        error: standard error of the mean, from ``count`` paired differences.
        count: number of differences.
        unit: ``seeds``, ``images`` or ``rows``.
    """

    mean: float
    error: float
    count: int
    unit: str

    @property
    def verdict(self) -> str:
        """``better`` or ``worse`` if the 95 % interval (Student's t) excludes 0, else ``no difference shown``."""
        from scipy.stats import t

        if abs(self.mean) <= max(_RESOLUTION, float(t.ppf((1 + _LEVEL) / 2, self.count - 1)) * self.error):
            return "no difference shown"
        return "better" if self.mean < 0 else "worse"


def base_of(arms: Sequence[Arm]) -> Arm:
    """The arm that the others are compared with: one without penalties, preferably with the others' solver."""
    plain = [arm for arm in arms if arm.name == "none"] or list(arms)
    solvers = [arm.recipe.solver for arm in arms if arm.name != "none"]
    return next((arm for arm in plain if arm.recipe.solver in solvers), plain[0])


def paired_difference(arm: Arm, base: Arm) -> Difference | None:
    """Scores of ``arm`` minus those of ``base`` on the same held-out samples with the same noise.

    The scores are the first quantity of the measure: dirty bits/dim of images. With several common seeds each
    difference is the mean over the samples for one seed; with one seed there is one for each sample. None if
    nothing can be paired.
    """
    pairs = [(one, other) for one in arm.runs for other in base.runs if _same_samples(one, other)]
    name = arm.measure.quantities[0].name
    differences = [one.scores[name] - other.scores[name] for one, other in pairs]
    if not differences:
        return None
    unit = arm.measure.samples if len(differences) == 1 else "seeds"
    values = differences[0] if unit != "seeds" else np.array([each.mean() for each in differences])
    if len(values) < 2:
        return None
    return Difference(float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))), len(values), unit)


def _same_samples(one: Run, other: Run) -> bool:
    """Whether both evaluated the same samples with the same noise."""

    def shown(run: Run) -> tuple[object, ...]:
        # the noise is a function of the seed and of a sample's place in its batch
        data, training = run.recipe.data, run.recipe.training
        if isinstance(data, TableData):
            split = (data.validation, data.held_out, data.split_seed)
            chosen = (data.root, data.checksum, data.modelled, data.given, *split)
        else:
            chosen = (data.root, data.shape, data.levels, training.val_images)
        return (data.name, *chosen, data.val_batch_size, training.seed, len(run.scores[run.measure.sample]))

    return len(one.scores[one.measure.sample]) > 0 and shown(one) == shown(other)
