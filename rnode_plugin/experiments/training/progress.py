"""``Progress`` prints a line with the values of a step every ten seconds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytorch_lightning as L

from ...text import duration
from ..recipes.recipe import Recipe
from .clock import Clock, StepCallback
from .stops import Stops

if TYPE_CHECKING:
    from .module import RnodeModule
    from .plan import RunPlan

_INTERVAL = 10.0  # least seconds between two lines
_FIRST_LINE = 20  # so many steps after the first step of this call, a line is printed without waiting
_SHOWN = {
    "train/bpd": "bits/dim", "train/nll": "NLL", "train/matching": "matching error", "train/nfe": "NFE",
    "val/bpd": "val bits/dim", "val/nll": "val NLL",
}  # fmt: skip


class Progress(StepCallback):
    """Prints the step, its values, the pace and the time that is left. Only the first process prints.

    Args:
        recipe: the recipe of the run.
        plan: the steps of the run.
        clock: the times of the run.
        stops: the time limit of the run.
    """

    def __init__(self, recipe: Recipe, plan: RunPlan, clock: Clock, stops: Stops) -> None:
        self._matching, self._plan, self._clock, self._stops = recipe.matching, plan, clock, stops
        self._stages = plan.stages(recipe)
        self._printed = time.monotonic()
        # step and training seconds at the last line, or after the first step of this call. The first step also
        # compiles and opens files, so its time would spoil the pace
        self._mark: tuple[int, float] | None = None
        self._pace = 0.0  # seconds per step between the two last marks

    def on_step_end(self, trainer: L.Trainer, module: RnodeModule, step: int) -> None:
        if self._mark is None:
            self._mark = step, self._clock.training_seconds
        # if a validation follows, its scores belong to the line of this step, which is printed after it
        if not (trainer.should_stop or self._plan.validates_after(step)):
            self._print_line(trainer)
        if (stage := self._stages.get(step)) and trainer.is_global_zero:
            print(f"step {step}: {stage}", flush=True)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._is_due(trainer):
            print(f"validating, batch {batch_idx + 1}", flush=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._print_line(trainer)

    def _is_due(self, trainer: L.Trainer, *, at_once: bool = False) -> bool:
        """Whether a line may be printed now. The next one then waits for an interval."""
        now = time.monotonic()
        due = trainer.is_global_zero and (at_once or now - self._printed >= _INTERVAL)
        if due:
            self._printed = now
        return due

    def _print_line(self, trainer: L.Trainer) -> None:
        """Print the line of the last step if it is due: step, values, pace, and the time that is left."""
        step, total, ends = trainer.global_step, self._plan.total, self._stops.out_of_time
        done, spent = self._mark or (step, 0.0)
        first = step - done == _FIRST_LINE and self._pace == 0
        if not self._is_due(trainer, at_once=first or ends or step == total):
            return
        if step > done:
            seconds = self._clock.training_seconds
            self._mark, self._pace = (step, seconds), (seconds - spent) / (step - done)
        figures = {_SHOWN[name]: value for name, value in trainer.progress_bar_metrics.items() if name in _SHOWN}
        # a step of flow matching is quicker than one of maximum likelihood, so its pace does not predict the rest
        left = total - step if step > self._matching and not ends else 0
        if step > self._matching:
            figures.pop("matching error", None)  # Lightning keeps the last value of what is no longer logged
        shown = "  ".join(f"{each} {float(value):.{0 if each == 'NFE' else 4}f}" for each, value in figures.items())
        pace = f"  {self._pace:.2f} s/step" if self._pace else ""
        seconds = min(self._pace * left, self._stops.seconds_left)
        rest = f", about {duration(seconds)} left" if pace and left > 0 else ""
        print(f"step {step}/{total}  {shown}{pace}{rest}", flush=True)
