"""The data settings of a recipe, for images or for a table."""

from __future__ import annotations

import os
import shlex
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from ...errors import ConfigError, suggest
from .fields import CONFIG, Fraction, KeptBy, Names, Text, listed


def _of_an_image(value: object) -> object:
    """Split a shape into its entries, and count them, because pydantic's message does not say what they mean."""
    entries = listed(value)
    if isinstance(entries, (list, tuple)) and len(entries) != 3:
        raise ValueError("an image has three numbers C,H,W (channels, height, width), as in 1,28,28")
    return entries


@dataclass(frozen=True, config=CONFIG)
class Data:
    """Settings of the images that a run uses, and of its batches.

    Attributes:
        name: a data set that ``rnode-cli data list`` shows.
        shape: (channels, height, width) of one image.
        levels: number of values that a pixel can take, 256 for 8 bits.
        batch_size: images per device and step.
        val_batch_size: images per device and batch of an evaluation. An adaptive solver chooses its steps for the
            batch as a whole, so the size changes the result within the tolerance.
        flip: mirror each training image left-right with probability 1/2.
        root: folder of the data set; None for the default one.
        workers: number of processes that read batches; 0 to read them in the training process.
        train_images: number of training images to use, drawn from all of them; None for all.
        size: height and width that the pictures of a folder are scaled to; None if they have the shape already.
    """

    name: Annotated[Text, KeptBy.RESUME]
    shape: Annotated[tuple[PositiveInt, PositiveInt, PositiveInt], BeforeValidator(_of_an_image), KeptBy.WEIGHTS]
    levels: Annotated[int, Field(ge=2), KeptBy.RESUME] = 256
    batch_size: PositiveInt = 200
    val_batch_size: PositiveInt = 200
    flip: bool = False
    root: Text | None = None
    workers: NonNegativeInt = 0
    train_images: PositiveInt | None = None
    size: Annotated[int, Field(ge=1, le=8192)] | None = None  # a typing error must not fill the memory

    def __post_init__(self) -> None:
        if self.name == "digits" and self.root is not None:
            raise ConfigError(
                "the digits come with scikit-learn, so --data-root has no effect. To train on your pictures: "
                f"rnode-cli train pictures --data-root {shlex.quote(os.path.relpath(self.root))}"
            )

    @property
    def has_own_files(self) -> bool:
        """Whether the images are the user's own pictures, in the folder ``root``."""
        return self.name == "folder"

    @property
    def event(self) -> tuple[int, int, int]:
        """The first argument of a model: the shape of one image."""
        return self.shape

    @property
    def model_options(self) -> dict[str, int]:
        """Further arguments of a model that follow from the data."""
        return {"levels": self.levels}

    @property
    def text(self) -> str:
        """What is modeled, in a message: ``1x28x28, 256 levels``."""
        return f"{'x'.join(map(str, self.shape))}, {self.levels} levels"


@dataclass(frozen=True, config=CONFIG)
class TableData:
    """Settings of the table and the columns that a run uses, and of its batches.

    Attributes:
        name: a data set that ``rnode-cli data list`` shows; ``table`` is your file.
        columns: names of the columns that are used. The other columns of the file are left out.
        given: columns that condition the density. The other columns are modeled.
        root: the file of ``table``, or the folder of another data set; None for the table that comes with
            scikit-learn, or for the default folder.
        validation: share of the rows whose likelihood chooses the best weights.
        held_out: share of the rows that measure the result. They take part in neither training nor that choice.
        split_seed: seed of the split.
        batch_size: rows per device and step.
        val_batch_size: rows per device and batch of an evaluation; see :class:`Data`.
        train_rows: number of training rows to use, drawn from all of them; None for all.
        workers: number of processes that read batches; 0 to read them in the training process.
        kind: marks the settings of a table.
    """

    name: Annotated[Text, KeptBy.RESUME]
    columns: Annotated[Names, KeptBy.WEIGHTS]
    given: Annotated[Names, KeptBy.WEIGHTS] = ()
    root: Text | None = None
    validation: Annotated[Fraction, KeptBy.WEIGHTS] = 0.1
    held_out: Annotated[Fraction, KeptBy.WEIGHTS] = 0.2
    split_seed: Annotated[int, Field(ge=0, lt=2**32), KeptBy.WEIGHTS] = 0
    batch_size: PositiveInt = 200
    val_batch_size: PositiveInt = 1000
    train_rows: Annotated[PositiveInt | None, KeptBy.RESUME] = None
    workers: NonNegativeInt = 0
    kind: Annotated[Literal["table"], KeptBy.WEIGHTS] = "table"

    def __post_init__(self) -> None:
        for name, names in (("columns", self.columns), ("given", self.given)):
            if len(set(names)) < len(names):
                raise ConfigError(f"data.{name} names a column twice: {', '.join(names)}.")
        if unknown := [each for each in self.given if each not in self.columns]:
            raise ConfigError(f"data.given: {suggest(unknown[0], self.columns, 'column')}")
        if not self.modeled:
            left = "data.given names all of them" if self.columns else "data.columns names none"
            raise ConfigError(f"a density needs at least one column that is not given: {left}.")
        if self.validation + self.held_out >= 1:
            raise ConfigError("data.validation and data.held_out together must leave rows to train on.")

    @property
    def modeled(self) -> tuple[str, ...]:
        """The columns that are modeled, in the order of the file."""
        return tuple(name for name in self.columns if name not in self.given)

    @property
    def has_own_files(self) -> bool:
        """Whether the rows come from the user's file ``root``, or from the table that stands in for it."""
        return self.name == "table"

    @property
    def event(self) -> int:
        """The first argument of a model: the number of modeled columns."""
        return len(self.modeled)

    @property
    def model_options(self) -> dict[str, int]:
        """Further arguments of a model that follow from the data."""
        return {"context": len(self.given)}

    @property
    def text(self) -> str:
        """What is modeled, in a message: ``a, b given c``."""
        return " given ".join(", ".join(part) for part in (self.modeled, self.given) if part)


AnyData = Data | TableData
"""The data settings of a recipe."""
