"""The images or the table of a recipe as a LightningDataModule; a batch is a function of the seed and the step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import pytorch_lightning as L
import torch
from pytorch_lightning.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from ...core.random_streams import Stream, stream_seed
from ..data import ImageArray, ImageData, Table
from ..data.batches import ArrayDataset, keep_batch
from ..recipes.recipe import Recipe
from .plan import check_held_out, steps_per_epoch

D = TypeVar("D", ImageData, Table)


class StepOrder(DistributedSampler[list[int]]):
    """The batches of one device in the order in which it takes them, each a list of training samples.

    The samples of a step are a function of the seed and the number of the step. Each pass through the samples has
    another order. A step takes the next samples of that order, and each device its part of them: two devices with
    half the batch see the samples of one device with the whole batch. Samples left over from a pass are reused in a
    later one.

    An iteration begins at ``next_step()`` and ends with the epoch in which that step lies, or never. An epoch is
    as many steps as make a pass with full batches.

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
        # Lightning leaves a sampler of this class alone
        numbers: Any = range(samples)
        super().__init__(numbers, num_replicas=world, rank=rank, seed=seed, drop_last=True)
        self._samples, self._batch_size = samples, batch_size
        self._next_step, self._endless = next_step, endless
        batches = samples // (batch_size * world)
        # with fewer samples than a step needs, Lightning makes its step at the end of the epoch
        self._accumulate = min(accumulate, batches)
        self._steps = batches // max(1, self._accumulate)  # of an epoch
        self._known: tuple[int, torch.Tensor] | None = None  # the last pass and its order

    def __len__(self) -> int:
        if self._endless:
            raise TypeError("an endless order has no length")
        return self._steps * self._accumulate

    def __iter__(self) -> Iterator[list[int]]:
        first = self._next_step()
        end = None if self._endless else (first // self._steps + 1) * self._steps
        for step in itertools.count(first) if end is None else range(first, end):
            yield from self.batches_of(step)

    def batches_of(self, step: int) -> list[list[int]]:
        """The samples of each batch that this device takes at ``step``, counted from 0."""
        size = self._batch_size
        of_step = self._accumulate * self.num_replicas * size
        number, place = divmod(step, self._steps)
        of_all = self._order(number)[place * of_step : (place + 1) * of_step].tolist()
        firsts = ((part * self.num_replicas + self.rank) * size for part in range(self._accumulate))
        return [of_all[first : first + size] for first in firsts]

    def _order(self, number: int) -> torch.Tensor:
        if self._known is None or self._known[0] != number:
            generator = torch.Generator().manual_seed(stream_seed(self.seed, Stream.ORDER, number))
            self._known = number, torch.randperm(self._samples, generator=generator)
        return self._known[1]


class _Resumable(DataLoader[Tensor]):
    """A loader without a state: its sampler finds its place from the step."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class RecipeDataModule(L.LightningDataModule, Generic[D]):
    """The training and held-out samples of a recipe, for any ``Trainer``.

    Which samples a step takes is a function of the recipe's seed and the step, so a run that is resumed continues
    after its last step.

    Args:
        recipe: names the data, the batch sizes and the workers.
        data: the samples themselves, if they are loaded already.
        download: fetch the data set if it is missing.
        endless: whether the training samples never end. If they do, an epoch of the Trainer is a pass.
    """

    def __init__(
        self, recipe: Recipe, *, data: D | None = None, download: bool = False, endless: bool = False
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self._data: Any = data  # of the recipe's kind
        self._download, self._endless = download, endless

    @property
    def data(self) -> D:
        """All samples.

        Raises:
            DataError: the data set is missing or does not fit the recipe.
        """
        if self._data is None:
            self._data = self.recipe.load_data()
        return self._data

    def prepare_data(self) -> None:
        """Download what is missing, once per machine."""
        if self._data is None and self._download:
            self.recipe.load_data(download=True)

    def setup(self, stage: str) -> None:
        devices = self._share[0]
        steps_per_epoch(self.recipe, len(self.data.train), devices)  # refuses samples that fill no step
        check_held_out(self.recipe, len(self.data.val), devices)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Batches of the training samples; only as many per epoch as fill whole steps."""
        return self._loader(self.data.train, None, self._order())  # an order of whole batches

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Batches of the held-out samples, each sample on exactly one device, so that means count each once."""
        world, rank, _ = self._share
        share = UnrepeatedDistributedSampler(self.data.val, num_replicas=world, rank=rank, shuffle=False)
        return self._loader(self.data.val, self.recipe.data.val_batch_size, share)

    def _order(self) -> StepOrder:
        world, rank, accumulate = self._share
        return StepOrder(
            len(self.data.train),
            batch_size=self.recipe.data.batch_size,
            seed=self.recipe.training.seed,
            accumulate=accumulate,
            world=world,
            rank=rank,
            next_step=lambda: 0 if self.trainer is None else self.trainer.global_step,
            endless=self._endless,
        )

    def _loader(
        self, samples: ImageArray, batch_size: int | None, sampler: DistributedSampler[Any]
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

    Args:
        recipe, data, download, endless: see :class:`RecipeDataModule`.

    Example:
        >>> from rnode_plugin import ImageDataModule, get_recipe
        >>> data = ImageDataModule(get_recipe("digits"))
        >>> data.data.train.shape, next(iter(data.train_dataloader())).shape
        ((1500, 1, 8, 8), torch.Size([50, 1, 8, 8]))
    """


class TableDataModule(RecipeDataModule[Table]):
    """The rows of the table of a recipe, for any ``Trainer``; see :class:`RecipeDataModule`.

    Batches are float32 ``(B, C)``: the columns that are modelled, then those that are given. The Trainer validates
    on the rows that choose the weights; the rows of ``data.held_out`` are left for an evaluation.

    Args:
        recipe, data, download, endless: see :class:`RecipeDataModule`.

    Example:
        >>> from rnode_plugin import get_recipe
        >>> data = TableDataModule(get_recipe("table"))
        >>> next(iter(data.train_dataloader())).shape
        torch.Size([200, 8])
    """
