"""``compare``: a recipe with different penalties, from the same weights, data order and noise, and one report."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...errors import ConfigError, TrainingError
from ..evaluation.loading import check_device
from ..recipes.recipe import Recipe
from ..reports import Report, write_report
from ..reports.runs import own_data
from ..runs.run import Run, training_lock
from .configurations import configured_recipes

_TRAIN = (sys.executable, "-m", "rnode_plugin", "train")
_VALIDATIONS = 20  # of a run whose recipe has a number of steps and no interval of validations


@dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare`.

    Attributes:
        runs: the folder of each run that has begun, in the order of the configurations.
        report: the report of all runs.
        failed: one message for each run that failed; the report has it as far as it came.
    """

    runs: tuple[Path, ...]
    report: Report
    failed: tuple[str, ...]


def compare(
    recipe: Recipe,
    *,
    configurations: Sequence[str] = (),
    seeds: int = 1,
    max_time: float | None = None,
    out: str | os.PathLike[str] = "comparison",
    accelerator: str = "auto",
    devices: int | None = None,
    download: bool = False,
    progress: bool = True,
    announce: Callable[[str], object] = print,
) -> Comparison:
    """Train the configurations, several at the same time if there is room, and write one report.

    Each run is ``rnode-cli train`` in a separate process, so a penalty, a model or a data set of a plugin must be
    installed. The same call in the same folder continues: finished runs stay, interrupted ones are resumed. A run
    that fails does not end the others.

    Args:
        recipe: the settings that the configurations share.
        configurations, seeds: see :func:`configured_recipes`.
        max_time: seconds for the training of each run, validations included.
        out: folder for ``runs/``, ``logs/`` and the report.
        accelerator: an accelerator of Lightning's Trainer, or one GPU, such as ``cuda:1``.
        devices: number of runs that train at the same time; None for one on each GPU, or on each core of a CPU.
        download: fetch the data set if it is missing.
        progress: show the progress of runs that are trained one after another. Other output is in the logs.
        announce: called with a line at the beginning of each run and for each failure.

    Raises:
        ConfigError: settings that cannot work, runs of other settings in the folder, or another process that trains
            in it.
        DataError: the data set is missing or does not fit the recipe.
        TrainingError: no run can be reported.
    """
    configured_recipes(recipe, configurations, seeds=seeds)  # refuses names before data are downloaded
    check_device(accelerator)
    recipe = recipe.trained_on(recipe.load_data(download=download))
    training = recipe.training
    if training.max_steps is not None and training.val_every_steps is None:
        every = max(1, training.max_steps // _VALIDATIONS)
        recipe = dataclasses.replace(recipe, training=dataclasses.replace(training, val_every_steps=every))
    planned = configured_recipes(recipe, configurations, seeds=seeds)
    places = _places(accelerator, devices)[: len(planned)]
    free: queue.SimpleQueue[tuple[str, ...]] = queue.SimpleQueue()
    for place in places:
        free.put(place)
    threads = str(max(1, torch.get_num_threads() // len(places)))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "PYTHONIOENCODING": "utf-8",
    }
    out = Path(out)
    running: set[subprocess.Popen[bytes]] = set()
    folders = {out / "runs" / one.name / str(one.training.seed): one for one in planned}
    (out / "logs").mkdir(parents=True, exist_ok=True)

    def train(title: str, one: Recipe, begin: Sequence[str]) -> str | None:
        announce(title)
        log, file = (out / "logs" / f"{one.name}-{one.training.seed}.{suffix}" for suffix in ("log", "json"))
        file.write_text(json.dumps(one.to_plain()), encoding="utf-8")
        place = free.get()
        command = [*_TRAIN, str(file), *begin, *place, "--no-next"]  # the end of the comparison has the next steps
        try:
            with log.open("wb") as output:
                shown = None if progress and len(places) == 1 else output
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=shown, stderr=output,
                                           env=environment)  # fmt: skip
                running.add(process)
                code = process.wait()
                running.discard(process)
        finally:
            free.put(place)
        if code == 0:
            return None
        failure = f"{one.name}, seed {one.training.seed}: {_reason(code, log)}"
        announce(failure)
        return failure

    with training_lock(out):
        jobs = []
        for number, (folder, one) in enumerate(folders.items(), 1):
            title = f"run {number} of {len(planned)}: {one.name}, seed {one.training.seed}"
            if (begin := _begin(folder, one, max_time)) is None:
                announce(f"{title}: done, in {folder}")
            else:
                jobs.append((title, one, begin))
        pool = ThreadPoolExecutor(len(places))
        try:
            failures = [each for each in pool.map(lambda job: train(*job), jobs) if each is not None]
        except BaseException:  # a signal, which Ctrl-C also sends to the processes
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.terminate()  # it ends with a checkpoint
            raise
        finally:
            pool.shutdown()
        runs = [folder for folder in folders if Run(folder).is_described]
        if not any(Run(folder).read().has_begun for folder in runs):
            raise TrainingError(" ".join(failures) or "the runs ended before a step was logged.")
        own = own_data(recipe)
        subject = recipe.name if own is None else f"{own}, recipe {recipe.name}"
        report = write_report(runs, out, title=f"{subject}: what the penalties change")
    return Comparison(tuple(runs), report, tuple(failures))


def _begin(folder: Path, recipe: Recipe, max_time: float | None) -> list[str] | None:
    """The options of ``train`` that begin or resume a run; None for a run that is done.

    Raises:
        ConfigError: the folder has a run of other settings, or cannot be read.
    """
    there = Run(folder)
    if there.is_described:
        run = there.read()
        old, new = dict(run.recipe.settings()), dict(recipe.settings())
        differ = [f"{name} is {old.get(name)} there and {new.get(name)} here" for name in {**old, **new}
                  if old.get(name) != new.get(name)]  # fmt: skip
        if differ:
            raise ConfigError(f"{folder} has other settings ({', '.join(differ)}): choose another --out.")
        if run.result is not None:
            return None
        if there.has_checkpoints:
            seconds = [0.0, *run.steps.get("seconds", ()), *run.checks.get("seconds", ())]
            return ["--resume", str(folder), *_limit(max_time, spent=np.nanmax(seconds))]
    elif there.has_checkpoints:
        raise ConfigError(f"{folder} has checkpoints, but no recipe.json: choose another --out.")
    if folder.exists():  # a run that ended before its first checkpoint
        with training_lock(folder):
            shutil.rmtree(folder)
    return ["--run-folder", str(folder), *_limit(max_time)]


def _limit(max_time: float | None, *, spent: float = 0.0) -> list[str]:
    """The time that is left for a run; with more than the others it would be compared unfairly."""
    return [] if max_time is None else ["--max-time", f"{max(max_time - spent, 0.001):.3f}"]


def _places(accelerator: str, devices: int | None) -> list[tuple[str, ...]]:
    """Options of runs that train at the same time: GPUs by turns, the GPU that is named, or a process of a CPU."""
    if ":" in accelerator:
        return [("--device", accelerator)] * (devices or 1)
    gpus = torch.cuda.device_count() if accelerator in ("auto", "gpu", "cuda") else 0
    on_mps = accelerator == "mps" or (accelerator == "auto" and torch.backends.mps.is_available())
    count = devices or gpus or (1 if on_mps else torch.get_num_threads())
    return [("--device", accelerator, "--devices", f"{number % gpus}," if gpus else "1") for number in range(count)]


def _reason(code: int, log: Path) -> str:
    """Why a process ended: the message of the command line, or its exit code."""
    if message := re.search(r"^Error: (.*)", log.read_text(errors="replace"), re.MULTILINE | re.DOTALL):
        return " ".join(message[1].split())
    hint = " The memory may not have sufficed. --devices 1 trains one run at a time." if code == -9 else ""
    return f"its process ended with exit code {code}, see {log}.{hint}"
