"""Whether a run can go on from a checkpoint."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, ConfigError
from ...recipes.recipe import Recipe
from ..schedule import RunPlan
from .checkpoints import BEST, LAST, PREVIOUS, find_checkpoint, read_checkpoint, recipe_of
from .folder import RunFolder
from .structure import damaged_training

__all__ = ["check_steps_left", "checkpoint_to_resume", "newest_intact"]

# of images and of tables
_FIXED = (
    "data.name", "data.shape", "data.levels",
    "data.kind", "data.columns", "data.given", "data.validation", "data.held_out", "data.split_seed",
    "data.train_rows",
    "model.name", "model.hidden", "model.layers", "model.alpha",
    "model.field", "model.activation", "model.blocks",
    "optimizer.name", "training.weights",
)  # fmt: skip


def newest_intact(resume: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """The checkpoint file that ``resume`` means and its contents: of a run folder, the newest that can be read.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(resume)
    errors: list[CheckpointError] = []
    for name in (LAST, PREVIOUS, BEST) if path.is_dir() else ():
        for file in (path / "checkpoints" / name, path / name):
            if not file.is_file():
                continue
            try:
                contents = read_checkpoint(file)
                _check_training(file, contents)
            except CheckpointError as error:
                errors.append(error)
                continue
            for error in errors:
                print(f"{error} Going on from {file.name}.", file=sys.stderr)
            return file, contents
    if errors:
        raise errors[0]
    file = find_checkpoint(path, prefer=LAST)
    return file, read_checkpoint(file)


def checkpoint_to_resume(resume: str | os.PathLike[str], recipe: Recipe) -> tuple[Path, int]:
    """The checkpoint file and the steps behind it, after comparing its recipe with the one to train.

    Raises:
        CheckpointError: there is none, or it holds another model or was trained on other images.
    """
    path, contents = newest_intact(resume)
    if "progress" not in contents:
        raise CheckpointError(f"{path} holds weights only: training cannot go on from it.")
    old, new = dict(recipe_of(contents, path).settings()), dict(recipe.settings())
    differ = [name for name in _FIXED if old.get(name) != new.get(name)]
    if new["training.ema"] is None and old["training.ema"] is not None:
        raise CheckpointError(f"{path} holds averaged weights: training.ema cannot be switched off in a run.")
    if differ:
        what = ", ".join(f"{name} is {old.get(name)} there and {new.get(name)} here" for name in differ)
        advice = f"--weights {path} starts a new run from it"
        raise CheckpointError(f"{path} cannot go on with other settings: {what}. {advice}.")
    _check_training(path, contents)
    return path, contents["progress"]["batches"]


def _check_training(path: Path, contents: dict[str, Any]) -> None:
    if "progress" in contents and (problem := damaged_training(contents)) is not None:
        raise CheckpointError(f"{path} is damaged: {problem}. Use another checkpoint of the run.")


def check_steps_left(checkpoint: Path, done: int, plan: RunPlan) -> None:
    """Refuse a checkpoint with ``done`` steps behind it that nothing follows.

    Raises:
        ConfigError: none are left to do, nor is the evaluation at the end of the run.
    """
    folder = RunFolder.of_checkpoint(checkpoint)
    to_evaluate = done == plan.total and folder is not None and not folder.result.exists()
    if done >= plan.total and not to_evaluate:
        raise ConfigError(f"{checkpoint} has done {done} of {plan.total} steps: raise --max-steps or --max-epochs.")
