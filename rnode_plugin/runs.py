"""The folder of a run, ``runs/RECIPE/VERSION/``, and what writes into it."""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import io
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.plugins.io import TorchCheckpointIO

from . import plugins
from ._version import __version__
from .checkpoints import BEST, LAST, PREVIOUS, read_checkpoint, write_atomically
from .errors import CheckpointError, ConfigError
from .evaluation import Evaluation
from .recipes import Recipe

__all__ = ["AtomicCheckpointIO", "RunFolder", "RunLogger", "environment"]

_PACKAGES = ("torch", "torchvision", "pytorch-lightning", "torchdyn", "torchdiffeq", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """Where a run writes."""

    path: Path

    @property
    def best(self) -> Path:
        """The checkpoint with the lowest validation bits/dim."""
        return self.path / "checkpoints" / BEST

    @property
    def last(self) -> Path:
        """The newest checkpoint, from which a run goes on."""
        return self.path / "checkpoints" / LAST

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def result(self) -> Path:
        """How the run ended and what its best weights measure; absent while it runs and after an interruption."""
        return self.path / "result.json"

    @property
    def skipped(self) -> Path:
        """The training images of the step that ended the run for want of a usable gradient; absent otherwise."""
        return self.path / "skipped.json"

    @property
    def images(self) -> Path:
        """Bits/dim of each held-out image in that result, one row each: ``image``, ``dirty``, ``clean``."""
        return self.path / "images.csv"

    @staticmethod
    def create(runs: str | os.PathLike[str], recipe: Recipe) -> RunFolder:
        """The next free version under ``runs/RECIPE``.

        Raises:
            ConfigError: the folder cannot be made.
        """
        parent = Path(runs) / recipe.name
        try:
            parent.mkdir(parents=True, exist_ok=True)
            version = 1 + max((int(each.name) for each in parent.iterdir() if each.name.isdigit()), default=-1)
            while True:
                try:
                    (parent / str(version)).mkdir()
                    return RunFolder(parent / str(version))
                except FileExistsError:  # another run took it in the meantime
                    version += 1
        except OSError as error:
            raise ConfigError(f"cannot make a run folder: {error}. Choose another with --runs.") from None

    @staticmethod
    def of_checkpoint(checkpoint: Path) -> RunFolder | None:
        """The run that a checkpoint lies in; None for a file elsewhere."""
        inside = checkpoint.parent.name == "checkpoints" and (checkpoint.parent.parent / "recipe.json").is_file()
        return RunFolder(checkpoint.parent.parent) if inside else None

    def describe(self, recipe: Recipe, device: torch.device) -> None:
        """Write ``recipe.json`` and ``environment.json``; how an earlier part of the run ended goes.

        Raises:
            CheckpointError: they cannot be written.
        """
        try:
            for file in (self.result, self.images, self.skipped):
                file.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot write into {self.path}: {error.strerror}.") from None
        _write_json(self.path / "recipe.json", recipe.to_plain())
        _write_json(self.path / "environment.json", environment(device))

    def name_skipped(self, step: int, images: Sequence[int]) -> None:
        """Write ``skipped.json``: the images of the batch that could not be used at ``step``.

        Raises:
            CheckpointError: it cannot be written.
        """
        _write_json(self.skipped, {"step": step, "images": list(images)})

    def conclude(self, ended: Mapping[str, Any], evaluation: Evaluation) -> None:
        """Write ``result.json`` and, before it, ``images.csv``.

        Args:
            ended: how the run ended.
            evaluation: of its best weights.

        Raises:
            CheckpointError: they cannot be written.
        """
        measured = dataclasses.asdict(evaluation)
        columns = [measured[kind].pop("images") for kind in ("dirty", "clean")]
        rows = (
            f"{number},{dirty:.8g},{clean:.8g}\n"
            for number, (dirty, clean) in enumerate(zip(*columns, strict=True))
        )
        text = "image,dirty,clean\n" + "".join(rows)
        write_atomically(self.images, lambda file: file.write(text.encode()))
        _write_json(self.result, {**ended, "evaluation": measured})


def _write_json(path: Path, contents: Mapping[str, Any]) -> None:
    text = json.dumps(contents, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and threads, as plain data."""
    cuda = device.type == "cuda"
    return {
        "rnode-plugin": __version__,
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "torch": torch.__version__,  # with its build: a wheel does not say in its metadata for which CUDA it is
        "plugins": {
            each.name: f"{each.distribution} {each.version}"
            for each in plugins.report()
            if each.status == "loaded" and each.distribution not in (None, "rnode-plugin")
        },
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if cuda else f"{device.type} {platform.processor()}".strip(),
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }


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


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, written all or not at all and read without running code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        keep = path.with_name(PREVIOUS) if path.name == LAST else None
        write_atomically(path, lambda file: torch.save(checkpoint, file), keep=keep)

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path), map_location=map_location)
