"""load_data, held_out_samples and pick_device: the data that a recipe asks for, and the device of a name."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from ..core.random_streams import Stream, seeded
from ..data import ImageData, get_dataset, get_table
from ..data.catalog import taken_by
from ..data.tables import Table, check_columns
from ..errors import ConfigError, DataError, first_line
from ..recipes.recipe import Data, Recipe, TableData
from .measures import FlowInput, measure_of


def load_for_training(recipe: Recipe, *, download: bool = False) -> tuple[Recipe, ImageData | Table]:
    """The data of a recipe, and the recipe with the number of rows and the checksum of a table.

    A table smaller than a batch is one batch.

    Raises:
        DataError, ConfigError: see :func:`load_images` and :func:`load_table`.
    """
    data = load_data(recipe, download=download)
    if isinstance(recipe.data, TableData) and isinstance(data, Table):
        batch_size = min(recipe.data.batch_size, len(data.train))
        known = dataclasses.replace(recipe.data, batch_size=batch_size, rows=data.rows, checksum=data.checksum)
        return dataclasses.replace(recipe, data=known), data
    return recipe, data


def load_data(recipe: Recipe, *, download: bool = False, all_val: bool = False) -> ImageData | Table:
    """The images or the table of a recipe; see :func:`load_images` and :func:`load_table`."""
    load = load_images if isinstance(recipe.data, Data) else load_table
    return load(recipe, download=download, all_val=all_val)


def load_table(recipe: Recipe, *, download: bool = False, all_val: bool = False) -> Table:
    """The table of a recipe in 32-bit numbers: the columns that are modelled, then those that are given.

    Args:
        recipe: names the table, its columns, and the number of rows.
        download: fetch it if it is missing.
        all_val: ignore ``training.val_images`` and keep all validation rows.

    Raises:
        DataError: it is missing, or its columns have no density; the message says what to do.
        ConfigError: there is no table of that name, or it has a split of its own and the recipe asks for another.
    """
    wanted = recipe.table
    columns = (*wanted.modelled, *wanted.given)
    split = {name: getattr(wanted, name) for name in ("validation", "held_out", "split_seed")}
    options = taken_by(wanted.name, {"columns": columns, **split})
    usual = {field.name: field.default for field in dataclasses.fields(TableData)}
    for name, value in split.items():
        if name not in options and value != usual[name]:
            raise ConfigError(
                f"the table {wanted.name} has a split of its own: leave data.{name} at {usual[name]}."
            )
    table = get_table(wanted.name, root=wanted.root, download=download, **options).select(columns)
    if wanted.checksum not in (None, table.checksum):
        now = f"{table.rows:,} rows" if table.rows != wanted.rows else "as many rows, but not the same"
        raise DataError(
            f"{table.name} has changed since the training: it had {wanted.rows:,} rows, and has {now} now. "
            "In a new split, rows that were trained on could be held out. Put the old file back, name it with "
            "--data-root, or train a new run on this one."
        )
    table = table.limit(wanted.train_rows, None if all_val else recipe.training.val_images)
    check_columns(table, len(wanted.modelled))
    return table.single()


def load_images(recipe: Recipe, *, download: bool = False, all_val: bool = False) -> ImageData:
    """The data set of a recipe, cut to its numbers of images.

    Args:
        recipe: names the data set, its shape, and the numbers of images.
        download: fetch it if it is missing.
        all_val: ignore ``training.val_images`` and keep all held-out images.

    Raises:
        DataError: it is missing, or its images are not of the recipe's shape or number of levels.
        ConfigError: there is no data set of that name.
    """
    wanted = recipe.images
    # a user's own pictures are read with the channels and bits that the recipe asks for; other sets have their own
    asked = {"channels": wanted.shape[0], "bits": (wanted.levels - 1).bit_length()}
    options = taken_by(wanted.name, asked)
    data = get_dataset(wanted.name, root=wanted.root, download=download, size=wanted.shape[1], **options)
    if (data.shape, data.levels) != (wanted.shape, wanted.levels):
        raise DataError(
            f"the images of {wanted.name} are {_shape(data.shape)} with {data.levels} levels, but the recipe "
            f"{recipe.name} is for {_shape(wanted.shape)} with {wanted.levels}: choose another data set, or set "
            "data.shape and data.levels."
        )
    return data.limit(wanted.train_images, None if all_val else recipe.training.val_images)


def held_out_samples(recipe: Recipe, count: int, *, seed: int = 0, download: bool = False) -> FlowInput:
    """At most ``count`` held-out samples of a recipe as a flow takes them, in no order.

    Args:
        recipe: names the data set. Images are dequantised; the rows of a conditional density come with contexts.
        count: number of draws from all held-out samples.
        seed: of the choice and of the noise of the dequantisation.
        download: fetch the data set if it is missing.

    Raises:
        DataError, ConfigError: from :func:`load_images` and :func:`load_table`.
    """
    held_out = load_data(recipe, download=download, all_val=True).held_out
    with seeded(seed, Stream.DIAGNOSE):
        chosen = torch.randperm(len(held_out))[:count]
        # a mapped file is read in one sweep
        batch = torch.from_numpy(np.ascontiguousarray(held_out[chosen.sort().values.numpy()]))
        return measure_of(recipe).inputs(batch[torch.randperm(len(batch))])


def pick_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is the first GPU, or the CPU.

    Raises:
        ConfigError: it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # an AssertionError if torch was built without CUDA
        raise ConfigError(f"the device {name!r} cannot be used: {first_line(error)}") from None


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
