"""One arm of a comparison: ``rnode-cli train RECIPE.json`` in a process of its own."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..errors import ConfigError
from ..recipes.recipe import Recipe
from ..training.fastest import Choice, write_choice
from ..training.runs import CHOSEN, RunFolder

__all__ = ["ArmProcess", "Ended", "Job"]

_COMMAND = ("-m", "rnode_plugin.comparison.child", "train")
_ERROR = "Error: "  # begins the message with which the command line ends
_CANNOT_WORK = 2  # the exit code of the command line for what cannot work


@dataclass(frozen=True)
class Job:
    """An arm to train.

    Attributes:
        recipe: of the arm.
        head: a line that announces it.
        runs: folder for the run of an arm that has none.
        resume: the run to go on with; None to begin one.
        max_time: seconds for this call; None for no limit.
        accelerator: as Lightning's Trainer takes it.
        chosen: how all arms compute their steps, if their recipes leave that open.
    """

    recipe: Recipe
    head: str
    runs: Path
    resume: Path | None
    max_time: float | None
    accelerator: str
    chosen: Choice | None = None

    @property
    def name(self) -> str:
        """The arm and its seed, for messages."""
        return f"{self.recipe.name}, seed {self.recipe.training.seed}"


@dataclass(frozen=True)
class Ended:
    """How the training of an arm ended.

    Attributes:
        failure: what ended this arm, which the others need not share; None without one.
        stopped: whether it was asked to stop.
    """

    failure: str | None = None
    stopped: bool = False


class ArmProcess:
    """A process that trains one arm and ends with this one.

    Args:
        job: what it does.
        device: as Lightning's Trainer takes its ``devices``.
        threads: of the process.
        recipes: folder for the recipe as JSON; it must outlast the start of the process.
        lines: gets ``(self, line)`` for each line that it prints, and ``(self, None)`` at its end.
        output: what becomes of its standard output: the terminal's, with progress bars (``"terminal"``), among the
            lines (``"lines"``), or nothing (``"nowhere"``). The standard error is always among the lines.

    Raises:
        ConfigError: there can be no run folder.
    """

    def __init__(
        self,
        job: Job,
        *,
        device: str,
        threads: int,
        recipes: Path,
        lines: queue.SimpleQueue[tuple[ArmProcess, str | None]],
        output: str,
    ) -> None:
        self.job = job
        self._stopping = False
        self._message: list[str] = []
        self._folder = job.resume or RunFolder.create(job.runs, job.recipe).path
        if job.chosen is not None and not (self._folder / CHOSEN).exists():
            write_choice(job.chosen, self._folder)
        file = recipes / f"{job.recipe.name}-{job.recipe.training.seed}.json"
        file.write_text(json.dumps(job.recipe.to_plain()), encoding="utf-8")
        arguments = [str(file), "--accelerator", job.accelerator, "--devices", device]
        arguments += ["--run-folder" if job.resume is None else "--resume", str(self._folder)]
        arguments += [] if job.max_time is None else ["--max-time", f"{job.max_time:.3f}"]
        # a session of its own: Ctrl-C comes to the first process alone, which then stops the others
        self._process = subprocess.Popen(
            [sys.executable, *_COMMAND, *arguments],
            stdin=subprocess.PIPE,  # stays open: the process stops when this one is gone
            stdout={"terminal": None, "lines": subprocess.PIPE, "nowhere": subprocess.DEVNULL}[output],
            stderr=subprocess.STDOUT if output == "lines" else subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(threads),
                "MKL_NUM_THREADS": str(threads),
                "PYTHONIOENCODING": "utf-8",
            },
        )
        pipe = self._process.stdout if output == "lines" else self._process.stderr
        self._reader = threading.Thread(target=self._forward, args=(pipe, lines), daemon=True)
        self._reader.start()

    def _forward(self, pipe: IO[str], lines: queue.SimpleQueue[tuple[ArmProcess, str | None]]) -> None:
        """Pass lines on; those of the error with which it ends are kept."""
        for line in pipe:
            text = line.strip()
            if text.startswith(_ERROR):
                self._message = [text.removeprefix(_ERROR)]
            elif self._message:
                self._message.append(text)
            elif text:
                lines.put((self, line.rstrip()))
        lines.put((self, None))

    def stop(self) -> None:
        """Ask the process to end after this step, with a checkpoint; asked again it ends at once."""
        self._stopping = True
        if self._process.poll() is None:
            self._process.terminate()

    def ended(self) -> Ended:
        """Wait for the end.

        Raises:
            ConfigError: what was asked for cannot work, for other arms neither.
        """
        code = self._process.wait()
        self._reader.join()
        assert self._process.stdin is not None
        self._process.stdin.close()
        with suppress(OSError):
            if [each.name for each in self._folder.iterdir()] == [CHOSEN]:
                (self._folder / CHOSEN).unlink()
            self._folder.rmdir()  # only if it is empty: the process had not begun
        if code == 0:
            return Ended()
        if self._stopping and code in (-signal.SIGTERM, 128 + signal.SIGTERM):
            return Ended(stopped=True)
        message = " ".join(part for part in self._message if part)
        if code == _CANNOT_WORK and message:
            raise ConfigError(f"{self.job.name}: {message}")
        return Ended(failure=f"{self.job.name}: {message or _how(code)}")


def _how(code: int) -> str:
    """How a process ended that left no message."""
    number = -code if code < 0 else code - 128
    name = signal.Signals(number).name if number in set(signal.Signals) else None
    if name is None:
        return f"its process ended with exit code {code}; the lines above may say why."
    hint = " Perhaps the memory did not suffice: --devices 1 trains one arm at a time." if name == "SIGKILL" else ""
    return f"its process was ended by {name}.{hint}"
