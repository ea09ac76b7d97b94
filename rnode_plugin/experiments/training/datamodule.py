"""Gives Lightning the images or the table of a recipe. A batch is a function of the seed and the step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import pytorch_lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from ...errors import ConfigError
from ..data import ImageArray, ImageData, Table
from ..data.batches import ArrayDataset, keep_batch, leave_signals_to_parent, signals_held_back
from ..random_streams import Stream, stream_seed
from ..recipes.recipe import Recipe
from .plan import steps_per_epoch

if TYPE_CHECKING:
    from torch.utils.data import Dataset, Sampler

D = TypeVar("D", bound=ImageData | Table)


class StepOrder(DistributedSampler[list[int]]):
    """Orders the training samples into the batches of one device, each a list of numbers of samples.

    The samples of a step are a function of the seed and the number of the step. Each pass through the samples has a
    new order. A step takes the next samples in that order, and each device takes its part of them, so two devices
    with half the batch see the same samples as one device with the whole batch. Samples that are left over at the
    end of a pass are used after the next shuffle.

    An iteration begins at ``next_step()`` and ends with the epoch in which that step lies, or never. An epoch has
    as many steps as one pass has full batches for.

    Args:
        samples: number of training samples.
        batch_size: samples per device and batch.
        seed: the seed of the orders.
        accumulate: batches per device and step.
        world, rank: number of devices, and which of them this one is.
        next_step: number of the step at which an iteration begins, counted from 0.
        endless: whether an iteration never ends, and so has no length.
    """

    def __init__(
        self,
        samples: int,
        *,
        batch_size: int,
        seed: int,
        accumulate: int = 1,
        world: int = 1,
        rank: int = 0,
        next_step: Callable[[], int] = int,
        endless: bool = False,
    ) -> None:
        # A DistributedSampler, because on several devices Lightning replaces any other sampler by its own, which
        # would shuffle by the epoch. The base class asks its data set only for its length
        numbers = cast("Dataset[list[int]]", range(samples))
        super().__init__(numbers, num_replicas=world, rank=rank, seed=seed, drop_last=True)
        self._samples, self._batch_size = samples, batch_size
        self._next_step, self._endless = next_step, endless
        batches = samples // (batch_size * world)
        # with fewer batches in an epoch than a step accumulates, Lightning takes the step at the end of the epoch
        self._accumulate = min(accumulate, batches)
        self._steps = batches // max(1, self._accumulate)  # of an epoch
        self._known: tuple[int, torch.Tensor] | None = None  # the last pass and its order

    def __len__(self) -> int:
        if self._endless:
            raise TypeError("an endless order has no length")
        return self._steps * self._accumulate

    def __iter__(self) -> Iterator[list[int]]:
        # asked when an iteration begins, not before, because only then a resumed Trainer knows its step
        first = self._next_step()
        end = None if self._endless else (first // self._steps + 1) * self._steps
        for step in itertools.count(first) if end is None else range(first, end):
            yield from self.batches_of(step)

    def batches_of(self, step: int) -> list[list[int]]:
        """Return the samples in each batch that this device takes at ``step``, counted from 0."""
        size = self._batch_size
        # The samples of a step lie side by side in the order of the pass, batch by batch, and in each of these
        # device by device. One device with `accumulate` batches cuts them as so many devices with one batch do
        of_step = self._accumulate * self.num_replicas * size
        number, index = divmod(step, self._steps)
        # the seed and the number of a pass alone decide its order
        if self._known is None or self._known[0] != number:
            generator = torch.Generator().manual_seed(stream_seed(self.seed, Stream.ORDER, number))
            self._known = number, torch.randperm(self._samples, generator=generator)
        of_all = self._known[1][index * of_step : (index + 1) * of_step].tolist()
        firsts = range(self.rank * size, of_step, self.num_replicas * size)
        return [of_all[first : first + size] for first in firsts]


class ValidationOrder(DistributedSampler[list[int]]):
    """Gives the batches of the held-out samples to the devices by turns, each a list of numbers of samples.

    All devices together validate the batches that one device would. The noise of a batch is a function of its
    number, and an adaptive solver chooses its steps for a whole batch, so a validation has the same values on any
    number of devices. Lightning waits for as many batches of each device. Those that are missing at the end are
    empty.

    Args:
        samples: number of held-out samples.
        batch_size: samples per batch.
        world, rank: number of devices, and which of them this one is.
    """

    def __init__(self, samples: int, *, batch_size: int, world: int = 1, rank: int = 0) -> None:
        numbers = cast("Dataset[list[int]]", range(samples))  # a DistributedSampler as StepOrder is one
        super().__init__(numbers, num_replicas=world, rank=rank, shuffle=False)
        self._numbers, self._batch_size = range(samples), batch_size

    def __len__(self) -> int:
        return math.ceil(len(self._numbers) / (self._batch_size * self.num_replicas))

    def __iter__(self) -> Iterator[list[int]]:
        for turn in range(len(self)):
            first = (turn * self.num_replicas + self.rank) * self._batch_size
            yield list(self._numbers[first : first + self._batch_size])


class RecipeLoader(DataLoader[Tensor]):
    """Loads the batches of a :class:`RecipeDataModule`, and lets Lightning resume in the middle of an epoch.

    Lightning warns about other loaders, because they would begin the epoch again. This one has no state to save,
    because its sampler knows its position from the step.
    """

    def __iter__(self) -> Any:  # the iterator of PyTorch, whose class has no public name
        with signals_held_back():
            return super().__iter__()

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        pass


class RecipeDataModule(L.LightningDataModule, Generic[D]):
    """Gives any ``Trainer`` the training and held-out samples of a recipe.

    The recipe's seed and the number of the step decide which samples a step takes, so a resumed run continues with
    the samples after its last step.

    Args:
        recipe: names the data, the batch sizes and the workers.
        data: the samples themselves, if they are loaded already.
        download: fetch the data set if it is missing.
        endless: whether one epoch of the Trainer never ends. Otherwise it is one pass through the samples.
    """

    def __init__(
        self, recipe: Recipe, *, data: D | None = None, download: bool = False, endless: bool = False
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self._data = data
        self._download, self._endless = download, endless

    @property
    def data(self) -> D:
        """All samples, which are loaded on first use.

        Raises:
            DataError: the data set is missing or does not fit the recipe.
        """
        if self._data is None:
            self._data = cast("D", self.recipe.load_data())
        return self._data

    def prepare_data(self) -> None:
        """Download the data set if it is missing. Lightning calls this in one process per machine."""
        if self._data is None and self._download:
            self.recipe.load_data(download=True)

    def setup(self, stage: str) -> None:
        """Refuse samples that fill no step, and a Trainer that takes them in another order.

        Raises:
            ConfigError: the samples are too few, or the Trainer has ``overfit_batches``.
        """
        if getattr(self.trainer, "overfit_batches", 0):  # an attribute that Lightning sets without declaring it
            raise ConfigError(
                "overfit_batches of the Trainer takes samples one by one, without the order of the recipe: set "
                "data.train_images or data.train_rows to a few samples in its place."
            )
        devices = self._share[0]
        steps_per_epoch(self.recipe, len(self.data.train), devices)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Load batches of the training samples. An epoch has only as many as fill whole steps."""
        world, rank, accumulate = self._share
        order = StepOrder(
            len(self.data.train),
            batch_size=self.recipe.kind.batch_size(self.recipe.data, len(self.data.train)),
            seed=self.recipe.training.seed,
            accumulate=accumulate,
            world=world,
            rank=rank,
            next_step=lambda: 0 if self.trainer is None else self.trainer.global_step,
            endless=self._endless,
        )
        return self._loader(self.data.train, order)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Load batches of the held-out samples, each batch on exactly one device, so that means count it once."""
        world, rank, _ = self._share
        order = ValidationOrder(
            len(self.data.val), batch_size=self.recipe.data.val_batch_size, world=world, rank=rank
        )
        return self._loader(self.data.val, order)

    def _loader(self, samples: ImageArray, order: Sampler[list[int]]) -> DataLoader[Tensor]:
        workers = self.recipe.data.workers
        # pinned memory is copied to a GPU while Python prepares the next kernels
        return RecipeLoader(
            ArrayDataset(samples),
            batch_size=None,  # the order gives whole batches
            sampler=order,
            collate_fn=keep_batch,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=leave_signals_to_parent,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )

    @property
    def _share(self) -> tuple[int, int, int]:
        """The number of devices, the rank of this one, and the batches per device and step."""
        if (trainer := self.trainer) is None:
            return 1, 0, 1
        return trainer.world_size, trainer.global_rank, trainer.accumulate_grad_batches


class ImageDataModule(RecipeDataModule[ImageData]):
    """Gives any ``Trainer`` the training and held-out images of a recipe; see :class:`RecipeDataModule`.

    Batches are uint8 ``(B, C, H, W)``.

    Args:
        recipe, data, download, endless: see :class:`RecipeDataModule`.

    Example:
        >>> from rnode_plugin import ImageDataModule, get_recipe
        >>> data = ImageDataModule(get_recipe("digits"))
        >>> data.data.train.shape, next(iter(data.train_dataloader())).shape
        ((1500, 1, 8, 8), torch.Size([50, 1, 8, 8]))
    """


class TableDataModule(RecipeDataModule[Table]):
    """Gives any ``Trainer`` the rows in the table of a recipe; see :class:`RecipeDataModule`.

    Batches are float32 ``(B, C)``, with the modeled columns before the given ones. The Trainer validates on the
    rows that choose the weights, and the rows in ``data.held_out`` are left for an evaluation.

    Args:
        recipe, data, download, endless: see :class:`RecipeDataModule`.

    Example:
        >>> from rnode_plugin import get_recipe
        >>> data = TableDataModule(get_recipe("table"))
        >>> next(iter(data.train_dataloader())).shape
        torch.Size([200, 8])
    """
