"""What the benchmarks share: alternated timings, peak memory, the environment, tables."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from rnode_plugin.experiments.runs.environment import Environment

__all__ = [
    "Memory",
    "Timing",
    "alternate",
    "device_option",
    "environment_line",
    "peak_memory",
    "print_environment",
    "repeats_option",
    "set_up",
    "table",
    "threads_option",
]


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs of one case.

    Attributes:
        median: the figure to compare.
        low, high: fastest and slowest run.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        unit, factor = ("s", 1.0) if self.median >= 0.1 else ("ms", 1e3)
        low, median, high = (f"{x * factor:.3g}" for x in (self.low, self.median, self.high))
        return f"{median} {unit} ({low} to {high})"


@dataclass(frozen=True)
class Memory:
    """Peak memory of one run in bytes.

    Attributes:
        total: on a CPU the process's resident memory with interpreter and libraries; on CUDA the memory of tensors.
        above: how much of it the run itself added.
    """

    total: int
    above: int


device_option = click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
threads_option = click.option("--threads", default=2, show_default=True, help="Threads of torch on a CPU.")
repeats_option = click.option(
    "--repeats", default=5, show_default=True, help="Timed runs of each case, alternated."
)


def set_up(device: str, threads: int) -> torch.device:
    """The device, after setting the number of threads."""
    torch.set_num_threads(threads)
    return torch.device(device)


def alternate(
    cases: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    device: torch.device,
    calls: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time each case in turn, ``repeats`` times, after one untimed run of each.

    Alternating gives every case the same share of a machine's slow and fast moments.

    Args:
        cases: what to run, by name.
        repeats: timed runs of each.
        device: synchronized before the clock is read.
        calls: calls in one timed run, for cases of microseconds; times are of one call.
        clock: ``time.process_time`` counts what this process computes, whatever else the machine does.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        case()
    for _ in range(repeats):
        for name, case in cases.items():
            _synchronize(device)
            start = clock()
            for _ in range(calls):
                case()
            _synchronize(device)
            seconds[name].append((clock() - start) / calls)
    return {name: Timing(statistics.median(s), min(s), max(s)) for name, s in seconds.items()}


def peak_memory(build: Callable[..., Callable[[], object]], *args: Any, device: torch.device) -> Memory:
    """Peak memory of ``build(*args)()``, run twice: the second run meets what the first one left behind.

    On a CPU this runs in a separate process, so ``build`` and ``args`` must be picklable. There glibc gives freed
    tensors back to the system at once. By default, the holes in its heap would count as memory in use.
    """
    if device.type == "cuda":
        run = build(*args)
        run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        return Memory(peak, peak - before)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 17)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_of_process, torch.get_num_threads(), build, args).result()


def _peak_of_process(threads: int, build: Callable[..., Callable[[], object]], args: Sequence[Any]) -> Memory:
    torch.set_num_threads(threads)
    run = build(*args)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    run()
    run()
    peak = _status("VmHWM")
    return Memory(peak, peak - before)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def environment_line(device: torch.device) -> str:
    """Device, versions and threads."""
    found = Environment.of(device)
    name = found.device if device.type == "cuda" else _cpu_model()
    packages = (f"{key} {found.packages[key]}" for key in ("torch", "torchdiffeq", "torchdyn", "rnode-plugin"))
    versions = ", ".join([f"python {found.python}", *packages])
    return f"{name}, {found.cpus} CPUs, {found.threads} threads, {versions}, {found.platform}"


def print_environment(device: torch.device) -> None:
    """Print :func:`environment_line`."""
    click.echo(f"{environment_line(device)}\n")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if not found:
        return "CPU"
    return f"{found.get('model name', 'CPU')} (family {found.get('cpu family')}, model {found.get('model')})"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
