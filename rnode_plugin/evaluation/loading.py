"""The data of a recipe for a training or an evaluation, and the device of a name."""

from __future__ import annotations

import dataclasses
import sys
import textwrap

import torch

from ..data import ImageData, Table
from ..errors import ConfigError, first_line
from ..recipes.recipe import Recipe


def load_for_training(recipe: Recipe, *, download: bool = False) -> tuple[Recipe, ImageData | Table]:
    """The data of a recipe, and the recipe with what is recorded of them, see ``recipe.data.trained_on``.

    Raises:
        DataError, ConfigError: see :meth:`~rnode_plugin.recipes.recipe.Recipe.load_data`.
    """
    data = recipe.load_data(download=download)
    return dataclasses.replace(recipe, data=recipe.data.trained_on(data)), data


def load_for_evaluation(recipe: Recipe, *, root: str | None = None, download: bool = False) -> ImageData | Table:
    """The data of a recipe, perhaps at another place, with all samples of a validation.

    Another table than the one of the training may hold out rows that were trained on, which is printed.

    Raises:
        DataError, ConfigError: see :meth:`~rnode_plugin.recipes.recipe.Recipe.load_data`.
    """
    data = recipe.at_root(root).load_data(download=download, all_val=True)
    if isinstance(data, Table) and recipe.table.checksum not in (None, data.checksum):
        print(
            f"{data.name} is another table than the one of the training. If they share rows, some that were "
            "trained on may be held out now.",
            file=sys.stderr,
        )
    return data


def check_device(name: str) -> None:
    """Refuse a CUDA or MPS device that PyTorch does not find. None is put to use for that.

    Raises:
        ConfigError: it is not there.
    """
    kind, _, index = name.partition(":")
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(kind)
    if count is None or (int(index) if index.isdecimal() else 0) < count:
        return
    there = "none" if count == 0 else f"{kind}:0" if count == 1 else f"{kind}:0 to {kind}:{count - 1}"
    raise ConfigError(
        f"the device {name!r} cannot be used: PyTorch {torch.__version__} finds {there} here. Leave --device out, "
        "or give --device cpu."
    )


def pick_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is the first GPU, or the CPU.

    Raises:
        ConfigError: it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_device(name)
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # the device meta has no values
    except (RuntimeError, AssertionError) as error:  # an AssertionError if torch was built without CUDA
        reason = textwrap.shorten(first_line(error), 200, placeholder="...")
        raise ConfigError(f"the device {name!r} cannot be used: {reason}") from None
    return probe.device
