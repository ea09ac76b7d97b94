"""``configured_recipes``: the recipes of the configurations that a comparison names, or reads from a file."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ...core.schedules import strength_text
from ...errors import ConfigError, suggest
from ...plugins import registry
from ..recipes.recipe import Recipe, read_strength
from ..validation import refused

_EXAMPLE = '{"weak": {"kinetic": 0.001}, "sweep": {"kinetic": [0.01, 0.1]}}'


def configured_recipes(recipe: Recipe, configurations: Sequence[str] = (), *, seeds: int = 1) -> list[Recipe]:
    """The recipe of each run: for each seed, all configurations.

    Args:
        recipe: the settings that the configurations share. Weights, data order and noise are functions of its seed.
        configurations: each is ``none`` (no penalty, the recipe's solver, as in the paper's ablation), ``ffjord``
            (no penalty, no flow matching, Dormand-Prince at 1e-5, as in the paper's comparison of times), ``rnode``
            (all penalties of the recipe), a penalty such as ``kinetic`` or ``taylor:3`` with the recipe's lambda or
            its default, or a JSON file. The file maps names to penalties with their lambdas,
            ``{"weak": {"kinetic": 0.001, "jacfrob": 0.001}}``. A list of lambdas is a sweep,
            ``{"sweep": {"kinetic": [0.001, 0.01, 0.1]}}``, and several lists form a grid. The default is ``none``,
            each penalty of the recipe alone, and ``rnode``.
        seeds: number of runs of each configuration, with the recipe's seed and the next ones.

    Raises:
        ConfigError: an unknown penalty, a bad lambda, a file that cannot be read, or two configurations that train
            the same.
    """
    known = [*_named(recipe), *registry.names("regularizers")]
    for text in configurations:  # a wrong name is refused before torch is imported to make a regularizer
        if not text.endswith(".json") and text.partition(":")[0] not in known:
            raise ConfigError(suggest(text, known, "configuration"))
    alone = list(recipe.regularizers)  # trained one by one, as in the paper's ablation (figure 5)
    chosen: dict[str, Recipe] = {}
    for text in configurations or ["none", *alone, *(["rnode"] if len(alone) > 1 else [])]:
        for name, one in _read(recipe, text):
            with refused():  # the name of a file cannot have a colon, which separates a penalty from its option
                one = dataclasses.replace(one, name=f"{recipe.name}-{name}".replace(":", "-"))
            for other, its in chosen.items():
                if its.name == one.name or dataclasses.replace(its, name=one.name) == one:
                    same = "name" if its.name == one.name else "settings"
                    raise ConfigError(f"{other} and {name} have the same {same}: give each configuration once.")
            chosen[name] = one
    first = recipe.training.seed
    return [
        dataclasses.replace(one, training=dataclasses.replace(one.training, seed=seed))
        for seed in range(first, first + seeds)
        for one in chosen.values()
    ]


def _read(recipe: Recipe, text: str) -> Iterator[tuple[str, Recipe]]:
    """The name and the recipe of a configuration, or of each configuration in a file."""
    named = _named(recipe)
    if text.endswith(".json"):
        yield from _read_file(recipe, Path(text))
    elif text in named:
        yield text, named[text]()
    else:
        (default,) = registry.resolve_regularizers([text]).strengths.values()
        strength = recipe.regularizers.get(text, read_strength(default))
        yield text, dataclasses.replace(recipe, regularizers={text: strength})


def _named(recipe: Recipe) -> dict[str, Callable[[], Recipe]]:
    """The configurations whose names stand for no single penalty."""
    return {
        "none": lambda: dataclasses.replace(recipe, regularizers={}),
        "ffjord": recipe.ffjord,
        "rnode": lambda: recipe,
    }


def _read_file(recipe: Recipe, file: Path) -> Iterator[tuple[str, Recipe]]:
    """The name and the recipe of each configuration in a file. Each point of a sweep is a configuration."""

    def each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        for name, _ in pairs:
            if [key for key, _ in pairs].count(name) > 1:
                raise ConfigError(f"{file} has the name {name!r} twice: give each name once.")
        return dict(pairs)

    try:
        plain = json.loads(file.read_bytes(), object_pairs_hook=each_once)
        entries = TypeAdapter(dict[str, dict[str, Any]]).validate_python(plain)
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:
        fault = f" It is not JSON: {error}." if isinstance(error, json.JSONDecodeError) else ""
        raise ConfigError(f"{file} must be JSON that maps names to penalties, such as {_EXAMPLE}.{fault}") from None
    if not all(each.strip() for each in entries):
        raise ConfigError(f"{file} has a configuration without a name: write it as {_EXAMPLE}.")
    if not entries or [] in itertools.chain.from_iterable(each.values() for each in entries.values()):
        raise ConfigError(f"{file} has no configuration, or a sweep without a lambda: write it as {_EXAMPLE}.")
    for entry, penalties in entries.items():
        lists = [value if isinstance(value, list) else [value] for value in penalties.values()]
        for values in itertools.product(*lists):
            try:
                with refused():
                    one = dataclasses.replace(recipe, regularizers=dict(zip(penalties, values, strict=True)))
                registry.resolve_regularizers(one.regularizers)
            except ConfigError as error:
                raise ConfigError(f"{file}, {entry}: {error}") from None
            swept = [name for name, value in penalties.items() if isinstance(value, list)]
            terms = [f"{name}={strength_text(one.regularizers[name])}" for name in swept]
            yield "-".join([entry, *terms]), one
