"""``AfterStep`` is called after each step of a run. It writes the step down, saves it, and ends the run."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import pytorch_lightning as L
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint
from torch import Tensor

from ...errors import SolverError, TrainingError
from ..data.batches import SIGNALS
from ..runs.environment import Environment
from ..runs.metrics import MetricsTable
from ..runs.run import Run
from ..text import batch_counter
from .loggers import make_logger
from .plan import AFTER_STEP
from .progress import Terminal

if TYPE_CHECKING:
    from .experiment import Experiment
    from .module import RnodeModule
    from .plan import RunPlan


class TrainingInterrupted(BaseException):
    """Ends the training for a signal, between two steps and after a checkpoint, or at once for a second signal.

    Like KeyboardInterrupt it is a BaseException, so that no ``except Exception`` takes it for a failure.
    """

    def __init__(self, signal_name: str, *, at_once: bool = False) -> None:
        super().__init__(signal_name)
        self.signal_name, self.at_once = signal_name, at_once


class AfterStep(Checkpoint):
    """Agrees with all devices after each step on the end of the run, writes the step down, saves, and ends the run.

    This is a ``Checkpoint``, and Lightning calls such callbacks last. So a checkpoint holds the state that all
    other callbacks have reached, and raising :class:`TrainingInterrupted` loses nothing. The row of a step is in
    its file before the checkpoint of the step. Only the first process writes.

    After its last step, and when its time is up, Lightning validates a run once more. A signal ends the run after a
    checkpoint, and a second signal at once, both by :class:`TrainingInterrupted`. A SIGTERM within one second of
    the first signal does not count as a second one, because a scheduler may send it to the process group and to
    each process. Only the main thread of a program can handle signals. A signal that is ignored, such as SIGHUP
    under nohup, stays ignored. Lightning restores the former handlers at the end.

    Args:
        experiment: recipe and data of the run.
        plan: its steps.
        max_time: seconds from now after which the run ends; None for no limit.
        progress: whether the first process prints lines on the terminal.

    Attributes:
        folder: the folder of the run; None before the first process has made it.
        begun: whether the run has taken a step in this call, after which :meth:`begin` has changed the folder.
        best: the lowest score of the validations so far.
        training_seconds: time of all steps of the run, including the parts before it was resumed. A step lasts
            from the end of the step before it, so waiting for its batches counts. Validations and writing
            checkpoints do not count.
        out_of_time: whether the limit ended the training before its last step.
        received: the name of the first signal that this process has received while it trained; None without one.
    """

    def __init__(
        self, experiment: Experiment, plan: RunPlan, *, max_time: float | None = None, progress: bool = False
    ) -> None:
        self.folder: Run | None = None
        self.begun = False
        self.best, self.training_seconds, self.out_of_time = math.inf, 0.0, False
        self._experiment, self._plan, self._progress = experiment, plan, progress
        self._recipe = recipe = experiment.recipe
        # what the score of a validation depends on, other than the weights. Its noise is a function of the seed and
        # the number of the batch, and has signs in place of Gaussian noise
        noise = recipe.model.trace_estimator
        self._validation: dict[str, object] = {
            **recipe.to_plain()["test_solver"],
            "seed": recipe.training.seed,
            "batch": recipe.data.val_batch_size,
            "trace_estimator": "rademacher" if noise == "gaussian" else noise,
            "samples": [*experiment.data.identity, len(experiment.data.val)],
        }
        # both in the first process alone
        self._table: MetricsTable | None = None
        self._terminal: Terminal | None = None
        self._step = 0  # the step that this was called for last
        self._agrees_at = 0  # the step after which the processes agree next, if they need not agree before
        self._began = self._step_began = time.monotonic()  # this clock ignores changes of the system's time
        self._seconds_before = 0.0  # of the run in earlier calls
        self._limit = math.inf if max_time is None else self._began + max_time
        self.received: str | None = None
        self._received_at = 0.0
        self._signal: str | None = None  # name of the signal that ends the run on all devices

    @property
    def run(self) -> Run:
        """The folder of the run, which all processes know after Lightning's setup hook."""
        assert self.folder is not None
        return self.folder

    @property
    def run_seconds(self) -> float:
        """Wall-clock time of the run so far, including the parts before it was resumed."""
        return self._seconds_before + time.monotonic() - self._began

    def open(self, folder: Run) -> None:
        """Tell the first process the folder of the run."""
        self.folder = folder
        self._terminal = Terminal(self._recipe, self._plan) if self._progress else None

    def begin(self, trainer: L.Trainer) -> None:
        """Let the first process change the folder, once, when nothing can refuse the run any more.

        This comes after the first step of a call, because Lightning, a callback, the memory or a broken picture may
        refuse the run until then. Recipe and environment are written, and the rows of steps that a
        resumed run takes again go.
        """
        if not self.begun and trainer.is_global_zero:
            run, experiment = self.run, self._experiment
            if experiment.resumed is not None:
                experiment.resumed.repair()
            environment = Environment.of(trainer.strategy.root_device, devices=trainer.world_size)
            run.describe(self._recipe, environment, experiment.facts)
            former = None if experiment.resumed is None else experiment.resumed.metrics
            self._table = MetricsTable(run.metrics, keep=experiment.done, former=former)
            self._step_began = time.monotonic()
        self.begun = True

    # after a step and after a validation -----------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Agree on the end of the run, write the step down, save it, and end the run, in this order."""
        # global_step counts optimizer steps, so with gradient accumulation it stays until the last batch of a step
        if (step := trainer.global_step) == self._step:
            return
        module, now = cast("RnodeModule", pl_module), time.monotonic()
        self._step, seconds, self._step_began = step, now - self._step_began, now
        self.training_seconds += seconds
        complete = step == self._plan.total
        due = complete or trainer.should_stop or step % self._plan.val_every == 0
        time_is_up = self._agree(trainer, seconds) if due or step >= self._agrees_at else False
        self.out_of_time = time_is_up and not complete
        if time_is_up or complete:
            trainer.should_stop = True  # Lightning validates once more
        self.begin(trainer)
        validates = trainer.should_stop or step % self._plan.val_every == 0
        # a callback may end the run in a validation, and the last step has a row
        logged = validates or step % self._recipe.training.log_every == 0
        means = module.values() if logged else None
        if trainer.is_global_zero:
            if means is not None:
                self.log_row(trainer, means, seconds_per_step=seconds)
            self.print_progress(trainer, module.own_values if means is None else means, validates=validates)
        self._log_epoch(trainer, module)
        # Lightning validates next, and `on_validation_end` saves. A run that was resumed from a checkpoint of this
        # moment would skip the validation
        if validates:
            return
        # not after a skipped step, so that the newest checkpoint is from a step that worked
        due = step % self._recipe.training.save_every == 0 and not module.skipped_in_row
        if due or self._signal is not None:
            self._save(trainer, self.run.last)
        self._end_for_signal()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log_epoch(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the validation down, save the best and the newest weights, and end the run, in this order."""
        if trainer.sanity_checking:
            return
        self._agree(trainer, 0.0)  # a validation is long, and a signal may have come meanwhile
        metrics = trainer.callback_metrics.items()
        scores = {name: float(value) for name, value in metrics if name.startswith("val/")}
        if trainer.is_global_zero:
            self.log_row(trainer, scores)
            self.print_progress(trainer, scores, validates=False)
        metric = self._recipe.kind.metric
        # before the checkpoints are saved, so that neither of them holds these weights
        if not math.isfinite(score := scores[f"val/{metric}"]):
            raise TrainingError(f"the validation {metric} is {score}.")
        if score < self.best:
            self.best = score
            self._save(trainer, self.run.best)
        self._save(trainer, self.run.last)
        self._end_for_signal()

    def _agree(self, trainer: L.Trainer, seconds: float) -> bool:
        """Agree with all devices on whether the time is up, which is returned, and whether a signal ends the run.

        The clocks of the processes differ, and one that stopped alone would leave the others waiting for it. But a
        question waits for the device. So after a step that has taken ``seconds`` in the slowest process, they ask
        again about a second later, after a number of steps that is the same in all of them.
        """
        ends = time.monotonic() >= self._limit, self.received is not None
        time_is_up, signaled, longest = _largest_in_any_process(trainer, *ends, seconds)
        several = trainer.world_size > 1 and longest > 0
        self._agrees_at = self._step + (math.ceil(_ASK_AGAIN / longest) if several else 1)
        if signaled:  # a process that has received no signal itself reports SIGTERM
            self._signal = self.received or signal.SIGTERM.name
        return time_is_up > 0

    def log_row(self, trainer: L.Trainer, values: Mapping[str, float], **times: float) -> None:
        """Write the row of this step, or of the validation after it, and hand it to the loggers.

        It is in the file when this returns.
        """
        assert self._table is not None
        times |= {"epoch": self._plan.epochs_at(self._step), "train_seconds": self.training_seconds}
        row = {**values, **times, "seconds": self.run_seconds}
        self._table.add(row, self._step)
        # The module's `log` would hand a row over after the checkpoint of its step, with the last value of each
        # name that is no longer logged
        for logger in trainer.loggers:
            logger.log_metrics(dict(row), step=self._step - 1)  # Lightning counts from 0
            logger.save()

    def print_progress(self, trainer: L.Trainer, values: Mapping[str, Tensor | float], *, validates: bool) -> None:
        """Print a line on the terminal if it is due."""
        if self._terminal is not None:
            self._terminal(
                self._step,
                values,
                train_seconds=self.training_seconds,
                validates=validates,
                ends=trainer.should_stop,
                seconds_left=max(self._limit - time.monotonic(), 0.0),
            )

    def _log_epoch(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # To what other callbacks log, Lightning would add the epoch of its loop, which stays 0. They may log in the
        # first process alone, where a reduction would wait for the others, and `rank_zero_only` reduces nothing
        if trainer.logged_metrics:
            epoch = self._plan.epochs_at(trainer.global_step)
            module.log("epoch", epoch, sync_dist=True, rank_zero_only=True)

    def _save(self, trainer: L.Trainer, path: Path) -> None:
        trainer.save_checkpoint(path)
        self._step_began = time.monotonic()

    def _end_for_signal(self) -> None:
        if self._signal is not None:
            raise TrainingInterrupted(self._signal)

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

    # before the first step -------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step  # above 0 in a run that is resumed
        # each machine reads its own copy of the checkpoint, and gradients at different weights, or by other moments
        # of the optimizer, would be averaged in silence
        resumed = self._experiment.resumed
        own = "" if resumed is None else resumed.sha256
        (differ,) = _largest_in_any_process(trainer, trainer.strategy.broadcast(own) != own)
        if differ:
            raise TrainingError(
                "the processes of this run continue from different checkpoints: copy the newest to all machines."
            )
        # without a best.ckpt that stays, the next validation has to write one, whatever its score
        kept = resumed is not None and trainer.is_global_zero and resumed.keeps_best
        self.best = trainer.strategy.broadcast(self.best if kept else math.inf)
        # Lightning registers its own handlers just before this hook, and they would end a run between a step and
        # its checkpoint. Set any earlier, ours would be replaced by them
        main = threading.current_thread() is threading.main_thread()
        for signum in SIGNALS if main else ():
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, self.receive)
        self._step_began = time.monotonic()

    def receive(self, signum: int, frame: FrameType | None = None) -> None:
        """Note a signal, and raise :class:`TrainingInterrupted` for a second one.

        A handler may run between any two instructions of Python, so it only notes the name. The run ends later,
        where its state is whole.
        """
        now, name = time.monotonic(), signal.Signals(signum).name
        if self.received is None:
            self.received, self._received_at = name, now
            if self._terminal is not None:
                again = "Press Ctrl-C again to stop" if signum == signal.SIGINT else f"A second {name} stops it"
                # not print, which raises an error if the signal has interrupted another print
                os.write(2, f"\nStopping after this step or validation. {again} at once.\n".encode())
        elif signum != signal.SIGTERM or now - self._received_at >= 1.0:
            raise TrainingInterrupted(name, at_once=True)

    # what checkpoints keep -------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        return AFTER_STEP

    # Lightning saves this with each checkpoint and restores it before training starts
    def state_dict(self) -> dict[str, object]:
        return {
            "best": self.best, "validation": self._validation, "plan": dataclasses.asdict(self._plan),
            "run_seconds": self.run_seconds, "training_seconds": self.training_seconds,
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before, self.training_seconds = state_dict["run_seconds"], state_dict["training_seconds"]
        # a score by another solver or noise, or of other samples, cannot be compared with those that follow
        if state_dict["validation"] == self._validation:
            self.best = state_dict["best"]


_ASK_AGAIN = 1.0  # seconds


def _largest_in_any_process(trainer: L.Trainer, *values: float) -> list[float]:
    """The largest of each value in all processes of the run, 0 or 1 of a bool. All have to call this together."""
    if trainer.world_size == 1:
        return list(map(float, values))
    own = torch.tensor(values, dtype=torch.float32, device=trainer.strategy.root_device)
    return cast("Tensor", trainer.strategy.reduce(own, reduce_op="max")).tolist()


class Folder(Callback):
    """Tells all processes the folder of the run, and makes the loggers that were given by name in each of them.

    The first process makes its own loggers before Lightning starts, because a profiler asks for their folder. A
    callback that needs a logger, such as LearningRateMonitor, looks for one in every process. So this one comes
    before the user's callbacks.

    Args:
        after_step: knows the folder in the first process, and gets it in the others.
        loggers: the names.
    """

    def __init__(self, after_step: AfterStep, loggers: Sequence[str] = ()) -> None:
        self._after_step, self._loggers = after_step, tuple(loggers)

    # the first hook after the processes have found each other
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        run = self._after_step.folder = trainer.strategy.broadcast(self._after_step.folder)
        if run is not None and not trainer.is_global_zero:
            trainer.loggers += [make_logger(name, run.path) for name in self._loggers]


class SampleGrids(Callback):
    """Draws a grid of samples, ``step-NUMBER.png``, at the end of each validation, with the weights that it had.

    Args:
        after_step: knows the folder of the run.
    """

    def __init__(self, after_step: AfterStep) -> None:
        self._after_step = after_step

    # In this hook WeightAveraging, which comes later in the list, has not yet put the trained weights back. In
    # on_validation_end it has
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        module = cast("RnodeModule", pl_module)
        recipe, path = module.recipe, self._after_step.run.picture(trainer.global_step)
        path.parent.mkdir(exist_ok=True)
        try:
            recipe.kind.write_samples(recipe.data, module.flow, path, recipe.pictured)
        except SolverError as error:  # a latent far out may fail where no image does, so training continues
            print(f"no grid of samples at step {trainer.global_step}: {error}", file=sys.stderr)
