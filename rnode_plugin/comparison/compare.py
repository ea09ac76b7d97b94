"""``compare``: a recipe with different penalties, from the same weights, data order and noise, and one report."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, TrainingError
from ..evaluation.loading import load_for_training
from ..recipes.recipe import Recipe
from ..reports import Report, write_report
from ..reports.runs import Run, read_run
from ..training.runs import RunPlan, newest_intact
from .arm_checks import check_arm
from .arm_recipes import arm_recipes
from .scheduler import places_of, threads_of, train_arms
from .shared_choice import shared_choice
from .worker import Job

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True)
class Comparison:
    """What a call of :func:`compare` left behind.

    Attributes:
        runs: the folder of each arm and seed that was trained, in the order of the arms.
        report: of all of them.
        failed: one message for each arm that could not be trained to its end; the report has it as far as it came.
        stopped: name of the signal that ended the call early; None if all arms are done.
    """

    runs: tuple[Path, ...]
    report: Report
    failed: tuple[str, ...]
    stopped: str | None


def compare(
    recipe: Recipe,
    *,
    arms: Sequence[str] = (),
    sweeps: Sequence[str] = (),
    seeds: int = 1,
    validations: int = 20,
    max_time: float | None = None,
    out: str | os.PathLike[str] = "comparison",
    accelerator: str = "auto",
    devices: str = "auto",
    download: bool = False,
    progress: bool = True,
    announce: Callable[[str], object] = print,
) -> Comparison:
    """Train the arms, several at the same time if there is room, and write one report.

    A call with the same settings in the same folder continues the last one: a finished arm is not
    trained again, an interrupted one is resumed. What ``training.precision=auto`` and ``training.compile=auto``
    leave open is measured once for all arms (``chosen.json``). An arm does not depend on which others train beside
    it. Each trains in a process of its own, so a penalty, a model or a data set of a plugin must be installed.

    Args:
        recipe: what the arms share.
        arms, sweeps, seeds: see :func:`~rnode_plugin.comparison.arm_recipes.arm_recipes`.
        validations: of each arm, evenly spread over its steps; they are the marks of the figures. Used if
            the recipe has ``max_steps`` and no ``val_every_steps`` of its own.
        max_time: seconds for each arm, validations included, those of earlier calls included.
        out: folder for ``runs/`` and the report.
        accelerator: as Lightning's Trainer takes it.
        devices: see :func:`~rnode_plugin.comparison.scheduler.places_of`; each arm has one. Processes on a CPU
            share out its threads.
        download: fetch the data set if it is missing.
        progress: show progress on the terminal.
        announce: called with a line before each arm and, if several train at once, for each line of theirs.

    Raises:
        ConfigError: settings that cannot work.
        DataError: the data set is missing or does not fit the recipe.
        CheckpointError: what was chosen for an earlier call cannot be read.
        TrainingError: no arm has a run to report.
    """
    if validations < 1:
        raise ConfigError(f"a comparison needs at least one validation, not {validations}.")
    if max_time is not None and max_time <= 0:
        raise ConfigError(f"the time limit must be positive, not {max_time} s.")
    # what is wrong with the data is said once, before anything is trained
    recipe, data = load_for_training(recipe, download=download)
    planned = arm_recipes(_with_validations(recipe, validations), arms, sweeps=sweeps, seeds=seeds)
    for arm in planned[: len(planned) // seeds]:
        check_arm(arm)
    places = places_of(accelerator, devices, len(planned))
    out = Path(out)
    jobs = _unfinished(planned, out / "runs", accelerator, max_time, announce)
    if jobs:
        steps, threads = RunPlan.of(planned[0], len(data.train)).total, threads_of(places)
        chosen = shared_choice(
            planned, out, steps=steps, accelerator=accelerator, threads=threads, announce=announce
        )
        jobs = [dataclasses.replace(job, chosen=chosen) for job in jobs]
    failed, stopped = train_arms(jobs, places, announce, progress=progress)
    runs = [run.path for arm in planned if (run := _earlier_run(out / "runs", arm)) is not None]
    if not any(read_run(run).has_steps for run in runs):
        raise TrainingError(" ".join(failed) or f"{stopped or 'The call ended'} before an arm had a logged step.")
    report = write_report(runs, out, title=f"{recipe.name}: what the penalties change")
    return Comparison(tuple(runs), report, tuple(failed), stopped)


def _with_validations(recipe: Recipe, validations: int) -> Recipe:
    """The recipe with so many validations, if it says how many steps there are and not how often to validate."""
    training = recipe.training
    if training.max_steps is None or training.val_every_steps is not None:
        return recipe
    every = max(1, training.max_steps // validations)
    return dataclasses.replace(recipe, training=dataclasses.replace(training, val_every_steps=every))


def _unfinished(
    planned: Sequence[Recipe],
    runs: Path,
    accelerator: str,
    max_time: float | None,
    announce: Callable[[str], object],
) -> list[Job]:
    """What is left to do; what is done is announced."""
    jobs: list[Job] = []
    for number, arm in enumerate(planned, 1):
        head = f"arm {number} of {len(planned)}: {arm.name}, seed {arm.training.seed}, {arm.solver.method}"
        run = _earlier_run(runs, arm)
        left = None if max_time is None else max_time - (_seconds_spent(run.path) if run is not None else 0.0)
        if run is not None and _is_done(run, left):
            announce(f"{head}: done, in {run.path}")
            continue
        resume = run.path if run is not None and _has_checkpoint(run.path) else None
        limit = None if left is None else max(left, 1e-3)  # at least one step, and the evaluation
        jobs.append(Job(arm, head, runs, resume, limit, accelerator))
    return jobs


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
