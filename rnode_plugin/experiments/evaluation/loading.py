"""The data of a recipe for an evaluation, and the device of a name."""

from __future__ import annotations

import sys
import textwrap
from typing import Any

import numpy as np
import torch

from ...core.random_streams import Stream, seeded
from ...errors import ConfigError, first_line
from ..data import ImageData, Table
from ..recipes.recipe import Recipe
from ..recipes.task import FlowInput


def load_for_evaluation(recipe: Recipe, *, root: str | None = None, download: bool = False) -> ImageData | Table:
    """The data of a recipe, perhaps at another place, with all samples of a validation.

    Another table than the one of the training may hold out rows that were trained on, which is printed.

    Raises:
        DataError, ConfigError: see :meth:`~rnode_plugin.experiments.recipes.recipe.Recipe.load_data`.
    """
    data: Any = recipe.at_root(root).load_data(download=download, all_val=True)
    if (doubt := recipe.data.doubt(data)) is not None:
        print(doubt, file=sys.stderr)
    return data


def check_device(name: str) -> None:
    """Refuse a CUDA or MPS device that PyTorch does not find, without opening any device.

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


def held_out_samples(
    recipe: Recipe, count: int, *, root: str | None = None, seed: int = 0, download: bool = False
) -> FlowInput:
    """At most ``count`` held-out samples of a recipe in random order, as a flow takes them.

    Images are dequantized; the rows of a conditional density come with contexts. ``root`` is another place of the
    data, and ``seed`` the seed of the order and of the noise.
    """
    held_out = load_for_evaluation(recipe, root=root, download=download).held_out
    with seeded(seed, Stream.DIAGNOSE):
        chosen = torch.randperm(len(held_out))[:count]
        # a mapped file is read in one sweep
        batch = torch.from_numpy(np.ascontiguousarray(held_out[chosen.sort().values.numpy()]))
        return recipe.task.inputs(batch[torch.randperm(len(batch))])
