"""One arm of a comparison in a process of its own, so that several can train at the same time."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import errors
from ..errors import RnodeError, TrainingError
from ..recipes.schema import Recipe

__all__ = ["ArmProcess", "Ended", "train_arm"]


@dataclass(frozen=True)
class Ended:
    """How the training of an arm ended.

    Attributes:
        folder: of the run; None where it has none to show.
        stopped: as :class:`~rnode_plugin.training.fit.FitResult` says it; None after an error.
        error: what ended it.
    """

    folder: Path | None = None
    stopped: str | None = None
    error: RnodeError | None = None


def train_arm(recipe: Recipe, options: dict[str, Any]) -> Ended:
    """Train an arm in this process; ``options`` are those of :func:`~rnode_plugin.training.fit.fit`."""
    from ..training.fit import fit

    try:
        result = fit(recipe, **options)
    except RnodeError as error:
        return Ended(error=error)
    return Ended(folder=result.folder.path, stopped=result.stopped)


class ArmProcess:
    """A Python process that trains one arm and ends with this one.

    Args:
        recipe, options: as :func:`train_arm` takes them.
        threads: of the process.
        lines: gets ``(self, line)`` for each line that it prints, and ``(self, None)`` at its end.
    """

    def __init__(
        self,
        recipe: Recipe,
        options: dict[str, Any],
        *,
        threads: int,
        lines: queue.SimpleQueue[tuple[ArmProcess, str | None]],
    ) -> None:
        self.recipe = recipe
        self._stopping = False
        # a session of its own: Ctrl-C comes to the first process alone, which then ends the others
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"import {__name__} as arm; arm._main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
        )
        threading.Thread(target=self._forward, args=(lines,), daemon=True).start()
        job = json.dumps({"recipe": recipe.to_plain(), "options": options, "threads": threads})
        assert self._process.stdin is not None
        self._process.stdin.write(job + "\n")
        self._process.stdin.flush()  # and it stays open: the process ends itself when this one is gone

    def _forward(self, lines: queue.SimpleQueue[tuple[ArmProcess, str | None]]) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if line.strip():
                lines.put((self, line.rstrip()))
        lines.put((self, None))

    def stop(self) -> None:
        """Ask the process to end after this step, with a checkpoint; asked again it ends at once."""
        self._stopping = True
        if self._process.poll() is None:
            self._process.terminate()

    def ended(self) -> Ended:
        """Wait for the end."""
        assert self._process.stdout is not None
        answer = self._process.stdout.read()
        code = self._process.wait()
        if answer:
            found = json.loads(answer)
            if "error" in found:
                return Ended(error=getattr(errors, found["kind"])(found["error"]))
            return Ended(folder=Path(found["folder"]), stopped=found["stopped"])
        if self._stopping:  # before its first step or while its best weights were evaluated
            return Ended(stopped=signal.SIGTERM.name)
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        why = " Maybe the memory did not suffice for all arms: --devices 1 trains them one after another."
        hint = why if code == -signal.SIGKILL else ""
        return Ended(error=TrainingError(f"the process that trained {self.recipe.name} {how}.{hint}"))


def _main() -> None:
    """Read a job from standard input and answer on standard output; what is printed goes to standard error."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(job["threads"])
    ended = train_arm(Recipe.from_plain(job["recipe"]), job["options"])
    if ended.error is not None:
        kind = type(ended.error).__name__
        found = {"error": str(ended.error), "kind": kind if kind != "SolverError" else TrainingError.__name__}
    else:
        found = {"folder": str(ended.folder), "stopped": ended.stopped}
    with answer:
        json.dump(found, answer)


def _end_with_parent() -> None:
    while os.read(0, 1):  # ends when the process that started this one has gone, however it ended
        pass
    os.kill(os.getpid(), signal.SIGTERM)
