"""What makes an arm impossible, found before the first one is trained."""

from __future__ import annotations

import dataclasses

from ..core.random_streams import Stream, seeded
from ..errors import ConfigError
from ..evaluation.measures import measure_of
from ..plugins import registry
from ..recipes.recipe import Recipe

__all__ = ["check_arm"]


def check_arm(recipe: Recipe) -> None:
    """Refuse an arm that cannot be trained, or not in a process of its own.

    Raises:
        ConfigError: a regularizer, the model or the data set is registered in this process only; or a penalty
            cannot be computed for the model with the solver of the recipe.
    """
    _check_known_to_other_processes(recipe)
    _check_penalties(recipe)


def _check_known_to_other_processes(recipe: Recipe) -> None:
    """Refuse what only this process knows: an arm trains in a process of its own.

    Raises:
        ConfigError: a regularizer, the model or the data set was registered in this process by
            ``plugins.register``.
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


def _check_penalties(recipe: Recipe) -> None:
    """Push one sample through a fresh flow, in one step if the solver has a grid."""
    if not recipe.regularizers:
        return
    solver = recipe.solver if recipe.solver.adaptive else dataclasses.replace(recipe.solver, step=None)
    try:
        with seeded(recipe.training.seed, Stream.TUNE):
            x, given = measure_of(recipe).random_inputs(1)
            recipe.build_flow()(x, **given, solver=solver)
    except ConfigError as error:
        raise ConfigError(f"the arm {recipe.name} cannot be trained: {error}") from error
