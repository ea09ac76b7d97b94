"""How many steps there are, and which images and learning rate each has: functions of its number alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from ..core.random_streams import Stream, stream_seed
from ..errors import ConfigError
from ..recipes.schema import Optimizer, Recipe

__all__ = ["RunPlan", "StepBatches", "learning_rate_factor"]


@dataclass(frozen=True)
class RunPlan:
    """The steps of a run.

    Attributes:
        images: training images.
        batch_size: images per device and step.
        world: number of devices.
        total: steps of the whole run.
        check_every: steps between two validations.
        accumulate: batches per device and step.
    """

    images: int
    batch_size: int
    world: int
    total: int
    check_every: int
    accumulate: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one pass; the images that do not fill one wait for another order."""
        return self.images // self.images_per_step

    @property
    def images_per_step(self) -> int:
        """On all devices together."""
        return self.batch_size * self.world * self.accumulate

    @staticmethod
    def of(recipe: Recipe, images: int, world: int = 1) -> RunPlan:
        """The plan of a recipe for a number of images and devices.

        Raises:
            ConfigError: the images do not fill one batch on each device.
        """
        training = recipe.training
        batch, accumulate = recipe.data.batch_size, training.accumulate
        per_epoch = images // (batch * world * accumulate)
        if per_epoch == 0:
            devices = f" on each of {world} devices" if world > 1 else ""
            times = f", {accumulate} times" if accumulate > 1 else ""
            raise ConfigError(
                f"{images} training images do not fill one batch of {batch}{devices}{times}: use a smaller "
                "--batch-size."
            )
        limits = [training.max_steps, training.max_epochs and training.max_epochs * per_epoch]
        total = min(limit for limit in limits if limit is not None)
        check = training.check_every_steps or training.check_every * per_epoch
        return RunPlan(images, batch, world, total, min(check, total), accumulate)


class StepBatches(Sampler[list[int]]):
    """The indices of each step's batches, a function of seed and step.

    Each epoch is a new order of all images, cut into steps for all devices together, of which each takes its
    part: two devices with half the batch see what one with the whole batch sees, at once or one after the other.

    Args:
        plan: of the run.
        seed: of the orders.
        rank: number of this device.
        start: first step, for a run that goes on.
    """

    def __init__(self, plan: RunPlan, *, seed: int, rank: int = 0, start: int = 0) -> None:
        self._plan, self._seed, self._rank, self._start = plan, seed, rank, start

    def __len__(self) -> int:
        # of the whole run: Lightning counts the steps before ``start`` as done
        return self._plan.total * self._plan.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        plan, of_epoch, order = self._plan, -1, torch.empty(0)
        for step in range(self._start, plan.total):
            epoch, position = divmod(step, plan.steps_per_epoch)
            if epoch != of_epoch:
                seeds = torch.Generator().manual_seed(stream_seed(self._seed, Stream.ORDER, epoch))
                of_epoch, order = epoch, torch.randperm(plan.images, generator=seeds)
            start = position * plan.images_per_step
            for part in range(plan.accumulate):
                first = start + (part * plan.world + self._rank) * plan.batch_size
                yield order[first : first + plan.batch_size].tolist()


def learning_rate_factor(settings: Optimizer, *, total: int) -> Callable[[int], float]:
    """The factor on ``settings.lr`` at each step: linear warm-up, then constant or half a cosine down to zero."""

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
        if settings.schedule == "constant":
            return warmup
        after = max(0.0, (step - settings.warmup) / max(1, total - settings.warmup))
        return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, after)))

    return factor
