"""load_for_training, held_out_samples and pick_device: the data of a recipe, and the device of a name."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from ..core.random_streams import Stream, seeded
from ..data import ImageData, Table
from ..errors import ConfigError, first_line
from ..recipes.recipe import Recipe
from ..recipes.task import FlowInput


def load_for_training(recipe: Recipe, *, download: bool = False) -> tuple[Recipe, ImageData | Table]:
    """The data of a recipe, and the recipe with what is recorded of them, see ``recipe.data.trained_on``.

    Raises:
        DataError, ConfigError: see :meth:`~rnode_plugin.recipes.recipe.Recipe.load_data`.
    """
    data = recipe.load_data(download=download)
    return dataclasses.replace(recipe, data=recipe.data.trained_on(data)), data


def held_out_samples(recipe: Recipe, count: int, *, seed: int = 0, download: bool = False) -> FlowInput:
    """At most ``count`` held-out samples of a recipe as a flow takes them, in no order.

    Args:
        recipe: names the data set. Images are dequantised; the rows of a conditional density come with contexts.
        count: number of draws from all held-out samples.
        seed: of the choice and of the noise of the dequantisation.
        download: fetch the data set if it is missing.

    Raises:
        DataError, ConfigError: see :meth:`~rnode_plugin.recipes.recipe.Recipe.load_data`.
    """
    held_out = recipe.load_data(download=download, all_val=True).held_out
    with seeded(seed, Stream.DIAGNOSE):
        chosen = torch.randperm(len(held_out))[:count]
        # a mapped file is read in one sweep
        batch = torch.from_numpy(np.ascontiguousarray(held_out[chosen.sort().values.numpy()]))
        return recipe.task.inputs(batch[torch.randperm(len(batch))])


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
