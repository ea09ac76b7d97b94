"""Loads the data of a recipe for an evaluation, and finds the device with a name."""

from __future__ import annotations

import os
import sys
import textwrap

import numpy as np
import torch

from ...errors import ConfigError, first_line
from ..data import ImageData, Table
from ..data.facts import Facts, doubt
from ..random_streams import Stream, seeded
from ..recipes.kind import FlowInput
from ..recipes.recipe import Recipe
from ..text import count_of


def load_for_evaluation(
    recipe: Recipe, facts: Facts | None, *, root: str | None = None, download: bool = False
) -> ImageData | Table:
    """Load the data of a recipe, perhaps from another file or folder, with all of its validation samples.

    A line on standard error says if the held-out samples are others than those of the training.

    Args:
        recipe: of the weights.
        facts: of the data that they were trained on; None if they are not known.
        root: another file or folder.
        download: fetch the data set if it is missing.

    Raises:
        DataError, ConfigError: see :meth:`~rnode_plugin.experiments.recipes.recipe.Recipe.load_data`.
    """
    data = recipe.at_root(root).load_data(download=download, all_val=True)
    if (said := doubt(facts, data)) is not None:
        print(said, file=sys.stderr)
    return data


def check_device(name: str, *, processes: int = 1) -> None:
    """Refuse a CUDA or MPS device that PyTorch does not find, without opening any device.

    ``processes`` is their number if each of them takes a device, which is a CPU for ``auto`` without a GPU.

    Raises:
        ConfigError: the machine does not have the device, or has fewer cores than processes for ``auto``.
    """
    cores = os.cpu_count() or 1
    if name == "auto" and processes > cores and not torch.accelerator.is_available():
        raise ConfigError(
            f"no GPU was found (torch {torch.__version__}), and {processes} processes are more than the "
            f"{count_of(cores, 'core')} of this machine: leave --devices out, or install torch for your GPU."
        )
    kind, _, index = name.partition(":")
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(kind)
    if count is None or (int(index) if index.isdecimal() else 0) < count:
        return
    available = "none" if count == 0 else f"{kind}:0" if count == 1 else f"{kind}:0 to {kind}:{count - 1}"
    raise ConfigError(
        f"the device {name!r} cannot be used: PyTorch {torch.__version__} finds {available}. Leave --device out, "
        "or give --device cpu."
    )


def pick_device(name: str) -> torch.device:
    """Find the device with a name, and try it. ``auto`` is the first GPU, or the CPU if there is none.

    Raises:
        ConfigError: the machine does not have the device, or the device cannot compute.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_device(name)
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # fails for `meta`, a device of PyTorch whose tensors have no values
    except (RuntimeError, AssertionError) as error:  # an AssertionError if torch was built without CUDA
        reason = textwrap.shorten(first_line(error), 200, placeholder="...")
        raise ConfigError(f"the device {name!r} cannot be used: {reason}") from None
    return probe.device


def held_out_samples(recipe: Recipe, data: ImageData | Table, count: int, *, seed: int = 0) -> FlowInput:
    """Draw at most ``count`` held-out samples of ``data`` in random order, as a flow of the recipe takes them.

    Images are dequantized, and the rows of a conditional density come with contexts. ``seed`` decides the order and
    the noise.
    """
    held_out = data.held_out
    with seeded(seed, Stream.DIAGNOSE):
        chosen = torch.randperm(len(held_out))[:count]
        # in the order of the file, so that a mapped file is read in one sweep, and then in random order again: a
        # caller that takes the first few must not get only the beginning of a folder
        batch = torch.from_numpy(np.ascontiguousarray(held_out[chosen.sort().values.numpy()]))
        return recipe.kind.inputs(recipe.data, batch[torch.randperm(len(batch))])
