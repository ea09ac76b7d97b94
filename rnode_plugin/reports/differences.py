"""What separates two arms: scores sample by sample, the other quantities as ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..recipes.recipe import TableData
from .arms import Arm
from .reading import Run

__all__ = ["Difference", "base_of", "paired_difference"]

_LEVEL = 0.95
_RESOLUTION = 1e-5  # bits/dim, nats: single precision tells no smaller differences apart


@dataclass(frozen=True)
class Difference:
    """A mean difference in the unit of the measure and how far it can be trusted.

    Attributes:
        mean: negative if the arm is better than the one it is compared with.
        error: standard error of the mean, from ``count`` paired differences.
        count: how many there are.
        unit: what they are differences of: ``seeds``, ``images`` or ``rows``.
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

    The scores are the first quantity of the measure: dirty bits/dim of images. Over the seeds that both have, if
    there are several: the difference for one seed is a mean over the samples. With one seed over the samples. None
    if nothing can be paired.
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
    """Whether sample by sample both saw the same values and noise."""

    def shown(run: Run) -> tuple[object, ...]:
        # the noise is a function of the seed and of a sample's place in its batch
        data, training = run.recipe.data, run.recipe.training
        if isinstance(data, TableData):
            chosen = (data.root, data.modelled, data.given, data.validation, data.held_out, data.split_seed)
        else:
            chosen = (data.root, data.shape, data.levels, training.val_images)
        return (data.name, *chosen, data.val_batch_size, training.seed, len(run.scores[run.measure.sample]))

    return len(one.scores[one.measure.sample]) > 0 and shown(one) == shown(other)
