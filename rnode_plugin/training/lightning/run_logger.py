"""RunLogger: Lightning's CSV logger, which writes ``metrics.csv`` into the folder of a run and survives kills."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter

from ...files import write_atomically
from ..runs.folder import RunFolder

__all__ = ["RunLogger"]


class _Writer(ExperimentWriter):
    """Lightning's writer of metrics, but a run that goes on keeps the rows before the step where it does."""

    def __init__(self, log_dir: str, keep: int) -> None:
        self._keep = keep
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        text = path.read_text(encoding="utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1]  # a kill can cut the last row in two
        reader = csv.DictReader(io.StringIO(whole, newline=""))
        self.metrics_keys = list(reader.fieldnames or [])
        rows = [row for row in reader if (row.get("step") or "").isdigit() and int(row["step"]) <= self._keep]
        self._replace(rows, self.metrics_keys)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with open(self.metrics_file_path, newline="") as file:
            rows = list(csv.DictReader(file))
        self._replace(rows, fieldnames)

    def _replace(self, rows: list[dict[str, Any]], fieldnames: list[str]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=fieldnames)
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.metrics_file_path, lambda file: file.write(text.getvalue().encode()))


class RunLogger(CSVLogger):
    """``metrics.csv`` in the run's folder itself.

    Args:
        folder: of the run.
        keep: number of steps whose rows stay; the rest was logged by a run that stopped without a checkpoint.
    """

    def __init__(self, folder: RunFolder, *, keep: int = 0) -> None:
        super().__init__(folder.path, name="", version="")
        self._keep = keep

    @property
    def log_dir(self) -> str:
        return self.root_dir

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir, self._keep)
        return self._experiment  # pyright: ignore[reportReturnType]
