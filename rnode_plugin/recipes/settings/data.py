"""Which images a recipe trains on, and how they are fed."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import ConfigError
from .checks import at_least

__all__ = ["Data"]


@dataclass(frozen=True)
class Data:
    """Which images, and how they are fed.

    Attributes:
        name: a data set that ``rnode-cli data`` lists.
        shape: (channels, height, width) of one image.
        levels: number of values a pixel can take; 256 for 8 bits.
        batch_size: images per device and step.
        val_batch_size: images per device while evaluating. An adaptive solver chooses its steps for the batch
            as a whole, so it changes the result within the tolerance.
        flip: mirror each training image left-right with probability 1/2.
        root: folder that holds the data set; None for the default one.
        workers: processes that read batches; 0 reads them in the training process.
        train_images: train on so many images only, drawn from all of them; None for all.
    """

    name: str
    shape: tuple[int, int, int]
    levels: int = 256
    batch_size: int = 200
    val_batch_size: int = 200
    flip: bool = False
    root: str | None = None
    workers: int = 0
    train_images: int | None = None

    def __post_init__(self) -> None:
        at_least(1, self, "batch_size", "val_batch_size", "train_images")
        at_least(2, self, "levels")
        at_least(0, self, "workers")
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ConfigError(f"data.shape must be channels,height,width, all positive, not {self.shape}.")
