"""The command line with something done to it at a training step, as a program that each process of a run starts."""

from __future__ import annotations

import sys
from pathlib import Path

_PROGRAM = """
import os
import rnode_plugin.training.lightning.module as module
from rnode_plugin.cli import main
from rnode_plugin.errors import SolverError
from rnode_plugin.training.lightning.module import FlowModule

original, log_prob, folder = FlowModule.training_step, module.output_log_prob, FOLDER
rank = int(os.environ.get("LOCAL_RANK", "0"))
node = int(os.environ.get("NODE_RANK", "0"))

def spoil(output):
    return log_prob(output) * float("nan")

def fail(*arguments, **options):
    raise SolverError("underflow", "it stopped", "Do something.", t=0.5, step=3, nfe=77)

STATEMENTS

def training_step(self, batch, batch_idx):
    step = batch_idx + 1
    with open(f"{folder}/{node}.{rank}.pid", "w") as file:
        file.write(str(os.getpid()))
    module.output_log_prob = log_prob
    self.flow.__dict__.pop("forward", None)
    at(self, step)
    return original(self, batch, batch_idx)

FlowModule.training_step = training_step
if __name__ == "__main__":
    main()
"""


def train_digits(*arguments: str) -> list[str]:
    """The command that trains the digits' recipe on the CPU."""
    return [sys.executable, "-m", "rnode_plugin", "train", "digits", "--accelerator", "cpu", *arguments]


def program(folder: Path, statements: str = "def at(self, step): pass") -> Path:
    """A file in ``folder`` to run instead of ``-m rnode_plugin``.

    Args:
        statements: define ``at(self, step)``, which each process calls before each of its steps; they may use
            ``rank`` and ``node``, and ``spoil`` and ``fail`` in place of ``module.output_log_prob`` and
            ``self.flow.forward`` for this step.
    """
    file = folder / "program.py"
    file.write_text(_PROGRAM.replace("FOLDER", repr(str(folder))).replace("STATEMENTS", statements))
    return file


def still_running(folder: Path) -> list[str]:
    """The processes of the program that have begun a step and are there still."""
    return [f.name for f in folder.glob("*.pid") if Path("/proc", f.read_text()).exists()]
