"""``task_of`` makes the task of a recipe from its data settings, and ``load_data`` loads the data of a recipe."""

from __future__ import annotations

from ..data import ImageData, Table
from .data import AnyData, TableData
from .images import ImageTask
from .recipe import Recipe
from .rows import RowTask
from .task import AnyTask


def task_of(settings: AnyData) -> AnyTask:
    """Make the task of data settings."""
    return RowTask(settings) if isinstance(settings, TableData) else ImageTask(settings)


def load_data(recipe: Recipe, *, download: bool = False, all_val: bool = False) -> ImageData | Table:
    """Load the images or the table of a recipe, with as many samples as the recipe says.

    Args:
        recipe: all settings.
        download: fetch them if they are missing.
        all_val: ignore ``training.val_images`` and keep all samples for validation.

    Raises:
        DataError, ConfigError: see :meth:`~rnode_plugin.experiments.recipes.task.Task.load`.
    """
    val_images = None if all_val else recipe.training.val_images
    return task_of(recipe.data).load(download=download, val_images=val_images)
