"""The folder of a run, ``runs/RECIPE/VERSION/``, and what writes into it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..._version import __version__
from ...errors import CheckpointError, ConfigError
from ...evaluation.measures import Evaluation, ImageMeasure, Measure, TableMeasure
from ...files import write_atomically
from ...plugins import registry
from ...recipes.recipe import Recipe
from .checkpoints import BEST, LAST

__all__ = ["CHOSEN", "DIAGNOSIS", "RunFolder", "environment"]

CHOSEN = "chosen.json"  # how the steps are computed, if the recipe leaves that open
DIAGNOSIS = "diagnosis.json"

_SCORES = (ImageMeasure.file, TableMeasure.file)
_PACKAGES = ("torch", "torchvision", "pytorch-lightning", "torchdyn", "torchdiffeq", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """Where a run writes."""

    path: Path

    @property
    def best(self) -> Path:
        """The checkpoint with the lowest score of a validation: bits/dim, or nats of a table."""
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
        """The training samples of the step that ended the run without a usable gradient; absent otherwise."""
        return self.path / "skipped.json"

    @property
    def diagnosis(self) -> Path:
        """What ``rnode-cli diagnose`` found; absent before it."""
        return self.path / DIAGNOSIS

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
    def claim(path: str | os.PathLike[str]) -> RunFolder:
        """A run folder at exactly ``path``, made if it is not there.

        It may hold a ``chosen.json``, which the run then keeps to.

        Raises:
            ConfigError: it cannot be made, or it holds something already.
        """
        path = Path(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            taken = next((each for each in path.iterdir() if each.name != CHOSEN), None)
        except OSError as error:
            raise ConfigError(f"cannot make the run folder {path}: {error.strerror}.") from None
        if taken is not None:
            raise ConfigError(
                f"the run folder {path} is not empty: it holds {taken.name}. --resume continues a run."
            )
        return RunFolder(path)

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
            scores = (self.path / name for name in _SCORES)
            for file in (self.result, self.skipped, self.diagnosis, *scores):
                file.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot write into {self.path}: {error.strerror}.") from None
        _write_json(self.path / "recipe.json", recipe.to_plain())
        _write_json(self.path / "environment.json", environment(device))

    def name_skipped(self, step: int, samples: Sequence[int], called: str = "images") -> None:
        """Write ``skipped.json``: the samples, called so, of the batch that could not be used at ``step``.

        Raises:
            CheckpointError: it cannot be written.
        """
        _write_json(self.skipped, {"step": step, called: list(samples)})

    def conclude(self, ended: Mapping[str, Any], evaluation: Evaluation, measure: Measure[Any]) -> None:
        """Write ``result.json`` and, before it, the scores of each held-out sample (``images.csv``, ``rows.csv``).

        Args:
            ended: how the run ended.
            evaluation: of its best weights.
            measure: of the kind of data.

        Raises:
            CheckpointError: they cannot be written.
        """
        measured = dataclasses.asdict(evaluation)
        values = measure.values(evaluation)
        for name in values:
            del measured[name][measure.samples]
        columns = zip(*(mean.samples for mean in values.values()), strict=True)
        rows = (",".join([str(number), *(f"{value:.8g}" for value in row)]) for number, row in enumerate(columns))
        text = "\n".join([",".join([measure.sample, *values]), *rows]) + "\n"
        write_atomically(self.path / measure.file, lambda file: file.write(text.encode()))
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
            for each in registry.report()
            if each.status == "loaded" and each.distribution not in (None, "rnode-plugin")
        },
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if cuda else f"{device.type} {platform.processor()}".strip(),
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }
