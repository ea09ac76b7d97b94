"""``save_samples`` draws the picture of samples that a run writes, by the settings of its training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..recipes.task import AnyTask

if TYPE_CHECKING:
    from ...core.distribution import DensityModel
    from ..data import ImageData, Table
    from ..recipes.settings import Training


def save_samples(
    task: AnyTask, flow: DensityModel, data: ImageData | Table | None, training: Training, path: Path
) -> None:
    """Draw samples of a flow into one PNG, with the number, temperatures and seed in the training settings.

    ``data`` has the held-out rows that the corner plot of a table shows. A grid of images needs no data. Errors are
    those raised by :meth:`~rnode_plugin.experiments.recipes.task.Task.save_picture`.
    """
    task.save_picture(
        flow,
        path,
        count=training.sample_images,
        temperatures=training.sample_temperatures,
        seed=training.seed,
        data=data,
    )
