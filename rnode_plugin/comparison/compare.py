"""``compare``: a recipe with different penalties, from the same weights, data order and noise, and one report."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..errors import ConfigError, RnodeError, TrainingError
from ..evaluation.loading import load_for_training, pick_device
from ..recipes.recipe import Recipe
from ..reports import Report, write_report
from ..reports.runs import Run, read_run
from ..training.checkpoints import newest_intact
from ..training.fastest import Choice, choose, is_open, read_choice, write_choice
from ..training.runs import CHOSEN, RunFolder, RunPlan, training_lock
from .arms import arm_recipes, check_arm

_TRAIN = ("-m", "rnode_plugin", "train")


@dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare`.

    Attributes:
        runs: the folder of each arm and seed that was trained, in the order of the arms.
        report: of all of them.
        failed: one message for each arm whose training failed; the report has it as far as it came.
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

    Each arm is ``rnode-cli train`` in a process of its own, so a penalty, a model or a data set of a plugin must be
    installed. A call with the same settings in the same folder continues the last one: a finished arm is not
    trained again, an interrupted one is resumed. Settings that ``training.precision=auto`` and
    ``training.compile=auto`` leave open are measured once for all arms (``chosen.json``). An arm does not depend on
    the arms that train beside it, and an arm that fails does not end the others.

    Args:
        recipe: the settings that the arms share.
        arms, sweeps, seeds: see :func:`~rnode_plugin.comparison.arms.arm_recipes`.
        validations: of each arm, evenly spread over its steps; they are the marks of the figures. Used if
            the recipe has ``max_steps`` and no ``val_every_steps`` of its own.
        max_time: seconds for each arm, validations included, those of earlier calls included.
        out: folder for ``runs/``, ``logs/`` and the report; one call at a time trains in it.
        accelerator: as Lightning's Trainer takes it.
        devices: see :func:`places_of`; each arm has one. Processes on a CPU share out its threads.
        download: fetch the data set if it is missing.
        progress: show the progress of arms that train one after another on the terminal. Other output of an arm is
            in its log.
        announce: called with a line at the beginning and at the end of each arm.

    Raises:
        ConfigError: settings that cannot work, or another call trains in the folder.
        DataError: the data set is missing or does not fit the recipe.
        CheckpointError: the choice of an earlier call cannot be read.
        TrainingError: no arm has a run to report.
    """
    recipe, data = load_for_training(recipe, download=download)
    planned = arm_recipes(_with_validations(recipe, validations), arms, sweeps=sweeps, seeds=seeds)
    for arm in planned[: len(planned) // seeds]:
        check_arm(arm)
    places = places_of(accelerator, devices, len(planned))
    threads = max(1, torch.get_num_threads() // len(places))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with training_lock(out):
        jobs = _unfinished(planned, out / "runs", max_time, announce)
        choice = None
        if jobs:
            steps = RunPlan.of(planned[0], len(data.train)).total
            gpu = places[0].endswith(",")  # "1,"
            device = pick_device(f"cuda:{places[0][:-1]}" if gpu else {"gpu": "cuda"}.get(accelerator, accelerator))
            choice = _shared_choice(planned, out, steps=steps, device=device, threads=threads, announce=announce)
        shown = progress and len(places) == 1
        pool = _Pool(places, out, accelerator, threads, choice, shown, announce)
        failures, stopped = pool.train(jobs)
        runs = [run for arm in planned if (run := _earlier_run(out / "runs", arm)) is not None]
        if not any(run.has_begun for run in runs):
            hopeless = failures and all(isinstance(failure, ConfigError) for failure in failures)
            raise (ConfigError if hopeless else TrainingError)(
                " ".join(map(str, failures)) or f"{stopped or 'The call ended'} before an arm had a logged step."
            )
        report = write_report([run.path for run in runs], out, title=f"{recipe.name}: what the penalties change")
    return Comparison(tuple(run.path for run in runs), report, tuple(map(str, failures)), stopped)


def _with_validations(recipe: Recipe, validations: int) -> Recipe:
    """The recipe with so many validations, if it has a number of steps and no interval of its own."""
    training = recipe.training
    if training.max_steps is None or training.val_every_steps is not None:
        return recipe
    every = max(1, training.max_steps // validations)
    return dataclasses.replace(recipe, training=dataclasses.replace(training, val_every_steps=every))


def places_of(accelerator: str, devices: str, arms: int) -> list[str]:
    """The places for arms that train at the same time, each as Lightning's Trainer takes its ``devices``.

    Args:
        accelerator: as Lightning's Trainer takes it.
        devices: ``auto``: all GPUs, or on a CPU as many processes as it has cores; a number of them; or a list of
            GPUs such as ``0,2``. There are at most as many places as arms.
        arms: number of arms.

    Raises:
        ConfigError: another text, or GPUs that this machine does not have.
    """
    gpus = torch.cuda.device_count() if accelerator in ("auto", "gpu", "cuda") else 0
    if devices == "auto":
        on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.backends.mps.is_available())
        cores = torch.get_num_threads() if on_cpu else 1
        return ([f"{gpu}," for gpu in range(gpus)] or ["1"] * cores)[:arms]
    listed = "," in devices
    parts = [part.strip() for part in devices.strip(", ").split(",")]
    if not all(part.isdigit() for part in parts) or (not listed and int(parts[0]) < 1):
        raise ConfigError(
            f"devices: expected auto, a number of arms at a time or GPUs such as 0,2; got {devices!r}"
        )
    numbers = [int(part) for part in parts] if listed else list(range(int(parts[0])))
    if gpus == 0 and not listed:
        return ["1"] * min(len(numbers), arms)
    if max(numbers) >= gpus or len(set(numbers)) < len(numbers):
        raise ConfigError(f"the devices {devices} are not different ones of the {gpus} GPUs of this machine.")
    return [f"{number}," for number in numbers][:arms]


# ---- the arms that are left ----


@dataclass(frozen=True)
class _Job:
    """An arm to train: its line on the terminal, the run to resume, and the seconds that are left."""

    recipe: Recipe
    head: str
    resume: Path | None
    max_time: float | None


def _unfinished(
    planned: Sequence[Recipe], runs: Path, max_time: float | None, announce: Callable[[str], object]
) -> list[_Job]:
    """The arms that are not done; those that are done are announced."""
    jobs: list[_Job] = []
    for number, arm in enumerate(planned, 1):
        head = f"arm {number} of {len(planned)}: {arm.name}, seed {arm.training.seed}, {arm.solver.method}"
        run = _earlier_run(runs, arm)
        begun = run is not None and any((run.path / "checkpoints").glob("*.ckpt"))
        left = max_time
        if max_time is not None and run is not None and begun:
            left = max_time - float(newest_intact(run.path)[1]["progress"]["seconds"])
        if run is not None and run.result is not None:
            out_of_time = left is not None and left <= 0  # stopped by a time limit, and again
            if run.result["stopped"] == "finished" or out_of_time:
                announce(f"{head}: done, in {run.path}")
                continue
        limit = None if left is None else max(left, 1e-3)  # at least one step, and the evaluation
        jobs.append(_Job(arm, head, run.path if run is not None and begun else None, limit))
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


def _shared_choice(
    arms: Sequence[Recipe],
    out: Path,
    *,
    steps: float,
    device: torch.device,
    threads: int,
    announce: Callable[[str], object],
) -> Choice | None:
    """The choice in ``chosen.json`` of a comparison; it is measured and written if it is not there.

    The arm with the most penalties is timed, or one with an adaptive solver if there is one, because then all train
    in 32-true. None if the recipes leave nothing open.

    Raises:
        ConfigError: earlier arms train in a precision in which one of these cannot.
        CheckpointError: the file cannot be read or written.
    """
    if not is_open(arms[0]):
        return None
    choice = read_choice(out)
    if choice is None:
        timed = max(arms, key=lambda arm: (arm.solver.adaptive, len(arm.regularizers)))
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            choice = choose(timed, device=device, steps=steps)
        finally:
            torch.set_num_threads(before)
            if device.type == "cuda":  # the arms need the memory
                torch.cuda.empty_cache()
        write_choice(choice, out)
        announce(f"all arms: {choice.line()}")
    for arm in arms:
        if not choice.fits(arm):
            raise ConfigError(
                f"the arm {arm.name} cannot train in {choice.way}, as {out / CHOSEN} says for all arms: choose "
                "another --out."
            )
    return choice


# ---- the processes ----


@dataclass
class _Pool:
    """Trains arms, one at a time at each place, each as ``rnode-cli train`` in a process of its own."""

    places: Sequence[str]
    out: Path
    accelerator: str
    threads: int  # of each process
    choice: Choice | None
    shown: bool  # whether an arm shows its progress on the terminal
    announce: Callable[[str], object]
    running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    received: list[str] = field(default_factory=list)  # names of the signals that asked this process to end

    def train(self, jobs: Sequence[_Job]) -> tuple[list[RnodeError], str | None]:
        """Train all; the failures, and the name of the signal that ended the call early."""
        free: queue.SimpleQueue[str] = queue.SimpleQueue()
        for place in self.places:
            free.put(place)

        def train_one(job: _Job) -> RnodeError | None:
            place = free.get()
            try:
                return None if self.received else self._train(job, place, Path(folder))
            finally:
                free.put(place)

        with (
            self._signals(),
            tempfile.TemporaryDirectory() as folder,
            ThreadPoolExecutor(len(self.places)) as threads,
        ):
            failures = [failure for failure in threads.map(train_one, jobs) if failure is not None]
        return failures, self.received[0] if self.received else None

    def _train(self, job: _Job, place: str, recipes: Path) -> RnodeError | None:
        folder = job.resume or RunFolder.create(self.out / "runs", job.recipe).path
        self.announce(job.head)
        if self.choice is not None and not (folder / CHOSEN).exists():
            write_choice(self.choice, folder)
        name, seed = job.recipe.name, job.recipe.training.seed
        file = recipes / f"{name}-{seed}.json"
        file.write_text(json.dumps(job.recipe.to_plain()), encoding="utf-8")
        log = self.out / "logs" / f"{name}-{seed}.log"
        log.parent.mkdir(exist_ok=True)
        arguments = [str(file), "--accelerator", self.accelerator, "--devices", place]
        arguments += ["--run-folder" if job.resume is None else "--resume", str(folder)]
        arguments += [] if job.max_time is None else ["--max-time", f"{job.max_time:.3f}"]
        code = self._run([sys.executable, *_TRAIN, *arguments], log)
        if not (folder / "recipe.json").exists():  # the process had not begun
            shutil.rmtree(folder, ignore_errors=True)
        if code == 0 or self.received:
            return None
        kind = ConfigError if code == 2 else TrainingError  # 2: the command line refused the settings
        failure = kind(f"{name}, seed {seed}: {_reason(code, log)}")
        self.announce(str(failure))
        return failure

    def _run(self, command: Sequence[str], log: Path) -> int:
        """The exit code of a process whose output, but for its progress, is in the log."""
        threads = str(self.threads)
        own = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONIOENCODING": "utf-8"}
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=None if self.shown else file, stderr=file,
                env={**os.environ, **own},
            )  # fmt: skip
            self.running.add(process)
            if self.received:  # while it started
                process.terminate()
            code = process.wait()
        self.running.discard(process)
        return code

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Begin no more arms after a signal; SIGTERM is passed on, and Ctrl-C reaches the processes by itself."""

        def receive(signum: int, frame: object) -> None:
            self.received.append(signal.Signals(signum).name)
            for process in tuple(self.running) if signum == signal.SIGTERM else ():
                process.terminate()

        # Python allows signal handlers in the main thread only
        handles = threading.current_thread() is threading.main_thread()
        former = {each: signal.signal(each, receive) for each in (signal.SIGINT, signal.SIGTERM) if handles}
        try:
            yield
        finally:
            for signum, handler in former.items():
                signal.signal(signum, handler)


def _reason(code: int, log: Path) -> str:
    """Why a process ended: the message of the command line, or its signal or exit code."""
    if message := re.search(r"^Error: (.*)", log.read_text(errors="replace"), re.MULTILINE | re.DOTALL):
        return " ".join(message[1].split())
    if code >= 0:
        return f"its process ended with exit code {code}; {log} may say why."
    name = signal.Signals(-code).name
    hint = " Perhaps the memory did not suffice: --devices 1 trains one arm at a time." if name == "SIGKILL" else ""
    return f"its process was ended by {name}.{hint}"
