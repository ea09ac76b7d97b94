"""RunCheckpoints: ``last``, ``previous`` and ``best`` checkpoints of a run."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytorch_lightning as L
from pytorch_lightning.callbacks import Checkpoint

from ....errors import TrainingError
from ...runs.checkpoints import BEST, LAST
from ..private import validates_after_this_batch
from .stopping import Interrupted

__all__ = ["RunCheckpoints"]


class RunCheckpoints(Checkpoint):
    """Writes ``last.ckpt`` every few steps and after each validation, and ``best.ckpt`` after the best validation.

    With :class:`~rnode_plugin.training.lightning.checkpoint_io.AtomicCheckpointIO` among the Trainer's plugins they
    are written all or not at all, and the ``last.ckpt`` from before stays as ``previous.ckpt``.

    Args:
        folder: where they go; only the first process needs to know.
        save_every: steps between two checkpoints.
        monitor: metric of a validation whose lowest value is the best.

    Attributes:
        best: lowest value so far.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None = None, *, save_every: int = 100, monitor: str = "val/bpd"
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.best = math.inf
        self._save_every, self._monitor = save_every, monitor
        self._saved = -1  # step of the newest checkpoint

    @property
    def state_key(self) -> str:
        return "RunControl"  # as in version 0.1, so that the best value of its runs is found

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._saved or step % self._save_every or validates_after_this_batch(trainer):
            return
        # a step without a usable gradient is in the weights of nobody: the checkpoint before it is as good
        if not pl_module.guard.in_row:
            self._save(trainer, LAST)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        value = float(trainer.callback_metrics[self._monitor])
        if not math.isfinite(value):
            raise TrainingError(f"the validation {self._monitor.removeprefix('val/')} is {value}.")
        if value < self.best:
            self.best = value
            self._save(trainer, BEST)
        self._save(trainer, LAST)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Interrupted) and trainer.global_step != self._saved:
            self._save(trainer, LAST)

    def _save(self, trainer: L.Trainer, name: str) -> None:
        assert self.folder is not None  # the first process has told it in setup
        trainer.save_checkpoint(self.folder / name)
        self._saved = trainer.global_step
