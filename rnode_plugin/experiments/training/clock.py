"""``Clock``: the time of a run and of its steps, and ``StepCallback``, whose hook comes once per optimizer step."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, cast

import pytorch_lightning as L
from pytorch_lightning.callbacks import Callback

if TYPE_CHECKING:
    from .module import RnodeModule


class StepCallback(Callback):
    """A callback with :meth:`on_step_end`, which is called after each optimizer step.

    Lightning's own hook is called after each batch, and a step can take several.
    """

    _seen = 0  # the step that the hook was called for last

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if (step := trainer.global_step) != self._seen:
            self._seen = step
            self.on_step_end(trainer, cast("RnodeModule", pl_module), step)

    def on_step_end(self, trainer: L.Trainer, module: RnodeModule, step: int) -> None:
        """Called with the number of steps so far."""


class Clock(StepCallback):
    """Times the steps of a run. It is the first of a run's own callbacks, and the others read it.

    A step lasts from the end of the step before it, so the wait for its batches counts. Validations and writes of
    checkpoints do not count, and whoever makes them calls :meth:`restart`.

    Attributes:
        step_seconds: time of the last step.
        training_seconds: time of all steps of the run, with the parts before it was resumed.
    """

    def __init__(self) -> None:
        self.step_seconds = self.training_seconds = 0.0
        self._before = 0.0  # seconds of the run in the calls before this one
        self._began = self._step_began = time.monotonic()

    @property
    def run_seconds(self) -> float:
        """Wall-clock time of the run so far, with the parts before it was resumed."""
        return self._before + time.monotonic() - self._began

    def restart(self) -> None:
        """Begin the next step now."""
        self._step_began = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.restart()

    def on_step_end(self, trainer: L.Trainer, module: RnodeModule, step: int) -> None:
        now = time.monotonic()
        self.step_seconds, self._step_began = now - self._step_began, now
        self.training_seconds += self.step_seconds

    def state_dict(self) -> dict[str, float]:
        return {"run_seconds": self.run_seconds, "training_seconds": self.training_seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self._before, self.training_seconds = state_dict["run_seconds"], state_dict["training_seconds"]
