"""What separates two arms: bits/dim image by image, the other quantities as ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .arms import Arm
from .reading import Run

__all__ = ["Difference", "base_of", "paired_difference"]

_LEVEL = 0.95
_RESOLUTION = 1e-5  # bits/dim: single precision tells no smaller differences apart


@dataclass(frozen=True)
class Difference:
    """A mean difference in bits/dim and how far it can be trusted.

    Attributes:
        mean: negative if the arm is better than the one it is compared with.
        error: standard error of the mean, from ``count`` paired differences.
        count: how many there are.
        unit: what they are differences of, ``images`` or ``seeds``.
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
    """Dirty bits/dim of ``arm`` minus those of ``base`` on the same held-out images with the same noise.

    Over the seeds that both have, if there are several: the difference for one seed is a mean over the images. With
    one seed over the images. None if nothing can be paired.
    """
    pairs = [(one, other) for one in arm.runs for other in base.runs if _same_images(one, other)]
    differences = [one.images["dirty"] - other.images["dirty"] for one, other in pairs]
    if not differences:
        return None
    unit = "images" if len(differences) == 1 else "seeds"
    values = differences[0] if unit == "images" else np.array([each.mean() for each in differences])
    if len(values) < 2:
        return None
    return Difference(float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))), len(values), unit)


def _same_images(one: Run, other: Run) -> bool:
    """Whether image by image both saw the same pixels and noise."""

    def shown(run: Run) -> tuple[object, ...]:
        # the noise is a function of the seed and of an image's place in its batch
        data, training = run.recipe.data, run.recipe.training
        images = (data.name, data.root, data.shape, data.levels, data.val_batch_size, training.val_images)
        return (*images, training.seed, len(run.images["image"]))

    return len(one.images["image"]) > 0 and shown(one) == shown(other)
