"""What happens around the training steps: stopping, metrics, checkpoints, sample grids.

The hooks take any LightningModule by their signature; these callbacks are of use for a
:class:`~rnode_plugin.training.lightning.module.FlowModule` only.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as L
import torch
from pytorch_lightning.callbacks import Callback

from ...errors import SolverError, TrainingError
from ...evaluation.sampling import sample_images, save_grid

__all__ = ["Interrupted", "RunControl", "SampleGrids"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):  # noqa: N818 - not an error
    """Raised between two steps, after a checkpoint, when a signal asked to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _anywhere(trainer: L.Trainer, decision: bool) -> bool:
    """Whether any process of the run decides so: all must leave at the same step."""
    return trainer.strategy.reduce_boolean_decision(decision, all=False) if trainer.world_size > 1 else decision


def _mean_over_processes(trainer: L.Trainer, row: dict[str, float]) -> dict[str, float]:
    if trainer.world_size == 1:
        return row
    values = torch.tensor(list(row.values()), dtype=torch.float64, device=trainer.strategy.root_device)
    return dict(zip(row, trainer.strategy.reduce(values, reduce_op="mean").tolist(), strict=True))


class RunControl(Callback):
    """Ends a run in time, writes its metrics and keeps its two checkpoints.

    ``last`` is written every ``save_every`` steps and after each validation, ``best`` after a validation with the
    lowest bits/dim so far. A signal ends the run between two steps, after writing ``last``; a second one ends it
    at once. One that comes during a validation, or right before, waits for its end.

    Args:
        max_time: seconds after which a last validation ends the run; None for no limit.
        log_every: steps between two rows of the metrics.
        save_every: steps between two checkpoints.
    """

    def __init__(self, *, max_time: float | None, log_every: int, save_every: int) -> None:
        self.best = math.inf
        self.out_of_time = False
        self._max_time, self._log_every, self._save_every = max_time, log_every, save_every
        self._start = time.monotonic()
        self._signum: int | None = None
        self._former: dict[int, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    @contextmanager
    def signals_restored(self) -> Iterator[None]:
        """Whatever handlers training sets, those from before are back at the end, also after an exception."""
        self._former = {signum: signal.getsignal(signum) for signum in _SIGNALS}
        try:
            yield
        finally:
            if _in_main_thread():
                for signum, handler in self._former.items():
                    signal.signal(signum, handler)

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        pl_module.folder = trainer.strategy.broadcast(pl_module.folder)  # the first process has made it

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # here Lightning has set its own, which would end a run between a step and its checkpoint
        if _in_main_thread():  # in another thread the program that owns it decides about signals
            for signum in _SIGNALS:
                signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._signum = signum
        signal.signal(signum, self._former[signum])  # the second one acts at once

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % pl_module.plan.accumulate:
            return  # in the middle of a step
        pl_module.finish_step(batch_idx)
        done = pl_module.batches
        if done % self._log_every == 0:
            self._log(trainer, _mean_over_processes(trainer, pl_module.metrics()), done)
        late = self._max_time is not None and time.monotonic() - self._start >= self._max_time
        self.out_of_time = _anywhere(trainer, late)
        validates = self.out_of_time or done == pl_module.plan.total or done % pl_module.plan.check_every == 0
        # a run that stopped here would go on without this step's validation
        if _anywhere(trainer, self._signum is not None) and not validates:
            self._save(trainer, pl_module.folder.last)
            raise Interrupted(self._signum or signal.SIGTERM)
        if self.out_of_time or done == pl_module.plan.total:
            trainer.should_stop = True  # Lightning validates once more before it stops
        elif not validates and done % self._save_every == 0 and not pl_module.guard.in_row:
            self._save(trainer, pl_module.folder.last)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        bits = float(trainer.callback_metrics["val/bpd"])
        row = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        self._log(trainer, {**row, "seconds": pl_module.seconds}, pl_module.batches)
        if not math.isfinite(bits):
            raise TrainingError(f"the validation bits/dim are {bits}.")
        if bits < self.best:
            self.best = bits
            self._save(trainer, pl_module.folder.best)
        self._save(trainer, pl_module.folder.last)
        if _anywhere(trainer, self._signum is not None):
            raise Interrupted(self._signum or signal.SIGTERM)

    def _log(self, trainer: L.Trainer, row: dict[str, float], step: int) -> None:
        # written here and not by Lightning, which would write a step's row only after its checkpoint
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)

    def _save(self, trainer: L.Trainer, path: Path) -> None:
        for logger in trainer.loggers:
            logger.save()  # what is logged up to a checkpoint must outlive a kill right after it
        trainer.save_checkpoint(path)


class SampleGrids(Callback):
    """Writes a grid of samples after each validation.

    Args:
        temperatures: one row of images each.
        images: in a row.
        seed: of the latents, the same in every grid.
    """

    def __init__(self, *, temperatures: tuple[float, ...], images: int, seed: int) -> None:
        self._temperatures, self._images, self._seed = temperatures, images, seed

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        flow = pl_module.flow
        try:
            samples = sample_images(flow, self._images, temperatures=self._temperatures, seed=self._seed)
        except SolverError as error:  # training may go on where a latent far out cannot be integrated
            print(f"no grid of samples at step {pl_module.batches}: {error}", file=sys.stderr)
            return
        path = pl_module.folder.samples / f"step-{pl_module.batches:07d}.png"
        save_grid(path, samples, levels=flow.levels, columns=self._images)
