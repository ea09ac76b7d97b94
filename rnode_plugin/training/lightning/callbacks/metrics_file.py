"""MetricsFile: ``metrics.csv`` of a run, which survives kills."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

import pytorch_lightning as L
from pytorch_lightning.callbacks import Callback

from ....files import write_atomically
from ..private import log_interval

__all__ = ["MetricsFile", "MetricsTable"]


class MetricsTable:
    """Rows of numbers by step in a CSV file, with a column for every name that comes along.

    Args:
        path: of the file; rows that are there stay if their step is not greater than ``keep``.
        keep: the rest was written by a run that stopped without a checkpoint.
    """

    def __init__(self, path: str | os.PathLike[str], *, keep: int = 0) -> None:
        self._path, self._names = Path(path), list[str]()
        if self._path.is_file():
            self._names, rows = self._read()
            self._replace([row for row in rows if row["step"].isdigit() and int(row["step"]) <= keep])

    def add(self, row: dict[str, float], step: int) -> None:
        """Write a row; whoever reads the file right afterwards finds it.

        Raises:
            OSError: the file cannot be written.
        """
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


class MetricsFile(Callback):
    """Writes the metrics of the steps that are logged, and of each validation, before the checkpoint of their step.

    Lightning hands a step's metrics to its loggers after the step's checkpoint, so a kill in between would lose a
    row for good.

    Args:
        table: where they go, in the first process; None in the others.
    """

    def __init__(self, table: MetricsTable | None = None) -> None:
        self.table = table
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step:
            return  # in the middle of a step
        self._step = step
        if self.table is not None and step % log_interval(trainer) == 0:
            clock = pl_module.clock
            times = {"seconds_per_step": clock.last, "train_seconds": clock.training, "seconds": clock.run}
            epochs = step * trainer.accumulate_grad_batches / trainer.num_training_batches
            self.table.add({"epoch": epochs, **pl_module.row, **times}, step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.table is None or trainer.sanity_checking:
            return
        row = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        self.table.add({**row, "seconds": pl_module.clock.run}, trainer.global_step)
