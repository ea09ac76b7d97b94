"""What the terminal shows while something takes long: a bar where a line can be redrawn, plain lines elsewhere."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import pytorch_lightning as L
from pytorch_lightning.callbacks import ProgressBar, TQDMProgressBar
from tqdm import tqdm

from ..text import duration

__all__ = ["LineProgress", "batch_counter", "progress_display"]

_INTERVAL = 10.0  # least seconds between two plain lines

_SHOWN = {
    "train/bpd": "bits/dim",
    "train/nll": "NLL",
    "train/nfe": "NFE",
    "val/bpd": "val bits/dim",
    "val/nll": "val NLL",
}


def _shown_metrics(metrics: dict[str, Any]) -> dict[str, str]:
    shown = {}
    for name, label in _SHOWN.items():
        if name in metrics:
            shown[label] = f"{float(metrics[name]):.0f}" if label == "NFE" else f"{float(metrics[name]):.4f}"
    return shown


class _Bar(TQDMProgressBar):
    """Lightning's bar over all steps of the run, with bits/dim and NFE."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=1)

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.reset(trainer.max_steps)
        self.train_progress_bar.set_description("training")
        self._show(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
        self._show(trainer)

    def _show(self, trainer: L.Trainer) -> None:
        self.train_progress_bar.n = trainer.global_step
        self.train_progress_bar.refresh()

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        return dict(_shown_metrics(trainer.progress_bar_metrics))


class LineProgress(ProgressBar):
    """A line now and then, for terminals without cursor movement and for log files.

    Args:
        interval: least seconds between two lines.
    """

    def __init__(self, interval: float = _INTERVAL) -> None:
        super().__init__()
        self._interval, self._last = interval, time.monotonic()

    def disable(self) -> None:
        self._interval = math.inf

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.monotonic() - self._last >= self._interval:
            self._print(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if time.monotonic() - self._last >= self._interval:
            self._last = time.monotonic()
            print(f"validating, batch {batch_idx + 1} of {self.total_val_batches}", flush=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._interval < math.inf:
            self._print(trainer, pl_module)

    def _print(self, trainer: L.Trainer, module: Any) -> None:
        self._last = time.monotonic()
        shown = "  ".join(f"{name} {value}" for name, value in _shown_metrics(trainer.progress_bar_metrics).items())
        pace = module.clock.training / max(trainer.global_step, 1)
        left = trainer.max_steps - trainer.global_step
        rest = f", about {duration(pace * left)} left" if left > 0 else ""
        print(f"step {trainer.global_step}/{trainer.max_steps}  {shown}  {pace:.2f} s/step{rest}", flush=True)


def progress_display() -> ProgressBar:
    """The display for Lightning's Trainer."""
    return _Bar() if _redraws(sys.stdout) else LineProgress()


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
