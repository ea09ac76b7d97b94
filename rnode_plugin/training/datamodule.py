"""The images or the table of a recipe as a LightningDataModule; a batch is a function of the seed and the step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import pytorch_lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from ..core.random_streams import Stream, stream_seed
from ..data import ArrayDataset, ImageArray, ImageData, Table
from ..data.images import keep_batch
from ..errors import ConfigError
from ..evaluation.loading import load_data
from ..evaluation.measures import measure_of
from ..recipes.recipe import Recipe, Start
from .runs import RunPlan
from .trainer import batches_trained

D = TypeVar("D", ImageData, Table)


class EpochOrder(DistributedSampler[list[int]]):
    """The batches of one device in the order in which it takes them, each a list of training images.

    The run passes through the images again and again, each time in a new order, a function of seed and pass. A step
    takes the next images of that order, and each device its part of them: two devices with half the batch see the
    images of one device with the whole batch, at once or one after the other. The images that do not fill a whole
    step wait for another order.

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
        limit: batches per epoch, or their share, as the Trainer's ``limit_train_batches``.
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
        self._batches = whole // accumulate * accumulate or whole
        self._accumulate = min(accumulate, self._batches)
        taken = self._batches
        if isinstance(limit, int):
            taken = min(limit, taken)
        elif limit is not None:
            taken = int(limit * taken)
        self._steps_per_epoch = math.ceil(taken / max(1, self._accumulate))
        self._done = divmod(done, max(1, taken))

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[int]]:
        # Lightning sets the epoch after workers were asked for their first batches, so a run that goes on knows it
        # from the start
        epoch = max(self.epoch, self._done[0])
        first = self._done[1] if epoch == self._done[0] else 0
        for batch in range(first, self._batches):
            step, part = divmod(batch, self._accumulate)
            yield self._images_of(epoch * self._steps_per_epoch + step, part)

    def _images_of(self, step: int, part: int) -> list[int]:
        """The images of this device in the batch ``part`` of a step."""
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
    """Every ``world``-th image, each image on exactly one device, so that means count each image once."""

    def __init__(self, images: int, *, world: int, rank: int) -> None:
        super().__init__(range(images), num_replicas=world, rank=rank, shuffle=False)  # pyright: ignore[reportArgumentType]
        self._mine = range(rank, images, world)

    def __len__(self) -> int:
        return len(self._mine)

    def __iter__(self) -> Iterator[int]:
        return iter(self._mine)


class _Resumable(DataLoader[Tensor]):
    """A loader without a state: its sampler finds its place from the batches that were trained on."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class RecipeDataModule(L.LightningDataModule, Generic[D]):
    """The training and held-out samples of a recipe, for any ``Trainer``.

    Which samples a step takes is a function of the recipe's seed and the step. A run that is resumed goes on after
    the batches that were trained on.
    """

    def __init__(self, recipe: Recipe, *, data: D | None = None, download: bool = False) -> None:
        super().__init__()
        self.recipe = recipe
        self._data, self._download = data, download

    @property
    def data(self) -> D:
        """All samples.

        Raises:
            DataError: the data set is missing or does not fit the recipe.
        """
        if self._data is None:
            self._data = load_data(self.recipe)  # pyright: ignore[reportAttributeAccessIssue]  (of the recipe's kind)
        return self._data  # pyright: ignore[reportReturnType]

    def prepare_data(self) -> None:
        """Download what is missing, once per machine."""
        if self._data is None and self._download:
            load_data(self.recipe, download=True)

    def setup(self, stage: str) -> None:
        (world, _, _), held_out = self._share, len(self.data.val)
        RunPlan.of(self.recipe, len(self.data.train), world)  # refuses too few training samples
        if held_out < world:
            samples = measure_of(self.recipe).samples
            raise ConfigError(f"{held_out} held-out {samples} are too few for {world} devices: each needs one.")

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Batches of the training samples; only as many per epoch as fill whole steps."""
        done = 0 if self.trainer is None else batches_trained(self.trainer)
        return self._loader(self.data.train, None, self._order(done))  # an order of whole batches

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Batches of the held-out samples, each sample on one device."""
        world, rank, _ = self._share
        share = EvenShare(len(self.data.val), world=world, rank=rank)
        return self._loader(self.data.val, self.recipe.data.val_batch_size, share)

    def samples_of_step(self, step: int) -> list[int]:
        """Numbers of the training samples that this device takes at ``step``, counted from 0."""
        _, _, accumulate = self._share
        batches = itertools.islice(self._order(step * accumulate), accumulate)
        return list(itertools.chain.from_iterable(batches))

    def _order(self, done: int) -> EpochOrder:
        world, rank, accumulate = self._share
        return EpochOrder(
            len(self.data.train),
            batch_size=self.recipe.data.batch_size,
            seed=self.recipe.training.seed,
            accumulate=accumulate,
            world=world,
            rank=rank,
            start=self.recipe.start,
            done=done,
            limit=1.0 if self.trainer is None else self.trainer.limit_train_batches,
        )

    def _loader(
        self, samples: ImageArray, batch_size: int | None, sampler: EpochOrder | EvenShare
    ) -> DataLoader[Tensor]:
        workers = self.recipe.data.workers
        return _Resumable(
            ArrayDataset(samples),
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=keep_batch,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )

    @property
    def _share(self) -> tuple[int, int, int]:
        """Devices, the number of this one, and batches per device and step."""
        if (trainer := self.trainer) is None:
            return 1, 0, 1
        return trainer.world_size, trainer.global_rank, trainer.accumulate_grad_batches


class ImageDataModule(RecipeDataModule[ImageData]):
    """The training and held-out images of a recipe, for any ``Trainer``; see :class:`RecipeDataModule`.

    Batches are uint8 ``(B, C, H, W)``.

    Example:
        >>> from rnode_plugin import ImageDataModule, get_recipe
        >>> data = ImageDataModule(get_recipe("digits"))
        >>> data.images.train.shape, next(iter(data.train_dataloader())).shape
        ((1500, 1, 8, 8), torch.Size([50, 1, 8, 8]))

    Args:
        recipe: names the data set, how many of its images to use, the batch sizes and the workers.
        images: the images themselves, if they are loaded already.
        download: fetch the data set if it is missing.
    """

    def __init__(self, recipe: Recipe, *, images: ImageData | None = None, download: bool = False) -> None:
        super().__init__(recipe, data=images, download=download)

    @property
    def images(self) -> ImageData:
        """All images, which ``data`` are too."""
        return self.data


class TableDataModule(RecipeDataModule[Table]):
    """The rows of the table of a recipe, for any ``Trainer``; see :class:`RecipeDataModule`.

    Batches are float32 ``(B, C)``: the columns that are modelled, then those that are given. The Trainer validates
    on the rows that choose the weights; those of ``data.held_out`` are left for an evaluation.

    Args:
        recipe: names the table, its columns and the batch size.
        data: the table, if it is loaded already.
        download: fetch a table that is missing.

    Example:
        >>> from rnode_plugin import get_recipe
        >>> data = TableDataModule(get_recipe("table"))
        >>> next(iter(data.train_dataloader())).shape
        torch.Size([200, 8])
    """
