"""``compare`` trains recipes that differ in their penalties, each in a separate process, and writes one report."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import CheckpointError, ConfigError, TrainingError
from ..data.facts import Facts
from ..evaluation.loading import check_device
from ..files import make_folder, write_atomically
from ..recipes.recipe import Recipe, Training, differences
from ..reports import Report, write_report
from ..reports.runs import data_name
from ..runs.results import Result
from ..runs.run import Run, training_lock
from ..training.checkpoints import newest_intact
from ..training.plan import ROWS, RunOptions

_RNODE_CLI = (sys.executable, "-m", "rnode_plugin")
_VALIDATIONS = 20  # at least, in a run whose recipe has as many steps and chooses no interval


@dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare`.

    Attributes:
        runs: the folder of each run that has begun, in the order of the recipes.
        report: the report on these runs.
        failed: a sentence for each run that failed. The report has the steps that this run made.
    """

    runs: tuple[Path, ...]
    report: Report
    failed: tuple[str, ...]


def compare(
    recipes: Sequence[Recipe],
    *,
    max_time: float | None = None,
    out: str | os.PathLike[str] = "comparison",
    accelerator: str = "auto",
    download: bool = False,
    announce: Callable[[str], object] | None = print,
) -> Comparison:
    """Train all recipes one after the other, and write one report.

    Each run is a process of ``rnode-cli train`` on one device, so a penalty, a model or a data set of a plugin must
    be installed. The same call in the same folder continues: it keeps finished runs and resumes interrupted ones.
    A run that fails does not end the others. An exception in this call, such as KeyboardInterrupt, ends the running
    process with a checkpoint.

    Args:
        recipes: what to train, as :func:`~rnode_plugin.experiments.comparison.configurations.configured_recipes`
            makes it. Two recipes may share their name if their seeds differ.
        max_time: seconds for the training of each run, validations included.
        out: folder for ``runs/``, ``recipes/`` and the report.
        accelerator: an accelerator of Lightning's Trainer, or one GPU, such as ``cuda:1``.
        download: fetch the data set if it is missing.
        announce: called with a line at the beginning of each run, and for an interruption. If it is None, the runs
            do not show their progress.

    Raises:
        ConfigError: settings that cannot work, runs with other settings or on other data in the folder, or another
            process that trains in it.
        DataError: the data set is missing or does not fit a recipe.
        TrainingError: no run can be reported.
    """
    out, tell = Path(out), announce or (lambda line: None)
    planned = _planned(recipes, out, accelerator, max_time, download=download)
    # of several GPUs `train` would take all, with the recipe's batch on each
    device = ["--device", accelerator, *([] if ":" in accelerator else ["--devices", "1"])]
    failed: list[str] = []
    with training_lock(out):
        for number, (folder, one) in enumerate(planned.items(), 1):
            title = f"run {number} of {len(planned)}: {one.name}, seed {one.training.seed}"
            if (options := _options(Run(folder), max_time)) is None:
                tell(f"{title}: done, in {folder}")
                continue
            tell(title)
            file = out / "recipes" / f"{one.name}-{one.training.seed}.json"
            write_atomically(file, json.dumps(one.to_plain()).encode())
            # --no-next because the comparison itself shows the next steps at its end
            words = ["train", str(file), *options, *device, "--no-next"]
            if code := _train(words, tell, progress=announce is not None):
                hint = " It was killed: the memory may not have sufficed." if code == -signal.SIGKILL else ""
                failed.append(f"{title}: its process ended with exit code {code}.{hint}")
        runs = [folder for folder in planned if Run(folder).is_described]
        if not any(Run(folder).read().has_begun for folder in runs):
            raise TrainingError(" ".join(failed) or "the runs ended before a step was logged.")
        report = write_report(runs, out, title=f"{data_name(recipes[0])}: what the penalties change")
    return Comparison(tuple(runs), report, tuple(failed))


def _planned(
    recipes: Sequence[Recipe], out: Path, accelerator: str, max_time: float | None, *, download: bool
) -> dict[Path, Recipe]:
    """The recipe of each run by its folder, after a look at the options, the data and what the folders hold.

    Raises:
        ConfigError, DataError: see :func:`compare`.
    """
    check_device(accelerator)
    RunOptions(max_time=max_time)  # refuses it as each run would
    known: dict[object, Facts] = {}
    planned: dict[Path, Recipe] = {}
    for one in recipes:
        if one.data not in known:
            known[one.data] = Facts.of(one.load_data(download=download), one.data.given)
        folder = out / "runs" / one.name / str(one.training.seed)
        if folder in planned:
            raise ConfigError(f"two recipes have the name {one.name} and the seed {one.training.seed}.")
        planned[folder] = _with_validations(one)
        _refuse_other(folder, planned[folder], known[one.data])
    make_folder(out / "recipes")
    return planned


def _with_validations(recipe: Recipe) -> Recipe:
    """The recipe with enough validations for the curves of the report, if its steps are known.

    An interval in steps, or one of several epochs, was chosen, so it stays.
    """
    training = recipe.training
    chosen = training.val_every_steps is not None or training.val_every != Training.val_every
    if training.max_steps is None or chosen:
        return recipe
    every = max(1, training.max_steps // _VALIDATIONS)
    return dataclasses.replace(recipe, training=dataclasses.replace(training, val_every_steps=every))


def _refuse_other(folder: Path, recipe: Recipe, facts: Facts) -> None:
    """Refuse a folder whose run cannot be compared with the others.

    Raises:
        ConfigError: the run has other settings or other data, its recipe is missing or cannot be read, or another
            process trains it.
    """
    run = Run(folder)
    if folder.exists():
        with training_lock(folder):  # refuses a run that another process trains
            pass
    if run.is_described:
        if differ := differences(run.recipe(), recipe):
            raise ConfigError(f"{folder} has other settings ({', '.join(map(str, differ))}): choose another --out.")
        contents = run.read()
        if len(contents.parts) > 1:
            raise ConfigError(
                f"{folder} has changed its settings at step {contents.parts[1].first}: choose another --out."
            )
        if contents.facts not in (None, facts):
            raise ConfigError(f"{folder} was trained on other data, or with another split: choose another --out.")
    elif run.has_checkpoints:
        raise ConfigError(f"{folder} has checkpoints, but no recipe.json: choose another --out.")


def _options(run: Run, max_time: float | None) -> list[str] | None:
    """The options of ``train`` that begin or resume a run; None for a run that is done."""
    if run.is_described and (result := run.read().result) is not None and not _has_time_left(result, max_time):
        return None
    if run.has_checkpoints:
        return ["--resume", str(run.path), *_limit(max_time, spent=_spent(run))]
    return ["--run-folder", str(run.path), *_limit(max_time)]


def _has_time_left(result: Result, max_time: float | None) -> bool:
    """Whether an earlier call stopped a run by a limit that is shorter than the limit of this one.

    Next to runs with the new limit, such a run would be compared at fewer steps.
    """
    return result.out_of_time and (max_time is None or result.run_seconds < max_time)


def _limit(max_time: float | None, *, spent: float = 0.0) -> list[str]:
    """The time that is left for a run. A resumed run that got all of it again would have an advantage."""
    if max_time is None or max_time == math.inf:
        return []
    return ["--max-time", f"{max(max_time - spent, 0.001):.3f}"]


def _spent(run: Run) -> float:
    """The wall-clock time of a run up to the checkpoint that it continues from. A kill undoes the time after it."""
    try:
        return newest_intact(run.path)[1]["callbacks"][ROWS]["run_seconds"]
    except (CheckpointError, KeyError):  # damaged, or of another Trainer: the process that resumes it reports this
        return 0.0


def _train(words: Sequence[str], announce: Callable[[str], object], *, progress: bool) -> int:
    """Run a process of ``rnode-cli`` and return its exit code.

    An exception in this thread, such as KeyboardInterrupt, ends the process by SIGTERM, which it answers with a
    checkpoint, and its end is waited for. After a Ctrl-C in a terminal it has got SIGINT before, which does not
    matter to it.
    """
    output = None if progress else subprocess.DEVNULL
    process = subprocess.Popen([*_RNODE_CLI, *words], stdin=subprocess.DEVNULL, stdout=output)
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        announce("Stopping the run. The same command continues it.")
        raise
    finally:
        process.wait()
