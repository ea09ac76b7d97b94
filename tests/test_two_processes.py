"""Two processes over gloo: the numbers of one, one writer, and one message."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from programs import train_digits
from tiny_runs import SETTINGS, as_options, rows, weights

from rnode_plugin import NeuralODE, RegularizedCNF, get_recipe
from rnode_plugin.errors import ConfigError

pytestmark = pytest.mark.ddp


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
COMMAND = [*train_digits(*as_options(*SETTINGS)), "--runs"]


def train(runs: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, str(runs), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env={**ENVIRONMENT, **(env or {})})


def test_two_processes_train_as_one_that_accumulates(tmp_path: Path) -> None:
    """The same images, noise and objective: the same metrics and weights to rounding; each image counts once."""
    two = train(tmp_path / "two", "--devices", "2", *as_options("data.batch_size=10", "training.max_steps=5"))
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("held-out images  31") == 1  # one process reports
    one = train(tmp_path / "one", "--devices", "1", "--accumulate", "2",
                *as_options("data.batch_size=10", "training.max_steps=5"))  # fmt: skip
    assert one.returncode == 0, one.stderr
    a, b = tmp_path / "two" / "digits" / "0", tmp_path / "one" / "digits" / "0"
    torch.testing.assert_close(weights(a), weights(b), rtol=1e-4, atol=1e-6)
    assert len(rows(a)) == len(rows(b)) == 7
    for of_two, of_one in zip(rows(a), rows(b), strict=True):
        assert set(of_two) == set(of_one)
        for name, value in of_two.items():
            tolerance = 5e-3 if name == "val/bpd" else 2e-4  # validation draws its noise by process
            assert float(value) == pytest.approx(float(of_one[name]), rel=tolerance, abs=1e-6), name


def test_a_trainer_of_ones_own(tmp_path: Path) -> None:
    """The example on two devices: each trains on its part, each held-out image counts once, one process reports."""
    example = Path(__file__).parents[1] / "examples" / "lightning_trainer.py"
    environment = {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(example), "--steps", "2", "--devices", "2"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("steps      2") == 1
    assert "sync_dist" not in done.stderr
    assert (tmp_path / "lightning_trainer.png").is_file()
    assert (tmp_path / "lightning" / "last.ckpt").is_file()


@pytest.mark.slow
def test_one_process_killed_and_the_run_resumed(tmp_path: Path) -> None:
    """SIGTERM to the first process, then SIGKILL of all, and the run ends as one that nothing happened to."""
    options = ("--devices", "2", *as_options("training.max_steps=40", "training.val_every_steps=20"))
    whole = train(tmp_path / "a", *options)
    assert whole.returncode == 0, whole.stderr
    run = tmp_path / "b" / "digits" / "0"
    resume: tuple[str, ...] = ()
    for signum, after in ((signal.SIGTERM, 3), (signal.SIGKILL, 9)):
        with subprocess.Popen(
            [*COMMAND, str(tmp_path / "b"), *options, *resume],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT, start_new_session=True,
        ) as process:  # fmt: skip
            _wait_for(run, after)
            if signum == signal.SIGKILL:
                os.killpg(process.pid, signum)
            else:
                process.send_signal(signum)
            assert process.stdout is not None
            output = process.stdout.read()
        assert process.returncode == (143 if signum == signal.SIGTERM else -signal.SIGKILL), output
        assert "Traceback" not in output
        resume = ("--resume", str(run))
    assert train(tmp_path / "b", *options, *resume).returncode == 0
    assert torch.equal(weights(run), weights(tmp_path / "a" / "digits" / "0"))
    assert rows(run) == rows(tmp_path / "a" / "digits" / "0")


def _wait_for(run: Path, step: int) -> None:
    end = time.monotonic() + 100
    while time.monotonic() < end:
        if (run / "metrics.csv").is_file():
            with (run / "metrics.csv").open() as file:
                if any(int(row["step"]) >= step for row in csv.DictReader(file) if (row["step"] or "").isdigit()):
                    return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


@pytest.mark.parametrize("make", [
    lambda: NeuralODE(torch.nn.Linear(2, 2)),
    lambda: torch.nn.Sequential(torch.nn.Linear(2, 2), NeuralODE(torch.nn.Linear(2, 2))),
    lambda: RegularizedCNF(torch.nn.Linear(2, 2), event_shape=2),
    lambda: get_recipe("digits").build_flow(),
])  # fmt: skip
def test_data_parallel_is_refused(make: Callable[[], torch.nn.Module]) -> None:
    model = make()
    with pytest.raises(ConfigError, match=r"does not work under DataParallel\. Use one process a device"):
        # as torch.nn.parallel.replicate does before it copies to the devices
        [module._replicate_for_data_parallel() for module in model.modules()]
