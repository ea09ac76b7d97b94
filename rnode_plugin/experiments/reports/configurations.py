"""Configurations, which are runs that differ only in their seed: means, errors, and the difference of two."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas

from ...core.schedules import final_strength
from ...errors import RnodeError
from ...flows.density import DensityModel
from ..evaluation.likelihood import has_whole_jacobian
from ..evaluation.measures import mean_of
from ..quantities import numbers_of, scores_of
from ..recipes.recipe import Recipe
from ..runs.contents import RunContents
from .runs import configuration_of, data_name, given_name, penalties_of, settings_of

_LEVEL = 0.95
_RESOLUTION = 1e-5  # bits/dim or nats; single precision does not resolve smaller differences
# settings of the data that have no effect on the held-out samples
_OF_TRAINING = ("batch_size", "workers", "flip", "train_images", "train_rows")
_WITHOUT = ("none", "ffjord")  # penalties
GRAY = "#767c85"
"""The color of what has no penalties, in all figures: the ink of the style file, which reads on white and black."""
_ORDER = ("none", "ffjord", "kinetic", "jacfrob", "rnode")  # as in the paper's ablation


class Configuration:
    """Runs that have the same settings, except for the seed, the same data, and the same number of devices.

    Attributes:
        label: a name that no other configuration of the report has.
        runs: one run for each seed.
        look: the color, the marker and the line style of its curves, as keywords of ``Axes.plot``.
        recipe: the settings that its runs share. The seed is the one of the first run.
        kind: what the runs of a report model, with its words and units. All have one kind.
        measured_runs: the runs that have a result, or all runs if none has one. Means and errors are over these.
        evaluations: the evaluation of each run that has a result.
        numbers: the numbers of the measured runs, a row each, with the keys of the quantities as columns.
    """

    def __init__(self, label: str, runs: Sequence[RunContents], look: Mapping[str, Any]) -> None:
        self.label, self.runs, self.look = label, runs, look
        self.recipe = runs[0].recipe
        self.kind = self.recipe.kind
        self.measured_runs = [run for run in runs if run.result is not None] or runs
        self.evaluations = [run.evaluation for run in runs if run.evaluation is not None]
        self.numbers = pandas.DataFrame(map(numbers_of, self.measured_runs))

    @functools.cached_property
    def flow(self) -> DensityModel | None:
        """A flow of the recipe with fresh weights; None if it needs a plugin that is not installed here."""
        try:
            return self.recipe.build_flow()
        except RnodeError:
            return None

    def mean(self, key: str) -> float:
        """The mean of a quantity over the measured runs; NaN if one of them has not measured it."""
        return float(np.mean(np.asarray(self.numbers[key]))) if key in self.numbers else math.nan

    def error(self, key: str) -> float | None:
        """Standard error of a score or of ``nfe_test``, over the seeds, or over the samples if there is one seed.

        It is over the samples also for a baseline, which does not depend on the seed. None for another quantity,
        for runs that are not finished, and for the NFE of one seed.
        """
        scores, baselines = ({score.name for score in some} for some in (self.kind.quantities, self.kind.baselines))
        if not self.evaluations or key not in {*scores, *baselines, "nfe_test"}:
            return None
        if len(self.numbers) > 1 and key not in baselines and key in self.numbers:
            return mean_of(np.asarray(self.numbers[key])).stderr
        score = self.evaluations[0].means.get(key)
        return None if score is None else score.stderr

    def has_whole_jacobian(self, *, validated: bool = False) -> bool:
        """Whether its penalties are those with the whole Jacobian, in evaluations or else in validations."""
        if self.evaluations and not validated:
            return all(each.whole_jacobian for each in self.evaluations)
        return self.flow is not None and has_whole_jacobian(self.flow)


def group_runs(runs: Sequence[RunContents]) -> list[Configuration]:
    """Group runs into configurations, in the order of a report.

    Configurations of the paper's ablation come first and the others as they are given. Configurations with the same
    penalties, as in a sweep, are sorted by lambda.
    """
    groups: dict[tuple[object, ...], list[RunContents]] = {}
    for run in runs:
        groups.setdefault(configuration_of(run), []).append(run)
    order: list[str] = [*_ORDER]
    ranked = []
    for number, group in enumerate(groups.values()):
        penalties, regularizers = penalties_of(group[0].recipe), group[0].recipe.regularizers
        if penalties not in order:
            order.append(penalties)
        # a schedule counts as its last value
        strengths = sorted((name, final_strength(each), str(each)) for name, each in regularizers.items())
        ranked.append((order.index(penalties), strengths, number, group))
    members = [group for *_, group in sorted(ranked)]
    looks = _looks([penalties_of(group[0].recipe) in _WITHOUT for group in members])
    return list(map(Configuration, _labels([group[0] for group in members]), members, looks))


def _looks(without: Sequence[bool]) -> list[dict[str, Any]]:
    """The look of each configuration: gray ``without`` penalties, and a color of the style with them."""
    lines, markers, used = ("-", "--", "-.", ":"), "oDs^vPX", itertools.count()
    return [
        {
            "color": GRAY if plain else f"C{next(used) % 6}",
            "marker": markers[number % 7],
            "linestyle": lines[number % 4],
        }
        for number, plain in enumerate(without)
    ]


def _labels(runs: Sequence[RunContents]) -> list[str]:
    """A label for each run that no other run has: the name that ``compare`` gave it, or the one of its penalties.

    The first setting that differs is added, between any data, because scores on different data would look like an
    ablation, and between runs that would have the same label.
    """
    if len(runs) == 1:
        return [runs[0].recipe.name]
    # a copy at another path has the name of the first one, because two names would look like two data sets
    first: dict[object, Recipe] = {}
    recipes = [first.setdefault((run.facts and run.facts.identity) or run, run.recipe) for run in runs]
    texts = [
        {
            "name": run.recipe.name,
            "data": data_name(recipe),
            **settings_of(run),
            "hash": _measured(run) or "unknown",
            "training hash": (run.facts and run.facts.train) or "unknown",
        }
        for run, recipe in zip(runs, recipes, strict=True)
    ]
    of_data = [{path: text for path, text in each.items() if _is_of_data(path)} for each in texts]
    names = [given_name(run.recipe) or penalties_of(run.recipe) for run in runs]
    labels = [f"{name}{what}" for name, what in zip(names, _differences(of_data), strict=True)]
    for label in set(labels):
        twins = [number for number, each in enumerate(labels) if each == label]
        for number, what in zip(twins, _differences([texts[each] for each in twins]), strict=True):
            labels[number] += what
    return labels


def _is_of_data(path: str) -> bool:
    """Whether a setting decides which samples are scored."""
    group, _, key = path.partition(".")
    return path == "hash" or (group == "data" and key not in (*_OF_TRAINING, "val_batch_size"))


def _differences(texts: Sequence[Mapping[str, str]]) -> list[str]:
    """The first setting by which all that differ do so, as `` (solver.step=0.5)``, else each that differs."""
    paths = dict.fromkeys(itertools.chain(*texts))
    values = {path: [each.get(path, "none") for each in texts] for path in paths}
    differ = [path for path in paths if len(set(values[path])) > 1]
    distinct = len({tuple(each.items()) for each in texts})
    chosen = [path for path in differ if len(set(values[path])) == distinct][:1] or differ
    shown = [", ".join(f"{path}={values[path][number]}" for path in chosen) for number in range(len(texts))]
    return [f" ({each})" if each else "" for each in shown]


def _measured(run: RunContents) -> str | None:
    return None if run.facts is None else run.facts.held_out


# ---- differences ----


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences, in the unit of the kind.

    Attributes:
        mean: the mean, negative if the configuration is better than the one that it is compared with.
        error: standard error of the mean, from the choice of samples and, with several seeds, from the seeds.
        freedom: degrees of freedom of the error.
        seeds: number of seeds that both have.
    """

    mean: float
    error: float
    freedom: float
    seeds: int

    @property
    def verdict(self) -> str:
        """``better`` or ``worse`` if the 95 % interval (Student's t) excludes 0, else ``no difference shown``.

        It is ``one seed`` if the runs of no other seed show what is the luck of a training.
        """
        from scipy.stats import t

        if self.seeds < 2:
            return "one seed"

        limit = max(_RESOLUTION, float(t.ppf((1 + _LEVEL) / 2, self.freedom)) * self.error)
        if not abs(self.mean) > limit:  # "not >" also holds for NaN
            return "no difference shown"
        return "better" if self.mean < 0 else "worse"


def base_of(configurations: Sequence[Configuration]) -> Configuration:
    """The configuration that the others are compared with.

    It is one without penalties, if possible with the training solver of a configuration that has penalties.
    """
    plain = [each for each in configurations if penalties_of(each.recipe) == "none"] or list(configurations)
    solvers = [each.recipe.solver for each in configurations if penalties_of(each.recipe) != "none"]
    for each in plain:
        if each.recipe.solver in solvers:
            return each
    return plain[0]


def paired_difference(one: Configuration, base: Configuration, name: str) -> Difference | None:
    """Scores of ``one`` minus scores of ``base`` on the same held-out samples with the same noise and test solver.

    The scores are the quantity ``name`` of the kind, such as dirty bits/dim of images. The error is over the
    samples, each with its mean difference over the seeds that both have. With several seeds the error over the
    seeds is added in quadrature, with the degrees of freedom of Welch and Satterthwaite. None if nothing can be
    paired.
    """
    pairs = [(run, other) for run in one.runs for other in base.runs if _same_samples(run, other, name)]
    changes = [scores_of(run, name) - scores_of(other, name) for run, other in pairs]
    # seeds may have different numbers of samples if a folder of pictures has changed between two runs
    if not changes or len(changes[0]) < 2 or len({len(each) for each in changes}) > 1:
        return None
    # the seeds share their samples, so the spread of the seeds does not show the choice of the samples
    parts = [np.mean(changes, axis=0), *([np.mean(changes, axis=1)] if len(changes) > 1 else [])]
    variances = [float(part.var(ddof=1)) / len(part) for part in parts]
    total = sum(variances)
    below = sum(each**2 / (len(part) - 1) for each, part in zip(variances, parts, strict=True))
    freedom = total**2 / below if below > 0 else len(parts[-1]) - 1.0  # without a spread any number is right
    return Difference(float(np.mean(changes)), math.sqrt(total), freedom, len(changes))


def _same_samples(one: RunContents, other: RunContents, name: str) -> bool:
    """Whether both evaluated the same samples with the same noise and the same solver."""

    def identity(run: RunContents) -> tuple[object, ...]:
        # the noise depends on the seed and on the position of a sample in its batch, hence on the size of a batch
        # pictures may be replaced by others at the same path, under the same names, and a copy is the same data
        left_out = _OF_TRAINING if run.facts is None else (*_OF_TRAINING, "root")
        data = {name: value for name, value in vars(run.recipe.data).items() if name not in left_out}
        training = run.recipe.training
        return (
            data,
            _measured(run),
            training.val_images,
            training.seed,
            len(scores_of(run, name)),
            run.recipe.test_solver,
        )

    return len(scores_of(one, name)) > 0 and identity(one) == identity(other)
