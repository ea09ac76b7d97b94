"""Of two processes one meets what the other does not: they skip together, stop together, and one says why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from programs import program, still_running
from tiny_runs import SETTINGS, as_options, rows

from rnode_plugin.training.checkpoints import read_checkpoint
from rnode_plugin.training.datamodule import EpochOrder

pytestmark = pytest.mark.ddp


def run(folder: Path, statements: str, *settings: str) -> tuple[int, str, str]:
    """Exit code, standard output and the errors that are left when nothing of the run is left."""
    changed = as_options(*SETTINGS, *settings)
    done = subprocess.run(
        [sys.executable, str(program(folder, statements)), "train", "digits", *changed,
         "--device", "cpu", "--devices", "2", "--runs", str(folder / "runs")],
        capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    end = time.monotonic() + 30
    while still_running(folder) and time.monotonic() < end:
        time.sleep(0.1)
    assert not still_running(folder)
    return done.returncode, done.stdout, done.stderr


def test_both_skip_a_step_that_one_cannot_use(tmp_path: Path) -> None:
    """A NaN at step 3 and a failed solve at step 5, in the second process alone."""
    code, _, errors = run(tmp_path, """
import torch
def at(module, step):
    if rank == 1 and step == 3:
        objective.output_log_prob = spoil
    if rank == 1 and step == 5:
        module.flow.forward = fail
def at_end(module):
    torch.save(module.flow.state_dict(), f"{folder}/{rank}.pt")
""")  # fmt: skip
    assert code == 0, errors
    assert not errors.strip()
    train = [row for row in rows(tmp_path / "runs" / "digits" / "0") if "train/loss" in row]
    assert [float(row["train/skipped"]) for row in train] == [0, 0, 1, 1, 2, 2, 2, 2]
    assert [row["train/loss"] == "nan" for row in train] == [i in (2, 4) for i in range(8)]
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(one[name], other[name]) and one[name].isfinite().all() for name in one)


def test_too_many_end_both_with_one_message(tmp_path: Path) -> None:
    statements = """
def at(module, step):
    if rank == 1 and step >= 6:
        objective.output_log_prob = spoil
"""
    code, output, errors = run(tmp_path, statements, "training.max_skipped=2")
    assert code == 1
    run_folder = tmp_path / "runs" / "digits" / "0"
    (line,) = errors.strip().splitlines()
    assert line.startswith("Error: training stopped: the loss is nan at training step 7; steps 6 to 7 were skipped")
    order = EpochOrder(80, batch_size=20, seed=42, world=2, rank=1)  # of the second process: two steps an epoch
    order.set_epoch(3)
    batch = next(iter(order))
    assert "training images are listed in" in line
    assert json.loads((run_folder / "skipped.json").read_text()) == {"step": 7, "images": batch}
    assert f"--resume {run_folder} goes on from it" in line
    assert "Error" not in output
    assert read_checkpoint(run_folder / "checkpoints" / "last.ckpt")["progress"]["batches"] == 5
    assert not list(run_folder.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize(("what", "words"), [
    ("raise OSError(5, 'Input/output error', 'x.png')", "the system refused: Input/output error (x.png)"),
    ("raise LocalError('it failed.')", "training stopped: it failed."),
    ("from rnode_plugin.errors import ConfigError; raise ConfigError('wrong.')", "training stopped: wrong."),
    ("os.kill(os.getpid(), 9)", "the processes of this run cannot reach each other"),
    ("os._exit(0)", "the processes of this run cannot reach each other"),
])  # fmt: skip
def test_the_second_process_fails_alone(tmp_path: Path, what: str, words: str) -> None:
    code, _, errors = run(tmp_path, f"def at(module, step):\n    if rank == 1 and step == 5:\n        {what}")
    assert code == 1
    assert words in errors
    assert "Traceback" not in errors
    checkpoint = tmp_path / "runs" / "digits" / "0" / "checkpoints" / "last.ckpt"
    assert f"The last good checkpoint is {checkpoint}" in errors
    assert read_checkpoint(checkpoint)["progress"]["batches"] == 4
