"""conclude: evaluate the best weights of a run, draw a picture of samples from them, write ``result.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..data import ImageData, Table
from ..errors import SolverError, TrainingError
from ..evaluation.likelihood import evaluate_by
from ..evaluation.measures import Evaluation, measure_of
from ..recipes.recipe import Recipe
from .progress import batch_counter
from .runs.checkpoints import load_flow, training_solver
from .runs.folder import RunFolder

__all__ = ["conclude"]


def conclude(
    folder: RunFolder,
    ended: Mapping[str, Any],
    recipe: Recipe,
    data: ImageData | Table,
    device: torch.device,
    *,
    progress: bool,
) -> tuple[Evaluation, Path | None]:
    """Evaluate the best weights of a run, draw a picture of samples from them, and write down how it ended.

    Args:
        folder: of the run.
        ended: how the training ended.
        recipe: of the run.
        data: whose held-out samples are used.
        device: to do it on.
        progress: show progress on the terminal.

    Returns:
        The evaluation, and the picture's file; None if the recipe asks for no samples.

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
    data: ImageData | Table,
    device: torch.device,
    *,
    progress: bool,
) -> tuple[Evaluation, Path | None]:
    flow, measure = load_flow(folder.best, map_location=device), measure_of(recipe)
    evaluation = evaluate_by(
        measure,
        flow,
        data.held_out,
        batch_size=recipe.data.val_batch_size,
        seed=recipe.training.seed,
        training_solver=training_solver(folder.best),
        progress=batch_counter("evaluating the best weights") if progress else None,
    )
    evaluation = measure.beside_baselines(evaluation, data)
    samples = None
    if recipe.training.sample_images:
        samples = folder.samples / "best.png"
        measure.draw_picture(flow, data, recipe.training, samples)
    folder.conclude(ended, evaluation, measure)
    return evaluation, samples
