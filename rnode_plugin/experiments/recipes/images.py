"""``ImageTask`` scores images in bits/dim and draws samples in a grid."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.objective import bits_per_dim
from ...errors import ConfigError, DataError
from ...flows.multiscale import MultiscaleFlow, dequantize, random_flip
from ..data.catalog import accepted_options, get_dataset
from ..data.facts import Facts
from ..data.images import shown
from ..samples import sample_images, save_grid
from .data import Data
from .kinds import IMAGES, refuse_repeated
from .task import FlowInput, SampleRequest, Task, check_place

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ...core.distribution import DensityModel
    from ..data import ImageData

_COUNT = 64  # images that are drawn if no number is given


class ImageTask(Task[Data, "ImageData"]):
    """Models uint8 images ``(B, C, H, W)``, scored in bits/dim.

    With ``settings.flip`` training mirrors each image left-right with probability 1/2.
    """

    kind = IMAGES

    @classmethod
    def of(cls, flow: DensityModel) -> ImageTask:
        """Return the task of a :class:`~rnode_plugin.MultiscaleFlow`, images with its shape and levels.

        Raises:
            ConfigError: the model is of another class.
        """
        if not isinstance(flow, MultiscaleFlow):
            raise ConfigError(f"give task=, the task of {type(flow).__name__}: only images have a default.")
        channels, height, width = flow.image_shape
        return cls(Data("images", (channels, height, width), levels=flow.levels))

    def load(self, *, download: bool = False, val_images: int | None = None) -> ImageData:
        settings = self.settings
        check_place(settings)
        # pictures in a folder are read with the channels and bits of the recipe. Other data sets have fixed ones,
        # which are compared below
        asked = {"channels": settings.shape[0], "bits": (settings.levels - 1).bit_length()}
        options = accepted_options(settings.name, asked)
        data = get_dataset(settings.name, root=settings.root, download=download, size=settings.size, **options)
        if (data.shape, data.levels) != (settings.shape, settings.levels):
            channels, height, width = data.shape
            advice = (
                f"Choose another data set, or add --set data.shape={channels},{height},{width} "
                f"--set data.levels={data.levels}."
            )
            # the pictures of a run that were scaled since then
            if settings.has_own_files and data.levels == settings.levels:
                advice = "Give pictures of that size, or train a new run on these."
            raise DataError(
                f"the images of {settings.name} are {shown(data.shape)} with {data.levels} levels, but the recipe "
                f"is for {shown(settings.shape)} with {settings.levels}. {advice}"
            )
        return data.limit(settings.train_images, val_images)

    def facts(self, data: ImageData) -> Facts:
        return Facts.of(data)

    def fit_statistics(self, flow: DensityModel, data: ImageData) -> None:
        """Do nothing, because the range of pixels is known without the data."""

    def inputs(self, batch: Tensor, quantity: str | None = None) -> FlowInput:
        """Scale pixels to [0, 1], with uniform noise in each bin, or for ``clean`` at the centers of the bins."""
        return FlowInput(dequantize(batch, self.settings.levels, clean=quantity == "clean"))

    def training_inputs(self, batch: Tensor) -> FlowInput:
        # noise before flips, so that a recipe without flips dequantizes each batch by the same noise
        inputs = self.inputs(batch)
        return FlowInput(random_flip(inputs.x)) if self.settings.flip else inputs

    def scores(self, log_prob: Tensor) -> Tensor:
        return bits_per_dim(log_prob, dims=math.prod(self.settings.shape), levels=self.settings.levels)

    def baseline_scores(self, data: ImageData, count: int) -> dict[str, np.ndarray]:
        return {}

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
        images = sample_images(flow, count, temperatures=temperatures, seed=seed)
        save_grid(path, images, levels=self.settings.levels, columns=count)

    def check_request(self, request: SampleRequest, path: Path | None) -> None:
        refuse_repeated(request.temperatures, "--temperature")
        if request.given is not None:
            raise ConfigError("--given-value and --given-file are for tables that were trained with --given.")
        if path is not None and path.suffix.lower() != ".png":
            raise ConfigError(f"images are written as PNG, and {path} has another ending: end its name in .png.")

    def write_samples(
        self, flow: DensityModel, path: Path, request: SampleRequest, *, facts: Facts | None = None
    ) -> int:
        self.check_request(request, path)
        count = request.count or _COUNT
        # the batch size is left to the function that draws, because its own default fits the memory of images
        options: dict[str, int] = {} if request.batch_size is None else {"batch_size": request.batch_size}
        images = sample_images(flow, count, temperatures=request.temperatures, seed=request.seed, **options)
        save_grid(path, images, levels=self.settings.levels, columns=request.columns)
        return count
