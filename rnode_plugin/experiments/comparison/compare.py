"""``compare`` trains a recipe with different penalties, each in a separate process, and writes one report.

All configurations begin with the same weights and see the same samples in the same order, with the same noise.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from ...errors import CheckpointError, ConfigError, TrainingError
from ..evaluation.loading import check_device
from ..recipes.recipe import Recipe, Training
from ..reports import Report, write_report
from ..reports.runs import own_data
from ..runs.results import Result
from ..runs.run import Run, training_lock
from ..training.checkpoints import newest_intact
from ..training.plan import CLOCK
from .configurations import configured_recipes

_TRAIN = (sys.executable, "-m", "rnode_plugin", "train")
_VALIDATIONS = 20  # at least, in a run whose recipe has as many steps and chooses no interval
_POLL = 0.1  # seconds between two looks at the processes


@dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare`.

    Attributes:
        runs: the folder of each run that has begun, in the order of the configurations.
        report: the report on these runs.
        failed: one message for each run that failed. The report has the steps that this run made.
    """

    runs: tuple[Path, ...]
    report: Report
    failed: tuple[str, ...]


class _Job(NamedTuple):
    """A run that is left to do: its title, its settings, and the options of ``train`` that begin or resume it."""

    title: str
    recipe: Recipe
    options: list[str]


def compare(
    recipe: Recipe,
    *,
    configurations: Sequence[str] = (),
    seeds: int = 1,
    max_time: float | None = None,
    out: str | os.PathLike[str] = "comparison",
    accelerator: str = "auto",
    jobs: int | None = None,
    download: bool = False,
    progress: bool = True,
    announce: Callable[[str], object] = print,
) -> Comparison:
    """Train all configurations and write one report.

    Each run is a process of ``rnode-cli train``, so a penalty, a model or a data set of a plugin must be installed.
    The same call in the same folder continues: it keeps finished runs and resumes interrupted ones. A run that
    fails does not end the others. An exception in this call, such as KeyboardInterrupt, ends the running processes
    with a checkpoint.

    Args:
        recipe: the settings that the configurations share.
        configurations, seeds: see :func:`configured_recipes`.
        max_time: seconds for the training of each run, validations included.
        out: folder for ``runs/``, ``logs/`` and the report.
        accelerator: an accelerator of Lightning's Trainer, or one GPU, such as ``cuda:1``.
        jobs: number of runs that train at the same time. None means one on each GPU, or on each core of a CPU.
        download: fetch the data set if it is missing.
        progress: show the progress of runs that are trained one after another. Other output is in the logs.
        announce: called with a line at the beginning of each run, for each failure, and for an interruption.

    Raises:
        ConfigError: settings that cannot work, runs with other settings in the folder, or another process that
            trains in it.
        DataError: the data set is missing or does not fit the recipe.
        TrainingError: no run can be reported.
    """
    configured_recipes(recipe, configurations, seeds=seeds)  # refuses names before data are downloaded
    check_device(accelerator)
    recipe = _with_validations(recipe.trained_on(recipe.load_data(download=download)))
    out = Path(out)
    planned = {
        out / "runs" / one.name / str(one.training.seed): one
        for one in configured_recipes(recipe, configurations, seeds=seeds)
    }
    places = _places(accelerator, jobs)[: len(planned)]
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with training_lock(out):
        left = []
        for number, (folder, one) in enumerate(planned.items(), 1):
            title = f"run {number} of {len(planned)}: {_name(one)}"
            if (options := _begin(folder, one, max_time)) is None:
                announce(f"{title}: done, in {folder}")
            else:
                left.append(_Job(title, one, options))
        failures = _train(left, places, logs, progress=progress and len(places) == 1, announce=announce)
        runs = [folder for folder in planned if Run(folder).is_described]
        if not any(Run(folder).read().has_begun for folder in runs):
            raise TrainingError(" ".join(failures) or "the runs ended before a step was logged.")
        own = own_data(recipe)
        subject = recipe.name if own is None else f"{own}, recipe {recipe.name}"
        report = write_report(runs, out, title=f"{subject}: what the penalties change")
    return Comparison(tuple(runs), report, tuple(failures))


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


def _train(
    jobs: Sequence[_Job],
    places: Sequence[tuple[str, ...]],
    logs: Path,
    *,
    progress: bool,
    announce: Callable[[str], object],
) -> list[str]:
    """Train each job at the first place that is free, and return a message for each one that failed.

    If this process gets a signal, its children get SIGTERM, which they answer with a checkpoint, and their end is
    waited for. After a Ctrl-C in a terminal they have got SIGINT before, which does not matter to them.
    """
    waiting, free, failures = list(jobs), list(places), dict[str, str]()
    running: dict[subprocess.Popen[bytes], tuple[_Job, tuple[str, ...]]] = {}
    threads = max(1, torch.get_num_threads() // len(places))
    try:
        while waiting or running:
            while waiting and free:
                job, place = waiting.pop(0), free.pop(0)
                announce(job.title)
                running[_start(job, place, logs, threads=threads, progress=progress)] = job, place
            time.sleep(_POLL)
            for process in [each for each in running if each.poll() is not None]:
                job, place = running.pop(process)
                free.append(place)
                if process.returncode != 0:
                    failures[job.title] = f"{_name(job.recipe)}: {_reason(process.returncode, _log(job, logs))}"
                    announce(failures[job.title])
    except BaseException:
        announce("Stopping the runs. The same command continues them.")
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        raise
    return [failures[job.title] for job in jobs if job.title in failures]


def _start(
    job: _Job, place: tuple[str, ...], logs: Path, *, threads: int, progress: bool
) -> subprocess.Popen[bytes]:
    """Begin or resume a run, with its standard output on the terminal for ``progress``, else in its log."""
    log = _log(job, logs)
    file = log.with_suffix(".json")
    file.write_text(json.dumps(job.recipe.to_plain()), encoding="utf-8")
    shares = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "PYTHONIOENCODING": "utf-8"}
    # --no-next because the comparison itself shows the next steps at its end
    command = [*_TRAIN, str(file), *job.options, *place, "--no-next"]
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=None if progress else output,
            stderr=output,
            env={**os.environ, **shares},
        )


def _name(recipe: Recipe) -> str:
    return f"{recipe.name}, seed {recipe.training.seed}"


def _log(job: _Job, logs: Path) -> Path:
    return logs / f"{job.recipe.name}-{job.recipe.training.seed}.log"


def _begin(folder: Path, recipe: Recipe, max_time: float | None) -> list[str] | None:
    """The options of ``train`` that begin or resume a run; None for a run that is done.

    Raises:
        ConfigError: the folder has a run with other settings, or cannot be read.
    """
    there = Run(folder)
    if there.is_described:
        run = there.read()
        old, new = dict(run.recipe.settings()), dict(recipe.settings())
        differ = [f"{name} is {old.get(name)} there and {new.get(name)} here" for name in {**old, **new}
                  if old.get(name) != new.get(name)]  # fmt: skip
        if differ:
            raise ConfigError(f"{folder} has other settings ({', '.join(differ)}): choose another --out.")
        if run.result is not None and not _has_time_left(run.result, max_time):
            return None
        if there.has_checkpoints:
            return ["--resume", str(folder), *_limit(max_time, spent=_spent(there))]
    elif there.has_checkpoints:
        raise ConfigError(f"{folder} has checkpoints, but no recipe.json: choose another --out.")
    if folder.exists():  # the run ended before its first checkpoint
        with training_lock(folder):
            shutil.rmtree(folder)
    return ["--run-folder", str(folder), *_limit(max_time)]


def _has_time_left(result: Result, max_time: float | None) -> bool:
    """Whether an earlier call stopped a run by a limit that is shorter than the limit of this one.

    Next to runs with the new limit, such a run would be compared at fewer steps.
    """
    return result.out_of_time and (max_time is None or result.run_seconds < max_time)


def _limit(max_time: float | None, *, spent: float = 0.0) -> list[str]:
    """The time that is left for a run. A resumed run that got all of it again would have an advantage."""
    return [] if max_time is None else ["--max-time", f"{max(max_time - spent, 0.001):.3f}"]


def _spent(run: Run) -> float:
    """The wall-clock time of a run up to the checkpoint that it continues from. A kill undoes the time after it."""
    try:
        contents = newest_intact(run.path)[1]
    except CheckpointError:  # the process that resumes the run reports this
        return 0.0
    return contents["callbacks"][CLOCK]["run_seconds"]


def _places(accelerator: str, jobs: int | None) -> list[tuple[str, ...]]:
    """The options of ``train`` for each run that trains at the same time: its GPU, or one process on the CPU.

    More jobs than GPUs share the GPUs by turns.
    """
    if ":" in accelerator:
        return [("--device", accelerator)] * (jobs or 1)
    gpus = torch.cuda.device_count() if accelerator in ("auto", "gpu", "cuda") else 0
    on_mps = accelerator == "mps" or (accelerator == "auto" and torch.backends.mps.is_available())
    count = jobs or gpus or (1 if on_mps else torch.get_num_threads())
    return [("--device", accelerator, "--devices", f"{number % gpus}," if gpus else "1") for number in range(count)]


def _reason(code: int, log: Path) -> str:
    """Why a process ended: its message, which every command prints after ``Error:``, or else its exit code."""
    if message := re.search(r"^Error: (.*)", log.read_text(errors="replace"), re.MULTILINE | re.DOTALL):
        return " ".join(message[1].split())
    hint = " The memory may not have sufficed. --jobs 1 trains one run at a time." if code == -9 else ""
    return f"its process ended with exit code {code}, see {log}.{hint}"
