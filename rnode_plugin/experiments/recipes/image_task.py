"""``ImageTask`` scores images in bits/dim and draws samples in a grid."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import ConfigError
from .task import FlowInput, Quantity, SampleRequest, Task

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.distribution import DensityModel
    from ..data import ImageData
    from ..data.facts import Facts

_COUNT = 64  # images that are drawn if no number is given


class Dirty(Quantity):
    """Measures bits/dim with uniform noise in each bin, for pixels with ``levels`` values."""

    name, heading = "dirty", "bits/dim, dirty"
    meaning = "uniform noise in each bin: bounds the discrete likelihood"
    noisy = True

    def __init__(self, levels: int) -> None:
        self._levels = levels

    def inputs(self, batch: Tensor) -> FlowInput:
        from ...flows.multiscale import dequantize

        return FlowInput(dequantize(batch, self._levels))


class Clean(Quantity):
    """Measures bits/dim at the centers of the bins, for pixels with ``levels`` values."""

    name, heading = "clean", "bits/dim, clean"
    meaning = "density at the bins' centers: no bound"

    def __init__(self, levels: int) -> None:
        self._levels = levels

    def inputs(self, batch: Tensor) -> FlowInput:
        from ...flows.multiscale import dequantize

        return FlowInput(dequantize(batch, self._levels, clean=True))


class ImageTask(Task["ImageData"]):
    """Models uint8 images ``(B, C, H, W)``, scored in bits/dim.

    Args:
        shape: ``(C, H, W)``.
        levels: number of values of a pixel.
        flip: whether training mirrors each image left-right with probability 1/2.
    """

    metric = "bpd"
    unit = short_unit = likelihood = "bits/dim"
    per_sample = ""
    score = "dirty [bits/dim]"
    sample, samples = "image", "images"
    file, samples_file = "images.csv", "samples.png"
    draws_while_training = True
    max_gap = 0.02
    exact_dims = 16  # the exact trace costs one product per dimension, so beyond this an estimate is cheaper
    noisy = True
    subject = "images"

    def __init__(self, shape: tuple[int, ...], levels: int, *, flip: bool = False) -> None:
        self.quantities = Dirty(levels), Clean(levels)
        self.event = self._shape = shape
        self.dims = math.prod(shape)
        self.model_options = {"levels": levels}
        self._levels, self._flip = levels, flip

    @classmethod
    def of(cls, flow: DensityModel) -> ImageTask:
        """Return the task of a :class:`~rnode_plugin.MultiscaleFlow`, images with its shape and levels.

        Raises:
            ConfigError: the model is of another class.
        """
        from ...flows.multiscale import MultiscaleFlow

        if not isinstance(flow, MultiscaleFlow):
            raise ConfigError(f"give task=, the task of {type(flow).__name__}: only images have a default.")
        return cls(flow.image_shape, flow.levels)

    def prepare(self, flow: DensityModel, data: ImageData) -> None:
        """Do nothing, because the range of pixels is known without the data."""

    def training_inputs(self, batch: Tensor) -> FlowInput:
        from ...flows.multiscale import random_flip

        # noise before flips, so that a recipe without flips dequantizes each batch by the same noise
        inputs = self.inputs(batch)
        return FlowInput(random_flip(inputs.x)) if self._flip else inputs

    def random_inputs(self, count: int) -> FlowInput:
        import torch

        return FlowInput(torch.rand(count, *self._shape))

    def scores(self, log_prob: Tensor) -> Tensor:
        from ...core.objective import bits_per_dim

        return bits_per_dim(log_prob, dims=self.dims, levels=self._levels)

    def grid_rows(self, temperatures: tuple[float, ...]) -> tuple[float, ...]:
        _refuse_repeated(temperatures, "training.sample_temperatures")
        return temperatures

    def save_picture(
        self,
        flow: DensityModel,
        path: Path,
        *,
        count: int,
        temperatures: tuple[float, ...],
        seed: int,
        data: ImageData | None = None,
    ) -> None:
        from ..samples import sample_images, save_grid

        images = sample_images(flow, count, temperatures=temperatures, seed=seed)
        save_grid(path, images, levels=self._levels, columns=count)

    def check_request(self, request: SampleRequest, path: Path | None) -> None:
        _refuse_repeated(request.temperatures, "--temperature")
        if request.given is not None:
            raise ConfigError("--given-values and --given-file are for tables that were trained with --given.")
        if path is not None and path.suffix.lower() != ".png":
            raise ConfigError(f"{path} is not a picture: its name must end in .png.")

    def write_samples(
        self, flow: DensityModel, path: Path, request: SampleRequest, *, facts: Facts | None = None
    ) -> int:
        from ..samples import sample_images, save_grid

        self.check_request(request, path)
        count = request.count or _COUNT
        # the batch size is left to the function that draws, because its own default fits the memory of images
        options: dict[str, int] = {} if request.batch_size is None else {"batch_size": request.batch_size}
        images = sample_images(flow, count, temperatures=request.temperatures, seed=request.seed, **options)
        save_grid(path, images, levels=self._levels, columns=request.columns)
        return count


def _refuse_repeated(temperatures: tuple[float, ...], setting: str) -> None:
    """Refuse equal temperatures, whose images would be the same, because they scale the same latents."""
    for each in temperatures:
        if temperatures.count(each) > 1:
            raise ConfigError(f"{setting} has {each:g} twice, which would draw the same images: give it once.")
