"""``Progress`` prints a line every ten seconds, and ``BusyProcessor`` a line about a machine that is busy."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytorch_lightning as L
import torch
from pytorch_lightning.callbacks import Callback

from ...text import duration
from ..recipes.recipe import Recipe
from .clock import Clock, StepCallback
from .stops import Stops

if TYPE_CHECKING:
    from .module import RnodeModule
    from .plan import RunPlan
    from .recorder import Recorder

_INTERVAL = 10.0  # least seconds between two lines
_FIRST_LINE = 20  # so many steps after the first step of this call, a line is printed without waiting
_BUSY = 0.6  # a machine is busy if the thread of a step has a core in less than this share of its time
_LOOKED_AT = 20.0  # seconds of steps over which the share is measured
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


class BusyProcessor(Callback):
    """Prints one line if the threads of a CPU wait for each other because other programs need its cores too.

    On an idle machine the thread that computes a step has a core all the time. On a busy machine this thread sleeps
    until another thread, which waits for a core, has done its part. The callback is the first in the list, so that
    it times no other callback.

    Args:
        recorder: knows the folder that the advice names.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._began: tuple[float, float] | None = None  # time of the clock, and processor time of this thread
        self._seconds = self._computed = 0.0  # both times, summed over steps
        self._is_first = True  # in the first step compilers work, and this thread waits for them
        self._said = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        if not (self._said or self._is_first):
            self._began = time.monotonic(), time.thread_time()

    # from batch start to batch end, so waiting for a batch and the other callbacks are not counted
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self._is_first = False
        if self._began is None:
            return
        self._seconds += time.monotonic() - self._began[0]
        self._computed += time.thread_time() - self._began[1]
        self._began = None
        if self._seconds < _LOOKED_AT:
            return
        share, self._seconds, self._computed = self._computed / self._seconds, 0.0, 0.0
        # with one thread there is nothing to wait for, on a GPU the thread sleeps anyway, and several processes on
        # one machine share its cores on purpose
        threads = torch.get_num_threads()
        alone = trainer.world_size == 1 and trainer.strategy.root_device.type == "cpu"
        if share < _BUSY and threads > 1 and alone:
            self._said = True
            print(
                f"other programs keep the processor busy: the steps had a core for {share:.0%} of their time, and "
                f"their {threads} threads wait for each other. One thread is usually faster then, after Ctrl-C by "
                f"OMP_NUM_THREADS=1 rnode-cli train --resume {self._recorder.run.path}",
                flush=True,
            )
