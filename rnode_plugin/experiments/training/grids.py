"""``SampleGrids`` draws samples at each validation."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, cast

from pytorch_lightning.callbacks import Callback

from ...errors import SolverError

if TYPE_CHECKING:
    import pytorch_lightning as L

    from .folder import RunFolder
    from .module import RnodeModule


class SampleGrids(Callback):
    """Draws a grid of samples, ``step-NUMBER.png``, at the end of each validation, with the weights that it had.

    Args:
        folder: knows the folder of the run.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    # In this hook WeightAveraging, which comes later in the list, has not yet put the trained weights back. In
    # on_validation_end it has
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        module = cast("RnodeModule", pl_module)
        recipe, path = module.recipe, self._folder.run.picture(trainer.global_step)
        path.parent.mkdir(exist_ok=True)
        try:
            recipe.kind.write_samples(recipe.data, module.flow, path, recipe.pictured)
        except SolverError as error:  # a latent far out may fail where no image does, so training continues
            print(f"no grid of samples at step {trainer.global_step}: {error}", file=sys.stderr)
