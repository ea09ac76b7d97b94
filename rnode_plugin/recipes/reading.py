"""Read a recipe from a JSON file, such as the ``recipe.json`` of a run."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..errors import ConfigError
from ..plugins.resolve import resolve_regularizers
from .schema import Recipe

__all__ = ["is_recipe_file", "read_recipe"]


def is_recipe_file(name: str) -> bool:
    """Whether ``name`` means a file and not the name of a recipe."""
    return name.endswith(".json")


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in a JSON file that :meth:`Recipe.to_plain` describes.

    Raises:
        ConfigError: the file cannot be read, is not JSON, or does not hold a recipe; or one of its regularizers is
            not known here or cannot have its lambda.
    """
    try:
        plain = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ConfigError(f"{path} is not JSON: {error}.") from None
    try:
        recipe = Recipe.from_plain(plain)
    except (ConfigError, RecursionError) as error:
        raise ConfigError(f"{path} does not hold a recipe: {error}") from None
    resolve_regularizers(recipe.regularizers)  # an unknown one is refused here, before the data is loaded
    return recipe
