"""``Clock`` times a run and its steps. ``StepCallback`` is a callback with a hook for each optimizer step."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, cast

import pytorch_lightning as L
from pytorch_lightning.callbacks import Callback

from .plan import CLOCK

if TYPE_CHECKING:
    from .module import RnodeModule


class StepCallback(Callback):
    """A callback with :meth:`on_step_end`, which is called after each optimizer step.

    Lightning's own hook is called after each batch, and with gradient accumulation a step takes several.
    """

    _seen = 0  # the step that the hook was called for last

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._seen = trainer.global_step  # above 0 in a run that is resumed

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        # global_step counts optimizer steps, so it stays until the last batch of a step
        if (step := trainer.global_step) != self._seen:
            self._seen = step
            self.on_step_end(trainer, cast("RnodeModule", pl_module), step)

    def on_step_end(self, trainer: L.Trainer, module: RnodeModule, step: int) -> None:
        """Act after a step. ``step`` is the number of steps so far, with the one that has just ended."""


class Clock(StepCallback):
    """Times the steps of a run. The callbacks after it read the times of the step that has just ended.

    A step lasts from the end of the step before it, so waiting for its batches counts. Validations and writing
    checkpoints do not count, because the recorder calls :meth:`restart` after them.

    Attributes:
        step_seconds: time of the last step.
        training_seconds: time of all steps of the run, including the parts before it was resumed.
    """

    def __init__(self) -> None:
        self.step_seconds = self.training_seconds = 0.0
        self._before = 0.0  # seconds of the run in earlier calls
        self._began = self._step_began = time.monotonic()  # this clock ignores changes of the system's time

    @property
    def run_seconds(self) -> float:
        """Wall-clock time of the run so far, including the parts before it was resumed."""
        return self._before + time.monotonic() - self._began

    def restart(self) -> None:
        """Let the next step begin now."""
        self._step_began = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.restart()

    def on_step_end(self, trainer: L.Trainer, module: RnodeModule, step: int) -> None:
        now = time.monotonic()
        self.step_seconds, self._step_began = now - self._step_began, now
        self.training_seconds += self.step_seconds

    @property
    def state_key(self) -> str:
        return CLOCK

    # Lightning saves these with each checkpoint and restores them before training starts
    def state_dict(self) -> dict[str, float]:
        return {"run_seconds": self.run_seconds, "training_seconds": self.training_seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self._before, self.training_seconds = state_dict["run_seconds"], state_dict["training_seconds"]
