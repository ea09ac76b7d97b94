"""The command line with something done to it at a training step, as a program that each process of a run starts."""

from __future__ import annotations

import sys
from pathlib import Path

_PROGRAM = """
import os
import sys
import pytorch_lightning
import rnode_plugin.training.step as objective
from rnode_plugin.cli import main
from rnode_plugin.errors import LocalError, SolverError

log_prob, folder = objective.output_log_prob, FOLDER
rank = int(os.environ.get("LOCAL_RANK", "0"))
node = int(os.environ.get("NODE_RANK", "0"))

def spoil(output):
    return log_prob(output) * float("nan")

def fail(*arguments, **options):
    raise SolverError("underflow", "it stopped", "Do something.", t=0.5, step=3, nfe=77)

STATEMENTS

class Act(pytorch_lightning.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with open(f"{folder}/{node}.{rank}.pid", "w") as file:
            file.write(str(os.getpid()))
        objective.output_log_prob = log_prob
        pl_module.flow.__dict__.pop("forward", None)
        at(pl_module, trainer.global_step + 1)

    def on_train_end(self, trainer, pl_module):
        at_end(pl_module)

if __name__ == "__main__":
    if "program:Act" not in sys.argv:  # the other processes are started with the same arguments
        sys.argv += ["--callback", "program:Act"]
    main()
"""

_NOTHING = "def at(module, step): pass\ndef at_end(module): pass\n"


def train_digits(*arguments: str) -> list[str]:
    """The command that trains the digits' recipe on the CPU."""
    return [sys.executable, "-m", "rnode_plugin", "train", "digits", "--device", "cpu", *arguments]


def program(folder: Path, statements: str = "") -> Path:
    """A file in ``folder`` to run instead of ``-m rnode_plugin``.

    Args:
        statements: may define ``at(module, step)``, which each process calls before each of its steps, and
            ``at_end(module)``. They may use ``rank`` and ``node``, and ``spoil`` and ``fail`` in place of
            ``objective.output_log_prob`` and ``module.flow.forward`` for this step.
    """
    file = folder / "program.py"
    file.write_text(_PROGRAM.replace("FOLDER", repr(str(folder))).replace("STATEMENTS", _NOTHING + statements))
    return file


def still_running(folder: Path) -> list[str]:
    """The processes of the program that have begun a step and are there still."""
    return [f.name for f in folder.glob("*.pid") if Path("/proc", f.read_text()).exists()]
