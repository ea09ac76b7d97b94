"""Two processes over gloo: the numbers of one, one writer, and one message."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
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


@pytest.mark.slow
def test_two_processes_take_the_same_way_and_keep_to_it(tmp_path: Path) -> None:
    settings = ("--devices", "2", "--precision", "auto", *as_options("training.max_steps=20"))
    done = train(tmp_path, *settings)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("training in ")]
    run = tmp_path / "digits" / "0"
    chosen = json.loads((run / "chosen.json").read_text())
    assert line.startswith(f"training in {chosen['way']['precision']} (")
    assert list(chosen["measured"]) == ["32-true", "bf16-mixed"]
    before = (run / "chosen.json").read_text()
    again = train(tmp_path, "--resume", str(run), "--devices", "2", *as_options("training.max_steps=22"))
    assert again.returncode == 0, again.stderr
    assert f"training in {chosen['way']['precision']}, as chosen before" in again.stderr
    assert (run / "chosen.json").read_text() == before


@pytest.mark.slow
def test_devices_exchanged_for_accumulation_in_the_middle_of_a_run(tmp_path: Path) -> None:
    a, b = tmp_path / "a" / "digits" / "0", tmp_path / "b" / "digits" / "0"
    settings = "data.batch_size=10"
    assert train(tmp_path / "a", "--devices", "2", *as_options(settings, "training.max_steps=3")).returncode == 0
    longer = (*as_options(settings, "training.max_steps=6"), "--resume")
    assert train(tmp_path, *longer, str(a), "--devices", "1", "--accumulate", "2").returncode == 0
    assert train(tmp_path / "b", "--devices", "2", *as_options(settings, "training.max_steps=6")).returncode == 0
    torch.testing.assert_close(weights(a), weights(b), rtol=1e-4, atol=1e-6)
    steps = [row["step"] for row in rows(a) if "train/loss" in row]
    assert steps == list("123456")


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
def test_a_port_in_use_is_one_message(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = train(tmp_path, "--devices", "2", env={"MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"})
    assert done.returncode == 1, done.stderr
    assert "the processes of this run cannot reach each other" in done.stderr
    assert port in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "digits").iterdir())


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
