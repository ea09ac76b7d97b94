"""Arms as text, such as ``kinetic+jacfrob`` or ``taylor:3=0.01``, to the recipes that train them."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence

from ..core.random_streams import Stream, seeded
from ..core.schedules import LinearWarmup, WrittenStrength, strength_text
from ..errors import ConfigError, suggest
from ..evaluation.measures import measure_of
from ..plugins import registry
from ..plugins.registry import resolve_regularizers
from ..recipes.recipe import Recipe, read_strength

_NONE, _FFJORD, _ALL = "none", "ffjord", "rnode"
_LONGEST = 70  # characters of a folder's name; longer ones end in a hash


def arm_recipes(
    recipe: Recipe, arms: Sequence[str] = (), *, sweeps: Sequence[str] = (), seeds: int = 1
) -> list[Recipe]:
    """The recipe of each run: for each seed, all arms.

    Args:
        recipe: the settings that the arms share. Weights, data order and noise are functions of its seed.
        arms: each is ``none`` (no penalty, the recipe's solver, as in the paper's ablation), ``ffjord`` (no
            penalty, Dormand-Prince at 1e-5, as in the paper's comparison of times), ``rnode`` (all penalties of the
            recipe), or penalties joined by ``+``. A penalty is a name, with options if it takes them, and its
            lambda: ``kinetic``, ``taylor:3``, ``kinetic=0.1+jacfrob``, ``kinetic=linear_warmup(100)*0.1``. Without
            a lambda it has that of the recipe, else its default. No arms: ``none``, each penalty of the recipe
            alone and ``rnode``; with sweeps ``none`` alone.
        sweeps: arms with several lambdas, as ``kinetic=0.001,0.01,0.1``. With several penalties they form a grid.
        seeds: runs of each arm; the first has the recipe's seed, the others the next ones.

    Raises:
        ConfigError: an unknown penalty, a bad lambda, or two arms that train the same.
    """
    if not arms:
        alone = list(recipe.regularizers)  # the paper's ablation, figure 5
        arms = [_NONE] if sweeps else [_NONE, *alone, *([_ALL] if len(alone) > 1 else [])]
    chosen: dict[str, Recipe] = {}
    for text in arms:
        arm = _arm_recipe(recipe, text)
        if (same := _find_same(arm, chosen)) is not None:
            raise ConfigError(f"a comparison needs each arm once: {same} and {text} train the same.")
        chosen[text] = arm
    for sweep in sweeps:
        for strengths in _parse(recipe, sweep):
            arm = _with_penalties(recipe, strengths)
            if _find_same(arm, chosen) is None:  # a point that is an arm already is trained once
                chosen[arm.name] = arm
    first = recipe.training.seed
    return [
        dataclasses.replace(arm, training=dataclasses.replace(arm.training, seed=seed))
        for seed in range(first, first + seeds)
        for arm in chosen.values()
    ]


def _arm_recipe(recipe: Recipe, text: str) -> Recipe:
    if text == _NONE:
        return _with_penalties(recipe, {})
    if text == _FFJORD:
        return dataclasses.replace(recipe.ffjord(), name=_folder_name(recipe, _FFJORD))
    if text == _ALL:
        return _with_penalties(recipe, recipe.regularizers)
    (strengths, *more) = _parse(recipe, text)
    if more:
        raise ConfigError(f"the arm {text!r} has several lambdas: --sweep {text} makes an arm of each.")
    return _with_penalties(recipe, strengths)


def _parse(recipe: Recipe, text: str) -> list[dict[str, WrittenStrength]]:
    """The sets of penalties with their lambdas that an arm or a sweep names: one, or a grid."""
    grid: dict[str, list[WrittenStrength]] = {}
    for term in re.split(r"\+(?![\d.])", text):  # but not the plus of 1e+3
        name, equals, values = term.strip().rpartition("=")
        # without an equals sign, or if it is that of the last option, as in taylor:order=3
        if not equals or (":" in name and re.split("[:,]", name)[-1].isidentifier()):
            name, values = term.strip(), None
        if name in grid:
            raise ConfigError(f"the arm {text!r} names {name} twice.")
        default = _default_lambda(recipe, name)
        grid[name] = [default] if values is None else [_lambda(name, value) for value in values.split(",")]
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _default_lambda(recipe: Recipe, name: str) -> WrittenStrength:
    known = [_NONE, _FFJORD, _ALL, *registry.names("regularizers")]
    if name.partition(":")[0] not in known:
        raise ConfigError(suggest(name, known, "arm"))
    (found,) = resolve_regularizers([name]).values()
    assert isinstance(found.strength, float | LinearWarmup)
    return recipe.regularizers.get(name, found.strength)


def _lambda(name: str, text: str) -> WrittenStrength:
    try:
        return read_strength(text)
    except ValueError:
        raise ConfigError(
            f"the lambda of {name} must be a finite number >= 0 or {LinearWarmup.spelling}, not {text.strip()!r}."
        ) from None


def _with_penalties(recipe: Recipe, strengths: Mapping[str, WrittenStrength]) -> Recipe:
    """The recipe with these penalties in the recipe's order, and with one name for one set."""
    order = [*recipe.regularizers, *sorted(strengths.keys() - recipe.regularizers.keys())]
    ordered = {name: strengths[name] for name in order if name in strengths}
    if not ordered:
        label = _NONE
    elif len(ordered) > 1 and ordered == dict(recipe.regularizers):
        label = _ALL
    else:
        terms = []
        for name, strength in ordered.items():
            usual = strength == _default_lambda(recipe, name)
            terms.append(name if usual else f"{name}={strength_text(strength)}")
        label = "+".join(terms)
    return dataclasses.replace(recipe, name=_folder_name(recipe, label), regularizers=ordered)


def _folder_name(recipe: Recipe, label: str) -> str:
    """A name for the runs of an arm that is a safe name of a folder on every system."""
    name = re.sub(r"[^A-Za-z0-9._+-]", "-", f"{recipe.name}-{label}")
    if len(name.encode()) <= _LONGEST:
        return name
    shortened = name.encode()[: _LONGEST - 9].decode(errors="ignore")
    return f"{shortened}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _find_same(arm: Recipe, chosen: Mapping[str, Recipe]) -> str | None:
    """The arm that trains the same, if there is one."""
    return next((text for text, other in chosen.items() if dataclasses.replace(other, name=arm.name) == arm), None)


def check_arm(recipe: Recipe) -> None:
    """Refuse an arm that cannot be trained, or not in a process of its own, before the first one is trained.

    Raises:
        ConfigError: a regularizer, the model or the data set is registered in this process only; or a penalty
            cannot be computed for the model with the solver of the recipe.
    """
    used = [("regularizers", name.partition(":")[0]) for name in recipe.regularizers]
    used += [("models", recipe.model.name), ("datasets", recipe.data.name)]
    plugins = registry.report()
    for kind, name in used:
        owners = [plugin for plugin in plugins if name in plugin.registers.get(kind, ())]
        if owners and all(plugin.distribution is None for plugin in owners):
            raise ConfigError(
                f"the {registry.KINDS[kind]} {name!r} is registered in this process only, by the plugin "
                f"{owners[0].name!r}, but each arm of a comparison trains in a process of its own. Make it a "
                "plugin of an installed package: docs/plugins.md says how."
            )
    if not recipe.regularizers:
        return
    # one sample through a fresh flow, in one step if the solver has a grid
    solver = recipe.solver if recipe.solver.adaptive else dataclasses.replace(recipe.solver, step=None)
    try:
        with seeded(recipe.training.seed, Stream.TUNE):
            x, given = measure_of(recipe).random_inputs(1)
            recipe.build_flow()(x, **given, solver=solver)
    except ConfigError as error:
        raise ConfigError(f"the arm {recipe.name} cannot be trained: {error}") from error
