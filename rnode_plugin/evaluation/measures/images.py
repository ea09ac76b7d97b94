"""Images: bits/dim with uniform noise in each bin (dirty) and at the bins' centres (clean)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...core.objective import bits_per_dim
from ...flows.transforms import dequantize, random_flip
from ..sampling import sample_images, save_grid
from .base import Evaluation, FlowInput, Mean, Measure, Quantity

if TYPE_CHECKING:
    from ...recipes.schema import Training

__all__ = ["BitsPerDim", "EvaluationResult", "ImageMeasure"]


@dataclass(frozen=True)
class BitsPerDim:
    """A mean in bits/dim and how far it can be trusted.

    Attributes:
        mean: over images and noise draws.
        stderr_images: standard error from the choice of images: of each image's mean over draws, so what noise is
            left is in it; None for a single image.
        stderr_noise: the part of it that comes from the noise: what another evaluation of the same images would
            differ by. None if nothing was drawn twice.
        images: bits/dim of each image, its mean over draws. Two models are best compared image by image.
    """

    mean: float
    stderr_images: float | None
    stderr_noise: float | None
    images: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class EvaluationResult(Evaluation):
    """What :func:`~rnode_plugin.evaluation.bits.evaluate` measured of images.

    Attributes:
        images: how many.
        dirty: with uniform noise in each bin, an upper bound on the bits/dim of the discrete images (in
            expectation over the noise).
        clean: of the density at the bins' centres; not a bound on anything discrete.
    """

    images: int
    dirty: BitsPerDim
    clean: BitsPerDim


class ImageMeasure(Measure[EvaluationResult]):
    """Bits/dim of uint8 images ``(B, C, H, W)``.

    Args:
        shape: ``(C, H, W)``.
        levels: number of values a pixel can take.
        flip: whether training mirrors images at random.
    """

    metric = "bpd"
    unit = "bits/dim"
    likelihood = "bits/dim"
    score = "dirty [bits/dim]"
    sample, samples = "image", "images"
    file = "images.csv"
    quantities = (
        Quantity(
            "dirty",
            "bits/dim dirty",
            "uniform noise in each bin: bounds the discrete likelihood",
            "bits/dim, dirty",
            "held-out images, uniform noise in each bin",
        ),
        Quantity(
            "clean",
            "bits/dim clean",
            "density at the bins' centres: no bound",
            "bits/dim, clean",
            "density at the bins' centres: no bound",
        ),
    )
    max_gap = 0.02
    step_gap, step_round_trip, step_unit = 0.005, 0.5, "levels"
    exact_dims = 16  # a product per dimension: beyond this, draws cost less
    noisy = True

    def __init__(self, shape: tuple[int, ...], levels: int, *, flip: bool = False) -> None:
        self.dims = math.prod(shape)
        self._shape, self._levels, self._flip = shape, levels, flip

    def inputs(self, batch: Tensor, quantity: int = 0) -> FlowInput:
        return FlowInput(dequantize(batch, self._levels, clean=quantity == 1), {})

    def training_inputs(self, batch: Tensor) -> FlowInput:
        x = dequantize(batch, self._levels)
        return FlowInput(random_flip(x) if self._flip else x, {})

    def random_inputs(self, count: int) -> FlowInput:
        return FlowInput(torch.rand(count, *self._shape), {})

    def scores(self, log_prob: Tensor) -> Tensor:
        return bits_per_dim(log_prob, dims=self.dims, levels=self._levels)

    def distance(self, flow: Any, one: Tensor, other: Tensor) -> float:
        return float((one - other).double().square().mean().sqrt()) * self._levels

    def result(self, means: Mapping[str, Mean], **shared: Any) -> EvaluationResult:
        parts = {name: BitsPerDim(*mean) for name, mean in means.items()}
        return EvaluationResult(images=len(means["dirty"].samples), **parts, **shared)

    def values(self, result: EvaluationResult) -> dict[str, Mean]:
        return {name: _mean(getattr(result, name)) for name in ("dirty", "clean")}

    def draw_picture(self, flow: Any, data: Any, training: Training, path: Path) -> None:
        """A grid: one row of images for each temperature, from the same latents."""
        count = training.sample_images
        drawn = sample_images(flow, count, temperatures=training.sample_temperatures, seed=training.seed)
        save_grid(path, drawn, levels=self._levels, columns=count)


def _mean(bits: BitsPerDim) -> Mean:
    return Mean(bits.mean, bits.stderr_images, bits.stderr_noise, bits.images)
