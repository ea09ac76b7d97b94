"""The callbacks of a run: metrics, checkpoints and signals after each step, and pictures of samples."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import pytorch_lightning as L
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint

from ...errors import SolverError, TrainingError
from ...text import duration
from ..evaluation.samples import save_samples
from ..recipes.recipe import Recipe
from ..runs.metrics import MetricsTable
from ..runs.run import Run
from .runs import RunPlan

_TO_STOP = [each for each in signal.Signals if each.name in ("SIGINT", "SIGTERM", "SIGHUP")]  # Windows has two
_INTERVAL = 10.0  # least seconds between two lines of progress
_BUSY = 0.6  # share of its time in which a step has a core, below which the machine counts as busy
_LOOKED_AT = 20.0  # seconds of steps for this share
_FIRST_LINE = 20  # steps after the first one of this call, when a line is printed at once
_SHOWN = {
    "train/bpd": "bits/dim", "train/nll": "NLL", "train/matching": "matching error", "train/nfe": "NFE",
    "val/bpd": "val bits/dim", "val/nll": "val NLL",
}  # fmt: skip


class Stopped(BaseException):
    """Raised with the name of a signal between two steps, after the checkpoint, or at once for a second signal."""

    def __init__(self, signal_name: str, *, at_once: bool = False) -> None:
        super().__init__(signal_name)
        self.signal_name, self.at_once = signal_name, at_once


class RunControl(Checkpoint):
    """Writes the metrics and checkpoints of a run, and ends it between two steps, on all devices at the same one.

    After a step its row of ``metrics.csv`` is written, if it is logged, then ``last.ckpt``, every few steps and
    after each validation, and ``best.ckpt`` after the best one.

    SIGINT (Ctrl-C), SIGTERM and SIGHUP end the run after the step, or the validation, in which they come, by
    raising :class:`Stopped`. A second one ends it at once, but for a SIGTERM within a second. When the time is up,
    and after the last step, Lightning validates once more and stops. Only the main thread of a program can handle
    signals. A signal that is ignored, such as SIGHUP under nohup, stays ignored. Lightning puts the handlers from
    before back at the end.

    Args:
        recipe: the recipe of the run.
        plan: its steps.
        folder: the folder of a run that is resumed, for the advice of an error before ``setup``.
        max_time: seconds from now; None for no limit.
        progress: whether the first process prints a line every ten seconds.

    Attributes:
        folder: the folder of the run, set before the training starts.
        table: the metrics, in the first process; None in the others.
        best: the lowest score of the validations so far.
        out_of_time: whether the limit ended the training.
        training_seconds: time of all steps of the run with the wait for their batches, without validations.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: RunPlan,
        *,
        folder: Run | None = None,
        max_time: float | None = None,
        progress: bool = False,
    ) -> None:
        self.folder = folder
        self.table: MetricsTable | None = None
        self.best, self.out_of_time = math.inf, False
        self.training_seconds = self._step_seconds = self._seconds_before = 0.0
        self._recipe, self._plan = recipe, plan
        self._stages = plan.stages(recipe)
        self._began = self._step_began = self._printed = time.monotonic()
        self._end = None if max_time is None else self._began + max_time
        self._received, self._since = None, 0.0  # signal of this process, and when
        self._agreed: str | None = None  # signal of all processes
        self._step = self._written = 0  # the last step that was made, and the last one in the table
        self._progress = progress
        # step and training seconds of a line, or of the first step of this call; and seconds per step before it
        self._mark: tuple[int, float] | None = None
        self._pace = 0.0

    @property
    def run_seconds(self) -> float:
        """Wall-clock time of the run so far, with the parts before it was resumed."""
        return self._seconds_before + time.monotonic() - self._began

    def state_dict(self) -> dict[str, Any]:
        seconds = {"run_seconds": self.run_seconds, "training_seconds": self.training_seconds}
        return {"best": self.best, "validation": self._validation, **seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before, self.training_seconds = state_dict["run_seconds"], state_dict["training_seconds"]
        if state_dict["validation"] == self._validation:  # others have other lowest scores
            self.best = state_dict["best"]

    @property
    def _validation(self) -> dict[str, Any]:
        training = self._recipe.training
        return {**dataclasses.asdict(self._recipe.test_solver), "seed": training.seed, "count": training.val_images}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = self._written = trainer.global_step
        if _any(trainer, (first := trainer.strategy.broadcast(self._step)) != self._step):
            raise TrainingError(
                f"this process continues from step {self._step}, the first one from step {first}, and others may "
                "differ: copy the newest checkpoint to all machines."
            )
        # best.ckpt may be in another folder, or have been of later steps
        self.best = trainer.strategy.broadcast(self.best if self._run.best.is_file() else math.inf)
        # here Lightning has set its own, which would end a run between a step and its checkpoint
        main = threading.current_thread() is threading.main_thread()
        for signum in _TO_STOP if main else ():
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, self._on_signal)
        self._step_began = time.monotonic()

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        now, name = time.monotonic(), signal.Signals(signum).name
        if self._received is None:
            self._received, self._since = name, now
            if self._progress and self.table is not None and signum == signal.SIGINT:
                os.write(2, b"\nStopping after this step or validation. Press Ctrl-C again to stop at once.\n")
        elif signum != signal.SIGTERM or now - self._since >= 1.0:  # a system may send it to a group and to each
            raise Stopped(name, at_once=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step:
            return  # in the middle of a step
        now = time.monotonic()
        self._step, self._step_seconds, self._step_began = step, now - self._step_began, now
        self.training_seconds += self._step_seconds
        if self._mark is None:  # the pace leaves out the first step, which also measures, compiles and opens files
            self._mark = step, self.training_seconds
        if pl_module.is_logged(step):
            self._write_row(step, pl_module)
        if self._end is not None:
            self.out_of_time = _any(trainer, now >= self._end)
        if self.out_of_time or step == self._plan.total:
            trainer.should_stop = True  # Lightning validates once more before it stops
        validates = trainer.should_stop or step % self._plan.val_every == 0
        if not validates:  # else the line of this step follows with its scores
            self._print_progress(trainer)
        if (stage := self._stages.get(step)) and self._progress and trainer.is_global_zero:
            print(f"step {step}: {stage}", flush=True)
        self._agree(trainer)
        if validates:
            return  # a checkpoint of this moment would skip the validation
        due = step % self._recipe.training.save_every == 0 and not pl_module.skipped_in_row
        if due or self._agreed is not None:
            trainer.save_checkpoint(self._run.last)
            self._step_began = time.monotonic()  # the time of a write is not the time of a step
        self._stop_if_agreed()

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._is_time_to_print(trainer):
            print(f"validating, batch {batch_idx + 1}", flush=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        step = trainer.global_step
        if trainer.should_stop and self._written < step:  # a time limit: the step was the last one
            self._write_row(step, pl_module)
        row = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if self.table is not None:
            self.table.add({**row, "seconds": self.run_seconds}, step)
        self._print_progress(trainer)
        self._agree(trainer)
        metric = self._recipe.task.metric
        if not math.isfinite(score := row[f"val/{metric}"]):
            raise TrainingError(f"the validation {metric} is {score}.")
        if score < self.best:
            self.best = score
            trainer.save_checkpoint(self._run.best)
        trainer.save_checkpoint(self._run.last)
        self._stop_if_agreed()
        self._step_began = time.monotonic()

    def _agree(self, trainer: L.Trainer) -> None:
        if _any(trainer, self._received is not None):
            self._agreed = self._received or signal.SIGTERM.name

    def _stop_if_agreed(self) -> None:
        if self._agreed is not None:
            raise Stopped(self._agreed)

    def _write_row(self, step: int, pl_module: Any) -> None:
        self._written = step
        row = pl_module.row()  # a mean over the devices, for which all of them are here
        if self.table is not None:
            times = {"seconds_per_step": self._step_seconds, "train_seconds": self.training_seconds}
            epoch = step / self._plan.steps_per_epoch
            self.table.add({"epoch": epoch, **row, **times, "seconds": self.run_seconds}, step)

    @property
    def _run(self) -> Run:
        assert self.folder is not None  # the first process has sent it in setup
        return self.folder

    def _is_time_to_print(self, trainer: L.Trainer, *, at_once: bool = False) -> bool:
        now = time.monotonic()
        due = self._progress and trainer.is_global_zero and (at_once or now - self._printed >= _INTERVAL)
        if due:
            self._printed = now
        return due

    def _print_progress(self, trainer: L.Trainer) -> None:
        """Print the step, its figures and the time that is left."""
        step = trainer.global_step
        done, spent = self._mark or (step, 0.0)
        first = step - done == _FIRST_LINE and self._pace == 0
        if not self._is_time_to_print(trainer, at_once=first or self.out_of_time or step == self._plan.total):
            return
        if step > done:
            self._mark = (step, self.training_seconds)
            self._pace = (self.training_seconds - spent) / (step - done)
        figures = {_SHOWN[name]: value for name, value in trainer.progress_bar_metrics.items() if name in _SHOWN}
        # the time of a step of flow matching is not the time of one of likelihood
        left = self._plan.total - step if step > self._recipe.matching and not self.out_of_time else 0
        if step > self._recipe.matching:
            figures.pop("matching error", None)
        shown = "  ".join(f"{each} {float(value):.{0 if each == 'NFE' else 4}f}" for each, value in figures.items())
        pace = f"  {self._pace:.2f} s/step" if self._pace else ""
        seconds = self._pace * left
        if self._end is not None:
            seconds = min(seconds, max(self._end - time.monotonic(), 0.0))
        rest = f", about {duration(seconds)} left" if pace and left > 0 else ""
        print(f"step {step}/{self._plan.total}  {shown}{pace}{rest}", flush=True)


def _any(trainer: L.Trainer, decision: bool) -> bool:
    """Whether any process of the run decides so."""
    return decision if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(decision, all=False)


class BusyProcessor(Callback):
    """Prints one line if the threads of a CPU wait for each other because other programs need its cores too.

    On an idle machine the thread that computes a step has a core all the time. On a busy one, this thread sleeps
    until another thread, which waits for a core, has done its part.
    """

    def __init__(self, control: RunControl) -> None:
        self._control = control
        self._began: tuple[float, float] | None = None  # clock and processor time of this thread
        self._seconds = self._computed = 0.0
        self._is_first = True  # step, in which compilers work and this thread waits for them
        self._said = False

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not (self._said or self._is_first):
            self._began = time.monotonic(), time.thread_time()

    # the wait for a batch and all that is done between two steps are not counted
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
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
        threads, folder = torch.get_num_threads(), self._control.folder
        alone = trainer.world_size == 1 and trainer.strategy.root_device.type == "cpu"
        if share < _BUSY and threads > 1 and alone and folder is not None:
            self._said = True
            print(
                f"other programs keep the processor busy: the steps had a core for {share:.0%} of their time, and "
                f"their {threads} threads wait for each other. One thread is usually faster then, after Ctrl-C by "
                f"OMP_NUM_THREADS=1 rnode-cli train --resume {folder.path}",
                flush=True,
            )


class SampleGrids(Callback):
    """Writes ``step-NUMBER.png``, a grid of samples, at the end of each validation, with its weights."""

    def __init__(self, control: RunControl) -> None:
        self._control = control

    # in this hook a callback that averages the weights has not put them back yet, if it comes later
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or (folder := self._control.folder) is None:
            return
        picture = folder.picture(trainer.global_step)
        try:
            save_samples(pl_module.task, pl_module.flow, None, pl_module.recipe.training, picture)
        except SolverError as error:  # training may continue if a latent far out cannot be integrated
            print(f"no grid of samples at step {trainer.global_step}: {error}", file=sys.stderr)
