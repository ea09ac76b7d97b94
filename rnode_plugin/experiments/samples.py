"""Draws samples of a flow, images or rows of a table, and writes a grid of images."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .files import write_atomically
from .random_streams import Stream, seeded

if TYPE_CHECKING:
    from ..flows.density import DensityModel

_SHOWN = 64  # pixels. Smaller images are enlarged by a whole factor


def sample_images(
    flow: DensityModel,
    count: int,
    *,
    temperatures: Sequence[float] = (1.0,),
    seed: int = 0,
    batch_size: int = 256,
) -> dict[float, Tensor]:
    """Draw images from the same latents scaled by each temperature.

    Args:
        flow: the model.
        count: images per temperature.
        temperatures: standard deviations of the latent.
        seed: the seed of the latents.
        batch_size: images per solve.

    Returns:
        Images ``(count, C, H, W)`` in [0, 1] on the CPU, by temperature.

    Raises:
        ConfigError: a temperature is not positive.
        SolverError: the integration failed.
    """
    return {each: _draw(flow, count, each, seed, batch_size) for each in temperatures}


@torch.no_grad()
def _draw(
    flow: DensityModel, count: int, temperature: float, seed: int, batch_size: int, context: Tensor | None = None
) -> Tensor:
    """Draw samples ``(count, *event_shape)`` in batches, and collect them on the CPU."""
    contexts = itertools.repeat(None) if context is None else context.split(batch_size)
    parts = []
    # the seed and the number of its first sample decide the latents of a batch. So every temperature scales the
    # same latents, and a larger count only appends batches
    for first, given in zip(range(0, count, batch_size), contexts, strict=False):
        with seeded(seed, Stream.SAMPLE, first):
            size = min(batch_size, count - first)
            parts.append(flow.sample(size, context=given, temperature=temperature).cpu())
    return torch.cat(parts)


def save_grid(
    path: str | os.PathLike[str], samples: Mapping[float, Tensor], *, levels: int = 256, columns: int | None = None
) -> None:
    """Write images into one PNG, with a block of rows for each temperature, in the order of ``samples``.

    Args:
        path: the PNG, which is written whole or not at all.
        samples: images ``(N, C, H, W)`` in [0, 1] by temperature, as :func:`sample_images` returns them.
        levels: number of gray levels in the data. A sample is shown as the level of its bin.
        columns: images in a row. None gives about square blocks, or one row each if there are several blocks.

    Raises:
        CheckpointError: the file cannot be written.
    """
    from torchvision.utils import make_grid, save_image

    count, _, height, _ = next(iter(samples.values())).shape
    if columns is None:
        columns = count if len(samples) > 1 and count <= 20 else math.ceil(math.sqrt(count))
    scale = max(1, _SHOWN // height)
    blocks = []
    for images in samples.values():
        # bins are half-open, so 1.0 itself would be one level above the last
        shown = (images * levels).floor().clamp(0, levels - 1) / (levels - 1)
        shown = shown.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        blocks.append(make_grid(shown, nrow=columns, padding=2, pad_value=0.5))
    write_atomically(path, lambda file: save_image(torch.cat(blocks, 1), file, format="png"))


def sample_rows(
    flow: DensityModel,
    count: int,
    *,
    context: np.ndarray | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 10_000,
) -> np.ndarray:
    """Draw rows ``(count, columns)`` in the unit of the data, on the CPU; see :func:`sample_images`.

    A conditional density takes a ``context (count, C)``, one for each row.

    Raises:
        ConfigError: the context does not fit, or the temperature is not positive.
        SolverError: the integration failed.
    """
    given = None if context is None else torch.from_numpy(context).to(next(flow.parameters()).device)
    return _draw(flow, count, temperature, seed, batch_size, given).numpy()
