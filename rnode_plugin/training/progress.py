"""Progress on the terminal: a bar where a line can be redrawn, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import pytorch_lightning as L
from pytorch_lightning.callbacks import ProgressBar
from tqdm import tqdm

from ..text import duration

_INTERVAL = 10.0  # least seconds between two plain lines

_SHOWN = {
    "train/bpd": "bits/dim",
    "train/nll": "NLL",
    "train/matching": "matching error",
    "train/nfe": "NFE",
    "val/bpd": "val bits/dim",
    "val/nll": "val NLL",
}


class RunProgress(ProgressBar):
    """Steps, bits/dim or NLL, and NFE of a run, over all its epochs."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm[Any] | None = None
        self._enabled, self._last = True, time.monotonic()
        self._mark, self._pace = (0, 0.0), 0.0  # step and training seconds of a line, seconds per step before it

    def disable(self) -> None:
        self._enabled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._enabled and _redraws(sys.stdout):
            self._bar = tqdm(desc="training", total=trainer.max_steps, initial=trainer.global_step, file=sys.stdout)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._show(trainer, pl_module, every=_INTERVAL)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._enabled and self._bar is None and time.monotonic() - self._last >= _INTERVAL:
            self._last = time.monotonic()
            print(f"validating, batch {batch_idx + 1} of {self.total_val_batches}", flush=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._show(trainer, pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.close()

    def _show(self, trainer: L.Trainer, module: Any, *, every: float = 0.0) -> None:
        step, metrics = trainer.global_step, dict(trainer.progress_bar_metrics)
        if step > module.recipe.matching:
            metrics.pop("train/matching", None)
        shown = {
            label: f"{float(metrics[name]):.{0 if label == 'NFE' else 4}f}"
            for name, label in _SHOWN.items()
            if name in metrics
        }
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._enabled and time.monotonic() - self._last >= every:
            self._last = time.monotonic()
            figures = "  ".join(f"{label} {value}" for label, value in shown.items())
            (done, spent), spent_now = self._mark, module.clock.training
            if step > done:
                self._mark, self._pace = (step, spent_now), (spent_now - spent) / (step - done)
            # a step of flow matching says nothing about one of likelihood
            left = trainer.max_steps - step if step > module.recipe.matching else 0
            rest = f", about {duration(self._pace * left)} left" if left > 0 else ""
            print(f"step {step}/{trainer.max_steps}  {figures}  {self._pace:.2f} s/step{rest}", flush=True)


def batch_counter(what: str) -> Callable[[int, int], None]:
    """A callback ``(done, total)`` that shows the count of batches on the standard error."""
    bar = tqdm(desc=what, unit="batch", file=sys.stderr) if _redraws(sys.stderr) else None
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if bar is not None:
            bar.total = total
            bar.update(done - bar.n)
            if done == total:
                bar.close()
        elif time.monotonic() - last >= _INTERVAL:
            last = time.monotonic()
            print(f"{what}, batch {done} of {total}", file=sys.stderr, flush=True)

    return show


def _redraws(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
