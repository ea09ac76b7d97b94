"""The steps of a run, the order of its images, and its learning rate: functions of seed and step alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch.utils.data import DistributedSampler

from ..core.random_streams import Stream, stream_seed
from ..errors import ConfigError
from ..recipes.recipe import Optimizer, Recipe, Start, TableData

__all__ = ["EpochOrder", "EvenShare", "RunPlan", "learning_rate_factor"]


@dataclass(frozen=True)
class RunPlan:
    """The steps of a run.

    Attributes:
        images: training images.
        batch_size: images per device and step, after the start of the run.
        world: number of devices.
        total: steps of the whole run.
        val_every: steps between two validations.
        accumulate: batches per device and step.
        start: whose first steps may take batches of another size.
    """

    images: int
    batch_size: int
    world: int
    total: int
    val_every: int
    accumulate: int = 1
    start: Start = field(default_factory=Start)

    @property
    def batches(self) -> str:
        """The sizes of the batches in words."""
        return self.start.described(self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Steps that take all images once after the start; what does not fill one waits for another order."""
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
        called = "rows" if isinstance(recipe.data, TableData) else "images"
        batch, accumulate = recipe.data.batch_size, training.accumulate
        per_epoch = images // (batch * world * accumulate)
        if per_epoch == 0:
            devices = f" on each of {world} devices" if world > 1 else ""
            times = f", {accumulate} times" if accumulate > 1 else ""
            raise ConfigError(
                f"{images} training {called} do not fill one batch of {batch}{devices}{times}: use a smaller "
                "--batch-size."
            )
        limits = [training.max_steps, training.max_epochs and training.max_epochs * per_epoch]
        total = min(limit for limit in limits if limit is not None)
        check = training.val_every_steps or training.val_every * per_epoch
        return RunPlan(images, batch, world, total, min(check, total), accumulate, recipe.start)


class EpochOrder(DistributedSampler[list[int]]):
    """The batches of one device in the order in which it takes them, each a list of training images.

    The run passes through the images again and again, each time in a new order, a function of seed and pass. A step
    takes the next images of that order, and each device its part of them: two devices with half the batch see what
    one device with the whole batch sees, at once or one after the other. The images that do not fill a whole step
    wait for another order.

    An epoch is as many steps as make a pass with full batches; without a start, it is a pass. With smaller batches
    at the start, a pass begins in the middle of an epoch. Which images a step takes follows from its number alone.

    Args:
        images: number of training images.
        batch_size: images per device and batch.
        seed: of the orders.
        accumulate: batches per device and step.
        world, rank: number of devices, and which of them this one is.
        start: whose first steps may take batches of another size.
        done: batches that this device has trained on already; the first iteration continues after them.
        limit: batches per epoch, or which part of them, as the Trainer's ``limit_train_batches``.

    Attributes:
        batches: per device and epoch, as many as fill whole steps.
    """

    def __init__(
        self,
        images: int,
        *,
        batch_size: int,
        seed: int,
        accumulate: int = 1,
        world: int = 1,
        rank: int = 0,
        start: Start | None = None,
        done: int = 0,
        limit: int | float | None = None,
    ) -> None:
        super().__init__(range(images), num_replicas=world, rank=rank, seed=seed, drop_last=True)  # pyright: ignore[reportArgumentType]
        self._images, self._batch_size = images, batch_size
        self._start = start or Start()
        self._known: tuple[int, torch.Tensor] | None = None  # the order of the last pass that was asked for
        whole = images // (batch_size * world)
        # fewer images than one step needs: Lightning makes its step at the end of the epoch
        self.batches = whole // accumulate * accumulate or whole
        self._accumulate = min(accumulate, self.batches)
        taken = self.batches
        if isinstance(limit, int):
            taken = min(limit, taken)
        elif limit is not None:
            taken = int(limit * taken)
        self._steps_per_epoch = math.ceil(taken / max(1, self._accumulate))
        self._done = divmod(done, max(1, taken))

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        # Lightning sets the epoch after workers were asked for their first batches, so a run that goes on knows it
        # from the start
        epoch = max(self.epoch, self._done[0])
        first = self._done[1] if epoch == self._done[0] else 0
        for batch in range(first, self.batches):
            step, part = divmod(batch, self._accumulate)
            yield self._images_of(epoch * self._steps_per_epoch + step, part)

    def _images_of(self, step: int, part: int) -> list[int]:
        """What this device takes in the batch ``part`` of a step."""
        size = self._start.size_at(step, self._batch_size)
        number, used = self._place(step)
        first = used + (part * self.num_replicas + self.rank) * size
        return self._order(number)[first : first + size].tolist()

    def _place(self, step: int) -> tuple[int, int]:
        """The pass in which a step lies, and how many images of it are used by the steps before."""
        of_one = self.num_replicas * self._accumulate
        at_start, later = self._start.size_at(0, self._batch_size) * of_one, self._batch_size * of_one
        if step < self._start.steps:
            number, steps = divmod(step, self._images // at_start)
            return number, steps * at_start
        number, steps = divmod(self._start.steps, self._images // at_start)
        used = steps * at_start
        left = (self._images - used) // later  # steps that the pass still holds when the start is over
        after = step - self._start.steps
        if after < left:
            return number, used + after * later
        more, steps = divmod(after - left, self._images // later)
        return number + 1 + more, steps * later

    def _order(self, number: int) -> torch.Tensor:
        if self._known is None or self._known[0] != number:
            generator = torch.Generator().manual_seed(stream_seed(self.seed, Stream.ORDER, number))
            self._known = number, torch.randperm(self._images, generator=generator)
        return self._known[1]


class EvenShare(DistributedSampler[int]):
    """Every ``world``-th image, each image on exactly one device, so that means count each image once.

    Args:
        images: number of images.
        world, rank: number of devices, and which of them this one is.
    """

    def __init__(self, images: int, *, world: int = 1, rank: int = 0) -> None:
        super().__init__(range(images), num_replicas=world, rank=rank, shuffle=False)  # pyright: ignore[reportArgumentType]
        self._mine = range(rank, images, world)

    def __len__(self) -> int:
        return len(self._mine)

    def __iter__(self) -> Iterator[int]:
        return iter(self._mine)


def learning_rate_factor(settings: Optimizer, total: Callable[[], float]) -> Callable[[int], float]:
    """The factor on ``settings.lr`` at each step: linear warm-up, then constant or half a cosine down to zero.

    Args:
        settings: of the optimizer.
        total: gives the steps of the whole run; called for the cosine only, and only after the warm-up.
    """

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
        if settings.schedule == "constant" or step <= settings.warmup:
            return warmup
        after = (step - settings.warmup) / max(1, total() - settings.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, after)))

    return factor
