"""``ArrayDataset`` and ``loader``: batches of uint8 images or of rows of a table, read as whole slices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import ConfigError
from .images import ImageArray

__all__ = ["ArrayDataset", "keep_batch", "loader"]


class ArrayDataset(Dataset[Tensor]):
    """Images, or rows of a table, as a PyTorch data set that returns a batch in one piece.

    A ``DataLoader`` calls ``__getitems__`` with the indices of a batch; give it ``collate_fn=keep_batch``, as
    :func:`loader` does, because its default would split the batch. With ``batch_size=None`` and a sampler of lists,
    it asks for ``dataset[list]``.

    Args:
        images: ``(N, C, H, W)``, uint8; in memory, mapped from disk, or read from files. Or rows ``(N, C)``, float.
    """

    def __init__(self, images: ImageArray) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int | Sequence[int]) -> Tensor:
        """One image ``(C, H, W)``, or those of a list, ``(B, C, H, W)``; uint8."""
        return self.__getitems__([index])[0] if isinstance(index, int) else self.__getitems__(index)

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        """The samples of a batch in the order of ``indices``, as a copy."""
        wanted = np.asarray(indices, dtype=np.int64)
        # ascending positions: a mapped file is then read in one sweep
        order = np.argsort(wanted, kind="stable")
        batch = np.empty((len(wanted), *self._images.shape[1:]), dtype=self._images.dtype)
        batch[order] = self._images[wanted[order]]
        return torch.from_numpy(batch)


def keep_batch(batch: Any) -> Any:
    """The collate function for what is a batch already."""
    return batch


def loader(
    images: ImageArray,
    *,
    batch_size: int,
    shuffle: bool = False,
    drop_last: bool = False,
    seed: int | None = None,
    num_workers: int = 0,
) -> DataLoader[Tensor]:
    """A plain ``DataLoader`` of uint8 batches ``(B, C, H, W)``.

    Args:
        images: ``(N, C, H, W)``, uint8, such as ``ImageData.train``.
        shuffle: a new order each epoch.
        drop_last: leave out the last images if they do not fill a batch.
        seed: of the order; None takes it from PyTorch's global generator.
        num_workers: processes that read ahead. They help with pictures that are decoded while training, not
            with arrays in memory.

    Raises:
        ConfigError: sizes that cannot work, or that leave no batch at all.
    """
    if batch_size < 1:
        raise ConfigError(f"the batch size must be at least 1, not {batch_size}.")
    if num_workers < 0:
        raise ConfigError(f"the number of workers must be 0 or more, not {num_workers}.")
    if drop_last and len(images) < batch_size:
        raise ConfigError(
            f"{len(images)} images do not fill one batch of {batch_size}; choose a smaller batch size."
        )
    return DataLoader(
        ArrayDataset(images),
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        num_workers=num_workers,
        collate_fn=keep_batch,
        generator=None if seed is None else torch.Generator().manual_seed(seed),
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
    )
