"""RunOptions, RunPlan and RunFolder: choices of a call, the steps of a run, its folder, and how it continues."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
import torch
from filelock import FileLock, Timeout

from ..._version import __version__
from ...errors import CheckpointError, ConfigError
from ...files import write_atomically
from ...plugins import registry
from ..evaluation.measures import Evaluation
from ..recipes.recipe import Recipe
from ..recipes.task import Task
from .checkpoints import BEST, LAST, PREVIOUS, newest_intact, read_checkpoint, recipe_of

LOCK = ".lock"  # held while a run is trained
DIAGNOSIS = "diagnosis.json"  # the result of `rnode-cli diagnose`

_SCORES = ("images.csv", "rows.csv")
_PACKAGES = ("torch", "torchvision", "pytorch-lightning", "torchdyn", "torchdiffeq", "numpy")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run writes, from where it continues, and how long a call may take.

    Attributes:
        runs: folder of all runs.
        run_folder: exact folder of a new run, missing or empty, instead of the next free one under ``runs``.
        resume: run folder or checkpoint to continue from, in the same folder if it lies in one.
        max_time: seconds after which the call ends with a last validation and a checkpoint; the schedule of the
            learning rate does not change.
        download: fetch the data set if it is missing.
        progress: print the progress on the terminal.

    Raises:
        ConfigError: for both ``run_folder`` and ``resume``.
    """

    runs: str | os.PathLike[str] = "runs"
    run_folder: str | os.PathLike[str] | None = None
    resume: str | os.PathLike[str] | None = None
    max_time: float | None = None
    download: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if self.run_folder is not None and self.resume is not None:
            raise ConfigError("a run that is resumed stays in its folder: give either run_folder or resume.")


@dataclass(frozen=True)
class RunPlan:
    """The steps of a run.

    Attributes:
        steps_per_epoch: steps that take all samples once; the rest that fills no step waits for another order.
        total: steps of the whole run.
        val_every: steps between two validations.
    """

    steps_per_epoch: int
    total: int
    val_every: int

    @staticmethod
    def of(recipe: Recipe, samples: int, world: int = 1) -> RunPlan:
        """The plan of a recipe for a number of training samples and devices.

        Raises:
            ConfigError: the samples do not fill one batch on each device, or flow matching fills all steps.
        """
        training = recipe.training
        batch, accumulate = recipe.data.batch_size, training.accumulate
        per_epoch = samples // (batch * world * accumulate)
        if per_epoch == 0:
            devices = f" on each of {world} devices" if world > 1 else ""
            times = f", {accumulate} times" if accumulate > 1 else ""
            raise ConfigError(
                f"{samples} training {recipe.task.samples} do not fill one batch of {batch}{devices}{times}: "
                "use a smaller --batch-size."
            )
        limits = [training.max_steps, training.max_epochs and training.max_epochs * per_epoch]
        total = min(limit for limit in limits if limit is not None)
        if total <= recipe.matching:
            raise ConfigError(
                f"training.matching={recipe.matching} leaves none of {total} steps for maximum likelihood: "
                "raise --max-steps or lower training.matching."
            )
        check = training.val_every_steps or training.val_every * per_epoch
        return RunPlan(per_epoch, total, min(check, total))

    def stages(self, recipe: Recipe) -> dict[int, str]:
        """What begins after so many steps, in words; empty for a run with steps of one kind."""
        matching, optimizer = recipe.matching, recipe.optimizer
        found = {0: "flow matching", matching: "maximum likelihood"} if matching else {}
        if optimizer.schedule == "cooldown":
            for first, end in {(0, matching or self.total), (matching, self.total)}:
                if steps := math.floor(optimizer.cooldown * (end - first)):
                    found[end - steps] = f"the learning rate falls until step {end}"
        return dict(sorted(found.items()))


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
        """The newest checkpoint, from which a run continues."""
        return self.path / "checkpoints" / LAST

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def result(self) -> Path:
        """How the run ended and the scores of its best weights; absent while it runs and after an interruption."""
        return self.path / "result.json"

    @staticmethod
    def create(runs: str | os.PathLike[str], recipe: Recipe) -> RunFolder:
        """The next free version under ``runs/RECIPE``."""
        parent = Path(runs) / recipe.name
        parent.mkdir(parents=True, exist_ok=True)
        version = 1 + max((int(each.name) for each in parent.iterdir() if each.name.isdigit()), default=-1)
        while True:
            try:
                (parent / str(version)).mkdir()
                return RunFolder(parent / str(version))
            except FileExistsError:  # another run took it in the meantime
                version += 1

    @staticmethod
    def claim(path: str | os.PathLike[str]) -> RunFolder:
        """A run folder at exactly ``path``, made if it is not there.

        Raises:
            ConfigError: another process trains in it, or it is not empty.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        with training_lock(path):
            if (taken := next((each for each in path.iterdir() if each.name != LOCK), None)) is not None:
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
        """Write ``recipe.json`` and ``environment.json``; remove the results of an earlier part of the run."""
        for name in ("result.json", "samples/best.png", DIAGNOSIS, *_SCORES):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / "diagnosis", ignore_errors=True)
        write_json(self.path / "recipe.json", recipe.to_plain())
        write_json(self.path / "environment.json", environment(device))

    def continue_from(self, checkpoint: Path, step: int) -> None:
        """Make a checkpoint of this run the newest one, and remove what later steps than its ``step`` have left.

        If the newest one had more steps, a run that is killed soon would continue from it, and ``metrics.csv``
        would lack the steps in between.
        """
        with suppress(CheckpointError):  # from a file that is missing or damaged
            if read_checkpoint(self.best)["global_step"] > step:
                self.best.unlink()
        for later in (each for each in self.samples.glob("step-*.png") if int(each.stem[5:]) > step):
            later.unlink()
        if checkpoint.name != LAST:
            contents = checkpoint.read_bytes()
            keep = None if checkpoint.name == PREVIOUS else self.last.with_name(PREVIOUS)
            write_atomically(self.last, lambda file: file.write(contents), keep=keep)

    def conclude(self, ended: Mapping[str, Any], evaluation: Evaluation, task: Task) -> None:
        """Write ``result.json`` and, before it, the scores by held-out sample (``images.csv``, ``rows.csv``)."""
        scores = pandas.DataFrame({name: mean.samples for name, mean in evaluation.means.items()})
        text = scores.to_csv(index_label=task.sample, float_format="%.8g", na_rep="nan", lineterminator="\n")
        write_atomically(self.path / task.file, lambda file: file.write(text.encode()))
        write_json(self.result, {**ended, "evaluation": evaluation.to_plain()})
        (self.path / DIAGNOSIS).unlink(missing_ok=True)  # one that was made in the meantime is of other weights


def write_json(path: Path, contents: Mapping[str, Any]) -> None:
    """Write one JSON file, whole or not at all."""
    text = json.dumps(contents, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and threads, as plain data."""
    cuda = device.type == "cuda"
    return {
        "rnode-plugin": __version__,
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "torch": torch.__version__,  # with its build, which names its CUDA
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


@contextmanager
def training_lock(folder: Path) -> Iterator[None]:
    """Hold the run in ``folder`` for this process.

    The system frees the lock of a process that ends, also of one that is killed. On a file system without locks,
    two processes that train one run are not noticed.

    Raises:
        ConfigError: another process trains the run.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"{folder} is being trained by another process: wait for its end, or stop it.") from None
    except (OSError, NotImplementedError) as error:  # no locks here, or a folder that cannot be written
        print(f"{folder} cannot be locked ({error}): start no other process that trains it.", file=sys.stderr)
    try:
        yield
    finally:
        lock.release()


def checkpoint_to_resume(resume: str | os.PathLike[str], recipe: Recipe) -> tuple[Path, dict[str, Any], Recipe]:
    """The checkpoint file, its contents, and the recipe to train with what the run has recorded of its table.

    Raises:
        CheckpointError: there is none, or it holds another model or was trained on other images.
    """
    path, contents = newest_intact(resume)
    if "optimizer_states" not in contents:
        raise CheckpointError(f"{path} has only weights, so a training cannot be resumed from it.")
    former = recipe_of(contents, path)
    old, new = dict(former.settings()), dict(recipe.settings())
    marks = {**former.kept(), **recipe.kept()}
    differ = [name for name in marks if old.get(name) != new.get(name)]
    ends = {settings["training.matching"] for settings in (old, new)}
    if len(ends) > 1 and contents["global_step"] >= min(ends):  # maximum likelihood began, in one of the two
        differ.append("training.matching")
    if new["training.ema"] is None and old["training.ema"] is not None:  # its weights are the average
        differ.append("training.ema")
    if differ:
        what = ", ".join(f"{name} is {old.get(name)} there and {new.get(name)} here" for name in differ)
        advice = f"--weights {path} in place of --resume starts a new run from it"
        if any(name in marks and marks[name].weights for name in differ):  # they do not fit another model
            advice = "Leave these settings out, or train a new run without --resume"
        raise CheckpointError(f"{path} cannot continue with other settings: {what}. {advice}.")
    recorded = {name: old[f"data.{name}"] for name in ("rows", "checksum") if f"data.{name}" in old}
    return path, contents, dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **recorded))
