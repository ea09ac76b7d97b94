"""The data settings of a recipe, for images or for a table."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from ...errors import ConfigError, DataError, suggest
from .fields import CONFIG, Fraction, KeptBy, Names, Text, listed
from .image_task import ImageTask
from .table_task import TableTask

if TYPE_CHECKING:
    from ..data import ImageData, Table


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
        kind: marks the settings of images.
        subject: what the settings describe, in a message.
        foreign: for each option of the command line that these data do not take, the data that take it.
    """

    kind: ClassVar[str] = "images"
    subject: ClassVar[str] = "images"
    foreign: ClassVar[Mapping[str, str]] = {"given": "tables"}

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
    def of_user(self) -> bool:
        """Whether the images are the user's own pictures, in the folder ``root``."""
        return self.name == "folder"

    @property
    def task(self) -> ImageTask:
        """The task of modeling these images."""
        return ImageTask(self.shape, self.levels, flip=self.flip)

    def changed(self, assigned: Mapping[str, str | None]) -> Data:
        """Assign settings, written as texts, and change the settings that they determine.

        Pictures in a folder bring their shape, and a ``size`` becomes the shape of all images. They have 256 levels
        unless ``levels`` are assigned. Images from another data set are mirrored only if ``flip`` is assigned, and
        they are not looked for in the user's folder.

        Raises:
            ValidationError: a value is bad.
            ConfigError: the images of this data set cannot be scaled.
            DataError: the pictures in a folder cannot be read.
        """
        # a mirrored digit is not a digit, so other data do not inherit the flips of a recipe for photographs
        derived: dict[str, object] = {} if assigned.get("name", self.name) == self.name else {"flip": False}
        if derived and assigned["name"] == "folder":
            derived["levels"] = Data.levels
        if derived and self.of_user:
            derived |= {"root": None, "size": None}
        new = dataclasses.replace(self, **{**derived, **_at_absolute_root(assigned)})
        if "shape" in assigned or not assigned.keys() & {"name", "root", "size"}:
            return new
        from ..data.catalog import accepted_options, image_shape  # numpy, which a bad value does not wait for

        if new.size is not None and not accepted_options(new.name, {"size": new.size}):
            raise ConfigError(
                f"the images of {new.name} have one size: leave --size out. It scales the pictures of a folder, as "
                f"in rnode-cli train pictures --data-root FOLDER --size {new.size}."
            )
        shape = image_shape(new.name, root=new.root, size=new.size)
        if shape is None and new.size is not None:
            shape = (new.shape[0], new.size, new.size)
        return new if shape is None else dataclasses.replace(new, shape=shape)

    def load(self, *, download: bool = False, val_images: int | None = None) -> ImageData:
        """Load the data set, limited to the numbers of images in these settings.

        Args:
            download: fetch the data set if it is missing.
            val_images: largest number of held-out images; None for all.

        Raises:
            DataError: the data set is missing, or its images have another shape or number of levels.
            ConfigError: there is no data set of that name.
        """
        from ..data.catalog import accepted_options, get_dataset
        from ..data.images import shown

        _check_place(self)
        # pictures in a folder are read with the channels and bits of the recipe. Other data sets have fixed ones,
        # which are compared below
        asked = {"channels": self.shape[0], "bits": (self.levels - 1).bit_length()}
        options = accepted_options(self.name, asked)
        data = get_dataset(self.name, root=self.root, download=download, size=self.size, **options)
        if (data.shape, data.levels) != (self.shape, self.levels):
            channels, height, width = data.shape
            advice = (
                f"Choose another data set, or add --set data.shape={channels},{height},{width} "
                f"--set data.levels={data.levels}."
            )
            if self.of_user and data.levels == self.levels:  # the pictures of a run that were scaled since then
                advice = "Give pictures of that size, or train a new run on these."
            raise DataError(
                f"the images of {self.name} are {shown(data.shape)} with {data.levels} levels, but the recipe is "
                f"for {shown(self.shape)} with {self.levels}. {advice}"
            )
        return data.limit(self.train_images, val_images)

    def check_chosen(self, before: AnyData) -> None:
        """Refuse the user's pictures if no folder is named; see :meth:`TableData.check_chosen`.

        Raises:
            ConfigError: no folder is named.
        """
        if self.of_user and self.root is None:
            raise ConfigError("name the folder of your pictures: --data-root FOLDER.")


@dataclass(frozen=True, config=CONFIG)
class TableData:
    """Settings of the table and the columns that a run uses, and of its batches.

    Attributes:
        name: a data set that ``rnode-cli data list`` shows; ``table`` is your file.
        columns: names of the columns that are used. The other columns of the file are not read.
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
        subject, foreign: as for :class:`Data`.
    """

    subject: ClassVar[str] = "a table"
    foreign: ClassVar[Mapping[str, str]] = {"size": "images"}

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
    def of_user(self) -> bool:
        """Whether the rows come from the user's file ``root``, or from the table that stands in for it."""
        return self.name == "table"

    @property
    def task(self) -> TableTask:
        """The task of modeling these rows."""
        return TableTask(self.modeled, self.given)

    def changed(self, assigned: Mapping[str, str | None]) -> TableData:
        """Assign settings, written as texts, and change the settings that they determine.

        Another table brings its columns, unless ``columns`` are assigned, and is not looked for in the user's file.

        Raises:
            ConfigError: there is no such table.
            DataError: the table cannot be read.
            ValidationError: a value is bad, or a given column is not in the table.
        """
        assigned = _at_absolute_root(assigned)
        if self.of_user and assigned.get("name", self.name) != self.name:
            assigned = {"root": None, **assigned}
        name, root = assigned.get("name", self.name), assigned.get("root", self.root)
        derived: dict[str, tuple[str, ...]] = {}
        # a published table at another place is the same table. The file of a user is not
        published = name == self.name and not self.of_user
        if (name, root) != (self.name, self.root) and "columns" not in assigned and not published:
            from ..data.catalog import table_columns  # numpy, which a bad value does not wait for

            derived["columns"] = table_columns(name or "", root=root)
        return dataclasses.replace(self, **assigned, **derived)

    def load(self, *, download: bool = False, val_images: int | None = None) -> Table:
        """Load the table in 32-bit numbers, with the modeled columns before the given ones.

        Args:
            download: fetch the table if it is missing.
            val_images: largest number of rows to choose the weights by; None for all.

        Raises:
            DataError: the table is missing, or its columns have no density.
            ConfigError: there is no table of that name, or these settings ask for another split of a table whose
                split is fixed.
        """
        from ..data.catalog import accepted_options, get_table
        from ..data.tables import check_columns

        _check_place(self)
        columns = (*self.modeled, *self.given)
        asked = {"columns": columns, "given": self.given, **{name: vars(self)[name] for name in _SPLIT}}
        options = accepted_options(self.name, asked)
        for name, default in _SPLIT.items():
            if name not in options and vars(self)[name] != default:
                raise ConfigError(f"the table {self.name} has a fixed split: leave data.{name} at {default}.")
        table = get_table(self.name, root=self.root, download=download, **options).select(columns)
        # limited before it is checked, because a column may be constant in the rows that are left, and checked in
        # double precision, in which a nearly constant column still shows its deviation
        table = table.limit(self.train_rows, val_images)
        check_columns(table, len(self.modeled))
        return table.single()

    def check_chosen(self, before: AnyData) -> None:
        """Refuse columns from a command line that the user's file does not have.

        This imports no torch, and reads only the names in the file.

        Args:
            before: the settings that the command line has changed.

        Raises:
            ConfigError: the file does not have one of the columns.
            DataError: the file cannot be read.
        """
        if not self.of_user or (isinstance(before, TableData) and self.columns == before.columns):
            return
        from ..data.tables import table_columns

        known = table_columns(self.root)
        if unknown := [each for each in self.columns if each not in known]:
            raise ConfigError(f"data.columns: {suggest(unknown[0], known, 'column')}")


AnyData = Data | TableData
"""The data settings of a recipe."""

_SPLIT = {"validation": TableData.validation, "held_out": TableData.held_out, "split_seed": TableData.split_seed}


def _check_place(data: AnyData) -> None:
    """Refuse a file or folder of the user that was moved or removed since a run was trained on it."""
    if data.of_user and data.root is not None and not os.path.exists(data.root):
        raise DataError(f"{data.root} is not there: name the new place of the data with --data-root.")


def _at_absolute_root(assigned: Mapping[str, str | None]) -> dict[str, str | None]:
    """Return assigned settings with an absolute ``root``, so that a command in another folder finds the data."""
    root = assigned.get("root")
    return {**assigned, "root": os.path.abspath(root)} if root else dict(assigned)
