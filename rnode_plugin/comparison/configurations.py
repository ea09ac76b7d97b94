"""The configurations of a comparison, by name or in a JSON file, as the recipes that train them."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.schedules import LinearWarmup, WrittenStrength, strength_text
from ..errors import ConfigError, suggest
from ..plugins import registry
from ..plugins.registry import resolve_regularizers
from ..recipes.fields import refused
from ..recipes.recipe import Recipe, read_strength

_NONE, _FFJORD, _ALL = "none", "ffjord", "rnode"


def configured_recipes(recipe: Recipe, configurations: Sequence[str] = (), *, seeds: int = 1) -> list[Recipe]:
    """The recipe of each run: for each seed, all configurations.

    Args:
        recipe: the settings that the configurations share. Weights, data order and noise are functions of its seed.
        configurations: each is ``none`` (no penalty, the recipe's solver, as in the paper's ablation), ``ffjord``
            (no penalty, Dormand-Prince at 1e-5, as in the paper's comparison of times), ``rnode`` (all penalties
            of the recipe), a penalty such as ``kinetic`` or ``taylor:3`` with the recipe's lambda or its default,
            or a JSON file. The file maps names to penalties with their lambdas,
            ``{"weak": {"kinetic": 0.001, "jacfrob": 0.001}}``. A list of lambdas is a sweep,
            ``{"sweep": {"kinetic": [0.001, 0.01, 0.1]}}``, and several lists form a grid. Without configurations:
            ``none``, each penalty of the recipe alone and ``rnode``.
        seeds: runs of each configuration; the first has the recipe's seed, the others the next ones.

    Raises:
        ConfigError: an unknown penalty, a bad lambda, a file that cannot be read, or two configurations that train
            the same.
    """
    if not configurations:
        alone = list(recipe.regularizers)  # the paper's ablation, figure 5
        configurations = [_NONE, *alone, *([_ALL] if len(alone) > 1 else [])]
    chosen: dict[str, Recipe] = {}
    for name, one in itertools.chain.from_iterable(_read(recipe, each) for each in configurations):
        # the colon of an option is no part of a file name
        with refused():
            one = dataclasses.replace(one, name=f"{recipe.name}-{name}".replace(":", "-"))
        for other, its in chosen.items():
            if its.name == one.name or dataclasses.replace(its, name=one.name) == one:
                raise ConfigError(
                    f"a comparison needs each configuration once: {other} and {name} have the same "
                    f"{'name' if its.name == one.name else 'settings'}."
                )
        chosen[name] = one
    first = recipe.training.seed
    return [
        dataclasses.replace(one, training=dataclasses.replace(one.training, seed=seed))
        for seed in range(first, first + seeds)
        for one in chosen.values()
    ]


def _read(recipe: Recipe, text: str) -> list[tuple[str, Recipe]]:
    """Names and recipes of a configuration, or of all in a file."""
    if text.endswith(".json"):
        return _read_file(recipe, Path(text))
    if text == _NONE:
        return [(text, dataclasses.replace(recipe, regularizers={}))]
    if text == _FFJORD:
        return [(text, recipe.ffjord())]
    if text == _ALL:
        return [(text, recipe)]
    known = [_NONE, _FFJORD, _ALL, *registry.names("regularizers")]
    if text.partition(":")[0] not in known:
        raise ConfigError(suggest(text, known, "configuration"))
    (found,) = resolve_regularizers([text]).values()
    assert isinstance(found.strength, float | LinearWarmup)
    strength = recipe.regularizers.get(text, found.strength)
    return [(text, dataclasses.replace(recipe, regularizers={text: strength}))]


def _read_file(recipe: Recipe, file: Path) -> list[tuple[str, Recipe]]:
    example = '{"weak": {"kinetic": 0.001}, "sweep": {"kinetic": [0.01, 0.1]}}'
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not a JSON file ({error}): write configurations as {example}.") from None
    if not isinstance(plain, dict) or not all(isinstance(each, dict) for each in plain.values()):
        raise ConfigError(f"{file} does not map names to penalties: write configurations as {example}.")
    return [
        (name, dataclasses.replace(recipe, regularizers=strengths))
        for entry, penalties in plain.items()
        for name, strengths in _expand(f"{file}, {entry}", entry, penalties)
    ]


def _expand(place: str, entry: str, penalties: Mapping[str, Any]) -> list[tuple[str, dict[str, WrittenStrength]]]:
    """Names and penalties of an entry of a file: one, or the grid of its lists of lambdas."""
    grid: dict[str, list[WrittenStrength]] = {}
    for name, value in penalties.items():
        try:
            grid[name] = [read_strength(each) for each in (value if isinstance(value, list) else [value])]
        except ValueError:
            expected = f"a finite number >= 0, {LinearWarmup.spelling}, or a list of them"
            raise ConfigError(f"{place}: the lambda of {name} must be {expected}, not {value!r}.") from None
    swept = [name for name, value in penalties.items() if isinstance(value, list)]
    found = []
    for strengths in (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())):
        try:
            resolve_regularizers(strengths)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None
        terms = [f"{name}={strength_text(strengths[name])}" for name in swept]
        found.append(("-".join([entry, *terms]), strengths))
    return found
