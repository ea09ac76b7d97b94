"""The callbacks of a run: what follows each step and validation, pictures of samples, averaged weights."""

from __future__ import annotations

import csv
import io
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import pytorch_lightning as L
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint, WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..errors import SolverError, TrainingError
from ..files import write_atomically
from .checkpoints import recipe_of
from .runs import RunFolder, RunPlan
from .trainer import is_logged, validates_after_this_batch

_TO_STOP = [each for each in signal.Signals if each.name in ("SIGINT", "SIGTERM", "SIGHUP")]  # Windows has two


class Interrupted(Exception):  # noqa: N818 - not an error
    """Raised with a signal's name between two steps; callbacks that save checkpoints save one."""


class StoppedAtOnce(BaseException):
    """Raised with a signal's name in the middle of a step when a second one comes; nothing is saved."""


class RunControl(Checkpoint):
    """Writes the metrics and checkpoints of a run, and ends it between two steps, on all devices at the same one.

    After a step its row of ``metrics.csv`` is written, if it is logged, then ``last.ckpt``, every few steps and
    after each validation, and ``best.ckpt`` after the best one. (Lightning hands a step's metrics to its loggers
    after the step's checkpoint, so a kill in between would lose a row for good.) With
    :class:`~rnode_plugin.training.trainer.AtomicCheckpointIO` among the Trainer's plugins checkpoints are written
    all or not at all, and the ``last.ckpt`` from before stays as ``previous.ckpt``.

    SIGINT (Ctrl-C), SIGTERM and SIGHUP end the run after the step, or the validation, in which they come, by
    raising :class:`Interrupted`; a second one ends it at once by raising :class:`StoppedAtOnce`, but for a SIGTERM
    within a second. When the time is up, and after the last step, Lightning validates once more and stops. Only the
    main thread of a program can handle signals; in another one they are left alone. A signal that is ignored, such
    as SIGHUP under nohup, stays ignored. Lightning puts the handlers from before back at the end.

    Args:
        folder: of the run; only the first process needs to know.
        save_every: steps between two checkpoints.
        monitor: metric of a validation whose lowest value is the best.
        max_time: seconds from now; None for no limit.

    Attributes:
        folder: of the run.
        table: of the metrics, in the first process; None in the others, or to write none.
        plan: of a run that is resumed, whose loops are placed by it; None to leave them as Lightning does.
        best: the lowest value so far.
        out_of_time: whether the limit ended the training.
    """

    def __init__(
        self,
        folder: RunFolder | None = None,
        *,
        save_every: int = 100,
        monitor: str = "val/bpd",
        max_time: float | None = None,
    ) -> None:
        self.folder = folder
        self.table: MetricsTable | None = None
        self.plan: RunPlan | None = None
        self.best, self.out_of_time = math.inf, False
        self._goes_on = folder is not None  # else best.ckpt of the checkpoint's run is in another folder
        self._save_every, self._monitor = save_every, monitor
        self._end = None if max_time is None else time.monotonic() + max_time
        self._received, self._since = None, 0.0  # signal of this process, and when
        self._agreed: str | None = None  # of all processes
        self._step = self._written = self._saved = 0  # the last one that was made, in the table, in a checkpoint

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._goes_on:
            self.best = state_dict["best"]

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Place Lightning's loops after the steps that the run has made.

        The checkpoint may be of another plan: fewer devices that accumulate more batches for a step, another number
        of steps, or version 0.1, which counted a whole run as one epoch. If it was validated in another way, its
        lowest value does not count.
        """
        old, new = recipe_of(checkpoint, Path("the checkpoint")), pl_module.recipe
        ways = [(each.test_solver, each.training.seed, each.training.val_images) for each in (old, new)]
        if self._goes_on and ways[0] != ways[1]:
            self._goes_on = False
            if trainer.is_global_zero:
                print("other validations than before: they choose the best weights anew", file=sys.stderr)
        if (plan := self.plan) is None:
            return
        loop, steps = checkpoint["loops"]["fit_loop"], checkpoint["progress"]["batches"]
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

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = self._written = self._saved = trainer.global_step
        if _any(trainer, (first := trainer.strategy.broadcast(self._step)) != self._step):
            raise TrainingError(
                f"this process goes on from step {self._step}, the first one from step {first}, and others may "
                "differ: copy the newest checkpoint to all machines."
            )
        # here Lightning has set its own, which would end a run between a step and its checkpoint
        main = threading.current_thread() is threading.main_thread()
        for signum in _TO_STOP if main else ():
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is not None:
            if signum == signal.SIGTERM and now - self._since < 1.0:
                return  # a system stops all processes of a group, and a comparison hands its own on
            raise StoppedAtOnce(signal.Signals(signum).name)
        self._received, self._since = signal.Signals(signum).name, now

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._stop_if_agreed()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step:
            return  # in the middle of a step
        self._step = step
        if is_logged(trainer, step):
            self._write_row(trainer, pl_module)
        if self._end is not None:
            self.out_of_time = _any(trainer, time.monotonic() >= self._end)
        if self.out_of_time or step == trainer.max_steps:
            trainer.should_stop = True  # Lightning validates once more before it stops
        self._agree(trainer)
        if validates_after_this_batch(trainer):  # a run that stopped right before a validation would miss it
            return
        self._stop_if_agreed()
        if step % self._save_every == 0 and not pl_module.record.in_row:  # a skipped step changes no weights
            self._save(trainer, "last")
            pl_module.clock.start_step()  # a write is no step

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        if trainer.should_stop and self._written < trainer.global_step:  # a time limit: the step was the last one
            self._write_row(trainer, pl_module)
        row = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if self.table is not None:
            self.table.add({**row, "seconds": pl_module.clock.run}, trainer.global_step)
        self._agree(trainer)
        value = row[self._monitor]
        if not math.isfinite(value):
            raise TrainingError(f"the validation {self._monitor.removeprefix('val/')} is {value}.")
        if value < self.best:
            self.best = value
            self._save(trainer, "best")
        self._save(trainer, "last")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_if_agreed()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Interrupted) and trainer.global_step != self._saved:
            self._save(trainer, "last")

    def _agree(self, trainer: L.Trainer) -> None:
        if _any(trainer, self._received is not None):
            self._agreed = self._received or signal.SIGTERM.name

    def _stop_if_agreed(self) -> None:
        if self._agreed is not None:
            raise Interrupted(self._agreed)

    def _write_row(self, trainer: L.Trainer, pl_module: Any) -> None:
        step = self._written = trainer.global_step
        row = pl_module.row()  # a mean over the devices, to which all of them come
        if self.table is not None:
            clock = pl_module.clock
            times = {"seconds_per_step": clock.last, "train_seconds": clock.training, "seconds": clock.run}
            epochs = step * trainer.accumulate_grad_batches / trainer.num_training_batches
            self.table.add({"epoch": epochs, **row, **times}, step)

    def _save(self, trainer: L.Trainer, name: Literal["best", "last"]) -> None:
        assert self.folder is not None  # the first process has told it in setup
        trainer.save_checkpoint(getattr(self.folder, name))
        self._saved = trainer.global_step


def _count(counts: dict[str, int], value: int) -> None:
    counts.update(dict.fromkeys(counts, value))


def _any(trainer: L.Trainer, decision: bool) -> bool:
    """Whether any process of the run decides so."""
    return decision if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(decision, all=False)


class MetricsTable:
    """Rows of numbers by step in a CSV file, with a column for each name that comes along.

    Rows that are there stay if their step is not greater than ``keep``; the rest has no checkpoint.
    """

    def __init__(self, path: str | os.PathLike[str], *, keep: int = 0) -> None:
        self._path, self._names = Path(path), list[str]()
        if self._path.is_file():
            self._names, rows = self._read()
            self._replace([row for row in rows if row["step"].isdigit() and int(row["step"]) <= keep])

    def add(self, row: dict[str, float], step: int) -> None:
        """Write a row; it is in the file when this returns."""
        full: dict[str, Any] = {**row, "step": step}
        if new := full.keys() - set(self._names):
            rows = self._read()[1] if self._path.exists() else []
            self._names = sorted({*self._names, *new})
            self._replace(rows)
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, self._names).writerow(full)

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        text = self._path.read_text(encoding="utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1]  # a kill can cut the last row in two
        reader = csv.DictReader(io.StringIO(whole, newline=""))
        names = list(reader.fieldnames or [])
        return names, [{name: row.get(name) or "" for name in {*names, "step"}} for row in reader]

    def _replace(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self._path, lambda file: file.write(text.getvalue().encode()))


class SampleGrids(Callback):
    """Writes ``step-NUMBER.png``, a grid of samples, at the end of each validation, with its weights."""

    # in this hook a callback that averages the weights has not put them back yet, if it comes later
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking or pl_module.folder is None:  # the first process has one
            return
        picture = pl_module.folder.samples / f"step-{trainer.global_step:07d}.png"
        try:
            pl_module.measure.draw_picture(pl_module.flow, None, pl_module.recipe.training, picture)
        except SolverError as error:  # training may go on if a latent far out cannot be integrated
            print(f"no grid of samples at step {trainer.global_step}: {error}", file=sys.stderr)


class WeightAverage(WeightAveraging):
    """Averages the weights after each step: ``average = decay * average + (1 - decay) * weights``.

    Validations measure the average. In a checkpoint ``state_dict`` holds the average, so that a loaded model
    has it, and ``current_model_state`` the weights that training goes on from.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._average_model is not None
        self._average_model.to(pl_module.device)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._latest_update_step = trainer.global_step  # checkpoints of earlier versions do not have it

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # a run that had no average until now: it begins as the weights
        checkpoint.setdefault("current_model_state", checkpoint["state_dict"])
        checkpoint.setdefault("averaging_state", {"n_averaged": torch.tensor(1)})
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
