"""``Images`` models uint8 images, scored in bits/dim, with the settings ``Data`` and ``Model``."""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from ...errors import ConfigError, DataError
from ..text import shape_text
from .kind import FlowInput, Kind, Quantity, SampleRequest
from .settings import CONFIG, KeptBy, Text, listed, refuse_repeated

if TYPE_CHECKING:
    from torch import Tensor

    from ...flows.density import DensityModel
    from ..data import ImageData
    from ..data.facts import Facts

_COUNT = 64  # images that are drawn if no number is given


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
        name: a data set that ``rnode-cli data`` shows.
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
        kind: the kind of the settings, which files do not have.
        modeled, given: the columns of a table, of which images have none.
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
    kind: ClassVar[str] = "images"
    modeled: ClassVar[tuple[str, ...]] = ()
    given: ClassVar[tuple[str, ...]] = ()

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
        return f"{shape_text(self.shape)}, {self.levels} levels"


@dataclass(frozen=True, config=CONFIG)
class Model:
    """Settings of the flow for images.

    Attributes:
        name: a model that is registered with the plugin host; ``MultiscaleFlow`` is the paper's.
        hidden: channels of the hidden convolutions of a block's field.
        layers: convolutions of a block's field.
        alpha: margin of the logit transform, ``y = logit(alpha + (1 - 2 alpha) x)``.
        trace_estimator: distribution of the noise in the divergence's estimate while training. The paper's recipes
            have ``gaussian``. Evaluations take signs, ``rademacher``, in either case.
        kind: the kind of the settings, which files do not have.
    """

    name: Annotated[Text, KeptBy.WEIGHTS] = "MultiscaleFlow"
    hidden: Annotated[PositiveInt, KeptBy.WEIGHTS] = 64
    layers: Annotated[PositiveInt, KeptBy.WEIGHTS] = 4
    alpha: Annotated[float, Field(gt=0, lt=0.5), KeptBy.RESUME] = 0.05
    trace_estimator: Literal["rademacher", "gaussian"] = "rademacher"
    kind: ClassVar[str] = "images"

    @property
    def total_layers(self) -> int:
        """Number of layers that a file can ask for with these settings. The shape decides the number of blocks."""
        return self.layers


class Images(Kind):
    """Models uint8 images ``(B, C, H, W)``, scored in bits/dim."""

    data = "images"
    sample, samples = "image", "images"
    metric = "bpd"
    short_unit = "bits/dim"
    likelihood = "bits/dim"
    score = "dirty [bits/dim]"
    samples_file, scores_file = "samples.png", "images.csv"
    has_grid = True
    max_gap = 0.02
    exact_dims = 16  # the exact trace costs one product per dimension, so beyond this an estimate is cheaper
    quantities = (
        Quantity(
            "dirty", "bits/dim, dirty", "uniform noise in each bin: bounds the discrete likelihood", noisy=True
        ),
        Quantity("clean", "bits/dim, clean", "density at the bins' centers: no bound"),
    )
    refused_options: ClassVar[Mapping[str, str]] = {"given": "tables"}

    def resolve(self, settings: Data, assigned: Mapping[str, str | None]) -> Data:
        """Assign texts to settings, and change the settings that follow from them and from the user's files.

        Pictures in a folder bring their shape, and a ``size`` becomes the shape of all images. They have 256 levels
        unless ``levels`` are assigned. Images from another data set are mirrored only if ``flip`` is assigned, and
        they are not looked for in the user's folder.

        Raises:
            ValidationError: a value is bad.
            ConfigError: the images of this data set cannot be scaled.
            DataError: the pictures in a folder cannot be read.
        """
        # a mirrored digit is not a digit, so other data do not inherit the flips of a recipe for photographs
        derived: dict[str, object] = {}
        if assigned.get("name", settings.name) != settings.name:
            derived["flip"] = False
        if derived and assigned["name"] == "folder":
            derived["levels"] = Data.levels
        if derived and settings.has_own_files:
            derived |= {"root": None, "size": None}
        new = dataclasses.replace(settings, **{**derived, **assigned})
        if "shape" in assigned or not assigned.keys() & {"name", "root", "size"}:
            return new
        from ..data.catalog import accepted_options  # numpy, which a bad value does not wait for

        if new.size is not None and not accepted_options(new.name, {"size": new.size}):
            raise ConfigError(
                f"the images of {new.name} have one size: leave --size out. It scales the pictures of a folder, as "
                f"in rnode-cli train pictures --data-root FOLDER --size {new.size}."
            )
        shape = new.shape if new.size is None else (new.shape[0], new.size, new.size)
        if new.has_own_files and new.root is not None:
            from ..data.folders import folder_shape

            shape = folder_shape(new.root, size=new.size)
        return dataclasses.replace(new, shape=shape)

    def check_root(self, settings: Data) -> None:
        if settings.has_own_files and settings.root is None:
            raise ConfigError("name the folder of your pictures: --data-root FOLDER.")
        super().check_root(settings)

    def memory(self, settings: Data, model: Model) -> float:
        """Estimate the bytes that a training step of a MultiscaleFlow keeps for an image and an evaluation.

        By the memory of steps of ``mnist`` and ``cifar10`` these are 18 to 20 arrays of the size of a hidden layer.
        """
        of_layer = 4 * model.hidden * math.prod(settings.shape[1:])
        return 20.0 * of_layer if model.name == Model.name else 0.0

    def load(self, settings: Data, *, download: bool = False, val: int | None = None) -> ImageData:
        from ..data.catalog import accepted_options, get_dataset

        self.check_root(settings)
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
                f"the images of {settings.name} are {shape_text(data.shape)} with {data.levels} levels, but the "
                f"recipe is for {shape_text(settings.shape)} with {settings.levels}. {advice}"
            )
        return data.limit(train=settings.train_images, val=val)

    def fit_statistics(self, flow: DensityModel, data: ImageData) -> None:
        """Do nothing, because the range of pixels is known without the data."""

    def inputs(self, settings: Data, batch: Tensor, quantity: str | None = None) -> FlowInput:
        """Scale pixels to [0, 1], with uniform noise in each bin, or for ``clean`` at the centers of the bins."""
        from ...flows.multiscale import dequantize

        return FlowInput(dequantize(batch, settings.levels, clean=quantity == "clean"))

    def training_inputs(self, settings: Data, batch: Tensor) -> FlowInput:
        """Scale pixels, and with ``settings.flip`` mirror each image left-right with probability 1/2."""
        from ...flows.multiscale import random_flip

        # noise before flips, so that a recipe without flips dequantizes each batch by the same noise
        inputs = self.inputs(settings, batch)
        return FlowInput(random_flip(inputs.x)) if settings.flip else inputs

    def scores(self, settings: Data, log_prob: Tensor) -> Tensor:
        from ...core.objective import bits_per_dim

        return bits_per_dim(log_prob, dims=math.prod(settings.shape), levels=settings.levels)

    def check_request(self, settings: Data, request: SampleRequest, path: Path | None) -> None:
        refuse_repeated(request.temperatures, "--temperature")
        if request.given is not None:
            raise ConfigError("--given-value and --given-file are for tables that were trained with --given.")
        if path is not None and path.suffix.lower() != ".png":
            raise ConfigError(f"images are written as PNG, and {path} has another ending: end its name in .png.")

    def write_samples(
        self, settings: Data, flow: DensityModel, path: Path, request: SampleRequest, *, facts: Facts | None = None
    ) -> int:
        from ..samples import sample_images, save_grid

        self.check_request(settings, request, path)
        count, seed = request.count or _COUNT, request.seed
        images = sample_images(flow, count, temperatures=request.temperatures, seed=seed, **request.solves)
        save_grid(path, images, levels=settings.levels, columns=request.columns)
        return count


def settings_of(flow: DensityModel) -> Data:
    """Return the settings of images with the shape and the levels of a :class:`~rnode_plugin.MultiscaleFlow`.

    Raises:
        ConfigError: the model is of another class.
    """
    from ...flows.multiscale import MultiscaleFlow

    if not isinstance(flow, MultiscaleFlow):
        name = type(flow).__name__
        raise ConfigError(f"give settings=, the data settings for {name}: only a MultiscaleFlow has a default.")
    channels, height, width = flow.image_shape
    return Data("images", (channels, height, width), levels=flow.levels)
