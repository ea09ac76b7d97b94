"""The runs of a report: those that it shows, and those that are left out."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ...core.schedules import final_strength
from ...errors import ConfigError
from ..recipes.recipe import Recipe
from ..runs.contents import RunContents
from ..runs.run import Run


def penalties_of(recipe: Recipe) -> str:
    """The name of a recipe's penalties in an ablation.

    Without penalties it is ``ffjord`` if the solver is the one of the FFJORD baseline, else ``none``. With the
    paper's two it is ``rnode``, with others their names, as ``a+b``.
    """
    names = [name for name, strength in recipe.regularizers.items() if final_strength(strength) > 0]
    if set(names) == {"kinetic", "jacfrob"}:
        return "rnode"
    return "+".join(names) or ("ffjord" if recipe.solver == recipe.ffjord().solver else "none")


def own_data(recipe: Recipe) -> str | None:
    """The name of the user's file or folder that a recipe is for; None for a data set with a name."""
    data = recipe.data
    return Path(data.root).name if data.root is not None and data.name in ("table", "folder") else None


def read_runs(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[RunContents], list[str]]:
    """The runs at ``paths`` and below those that are not runs, and a message for each one that is left out.

    Left out are runs below a folder that cannot be read, runs without a logged step of likelihood, and repetitions.

    Raises:
        ConfigError: there is no run at one of the paths, it cannot be read, nothing is left, or some are on images
            and others on tables.
    """
    runs: dict[Path, RunContents] = {}
    left_out: dict[str, None] = {}
    for path in map(Path, paths):
        for each in Run.find(path):
            try:
                run = each.read()
            except ConfigError as error:
                if each.path == path:
                    raise
                left_out[str(error)] = None
                continue
            if run.has_begun:
                runs[each.path] = run
            else:
                left_out[f"{each.path} has no logged step of likelihood."] = None
    if not runs:
        raise ConfigError(" ".join(left_out))
    kinds = {run.task.metric: run for run in runs.values()}
    if len(kinds) > 1:
        paths = " and ".join(str(run.path) for run in kinds.values())
        raise ConfigError(
            f"runs on images and on tables have no unit in common, such as {paths}: make a report of each kind."
        )
    kept: dict[str, RunContents] = {}  # a repetition is not a second seed and would shrink the error
    for run in sorted(runs.values(), key=lambda run: (run.result is None, -run.done)):
        one = kept.setdefault(repr(run.recipe.to_plain()), run)
        if one is not run:
            left_out[f"{run.path} has the settings and the seed of {one.path}."] = None
    return [run for run in runs.values() if run in kept.values()], list(left_out)
