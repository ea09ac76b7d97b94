"""Place Lightning's loops after a number of steps, whatever they counted when the checkpoint was written."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as L
from pytorch_lightning.callbacks import Callback

from ..schedule import RunPlan

__all__ = ["RunPosition"]


class RunPosition(Callback):
    """Starts a resumed run between two steps of its own plan.

    The checkpoint may be of another plan: fewer devices that accumulate more batches for a step, another number of
    steps, or version 0.1, which counted a whole run as one epoch. The steps that were made are what counts.

    Args:
        plan: of the run.
    """

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        place_after(checkpoint["loops"]["fit_loop"], checkpoint["progress"]["batches"], self._plan)


def place_after(loop: dict[str, Any], steps: int, plan: RunPlan) -> None:
    """Change the state of a fit loop to that of a run of ``plan`` right after ``steps`` steps."""
    epoch, step = divmod(steps, plan.steps_per_epoch)
    trained = steps * plan.accumulate
    batches = loop["epoch_loop.batch_progress"]
    _count(batches["current"], step * plan.accumulate)
    _count(batches["total"], trained)
    batches["is_last_batch"] = False
    for which in ("current", "total"):
        _count(loop["epoch_progress"][which], epoch)
        if step:  # in the middle of an epoch
            loop["epoch_progress"][which].update(ready=epoch + 1, started=epoch + 1)
    # a loop that begins after a step with a validation counts that step when it leaves the validation out
    validated = trained % (plan.val_every * plan.accumulate) == 0
    loop["epoch_loop.state_dict"] = {"_batches_that_stepped": steps - validated}


def _count(counts: dict[str, int], value: int) -> None:
    counts.update(dict.fromkeys(counts, value))
