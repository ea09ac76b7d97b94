"""SampleGrids: a picture of samples after each validation."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as L
from pytorch_lightning.callbacks import Callback

from ....errors import SolverError
from ....evaluation.samples import sample_images, save_grid

__all__ = ["SampleGrids"]


class SampleGrids(Callback):
    """Writes ``step-NUMBER.png``, a grid of samples, at the end of each validation, with the weights it measured.

    Args:
        folder: where they go; only the first process needs to know.
        temperatures: standard deviation of the latent, one row of images each.
        images: in a row.
        seed: of the latents, the same in every grid.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        temperatures: tuple[float, ...],
        images: int,
        seed: int,
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self._temperatures, self._images, self._seed = temperatures, images, seed

    # in this hook a callback that averages the weights has not put them back yet, if it comes later
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero or trainer.sanity_checking or self.folder is None:
            return
        flow = pl_module.flow
        try:
            samples = sample_images(flow, self._images, temperatures=self._temperatures, seed=self._seed)
        except SolverError as error:  # training may go on if a latent far out cannot be integrated
            print(f"no grid of samples at step {trainer.global_step}: {error}", file=sys.stderr)
            return
        path = self.folder / f"step-{trainer.global_step:07d}.png"
        save_grid(path, samples, levels=flow.levels, columns=self._images)
