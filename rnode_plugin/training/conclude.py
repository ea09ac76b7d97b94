"""conclude: evaluate the best weights of a run, draw a grid from them, write ``result.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..data import ImageData
from ..errors import SolverError, TrainingError
from ..evaluation.bits import EvaluationResult, evaluate
from ..evaluation.sampling import sample_images, save_grid
from ..recipes.schema import Recipe
from .progress import batch_counter
from .runs.checkpoints import load_flow, training_solver
from .runs.folder import RunFolder

__all__ = ["conclude"]


def conclude(
    folder: RunFolder,
    ended: Mapping[str, Any],
    recipe: Recipe,
    data: ImageData,
    device: torch.device,
    *,
    progress: bool,
) -> tuple[EvaluationResult, Path | None]:
    """Evaluate the best weights of a run, draw its last grid, and write down how it ended.

    Args:
        folder: of the run.
        ended: how the training ended.
        recipe: of the run.
        data: whose held-out images are used.
        device: to do it on.
        progress: show progress on the terminal.

    Returns:
        The evaluation, and the grid's file; None if the recipe asks for no samples.

    Raises:
        TrainingError: the weights cannot be integrated; training itself is done.
    """
    try:
        return _conclude(folder, ended, recipe, data, device, progress=progress)
    except SolverError as error:
        raise TrainingError(
            f"training is done, but its best weights could not be evaluated: {error} They are in {folder.best}; "
            f"rnode-cli eval {folder.path} tries again, with another solver by --set test_solver."
        ) from error


def _conclude(
    folder: RunFolder,
    ended: Mapping[str, Any],
    recipe: Recipe,
    data: ImageData,
    device: torch.device,
    *,
    progress: bool,
) -> tuple[EvaluationResult, Path | None]:
    flow = load_flow(folder.best, map_location=device)
    training = recipe.training
    evaluation = evaluate(
        flow,
        data.val,
        batch_size=recipe.data.val_batch_size,
        seed=training.seed,
        training_solver=training_solver(folder.best),
        progress=batch_counter("evaluating the best weights") if progress else None,
    )
    samples = None
    if training.sample_images:
        samples = folder.samples / "best.png"
        images = sample_images(
            flow, training.sample_images, temperatures=training.sample_temperatures, seed=training.seed
        )
        save_grid(samples, images, levels=recipe.data.levels, columns=training.sample_images)
    folder.conclude(ended, evaluation)
    return evaluation, samples
