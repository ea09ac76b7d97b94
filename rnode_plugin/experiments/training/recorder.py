"""``Recorder`` writes the metrics and checkpoints of a run, and ``SampleGrids`` draws its pictures."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import TYPE_CHECKING, cast

import pytorch_lightning as L
from pytorch_lightning.callbacks import Callback, Checkpoint

from ...errors import SolverError, TrainingError
from ..data.images import ImageArray, fingerprint
from ..recipes.recipe import Recipe
from ..runs.metrics import MetricsTable
from ..runs.run import Run
from .clock import Clock, StepCallback
from .plan import RECORDER
from .stops import Stopped, Stops, any_process

if TYPE_CHECKING:
    from .module import RnodeModule
    from .plan import RunPlan


class Recorder(StepCallback, Checkpoint):
    """Writes the metrics and checkpoints of a run, and ends the run after a step if :class:`Stops` has decided to.

    It writes a row of ``metrics.csv`` after each logged step and each validation, ``last.ckpt`` every few steps and
    after each validation, and ``best.ckpt`` after the best validation. It is a ``Checkpoint``, and Lightning calls
    such callbacks last. So a checkpoint holds the state that all other callbacks have reached, and raising
    :class:`Stopped` loses nothing.

    Args:
        recipe: the recipe of the run.
        plan: the steps of the run.
        clock: the times of the run.
        stops: the decision about the end of the run.
        validated: the samples of a validation.
        folder: the folder of a run that is resumed. The folder of a new run is set before training starts.

    Attributes:
        folder: the folder of the run; None before the first process has made it.
        table: the metrics, in the first process; None in the others.
        best: the lowest score of the validations so far.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: RunPlan,
        clock: Clock,
        stops: Stops,
        *,
        validated: ImageArray,
        folder: Run | None = None,
    ) -> None:
        self.folder = folder
        self.table: MetricsTable | None = None
        self.best = math.inf
        self._recipe, self._plan, self._clock, self._stops = recipe, plan, clock, stops
        self._validated = fingerprint(validated)
        self._written = 0  # the last step in the table

    @property
    def run(self) -> Run:
        """The folder of the run, which all processes know after Lightning's setup hook."""
        assert self.folder is not None
        return self.folder

    def open(self, folder: Run, *, keep: int) -> None:
        """Let the first process write into this folder, whose metrics stay up to step ``keep``."""
        self.folder, self.table = folder, MetricsTable(folder.metrics, keep=keep)

    @property
    def state_key(self) -> str:
        return RECORDER

    def state_dict(self) -> dict[str, object]:
        return {"best": self.best, "validation": self._validation, "plan": dataclasses.asdict(self._plan)}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        # a score by another solver or noise, or of other samples, cannot be compared with those that follow
        if state_dict["validation"] == self._validation:
            self.best = cast("float", state_dict["best"])

    @property
    def _validation(self) -> dict[str, object]:
        """What the score of a validation depends on, other than the weights."""
        recipe = self._recipe
        # the noise is a function of the seed, the process and the number of the batch
        noise = {"seed": recipe.training.seed, "batch": recipe.data.val_batch_size, "devices": self._plan.devices}
        # a validation has signs in place of Gaussian noise
        estimator = recipe.model.trace_noise
        noise |= {"trace_noise": "rademacher" if estimator == "gaussian" else estimator}
        return {**dataclasses.asdict(recipe.test_solver), **noise, "samples": self._validated}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # the first hook after the processes have found each other
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._written = step = trainer.global_step
        # each machine reads its own copy of the checkpoint, and gradients at different weights would be averaged in
        # silence
        if any_process(trainer, (first := trainer.strategy.broadcast(step)) != step):
            raise TrainingError(
                f"this process continues from step {step}, the first one from step {first}, and others may "
                "differ: copy the newest checkpoint to all machines."
            )
        # without a best.ckpt in this folder the next validation has to write one, whatever its score. The file may
        # lie in another folder, or going back has removed it because it was from a later step
        self.best = trainer.strategy.broadcast(self.best if self.run.best.is_file() else math.inf)

    def on_step_end(self, trainer: L.Trainer, module: RnodeModule, step: int) -> None:
        if module.is_logged(step) or trainer.should_stop:  # the steps after which Lightning calls loggers
            module.log_dict(self._times(step))
        if module.is_logged(step):
            self._write_row(step, module)
        # Lightning validates next, and `on_validation_end` saves. A run that was resumed from a checkpoint of this
        # moment would skip the validation
        if trainer.should_stop or self._plan.validates_after(step):
            return
        # not after a skipped step, so that the newest checkpoint is from a step that worked
        due = step % self._recipe.training.save_every == 0 and not module.skipped_in_row
        if due or self._stops.signal is not None:
            trainer.save_checkpoint(self.run.last)
            self._clock.restart()
        self._end_if_decided()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log("epoch", self._plan.epochs_at(trainer.global_step), sync_dist=trainer.world_size > 1)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        step = trainer.global_step
        # a time limit may make any step the last one, and the last step always has a row
        if trainer.should_stop and self._written < step:
            self._write_row(step, cast("RnodeModule", pl_module))
        row = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if self.table is not None:
            self.table.add({**row, "seconds": self._clock.run_seconds}, step)
        metric = self._recipe.task.metric
        # before the checkpoints are saved, so that neither of them holds these weights
        if not math.isfinite(score := row[f"val/{metric}"]):
            raise TrainingError(f"the validation {metric} is {score}.")
        if score < self.best:
            self.best = score
            trainer.save_checkpoint(self.run.best)
        trainer.save_checkpoint(self.run.last)
        self._end_if_decided()
        self._clock.restart()

    def _end_if_decided(self) -> None:
        """Raise :class:`Stopped` if a signal ends the run, in all processes at the same step."""
        if (name := self._stops.signal) is not None:
            raise Stopped(name)

    def _write_row(self, step: int, module: RnodeModule) -> None:
        """Write the row of a training step. All processes have to call this, and the first one writes."""
        self._written = step
        row = module.row()  # averages over the devices, so it must not be called by the first process alone
        if self.table is not None:
            self.table.add({**row, **self._times(step)}, step)

    def _times(self, step: int) -> dict[str, float]:
        """Return the epochs and the times up to a step, which loggers get too.

        Without them Lightning would log the epoch of its loop, which stays 0, because the one epoch of a run never
        ends.
        """
        clock = self._clock
        return {
            "epoch": self._plan.epochs_at(step),
            "seconds_per_step": clock.step_seconds,
            "train_seconds": clock.training_seconds,
            "seconds": clock.run_seconds,
        }


class SampleGrids(Callback):
    """Draws a grid of samples, ``step-NUMBER.png``, at the end of each validation, with the weights that it had.

    Args:
        recorder: knows the folder of the run.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    # In this hook WeightAveraging, which comes later in the list, has not yet put the trained weights back. In
    # on_validation_end it has
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        module = cast("RnodeModule", pl_module)
        training = module.recipe.training
        try:
            module.task.save_picture(
                module.flow,
                self._recorder.run.picture(trainer.global_step),
                count=training.sample_images,
                temperatures=training.sample_temperatures,
                seed=training.seed,
                data=None,
            )
        except SolverError as error:  # a latent far out may fail where no image does, so training continues
            print(f"no grid of samples at step {trainer.global_step}: {error}", file=sys.stderr)
