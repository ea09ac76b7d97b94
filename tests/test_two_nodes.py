"""Two machines, each a network namespace with an address of its own, train as two processes of one machine do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from programs import program, still_running, train_digits
from tiny_runs import SETTINGS, as_options, rows, weights

from rnode_plugin.training.checkpoints import read_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.ddp, pytest.mark.timeout(900)]

TORCHRUN = ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
            "--rdzv-id", "rnode", "--rdzv-endpoint", "10.77.0.1:29500")  # fmt: skip


SET = as_options(*SETTINGS)


@pytest.fixture(scope="module")
def machines() -> Iterator[list[str]]:
    """The names of two namespaces that reach each other at 10.77.0.1 and 10.77.0.2, and know each other's names."""
    names = [f"rnode{os.getpid()}-{i}" for i in range(2)]
    ends = [f"rn{os.getpid()}{i}" for i in range(2)]
    commands = [
        *(["netns", "add", name] for name in names),
        ["link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1]],
        *(["-n", name, "address", "add", f"10.77.0.{i + 1}/24", "dev", ends[i]] for i, name in enumerate(names)),
        *(["-n", name, "link", "set", link, "up"] for i, name in enumerate(names) for link in (ends[i], "lo")),
    ]
    files = [Path("/etc/netns", name, "hosts") for name in names]  # `ip netns exec` lays it over /etc/hosts
    try:
        for command in commands:
            subprocess.run(["ip", *command], check=True, capture_output=True)
        for i, file in enumerate(files):
            file.parent.mkdir(parents=True)
            known = (
                f"127.0.0.1 localhost\n10.77.0.1 node1\n10.77.0.2 node2\n10.77.0.{i + 1} {socket.gethostname()}\n"
            )
            file.write_text(known)
        yield names
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    finally:
        for name, file in zip(names, files, strict=True):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
            file.unlink(missing_ok=True)
            if file.parent.is_dir():
                file.parent.rmdir()


def start(
    machines: list[str],
    folder: Path,
    how: str,
    runs: list[Path],
    *extra: str,
    statements: str = "",
    option: str = "--runs",
) -> list[tuple[int, str, str]]:
    """Exit code, standard output and errors of each machine."""
    arguments = ["train", "digits", *SET, "--device", "cpu", *extra]
    processes = []
    for i, name in enumerate(machines):
        mine = [str(program(folder, statements)), *arguments, option, str(runs[i])]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "NODE_RANK": str(i)}
        if how == "torchrun":
            mine = [*TORCHRUN, *mine]
        else:
            mine += ["--devices", "1", "--num-nodes", "2"]
        if how == "environment":
            env |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29511"}
        elif how == "slurm":
            env |= {
                "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1",
                "SLURM_NNODES": "2", "SLURM_PROCID": str(i), "SLURM_NODEID": str(i), "SLURM_LOCALID": "0",
                "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NODELIST": "node[1-2]",
            }  # fmt: skip
        command = ["ip", "netns", "exec", name, sys.executable, *mine]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
        processes.append(subprocess.Popen(command, **options))
    try:
        said = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not still_running(folder)
    return [(process.returncode, *each) for process, each in zip(processes, said, strict=True)]


@pytest.fixture(scope="module")
def one_machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("one")
    command = train_digits(*SET, "--devices", "2", "--runs", str(runs))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, timeout=400, env=env)
    return runs / "digits" / "0"


@pytest.mark.parametrize("how", ["environment", "torchrun", "slurm"])
@pytest.mark.parametrize("shared", [True, False], ids=["one folder", "two folders"])
def test_as_on_one_machine(machines: list[str], one_machine: Path, tmp_path: Path, how: str, shared: bool) -> None:
    """The same noise, images, metrics and weights; one machine writes and reports."""
    runs = [tmp_path / "runs" / ("all" if shared else str(i)) for i in range(2)]
    (code, output, errors), (other_code, other_output, _) = start(machines, tmp_path, how, runs)
    assert (code, other_code) == (0, 0), errors
    assert output.count("held-out images  31") == 1
    assert not other_output.strip()
    (run,) = (tmp_path / "runs").rglob("recipe.json")  # nobody else made a folder
    assert run.parent == runs[0] / "digits" / "0"
    assert torch.equal(weights(run.parent), weights(one_machine))
    assert rows(run.parent) == rows(one_machine)
    assert sorted(f.name for f in run.parent.iterdir()) == sorted(f.name for f in one_machine.iterdir())


@pytest.mark.parametrize("which", [0, 1])
def test_a_machine_that_dies(machines: list[str], tmp_path: Path, which: int) -> None:
    """The other one ends too and says why; the checkpoint is there."""
    statements = f"def at(module, step):\n    if node == {which} and step == 5:\n        os.kill(os.getpid(), 9)"
    ended = start(machines, tmp_path, "environment", [tmp_path / "runs"] * 2, statements=statements)
    assert ended[which][0] == -9
    code, _, errors = ended[1 - which]
    assert code == 1
    assert "the processes of this run cannot reach each other" in errors
    assert "Traceback" not in errors
    last = tmp_path / "runs" / "digits" / "0" / "checkpoints" / "last.ckpt"
    assert f"The last good checkpoint is {last}" in errors
    assert read_checkpoint(last)["progress"]["batches"] == 4


def test_a_run_goes_on_without_a_shared_folder(machines: list[str], tmp_path: Path) -> None:
    """Each machine needs the checkpoint, and the first one goes on writing."""
    runs = [tmp_path / "runs" / str(i) for i in range(2)]
    assert [code for code, _, _ in start(machines, tmp_path, "environment", runs)] == [0, 0]
    copied = runs[1] / "digits" / "0" / "checkpoints"
    copied.mkdir(parents=True)
    first = runs[0] / "digits" / "0"
    (copied / "last.ckpt").write_bytes((first / "checkpoints" / "last.ckpt").read_bytes())
    both = [run / "digits" / "0" for run in runs]
    ended = start(machines, tmp_path, "environment", both, "--set", "training.max_steps=10", option="--resume")
    assert [code for code, _, _ in ended] == [0, 0]
    assert [row["step"] for row in rows(first) if "train/loss" in row] == [str(i) for i in range(1, 11)]
    assert [f.name for f in copied.iterdir()] == ["last.ckpt"]
