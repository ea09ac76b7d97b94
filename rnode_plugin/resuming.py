"""Whether a run can go on from a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

from .checkpoints import LAST, find_checkpoint, read_checkpoint, recipe_of
from .errors import CheckpointError, ConfigError
from .recipes import Recipe
from .runs import RunFolder
from .schedule import Plan

__all__ = ["checkpoint_to_resume", "steps_done"]

_FIXED = (
    "data.name", "data.shape", "data.levels",
    "model.name", "model.hidden", "model.layers", "model.alpha",
)  # fmt: skip


def checkpoint_to_resume(resume: str | os.PathLike[str], recipe: Recipe) -> Path:
    """The checkpoint file, after comparing its recipe with the one to train.

    Raises:
        CheckpointError: there is none, or it holds another model or was trained on other images.
    """
    path = find_checkpoint(resume, prefer=LAST)
    contents = read_checkpoint(path)
    if "progress" not in contents:
        raise CheckpointError(f"{path} holds weights only: training cannot go on from it.")
    old, new = dict(recipe_of(contents, path).settings()), dict(recipe.settings())
    differ = [name for name in _FIXED if old[name] != new[name]]
    if differ:
        what = ", ".join(f"{name} is {old[name]} there and {new[name]} here" for name in differ)
        raise CheckpointError(f"{path} is of another model: {what}.")
    return path


def steps_done(checkpoint: Path, plan: Plan) -> int:
    """Steps behind a checkpoint.

    Raises:
        ConfigError: none are left to do, nor is the evaluation at the end of the run.
    """
    done = read_checkpoint(checkpoint)["progress"]["batches"]
    folder = RunFolder.of_checkpoint(checkpoint)
    to_evaluate = done == plan.total and folder is not None and not folder.result.exists()
    if done >= plan.total and not to_evaluate:
        raise ConfigError(f"{checkpoint} has done {done} of {plan.total} steps: raise --max-steps or --max-epochs.")
    return done
