"""Which arms of a comparison train where and when: one after another, or one at each of several places."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from ..errors import ConfigError, SolverError, TrainingError
from ..recipes.schema import Recipe
from .worker import ArmProcess, Ended, train_arm

__all__ = ["Job", "places_of", "train_arms"]


class Job(NamedTuple):
    """An arm to train: its recipe, the options of ``fit``, and a line that announces it."""

    recipe: Recipe
    options: dict[str, Any]
    head: str


def places_of(accelerator: str, devices: str, arms: int) -> list[str]:
    """Where arms train at the same time, each place as Lightning's Trainer takes its ``devices``.

    Args:
        accelerator: as Lightning's Trainer takes it.
        devices: ``auto``: all GPUs, or on a CPU as many processes as it has cores; a number of them; or a list of
            GPUs such as ``0,2``. No more places than arms are used.
        arms: how many there are.

    Raises:
        ConfigError: another text, or more GPUs than there are.
    """
    gpus = torch.cuda.device_count() if accelerator in ("auto", "gpu", "cuda") else 0
    if devices == "auto":
        cores = torch.get_num_threads() if _on_cpu(accelerator) else 1
        return ([f"{gpu}," for gpu in range(gpus)] or ["1"] * cores)[:arms]
    listed = "," in devices
    parts = [part.strip() for part in devices.strip(", ").split(",")]
    if not all(part.isdigit() for part in parts) or (not listed and int(parts[0]) < 1):
        raise ConfigError(
            f"devices: expected auto, a number of arms at a time or GPUs such as 0,2; got {devices!r}"
        )
    numbers = [int(part) for part in parts] if listed else list(range(int(parts[0])))
    if gpus == 0:
        if listed:
            raise ConfigError(f"there are no GPUs to choose {devices} from; give a number of arms at a time.")
        return ["1"] * min(len(numbers), arms)
    if max(numbers) >= gpus or len(set(numbers)) < len(numbers):
        raise ConfigError(f"the devices {devices} are not different ones of the {gpus} GPUs of this machine.")
    return [f"{number}," for number in numbers][:arms]


def _on_cpu(accelerator: str) -> bool:
    return accelerator == "cpu" or (accelerator == "auto" and not torch.backends.mps.is_available())


def train_arms(
    jobs: Sequence[Job], places: Sequence[str], announce: Callable[[str], object]
) -> tuple[list[str], str | None]:
    """Train arms, at each place one at a time.

    Args:
        jobs: in the order in which they begin.
        places: see :func:`places_of`. At a single one the arms train in this process; for several each arm has a
            process of its own, and an equal share of the threads of this one.
        announce: called with the head of each job and, from several places, with each line that an arm prints.

    Returns:
        A message for each arm that failed, and the name of the signal that ended the call early.

    Raises:
        RnodeError: an error that concerns all arms, such as missing data or a full disk.
    """
    return _in_turn(jobs, places[0], announce) if len(places) == 1 else _at_once(jobs, places, announce)


def _in_turn(jobs: Sequence[Job], place: str, announce: Callable[[str], object]) -> tuple[list[str], str | None]:
    failed: list[str] = []
    for job in jobs:
        announce(job.head)
        ended = train_arm(job.recipe, {**job.options, "devices": place})
        _note_failure(ended, job.recipe, failed)
        if ended.stopped in signal.Signals.__members__:
            return failed, ended.stopped
    return failed, None


def _at_once(
    jobs: Sequence[Job], places: Sequence[str], announce: Callable[[str], object]
) -> tuple[list[str], str | None]:
    failed: list[str] = []
    waiting, free = list(jobs), list(places)
    threads = max(1, torch.get_num_threads() // len(places))
    lines: queue.SimpleQueue[tuple[ArmProcess, str | None]] = queue.SimpleQueue()
    running: dict[ArmProcess, str] = {}
    try:
        with _signals(lambda: [arm.stop() for arm in running]) as received:
            while running or (waiting and not received):
                while waiting and free and not received:
                    job, place = waiting.pop(0), free.pop(0)
                    announce(job.head)
                    options = {**job.options, "devices": place}
                    arm = ArmProcess(job.recipe, options, threads=threads, lines=lines)
                    running[arm] = place
                    if received:  # while it started
                        arm.stop()
                arm, line = lines.get()
                if line is not None:
                    announce(f"{arm.recipe.name}, seed {arm.recipe.training.seed}: {line}")
                    continue
                ended = arm.ended()
                free.append(running.pop(arm))
                _note_failure(ended, arm.recipe, failed)
    finally:
        for arm in running:  # an error that concerns all arms
            arm.stop()
        for arm in running:
            arm.ended()
    return failed, received[0] if received else None


def _note_failure(ended: Ended, recipe: Recipe, failed: list[str]) -> None:
    """An arm whose training fails does not keep the others from theirs; other errors concern them too."""
    if ended.error is None:
        return
    if not isinstance(ended.error, (TrainingError, SolverError)):
        raise ended.error
    failed.append(f"{recipe.name}, seed {recipe.training.seed}: {ended.error}")


@contextmanager
def _signals(stop: Callable[[], object]) -> Iterator[list[str]]:
    """Call ``stop`` at each signal that asks this process to end; the names of those that came."""
    received: list[str] = []

    def note(signum: int, frame: object) -> None:
        received.append(signal.Signals(signum).name)
        stop()

    if threading.current_thread() is not threading.main_thread():  # the program that owns it decides about signals
        yield received
        return
    former = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)
