"""Runs in processes of their own, that tests kill and starve."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tiny_runs import rows, train

from rnode_plugin.training.checkpoints import newest_intact, read_checkpoint

# children of a server that has imported all: a start costs no seconds, and no thread of this process is copied
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["rnode_plugin.training.fit"])

STEPS = ["training.max_steps=24", "training.val_every_steps=8"]


class Child:
    """A process that trains, and what it printed."""

    def __init__(self, runs: Path, settings: list[str], before: str = "", **options: Any) -> None:
        self._output = runs.parent / "output.txt"
        self._process: BaseProcess = CONTEXT.Process(
            target=train, args=(runs, self._output, settings, options, before)
        )
        self._process.start()
        self.pid = self._process.pid

    def kill_after(self, seconds: float, signum: int) -> None:
        self._process.join(seconds)
        if self._process.is_alive() and self.pid is not None:
            os.kill(self.pid, signum)

    def end(self) -> tuple[int | None, str]:
        self._process.join(120)
        assert not self._process.is_alive(), "it hangs"
        return self._process.exitcode, self._output.read_text()

    def error(self) -> str:
        code, output = self.end()
        assert code == 1, output
        return output.strip().splitlines()[-1]  # of the traceback; the command line prints this line alone


def one_run(runs: Path) -> Path:
    (run,) = (runs / "digits").iterdir()
    return run


def at(step: int, what: str) -> str:
    return f"def at(step):\n    if step == {step}:\n        {what}\n"


def assert_same(one: Path, other: Path) -> None:
    """Weights and their average, optimizer, schedule and metrics, to the bit."""
    a, b = (read_checkpoint(run / "checkpoints" / "last.ckpt") for run in (one, other))
    keys = {"state_dict", "optimizer_states", "lr_schedulers", "callbacks", "global_step"}
    for key in keys | a.keys() & {"current_model_state", "averaging_state"}:
        assert repr_exact(a[key]) == repr_exact(b[key]), key
    assert rows(one) == rows(other)


def repr_exact(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: repr_exact(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [repr_exact(each) for each in value]
    return value.numpy().tobytes() if hasattr(value, "numpy") else value


def assert_intact(runs: Path, steps: int) -> None:
    run = one_run(runs)
    assert newest_intact(run)[1]["progress"]["batches"] == steps
    assert not [file.name for file in run.rglob("*") if file.name.endswith(".tmp")]
