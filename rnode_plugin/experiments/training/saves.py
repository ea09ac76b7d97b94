"""``Checkpoints`` saves the best and the newest weights of a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pytorch_lightning.callbacks import Checkpoint

from ...errors import TrainingError
from .plan import SAVES

if TYPE_CHECKING:
    import pytorch_lightning as L

    from .experiment import Experiment
    from .folder import RunFolder
    from .module import RnodeModule
    from .plan import RunPlan
    from .rows import Rows
    from .stop import StopAt


class Checkpoints(Checkpoint):
    """Saves ``last.ckpt`` after steps and validations, ``best.ckpt`` after better validations, and ends the run.

    This is a ``Checkpoint``, and Lightning calls such callbacks last. So a checkpoint holds the state that all
    other callbacks have reached, and ending the run for a signal loses nothing.

    Args:
        experiment: recipe and data of the run.
        plan: its steps.
        folder: knows the folder of the run.
        rows: measures the time, without that of checkpoints.
        stop: ends the run for a signal.

    Attributes:
        best: the lowest score of the validations so far.
    """

    def __init__(self, experiment: Experiment, plan: RunPlan, folder: RunFolder, rows: Rows, stop: StopAt) -> None:
        self.best = math.inf
        self._experiment, self._plan, self._folder, self._rows, self._stop = experiment, plan, folder, rows, stop
        # what the score of a validation depends on, other than the weights. Its noise is a function of the seed and
        # the number of the batch, and has signs in place of Gaussian noise
        recipe = experiment.recipe
        noise = recipe.model.trace_estimator
        self._validation: dict[str, object] = {
            **recipe.to_plain()["test_solver"],
            "seed": recipe.training.seed,
            "batch": recipe.data.val_batch_size,
            "trace_estimator": "rademacher" if noise == "gaussian" else noise,
            "samples": [*experiment.data.identity, len(experiment.data.val)],
        }

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # without a best.ckpt that stays, the next validation has to write one, whatever its score
        resumed = self._experiment.resumed
        kept = resumed is not None and trainer.is_global_zero and resumed.keeps_best
        self.best = trainer.strategy.broadcast(self.best if kept else math.inf)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        # Lightning validates next, and `on_validation_end` saves. A run that was resumed from a checkpoint of this
        # moment would skip the validation
        if not self._plan.ends_step(trainer, batch_idx) or self._plan.validates(trainer):
            return
        # not after a skipped step, so that the newest checkpoint is from a step that worked
        due = trainer.global_step % self._experiment.recipe.training.save_every == 0
        if (due and not cast("RnodeModule", pl_module).skipped_in_row) or self._stop.ends:
            self._save(trainer, self._folder.run.last)
        self._stop.raise_if_signaled()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        metric = self._experiment.recipe.kind.metric
        # before the checkpoints are saved, so that neither of them holds these weights
        if not math.isfinite(score := float(trainer.callback_metrics[f"val/{metric}"])):
            raise TrainingError(f"the validation {metric} is {score}.")
        if score < self.best:
            self.best = score
            self._save(trainer, self._folder.run.best)
        self._save(trainer, self._folder.run.last)
        self._stop.raise_if_signaled()

    def _save(self, trainer: L.Trainer, path: Path) -> None:
        trainer.save_checkpoint(path)
        self._rows.begin_step()

    # what checkpoints keep -------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        return SAVES

    # Lightning saves this with each checkpoint and restores it before training starts
    def state_dict(self) -> dict[str, object]:
        return {"best": self.best, "validation": self._validation}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # a score by another solver or noise, or of other samples, cannot be compared with those that follow
        if state_dict["validation"] == self._validation:
            self.best = state_dict["best"]
