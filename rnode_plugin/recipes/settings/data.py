"""Which images, or which table, a recipe trains on, and how they are fed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from ...errors import ConfigError, suggest
from .checks import at_least

__all__ = ["Data", "TableData"]


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

    @property
    def event(self) -> tuple[int, int, int]:
        """What a model is made for: the shape of one image."""
        return self.shape

    @property
    def dims(self) -> int:
        """Number of dimensions d of one image, C*H*W."""
        channels, height, width = self.shape
        return channels * height * width

    def model_options(self) -> dict[str, Any]:
        """What a model has to know of the images besides their shape."""
        return {"levels": self.levels}


@dataclass(frozen=True)
class TableData:
    """Which table, which of its columns, and how its rows are fed.

    Attributes:
        name: a data set that ``rnode-cli data list`` shows; ``table`` is a file of one's own.
        columns: names of the columns that are used; the others of the file are not read.
        given: those of them that a conditional density is given; the density is one of the others.
        root: the file of ``table``, or the folder of the published data sets; None for the table that comes with
            scikit-learn, or for the default folder.
        validation: share of the rows whose likelihood says which weights are the best.
        held_out: share of the rows that measure the result, seen neither by training nor by that choice.
        split_seed: of the draw of both.
        batch_size: rows per device and step.
        val_batch_size: rows per device while evaluating; see :class:`Data`.
        train_rows: train on so many rows only, drawn from all of them; None for all.
        workers: processes that read batches; 0 reads them in the training process.
        kind: tells the settings of a table from those of images.
    """

    name: str
    columns: tuple[str, ...]
    given: tuple[str, ...] = ()
    root: str | None = None
    validation: float = 0.1
    held_out: float = 0.1
    split_seed: int = 0
    batch_size: int = 200
    val_batch_size: int = 1000
    train_rows: int | None = None
    workers: int = 0
    kind: Literal["table"] = "table"

    def __post_init__(self) -> None:
        at_least(1, self, "batch_size", "val_batch_size", "train_rows")
        at_least(0, self, "workers", "split_seed")
        for name, names in (("columns", self.columns), ("given", self.given)):
            twice = [each for each, count in Counter(names).items() if count > 1]
            if twice:
                raise ConfigError(f"data.{name} names {twice[0]!r} twice.")
        for each in self.given:
            if each not in self.columns:
                raise ConfigError(f"data.given: {suggest(each, self.columns, 'column')}")
        if not self.modelled:
            left = "data.given names all of them" if self.columns else "data.columns names none"
            raise ConfigError(f"a density needs at least one column that is not given: {left}.")
        for name in ("validation", "held_out"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"data.{name} must be between 0 and 1, not {getattr(self, name)}.")
        if self.validation + self.held_out >= 1:
            raise ConfigError("data.validation and data.held_out together must leave rows to train on.")

    @property
    def modelled(self) -> tuple[str, ...]:
        """The columns that the density is one of, in the order of the file."""
        return tuple(name for name in self.columns if name not in self.given)

    @property
    def event(self) -> int:
        """What a model is made for: the number of columns that are modelled."""
        return len(self.modelled)

    @property
    def dims(self) -> int:
        """Number of dimensions d of one row."""
        return self.event

    def model_options(self) -> dict[str, Any]:
        """What a model has to know of the table besides."""
        return {"context": len(self.given)}
