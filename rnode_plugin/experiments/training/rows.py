"""``Rows`` writes each step and validation into ``metrics.csv``, to the loggers and on the terminal."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from pytorch_lightning.callbacks import Callback

from ..runs.metrics import MetricsTable
from ..text import batch_counter
from .plan import ROWS
from .progress import Terminal

if TYPE_CHECKING:
    import pytorch_lightning as L
    from torch import Tensor

    from .experiment import Experiment
    from .folder import RunFolder
    from .module import RnodeModule
    from .plan import RunPlan
    from .stop import StopAt


class Rows(Callback):
    """Writes the rows of the run, and measures its time. Only the first process writes.

    The row of a step or a validation is in its file when the hook returns, before its checkpoint.

    Args:
        experiment: recipe and data of the run.
        plan: its steps.
        folder: is told when the first row is due.
        stop: knows the time that is left.
        progress: whether the first process prints lines on the terminal.

    Attributes:
        training_seconds: time of all steps of the run, including the parts before it was resumed. A step lasts
            from the end of the step before it, so waiting for its batches counts. Validations and writing
            checkpoints do not count.
        processor_seconds: processor time of this process in the same steps, over all threads.
    """

    def __init__(
        self, experiment: Experiment, plan: RunPlan, folder: RunFolder, stop: StopAt, *, progress: bool = False
    ) -> None:
        self.training_seconds = self.processor_seconds = 0.0
        self._experiment, self._plan, self._folder, self._stop = experiment, plan, folder, stop
        self._progress = progress
        # both in the first process alone
        self._table: MetricsTable | None = None
        self._terminal: Terminal | None = None
        self._processor_began = time.process_time()
        self._began = self._step_began = time.monotonic()  # this clock ignores changes of the system's time
        self._seconds_before = 0.0  # of the run in earlier calls

    @property
    def run_seconds(self) -> float:
        """Wall-clock time of the run so far, including the parts before it was resumed."""
        return self._seconds_before + time.monotonic() - self._began

    def begin_step(self) -> None:
        """Begin the time of the next step, after writing a checkpoint."""
        self._step_began, self._processor_began = time.monotonic(), time.process_time()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._progress and trainer.is_global_zero:
            self._terminal = Terminal(self._experiment.recipe, self._plan)
        self.begin_step()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if not self._plan.ends_step(trainer, batch_idx):
            return
        module, now, step = cast("RnodeModule", pl_module), time.monotonic(), trainer.global_step
        seconds, self._step_began = now - self._step_began, now
        self.training_seconds += seconds
        used = time.process_time()
        self.processor_seconds += used - self._processor_began
        self._processor_began = used
        self._begin(trainer, module)
        validates = self._plan.validates(trainer)
        # a callback may end the run in a validation, and the last step has a row
        logged = validates or step % self._experiment.recipe.training.log_every == 0
        means = module.values() if logged else None
        if trainer.is_global_zero:
            if means is not None:
                self._write(trainer, means, seconds_per_step=seconds)
            self._print(trainer, module.own_values if means is None else means, validates=validates)
        self._log_epoch(trainer, module)

    def _begin(self, trainer: L.Trainer, module: RnodeModule) -> None:
        """Describe the run, and take over the rows up to the step where it continues."""
        self._folder.begin(trainer, module)
        if self._table is None and trainer.is_global_zero:
            done, resumed = self._experiment.done, self._experiment.resumed
            former = None if resumed is None else resumed.metrics
            self._table = MetricsTable(self._folder.run.metrics, keep=done, former=former)
            self.begin_step()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._count = batch_counter("validating")

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._terminal is not None:
            self._count(batch_idx + 1, int(trainer.num_val_batches[dataloader_idx]))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log_epoch(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            metrics = trainer.callback_metrics.items()
            scores = {name: float(value) for name, value in metrics if name.startswith("val/")}
            self._write(trainer, scores)
            self._print(trainer, scores, validates=False)

    def _write(self, trainer: L.Trainer, values: Mapping[str, float], **times: float) -> None:
        assert self._table is not None
        step = trainer.global_step
        times |= {"epoch": self._plan.epochs_at(step), "train_seconds": self.training_seconds}
        row = {**values, **times, "seconds": self.run_seconds}
        self._table.add(row, step)
        # The module's `log` would hand a row over after the checkpoint of its step, with the last value of each
        # name that is no longer logged
        for logger in trainer.loggers:
            logger.log_metrics(dict(row), step=step - 1)  # Lightning counts from 0
            logger.save()

    def _print(self, trainer: L.Trainer, values: Mapping[str, Tensor | float], *, validates: bool) -> None:
        """Print a line on the terminal if it is due."""
        if self._terminal is not None:
            self._terminal(
                trainer.global_step,
                values,
                train_seconds=self.training_seconds,
                validates=validates,
                ends=trainer.should_stop,
                seconds_left=self._stop.seconds_left,
            )

    def _log_epoch(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # To what other callbacks log, Lightning would add the epoch of its loop, which stays 0. They may log in the
        # first process alone, where a reduction would wait for the others, and `rank_zero_only` reduces nothing
        if trainer.logged_metrics:
            epoch = self._plan.epochs_at(trainer.global_step)
            module.log("epoch", epoch, sync_dist=True, rank_zero_only=True)

    # what checkpoints keep -------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        return ROWS

    # Lightning saves this with each checkpoint and restores it before training starts
    def state_dict(self) -> dict[str, object]:
        return {
            "plan": dataclasses.asdict(self._plan),
            "run_seconds": self.run_seconds,
            "training_seconds": self.training_seconds,
            "processor_seconds": self.processor_seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before, self.training_seconds = state_dict["run_seconds"], state_dict["training_seconds"]
        self.processor_seconds = state_dict["processor_seconds"]
