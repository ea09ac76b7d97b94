"""places_of and train_arms: the arms of a comparison, one at a time on each of several devices."""

from __future__ import annotations

import queue
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from ..errors import ConfigError
from .worker import ArmProcess, Job

__all__ = ["places_of", "threads_of", "train_arms"]

_LONGEST_WAIT = 0.5  # seconds


def places_of(accelerator: str, devices: str, arms: int) -> list[str]:
    """The places for arms that train at the same time, each as Lightning's Trainer takes its ``devices``.

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


def threads_of(places: Sequence[str]) -> int:
    """The threads of each process if one trains at each place: an equal share of this one's."""
    return max(1, torch.get_num_threads() // len(places))


def _on_cpu(accelerator: str) -> bool:
    return accelerator == "cpu" or (accelerator == "auto" and not torch.backends.mps.is_available())


def train_arms(
    jobs: Sequence[Job], places: Sequence[str], announce: Callable[[str], object], *, progress: bool = True
) -> tuple[list[str], str | None]:
    """Train arms, one at a time at each place, each in a process with an equal share of this one's threads.

    Args:
        jobs: in the order in which they begin.
        places: see :func:`places_of`.
        announce: called with the head of each job and with each line that an arm prints. A single place leaves the
            terminal to its arm, progress bar included, and only errors and warnings are announced.
        progress: whether the arms show their progress.

    Returns:
        A message for each arm that failed, and the name of the signal that ended the call early.

    Raises:
        ConfigError: an arm found that what was asked for cannot work. The others were stopped.
    """
    failed: list[str] = []
    waiting, free = list(jobs), list(places)
    output = "nowhere" if not progress else "terminal" if len(places) == 1 else "lines"
    threads = threads_of(places)
    lines: queue.SimpleQueue[tuple[ArmProcess, str | None]] = queue.SimpleQueue()
    running: dict[ArmProcess, str] = {}
    with tempfile.TemporaryDirectory() as recipes, _stopped_with(running) as received:
        while running or (waiting and not received):
            while waiting and free and not received:
                job, place = waiting.pop(0), free.pop(0)
                announce(job.head)
                arm = ArmProcess(
                    job, device=place, threads=threads, recipes=Path(recipes), lines=lines, output=output
                )
                running[arm] = place
                if received:  # while it started
                    arm.stop()
            try:
                # a signal's handler runs between two waits: one that comes just before a wait must not be lost
                arm, line = lines.get(timeout=_LONGEST_WAIT)
            except queue.Empty:
                continue
            if line is not None:
                announce(f"{arm.job.name}: {line}")
                continue
            free.append(running.pop(arm))
            ended = arm.ended()
            if ended.failure is not None:
                failed.append(ended.failure)
    return failed, received[0] if received else None


@contextmanager
def _stopped_with(running: Mapping[ArmProcess, str]) -> Iterator[list[str]]:
    """Stop the running arms at each signal that asks this process to end, and at an error.

    Yields:
        The names of the signals that came.
    """
    received: list[str] = []

    def stop_all(signum: int, frame: object) -> None:
        received.append(signal.Signals(signum).name)
        for arm in tuple(running):
            arm.stop()

    # in another thread, the program that owns the main one decides about signals
    handles = threading.current_thread() is threading.main_thread()
    former = {each: signal.signal(each, stop_all) for each in (signal.SIGINT, signal.SIGTERM)} if handles else {}
    try:
        yield received
    finally:
        for arm in running:  # after an error
            arm.stop()
        for arm in running:
            with suppress(ConfigError):
                arm.ended()
        for signum, handler in former.items():
            signal.signal(signum, handler)
