"""The runs of a report: which ones it shows, and which ones are left out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path

from ...core.schedules import final_strength
from ...errors import ConfigError
from ...plugins import registry
from ..quantities import steps_of
from ..recipes.parts import changes_in
from ..recipes.recipe import Recipe, as_text
from ..runs.contents import RunContents
from ..runs.run import Run


def penalties_of(recipe: Recipe) -> str:
    """The name that an ablation has for the penalties of a recipe.

    It is ``rnode`` for the paper's two penalties, and the names, as ``a+b``, for other ones. Without penalties it
    is ``ffjord`` for the baseline of ``--ffjord``, and ``none`` for any other solver of the training.
    """
    names = [name for name, strength in recipe.regularizers.items() if final_strength(strength) > 0]
    if set(names) == {"kinetic", "jacfrob"}:
        return "rnode"
    return "+".join(names) or ("ffjord" if _is_ffjord(recipe) else "none")


def _is_ffjord(recipe: Recipe) -> bool:
    """Whether a recipe without penalties trains the FFJORD baseline, with any name and measured penalties."""
    return dataclasses.replace(recipe.ffjord(), name=recipe.name, regularizers=recipe.regularizers) == recipe


def recipe_name(recipe: Recipe) -> str:
    """The recipe that the name begins with, because ``compare`` adds the configuration, as in ``digits-rnode``."""
    known = [each for each in registry.names("recipes") if f"{recipe.name}-".startswith(f"{each}-")]
    return max(known, key=len, default=recipe.name)


def given_name(recipe: Recipe) -> str:
    """The configuration of ``compare`` in the name of a recipe, as ``rnode`` in ``digits-rnode``; else empty."""
    return recipe.name.removeprefix(recipe_name(recipe)).removeprefix("-")


def own_data(recipe: Recipe) -> str | None:
    """The name of the user's file or folder that a recipe trains on; None for a data set with a name."""
    data = recipe.data
    return Path(data.root).name if data.root is not None and data.has_own_files else None


def data_name(recipe: Recipe) -> str:
    """The name of the data of a recipe: of the user's file or folder, or of the data set."""
    return own_data(recipe) or recipe.data.name


def settings_of(run: RunContents) -> dict[str, str]:
    """The text of each setting in which runs of two configurations may differ.

    The seed is left out, whether the steps are compiled, and the path of the data too if the facts of the run
    identify them: a copy is the same. ``changes`` are those of a resumed run, with their steps.
    """
    left_out = {"training.seed", "training.compile"} | (set() if run.facts is None else {"data.root"})
    texts = {path: as_text(value) for path, value in run.recipe.settings() if path not in left_out}
    return {**texts, "devices": str(run.devices), "changes": "; ".join(changes_in(run.parts))}


def configuration_of(run: RunContents) -> tuple[object, ...]:
    """A key that the runs of one configuration share, and no run of another configuration has.

    It has the settings and their changes, the number of devices, because a step takes a batch on each, and the
    data. Names and
    descriptions change no run and are left out.
    """
    return tuple(settings_of(run).items()), run.facts and run.facts.identity


def read_runs(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
) -> tuple[list[RunContents], list[str]]:
    """Read the runs of a report.

    Args:
        paths: run folders, and folders that have run folders below them, or one of these.

    Returns:
        The runs, and a message for each one that is left out: a run below a folder that cannot be read, a run
        without a logged step of likelihood or a validation, or a repetition of another run.

    Raises:
        CheckpointError: there is no run at one of the paths.
        ConfigError: no path is given, a run cannot be read, nothing is left, or some runs are on images and others
            on tables.
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not paths:
        raise ConfigError("a report needs at least one run folder.")
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
                left_out[f"{each.path} has no logged step of likelihood, and no validation."] = None
    if not runs:
        raise ConfigError(" ".join(left_out))
    kinds = {run.recipe.kind.metric: run for run in runs.values()}
    if len(kinds) > 1:
        paths = " and ".join(str(run.path) for run in kinds.values())
        raise ConfigError(
            f"runs on images and on tables have no unit in common, such as {paths}: make a report of each kind."
        )
    # a repetition is not a second seed: its score is the same, so it would make the error too small
    kept: dict[tuple[object, ...], RunContents] = {}
    for run in sorted(runs.values(), key=lambda run: (run.result is None, -steps_of(run))):
        one = kept.setdefault((*configuration_of(run), run.recipe.training.seed), run)
        if one is not run:
            left_out[f"{run.path} has the settings and the seed of {one.path}."] = None
    return [run for run in runs.values() if run in kept.values()], list(left_out)
