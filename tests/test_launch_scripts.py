"""examples/torchrun.sh and examples/slurm.sh, with two gloo processes in place of eight GPUs."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import SETTINGS

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = ["--device", "cpu", *(f"--set={setting}" for setting in [*SETTINGS, "training.max_steps=2"])]
pytestmark = pytest.mark.ddp

# what srun does: as many processes as tasks, each with its numbers in the environment
SRUN = """#!/usr/bin/env bash
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
done
wait -n && wait -n
"""


def environment(**values: str) -> dict[str, str]:
    # the scripts' torchrun and rnode-cli are those of this Python
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **values}


def is_one_run(folder: Path, output: str) -> None:
    """One run of two steps by two processes, of which one reports."""
    assert output.count("bits/dim, dirty") == 1
    assert "2 x cpu" in output
    assert [each.name for each in (folder / "runs" / "digits").iterdir()] == ["0"]
    assert json.loads((folder / "runs" / "digits" / "0" / "result.json").read_text())["steps"] == 2


def test_torchrun_on_two_machines(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = ["bash", str(EXAMPLES / "torchrun.sh"), *SMALL]
    machines = [
        subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment(NODES="2", NODE=node, GPUS="1", MAIN="127.0.0.1", PORT=port, RECIPE="digits"),
        )
        for node in ("0", "1")
    ]  # fmt: skip
    said = [machine.communicate(timeout=250) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    is_one_run(tmp_path, "".join(output for output, _ in said))


def test_slurm(tmp_path: Path) -> None:
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(SRUN)
    srun.chmod(srun.stat().st_mode | stat.S_IXUSR)
    job = {
        "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "imagenet64", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "localhost", "SLURM_NODELIST": "localhost",
    }  # fmt: skip
    values = environment(RECIPE="digits", **job)
    values["PATH"] = os.pathsep.join([str(srun.parent), values["PATH"]])
    done = subprocess.run(
        ["bash", str(EXAMPLES / "slurm.sh"), *SMALL], cwd=tmp_path, env=values, capture_output=True, text=True,
        timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    is_one_run(tmp_path, done.stdout)
