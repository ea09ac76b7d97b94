"""Gives Lightning the images or the table of a recipe. A batch is a function of the seed and the step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar, cast

import pytorch_lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from ...core.random_streams import Stream, stream_seed
from ..data import ImageArray, ImageData, Table
from ..data.batches import ArrayDataset, keep_batch, leave_signals_to_parent
from ..recipes.recipe import Recipe
from ..recipes.tasks import load_data
from .plan import batch_size, check_held_out, steps_per_epoch

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
        number, place = divmod(step, self._steps)
        of_all = self._order(number)[place * of_step : (place + 1) * of_step].tolist()
        firsts = ((part * self.num_replicas + self.rank) * size for part in range(self._accumulate))
        return [of_all[first : first + size] for first in firsts]

    def _order(self, number: int) -> torch.Tensor:
        """Shuffle the samples for a pass, which only the seed and the number of the pass decide."""
        if self._known is None or self._known[0] != number:
            generator = torch.Generator().manual_seed(stream_seed(self.seed, Stream.ORDER, number))
            self._known = number, torch.randperm(self._samples, generator=generator)
        return self._known[1]


class _Share(DistributedSampler[int]):
    """The samples of one device in order, each sample on exactly one device, where PyTorch's own repeats some."""

    def __init__(self, samples: int, *, world: int, rank: int) -> None:
        self._places = range(rank, samples, world)

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class _Resumable(DataLoader[Tensor]):
    """A loader that Lightning can resume in the middle of an epoch.

    Lightning warns about other loaders, because they would begin the epoch again. This one has no state to save,
    because its sampler finds its place from the step.
    """

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
            self._data = cast("D", load_data(self.recipe))
        return self._data

    def prepare_data(self) -> None:
        """Download the data set if it is missing. Lightning calls this in one process per machine."""
        if self._data is None and self._download:
            load_data(self.recipe, download=True)

    def setup(self, stage: str) -> None:
        devices = self._share[0]
        steps_per_epoch(self.recipe, len(self.data.train), devices)  # refuses samples that fill no step
        check_held_out(self.recipe, len(self.data.val), devices)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Load batches of the training samples. An epoch has only as many as fill whole steps."""
        world, rank, accumulate = self._share
        order = StepOrder(
            len(self.data.train),
            batch_size=batch_size(self.recipe, len(self.data.train)),
            seed=self.recipe.training.seed,
            accumulate=accumulate,
            world=world,
            rank=rank,
            next_step=lambda: 0 if self.trainer is None else self.trainer.global_step,
            endless=self._endless,
        )
        return self._loader(self.data.train, None, order)  # the order gives whole batches

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Load batches of the held-out samples, each sample on exactly one device, so that means count it once."""
        world, rank, _ = self._share
        share = _Share(len(self.data.val), world=world, rank=rank)
        return self._loader(self.data.val, self.recipe.data.val_batch_size, share)

    def _loader(
        self, samples: ImageArray, batch_size: int | None, sampler: Sampler[list[int]] | Iterable[int]
    ) -> DataLoader[Tensor]:
        workers = self.recipe.data.workers
        # pinned memory is copied to a GPU while Python prepares the next kernels
        return _Resumable(
            ArrayDataset(samples),
            batch_size=batch_size,
            sampler=sampler,
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
