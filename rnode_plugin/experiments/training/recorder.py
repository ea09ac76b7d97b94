"""``Recorder`` writes the metrics and checkpoints of a run, and ``SampleGrids`` its pictures."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import TYPE_CHECKING, Any, cast

import pytorch_lightning as L
from pytorch_lightning.callbacks import Callback, Checkpoint

from ...errors import SolverError, TrainingError
from ..evaluation.samples import save_samples
from ..recipes.recipe import Recipe
from ..runs.metrics import MetricsTable
from ..runs.run import Run
from .clock import Clock, StepCallback
from .stops import Stopped, Stops, any_process

if TYPE_CHECKING:
    from .module import RnodeModule
    from .plan import RunPlan


class Recorder(StepCallback, Checkpoint):
    """Writes what a run leaves after a step, and ends the run there if :class:`Stops` has decided so.

    After a step its row of ``metrics.csv`` is written, if it is logged, then ``last.ckpt``, every few steps and
    after each validation, and ``best.ckpt`` after the best one. It is a ``Checkpoint``, so that Lightning calls it
    last: what it saves is what all other callbacks have left, and raising :class:`Stopped` loses nothing.

    Args:
        recipe: the recipe of the run.
        plan: its steps.
        clock: its times.
        stops: the decision about its end.
        folder: the folder of a run that is resumed; a new one is set before the training starts.

    Attributes:
        folder: the folder of the run; None before the first process has made it.
        table: the metrics, in the first process; None in the others.
        best: the lowest score of the validations so far.
    """

    def __init__(
        self, recipe: Recipe, plan: RunPlan, clock: Clock, stops: Stops, *, folder: Run | None = None
    ) -> None:
        self.folder = folder
        self.table: MetricsTable | None = None
        self.best = math.inf
        self._recipe, self._plan, self._clock, self._stops = recipe, plan, clock, stops
        self._written = 0  # the last step in the table

    @property
    def run(self) -> Run:
        """The folder of the run, which all processes have once training has begun."""
        assert self.folder is not None
        return self.folder

    def open(self, folder: Run, *, keep: int) -> None:
        """Write into this folder, whose metrics stay up to step ``keep``. The first process alone does so."""
        self.folder, self.table = folder, MetricsTable(folder.metrics, keep=keep)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "validation": self._validation}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["validation"] == self._validation:  # others have other lowest scores
            self.best = state_dict["best"]

    @property
    def _validation(self) -> dict[str, object]:
        """What the score of a validation depends on, other than the weights."""
        training = self._recipe.training
        return {**dataclasses.asdict(self._recipe.test_solver), "seed": training.seed, "count": training.val_images}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._written = step = trainer.global_step
        if any_process(trainer, (first := trainer.strategy.broadcast(step)) != step):
            raise TrainingError(
                f"this process continues from step {step}, the first one from step {first}, and others may "
                "differ: copy the newest checkpoint to all machines."
            )
        # best.ckpt may be in another folder, or have been of later steps
        self.best = trainer.strategy.broadcast(self.best if self.run.best.is_file() else math.inf)

    def on_step_end(self, trainer: L.Trainer, module: RnodeModule, step: int) -> None:
        if module.is_logged(step):
            self._write_row(step, module)
        if trainer.should_stop or self._plan.validates_after(step):
            return  # a checkpoint of this moment would skip the validation
        due = step % self._recipe.training.save_every == 0 and not module.skipped_in_row
        if due or self._stops.signal is not None:
            trainer.save_checkpoint(self.run.last)
            self._clock.restart()
        self._end_if_decided()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        step = trainer.global_step
        if trainer.should_stop and self._written < step:  # a time limit: the step was the last one
            self._write_row(step, cast("RnodeModule", pl_module))
        row = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if self.table is not None:
            self.table.add({**row, "seconds": self._clock.run_seconds}, step)
        metric = self._recipe.task.metric
        if not math.isfinite(score := row[f"val/{metric}"]):
            raise TrainingError(f"the validation {metric} is {score}.")
        if score < self.best:
            self.best = score
            trainer.save_checkpoint(self.run.best)
        trainer.save_checkpoint(self.run.last)
        self._end_if_decided()
        self._clock.restart()

    def _end_if_decided(self) -> None:
        if (name := self._stops.signal) is not None:
            raise Stopped(name)

    def _write_row(self, step: int, module: RnodeModule) -> None:
        self._written = step
        row = module.row()  # a mean over the devices, for which all of them are here
        if self.table is not None:
            clock, epoch = self._clock, step / self._plan.steps_per_epoch
            times = {"seconds_per_step": clock.step_seconds, "train_seconds": clock.training_seconds}
            self.table.add({"epoch": epoch, **row, **times, "seconds": clock.run_seconds}, step)


class SampleGrids(Callback):
    """Writes ``step-NUMBER.png``, a grid of samples, at the end of each validation, with its weights."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    # in this hook a callback that averages the weights has not put them back yet, if it comes later
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        module = cast("RnodeModule", pl_module)
        picture = self._recorder.run.picture(trainer.global_step)
        try:
            save_samples(module.task, module.flow, None, module.recipe.training, picture)
        except SolverError as error:  # training may continue if a latent far out cannot be integrated
            print(f"no grid of samples at step {trainer.global_step}: {error}", file=sys.stderr)
