"""``compare``: the same recipe with and without its penalties, from the same weights, data order and noise."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, TrainingError, suggest
from ..evaluation.images import load_images
from ..recipes.schema import Recipe
from ..reports import Report, write_report
from ..reports.reading import Run, read_run
from ..training.runs.resume import newest_intact
from .scheduler import Job, places_of, train_arms

__all__ = ["ARMS", "Comparison", "arm_recipes", "compare"]

ARMS = ("vanilla", "kinetic", "jacfrob", "rnode")
"""The four arms of the paper's ablation (figure 5)."""


@dataclass(frozen=True)
class Comparison:
    """What a call of :func:`compare` left behind.

    Attributes:
        runs: the folder of each arm and seed that was trained, in the order of the arms.
        report: of all of them.
        failed: one message for each arm that could not be trained to its end; the report has it as far as it came.
        stopped: name of the signal that ended the call early; None where all arms are done.
    """

    runs: tuple[Path, ...]
    report: Report
    failed: tuple[str, ...]
    stopped: str | None


def arm_recipes(recipe: Recipe, arms: Sequence[str] = ARMS, *, seeds: int = 1) -> list[Recipe]:
    """The recipe of each run: for each seed, all arms.

    Args:
        recipe: what the arms share: weights, data order and noise are functions of its seed.
        arms: ``vanilla`` (no penalty, the recipe's solver, as in the paper's ablation), ``ffjord`` (no penalty,
            Dormand-Prince at 1e-5, as in the paper's comparison of times), ``rnode`` (all penalties of the recipe),
            or the name of one of them.
        seeds: runs of each arm; the first has the recipe's seed, the others the next ones.

    Raises:
        ConfigError: an unknown arm, one named twice or the same as another, no arm, or no seed.
    """
    known = ["vanilla", "ffjord", *recipe.regularizers, "rnode"]
    for arm in arms:
        if arm not in known:
            raise ConfigError(suggest(arm, known, "arm"))
    if not arms or len(set(arms)) < len(arms) or seeds < 1:
        raise ConfigError("a comparison needs at least one seed and one arm, and each arm once.")
    if {"vanilla", "ffjord"} <= set(arms) and recipe.trains_as_ffjord:
        raise ConfigError(f"vanilla and ffjord are the same for {recipe.name}, which trains with dopri5 at 1e-5.")
    found = []
    for seed in range(recipe.training.seed, recipe.training.seed + seeds):
        seeded = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, seed=seed))
        for arm in arms:
            changes: dict[str, Any] = {}
            if arm == "vanilla":
                changes = {"regularizers": {}}
            elif arm == "ffjord":
                changes = {"regularizers": {}, "solver": recipe.ffjord().solver}
            elif arm != "rnode":
                changes = {"regularizers": {arm: recipe.regularizers[arm]}}
            found.append(dataclasses.replace(seeded, name=f"{recipe.name}-{arm}", **changes))
    return found


def compare(
    recipe: Recipe,
    *,
    arms: Sequence[str] = ARMS,
    seeds: int = 1,
    checks: int = 20,
    max_time: float | None = None,
    out: str | os.PathLike[str] = "comparison",
    accelerator: str = "auto",
    devices: str = "auto",
    download: bool = False,
    progress: bool = True,
    announce: Callable[[str], object] = print,
) -> Comparison:
    """Train the arms, several at the same time where there is room, and write one report.

    A call with the same settings in the same folder goes on where the last one stopped: a finished arm is not
    trained again, an interrupted one is resumed. An arm does not depend on which others train beside it.

    Args:
        recipe, arms, seeds: see :func:`arm_recipes`.
        checks: validations of each arm, evenly spread over its steps; they are the marks of the figures. Used where
            the recipe has ``max_steps`` and no ``check_every_steps`` of its own.
        max_time: seconds for each arm, validations included, those of earlier calls included.
        out: folder for ``runs/`` and the report.
        accelerator: as Lightning's Trainer takes it.
        devices: see :func:`places_of`; each arm has one. Processes on a CPU share out its threads.
        download: fetch the data set if it is missing.
        progress: show progress on the terminal.
        announce: called with a line before each arm and, where several train at once, for each line of theirs.

    Raises:
        ConfigError: settings that cannot work.
        DataError, CheckpointError: as :func:`~rnode_plugin.training.fit.fit`; arms that are done stay.
        TrainingError: no arm has a run to report.
    """
    if checks < 1:
        raise ConfigError(f"a comparison needs at least one check, not {checks}.")
    if max_time is not None and max_time <= 0:
        raise ConfigError(f"the time limit must be positive, not {max_time} s.")
    training = recipe.training
    if training.max_steps is not None and training.check_every_steps is None:
        every = max(1, training.max_steps // checks)
        recipe = dataclasses.replace(recipe, training=dataclasses.replace(training, check_every_steps=every))
    out = Path(out)
    todo = arm_recipes(recipe, arms, seeds=seeds)
    places = places_of(accelerator, devices, len(todo))
    load_images(recipe, download=download)  # what is wrong with them is said once, before anything is trained
    fixed = {"runs": str(out / "runs"), "accelerator": accelerator, "progress": progress}
    jobs: list[Job] = []
    for number, arm in enumerate(todo, 1):
        run = _earlier_run(out / "runs", arm)
        head = f"arm {number} of {len(todo)}: {arm.name}, seed {arm.training.seed}, {arm.solver.method}"
        left = None if max_time is None else max_time - (_seconds_spent(run.path) if run is not None else 0.0)
        if run is not None and _is_done(run, left):
            announce(f"{head}: done, in {run.path}")
            continue
        resume = str(run.path) if run is not None and _has_checkpoint(run.path) else None
        limit = None if left is None else max(left, 1e-3)  # at least one step, and the evaluation
        jobs.append(Job(arm, {**fixed, "resume": resume, "max_time": limit}, head))
    failed, stopped = train_arms(jobs, places, announce)
    runs = [run.path for run in (_earlier_run(out / "runs", arm) for arm in todo) if run is not None]
    if not runs:
        raise TrainingError(failed[0] if failed else f"{stopped} before an arm had begun.")
    title = f"{recipe.name}: with and without the penalties"
    return Comparison(tuple(runs), write_report(runs, out, title=title), tuple(failed), stopped)


def _earlier_run(runs: Path, recipe: Recipe) -> Run | None:
    """The newest run of exactly this recipe."""
    versions = [path for path in (runs / recipe.name).glob("*") if path.name.isdigit()]
    for path in sorted(versions, key=lambda path: int(path.name), reverse=True):
        with suppress(ConfigError):  # a folder that cannot be read is left as it is
            run = read_run(path)
            if run.recipe == recipe:
                return run
    return None


def _is_done(run: Run, left: float | None) -> bool:
    """Finished, or stopped by a time limit and out of time again."""
    if run.result is None:
        return False
    return run.result["stopped"] == "finished" or (left is not None and left <= 0)


def _has_checkpoint(path: Path) -> bool:
    return any((path / "checkpoints").glob("*.ckpt"))


def _seconds_spent(path: Path) -> float:
    return float(newest_intact(path)[1]["progress"]["seconds"]) if _has_checkpoint(path) else 0.0
