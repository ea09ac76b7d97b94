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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import ConfigError, TrainingError
from ..evaluation.loading import load_for_training
from ..recipes.recipe import Recipe
from ..reports import Report, write_report
from ..reports.runs import read_run
from ..training.runs import training_lock
from .configurations import configured_recipes

_TRAIN = (sys.executable, "-m", "rnode_plugin", "train")


@dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare`.

    Attributes:
        runs: the folder of each run that has begun, in the order of the configurations.
        report: of all of them.
        failed: one message for each run that failed; the report has it as far as it came.
    """

    runs: tuple[Path, ...]
    report: Report
    failed: tuple[str, ...]


def compare(
    recipe: Recipe,
    *,
    configurations: tuple[str, ...] = (),
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
    """Train the configurations, several at the same time if there is room, and write one report.

    Each run is ``rnode-cli train`` in a separate process, so a penalty, a model or a data set of a plugin must be
    installed. The same call in the same folder continues: finished runs stay, interrupted ones are resumed. A run
    that fails does not end the others.

    Args:
        recipe: the settings that the configurations share.
        configurations, seeds: see :func:`~rnode_plugin.comparison.configurations.configured_recipes`.
        validations: number of validations of each run, evenly spread over its steps. They are the marks of the
            figures. Used if the recipe has ``max_steps`` and no ``val_every_steps``.
        max_time: seconds for the training of each run, validations included.
        out: folder for ``runs/``, ``logs/`` and the report.
        accelerator: as Lightning's Trainer takes it.
        devices: see :func:`places_of`; each run has one. Processes on a CPU share its threads.
        download: fetch the data set if it is missing.
        progress: show the progress of runs that are trained one after another. Other output is in the logs.
        announce: called with a line at the beginning of each run and for each failure.

    Raises:
        ConfigError: settings that cannot work, runs of other settings in the folder, or another process that trains
            in it.
        DataError: the data set is missing or does not fit the recipe.
        TrainingError: no run can be reported.
    """
    recipe, _ = load_for_training(recipe, download=download)
    training = recipe.training
    if training.max_steps is not None and training.val_every_steps is None:
        every = max(1, training.max_steps // validations)
        recipe = dataclasses.replace(recipe, training=dataclasses.replace(training, val_every_steps=every))
    planned = configured_recipes(recipe, configurations, seeds=seeds)
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    places = places_of(accelerator, devices, len(planned))
    for place in places:
        free.put(place)
    threads = str(max(1, torch.get_num_threads() // len(places)))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "PYTHONIOENCODING": "utf-8",
    }
    limit = [] if max_time is None else ["--max-time", f"{max_time:.3f}"]
    out = Path(out)
    folders = {out / "runs" / one.name / str(one.training.seed): one for one in planned}
    (out / "logs").mkdir(parents=True, exist_ok=True)

    def train(title: str, one: Recipe, begin: list[str]) -> str | None:
        announce(title)
        log, file = (out / "logs" / f"{one.name}-{one.training.seed}.{suffix}" for suffix in ("log", "json"))
        file.write_text(json.dumps(one.to_plain()), encoding="utf-8")
        place = free.get()
        try:
            command = [*_TRAIN, str(file), *begin, "--device", accelerator, "--devices", place, *limit]
            with log.open("wb") as output:
                shown = None if progress and len(places) == 1 else output
                code = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, stdout=shown, stderr=output,
                                      env=environment).returncode  # fmt: skip
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
            begin = _begin(folder, one)
            if begin is None:
                announce(f"{title}: done, in {folder}")
            else:
                jobs.append((title, one, begin))
        pool = ThreadPoolExecutor(len(places))
        try:
            failures = [each for each in pool.map(lambda job: train(*job), jobs) if each is not None]
        finally:  # Ctrl-C also reaches the processes, which end with a checkpoint
            pool.shutdown(cancel_futures=True)
        runs = [folder for folder in folders if (folder / "recipe.json").is_file()]
        if not any(read_run(folder).has_begun for folder in runs):
            raise TrainingError(" ".join(failures) or "the runs ended before a step was logged.")
        report = write_report(runs, out, title=f"{recipe.name}: what the penalties change")
    return Comparison(tuple(runs), report, tuple(failures))


def _begin(folder: Path, recipe: Recipe) -> list[str] | None:
    """The options of ``train`` that begin or resume a run; None for a run that is done.

    Raises:
        ConfigError: the folder has a run of other settings, or cannot be read.
    """
    if (folder / "recipe.json").is_file():
        run = read_run(folder)
        old, new = dict(run.recipe.settings()), dict(recipe.settings())
        differ = [f"{name} is {old.get(name)} there and {new.get(name)} here" for name in {**old, **new}
                  if old.get(name) != new.get(name)]  # fmt: skip
        if differ:
            raise ConfigError(f"{folder} has other settings ({', '.join(differ)}): choose another --out.")
        if run.result is not None:
            return None
        if any((folder / "checkpoints").glob("*.ckpt")):
            return ["--resume", str(folder)]
    if folder.exists():  # a run that ended before its first checkpoint
        with training_lock(folder):
            shutil.rmtree(folder)
    return ["--run-folder", str(folder)]


def places_of(accelerator: str, devices: str, runs: int) -> list[str]:
    """The places for runs that are trained at the same time, each as Lightning's Trainer takes its ``devices``.

    Args:
        accelerator: as Lightning's Trainer takes it.
        devices: ``auto``: all GPUs, or on a CPU as many processes as it has cores; a number of them; or a list of
            GPUs such as ``0,2``. There are at most as many places as runs.
        runs: number of runs.

    Raises:
        ConfigError: another text, or GPUs that this machine does not have.
    """
    gpus = torch.cuda.device_count() if accelerator in ("auto", "gpu", "cuda") else 0
    if devices == "auto":
        on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.backends.mps.is_available())
        places = [f"{gpu}," for gpu in range(gpus)] or ["1"] * (torch.get_num_threads() if on_cpu else 1)
    elif re.fullmatch(r"[1-9]\d*", devices):
        places = [f"{gpu}," for gpu in range(int(devices))] if gpus else ["1"] * int(devices)
    elif re.fullmatch(r"\d+(,\d+)*,?", devices) and "," in devices:
        places = [f"{gpu}," for gpu in devices.strip(",").split(",")]
    else:
        raise ConfigError(
            f"devices: expected auto, a number of runs at a time or GPUs such as 0,2; got {devices!r}."
        )
    if (len(set(places)) < len(places) and gpus) or any(p != "1" and int(p[:-1]) >= gpus for p in places):
        raise ConfigError(f"the devices {devices} are not different ones of the {gpus} GPUs of this machine.")
    return places[:runs]


def _reason(code: int, log: Path) -> str:
    """Why a process ended: the message of the command line, or its exit code."""
    if message := re.search(r"^Error: (.*)", log.read_text(errors="replace"), re.MULTILINE | re.DOTALL):
        return " ".join(message[1].split())
    hint = " The memory may not have sufficed. --devices 1 trains one run at a time." if code == -9 else ""
    return f"its process ended with exit code {code}, see {log}.{hint}"
