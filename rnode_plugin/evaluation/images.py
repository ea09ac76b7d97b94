"""load_images, held_out_images and pick_device: the images that a recipe asks for, and the device of a name."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from ..data import ImageData, get_dataset
from ..errors import ConfigError, DataError
from ..flows.transforms import dequantize
from ..plugins import registry
from ..recipes.schema import Recipe
from .bits import image_batch

__all__ = ["held_out_images", "load_images", "pick_device"]


def load_images(recipe: Recipe, *, download: bool = False, all_val: bool = False) -> ImageData:
    """The data set of a recipe, cut to what it asks for.

    Args:
        recipe: names the data set, its shape, and how many of its images to use.
        download: fetch it if it is missing.
        all_val: keep all held-out images, whatever ``training.val_images`` says.

    Raises:
        DataError: it is missing, or its images are not of the recipe's shape or number of levels.
        ConfigError: there is no data set of that name.
    """
    wanted = recipe.data
    # a user's own pictures are read with the channels and bits that the recipe asks for; other sets have their own
    asked = {"channels": wanted.shape[0], "bits": (wanted.levels - 1).bit_length()}
    taken = inspect.signature(registry.get("datasets", wanted.name)).parameters
    options = {name: value for name, value in asked.items() if name in taken}
    data = get_dataset(wanted.name, root=wanted.root, download=download, size=wanted.shape[1], **options)
    if (data.shape, data.levels) != (wanted.shape, wanted.levels):
        raise DataError(
            f"the images of {wanted.name} are {_shape(data.shape)} with {data.levels} levels, but the recipe "
            f"{recipe.name} is for {_shape(wanted.shape)} with {wanted.levels}: choose another data set, or set "
            "data.shape and data.levels."
        )
    return data.limit(wanted.train_images, None if all_val else recipe.training.val_images)


def held_out_images(recipe: Recipe, count: int, *, seed: int = 0, download: bool = False) -> Tensor:
    """At most ``count`` held-out images of a recipe, dequantised: ``(N, C, H, W)`` in [0, 1], in no order.

    Args:
        recipe: names the data set.
        count: how many are drawn from all held-out images.
        seed: of the noise of the dequantisation.
        download: fetch the data set if it is missing.

    Raises:
        DataError, ConfigError: from :func:`load_images`.
    """
    images = load_images(recipe, download=download, all_val=True).limit(None, count).val
    batch = image_batch(images, slice(None))
    generator = torch.Generator().manual_seed(seed)
    return dequantize(
        batch[torch.randperm(len(batch), generator=generator)], recipe.data.levels, generator=generator
    )


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
        raise ConfigError(f"the device {name!r} cannot be used: {str(error).splitlines()[0]}") from None


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
