"""Samples of a flow at several temperatures, and grids of them as PNG."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.random_streams import Stream, seeded
from ..errors import ConfigError
from ..files import write_atomically

if TYPE_CHECKING:
    from ..flows.multiscale import MultiscaleFlow
    from ..solvers import Solver

__all__ = ["sample_images", "save_grid"]

_SHOWN = 64  # pixels: smaller images are enlarged by a whole factor, so that they can be seen
_BATCH = 256


def sample_images(
    flow: MultiscaleFlow,
    count: int,
    *,
    temperatures: Sequence[float] = (1.0,),
    seed: int = 0,
    batch_size: int = _BATCH,
    solver: Solver | None = None,
) -> dict[float, Tensor]:
    """Draw images from the same latents scaled by each temperature.

    Args:
        flow: the model.
        count: images per temperature.
        temperatures: standard deviations of the latent.
        seed: of the latents.
        batch_size: images per solve.
        solver: the integrator; None for the flow's own.

    Returns:
        ``(count, C, H, W)`` in [0, 1] on the CPU, by temperature.

    Raises:
        ConfigError: for a count below one or a temperature that is not positive.
        SolverError: if the integration fails.
    """
    if count < 1 or batch_size < 1:
        raise ConfigError("sampling needs at least one image and a batch size of one.")
    bad = [t for t in temperatures if not (math.isfinite(t) and t > 0)]
    if bad or not temperatures:
        raise ConfigError(f"a temperature must be a positive number, not {bad[0] if bad else 'none at all'}.")
    drawn: dict[float, Tensor] = {}
    for temperature in temperatures:
        parts = []
        for first in range(0, count, batch_size):
            size = min(batch_size, count - first)
            with torch.no_grad(), seeded(seed, Stream.SAMPLE, first):
                parts.append(flow.sample(size, temperature=temperature, solver=solver).cpu())
        drawn[temperature] = torch.cat(parts)
    return drawn


def save_grid(
    path: str | os.PathLike[str], samples: Mapping[float, Tensor], *, levels: int = 256, columns: int | None = None
) -> None:
    """Write one PNG: a block of rows for each temperature, in the order of ``samples``.

    Args:
        path: of the PNG; written atomically.
        samples: images ``(N, C, H, W)`` in [0, 1] by temperature, as :func:`sample_images` returns them.
        levels: number of grey levels of the data; a sample is shown as the level of its bin.
        columns: images in a row; None makes the blocks about square, or one row each if there are several.

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
        shown = (images * levels).floor().clamp(0, levels - 1) / (levels - 1)
        shown = shown.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        blocks.append(make_grid(shown, nrow=columns, padding=2, pad_value=0.5))
    encoded = BytesIO()
    save_image(torch.cat(blocks, 1), encoded, format="png")
    write_atomically(Path(path), lambda file: file.write(encoded.getvalue()))
