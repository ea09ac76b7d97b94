"""``compare``: a recipe with different penalties, from the same weights, data order and noise, and one report."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import queue
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter

from ..core.schedules import strength_text
from ..errors import ConfigError, TrainingError, suggest
from ..evaluation.loading import check_device, load_for_training
from ..plugins import registry
from ..recipes.fields import refused
from ..recipes.recipe import Recipe
from ..reports import Report, write_report
from ..reports.runs import own_data, read_run
from ..training.runs import training_lock

_TRAIN = (sys.executable, "-m", "rnode_plugin", "train")
_VALIDATIONS = 20  # of a run whose recipe has a number of steps and no interval of validations
_EXAMPLE = '{"weak": {"kinetic": 0.001}, "sweep": {"kinetic": [0.01, 0.1]}}'


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
    recipe, _ = load_for_training(recipe, download=download)
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
        runs = [folder for folder in folders if (folder / "recipe.json").is_file()]
        if not any(read_run(folder).has_begun for folder in runs):
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
            seconds = [0.0, *run.steps.get("seconds", ()), *run.checks.get("seconds", ())]
            return ["--resume", str(folder), *_limit(max_time, spent=np.nanmax(seconds))]
    elif any((folder / "checkpoints").glob("*.ckpt")):
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


def configured_recipes(recipe: Recipe, configurations: Sequence[str] = (), *, seeds: int = 1) -> list[Recipe]:
    """The recipe of each run: for each seed, all configurations.

    Args:
        recipe: the settings that the configurations share. Weights, data order and noise are functions of its seed.
        configurations: each is ``none`` (no penalty, the recipe's solver, as in the paper's ablation), ``ffjord``
            (no penalty, Dormand-Prince at 1e-5, as in the paper's comparison of times), ``rnode`` (all penalties
            of the recipe), a penalty such as ``kinetic`` or ``taylor:3`` with the recipe's lambda or its default,
            or a JSON file. The file maps names to penalties with their lambdas,
            ``{"weak": {"kinetic": 0.001, "jacfrob": 0.001}}``. A list of lambdas is a sweep,
            ``{"sweep": {"kinetic": [0.001, 0.01, 0.1]}}``, and several lists form a grid. Without configurations:
            ``none``, each penalty of the recipe alone and ``rnode``.
        seeds: runs of each configuration; the first has the recipe's seed, the others the next ones.

    Raises:
        ConfigError: an unknown penalty, a bad lambda, a file that cannot be read, or two configurations that train
            the same.
    """
    alone = list(recipe.regularizers)  # the paper's ablation, figure 5
    chosen: dict[str, Recipe] = {}
    for text in configurations or ["none", *alone, *(["rnode"] if len(alone) > 1 else [])]:
        for name, one in _read(recipe, text):
            with refused():  # the colon of an option cannot be in the name of a file
                one = dataclasses.replace(one, name=f"{recipe.name}-{name}".replace(":", "-"))
            for other, its in chosen.items():
                if its.name == one.name or dataclasses.replace(its, name=one.name) == one:
                    same = "name" if its.name == one.name else "settings"
                    raise ConfigError(f"{other} and {name} have the same {same}: give each configuration once.")
            chosen[name] = one
    first = recipe.training.seed
    return [
        dataclasses.replace(one, training=dataclasses.replace(one.training, seed=seed))
        for seed in range(first, first + seeds)
        for one in chosen.values()
    ]


def _read(recipe: Recipe, text: str) -> Iterator[tuple[str, Recipe]]:
    """Name and recipe of a configuration, or of each one in a file."""
    named = {
        "none": lambda: dataclasses.replace(recipe, regularizers={}),
        "ffjord": recipe.ffjord,
        "rnode": lambda: recipe,
    }
    known = [*named, *registry.names("regularizers")]
    if text.endswith(".json"):
        yield from _read_file(recipe, Path(text))
    elif text in named:
        yield text, named[text]()
    elif text.partition(":")[0] in known:
        (found,) = registry.resolve_regularizers([text]).values()
        strengths: Any = {text: recipe.regularizers.get(text, found.strength)}
        yield text, dataclasses.replace(recipe, regularizers=strengths)
    else:
        raise ConfigError(suggest(text, known, "configuration"))


def _read_file(recipe: Recipe, file: Path) -> Iterator[tuple[str, Recipe]]:
    def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for name, _ in pairs:
            if [key for key, _ in pairs].count(name) > 1:
                raise ConfigError(f"{file} has the name {name!r} twice: give each name once.")
        return dict(pairs)

    try:
        plain = json.loads(file.read_bytes(), object_pairs_hook=each_once)
        entries = TypeAdapter(dict[str, dict[str, Any]]).validate_python(plain)
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{file} must be JSON that maps names to penalties, such as {_EXAMPLE}.") from None
    if not entries or [] in itertools.chain.from_iterable(each.values() for each in entries.values()):
        raise ConfigError(f"{file} has no configuration, or a sweep without a lambda: write it as {_EXAMPLE}.")
    for entry, penalties in entries.items():
        lists = [value if isinstance(value, list) else [value] for value in penalties.values()]
        for values in itertools.product(*lists):
            try:
                with refused():
                    one = dataclasses.replace(recipe, regularizers=dict(zip(penalties, values, strict=True)))
                registry.resolve_regularizers(one.regularizers)
            except ConfigError as error:
                raise ConfigError(f"{file}, {entry}: {error}") from None
            swept = [name for name, value in penalties.items() if isinstance(value, list)]
            terms = [f"{name}={strength_text(one.regularizers[name])}" for name in swept]
            yield "-".join([entry, *terms]), one
