"""Real processes, killed, starved and robbed of their files: a run ends with the same result, or with a message."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from problems import refuses
from tiny_runs import CONTEXT, SETTINGS, TIMES, as_options, assert_same, repr_exact, rows, train, train_digits

from rnode_plugin.errors import CheckpointError
from rnode_plugin.experiments.runs.run import Run
from rnode_plugin.experiments.training.checkpoints import newest_intact, read_checkpoint

STEPS = ["training.max_steps=8", "training.val_every_steps=4"]


class Child:
    """A process that trains, and what it printed."""

    def __init__(self, runs: Path, settings: list[str], before: str = "", **options: Any) -> None:
        self._output = runs.parent / "output.txt"
        self._process: BaseProcess = CONTEXT.Process(
            target=train, args=(runs, self._output, settings, options, before)
        )
        self._process.start()

    def end(self) -> tuple[int | None, str]:
        self._process.join(800)
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


def assert_intact(runs: Path, steps: int) -> None:
    run = one_run(runs)
    assert newest_intact(run)[1]["global_step"] == steps
    assert not [file.name for file in run.rglob("*") if file.name.endswith(".tmp")]


@pytest.fixture
def whole(finished_run: Callable[[str], Path]) -> Path:
    return finished_run("images")


# Statements that replace a function by one that dies between two writes
_BEFORE = """
from pathlib import Path
from rnode_plugin.experiments.runs.metrics import MetricsTable
add, replace, calls = MetricsTable.add, Path.replace, []

def die():
    os.kill(os.getpid() if {alone} else 0, signal.SIGKILL)  # 0 is the group of all processes of the run
"""


def published(name: str, count: int, *, before: bool = False) -> str:
    """Statements that die right after, or before, a file with this name is published for the time ``count``."""
    return f"""
def dying(self, target):
    calls.append(Path(target).name)
    now = calls[-1] == "{name}" and calls.count("{name}") == {count}
    if now and {before}: die()
    replace(self, target)
    if now: die()
Path.replace = dying
"""


PLACES = {
    "after a row": """
def dying(self, row, step):
    add(self, row, step)
    if step == 6 and "train/loss" in row: die()
MetricsTable.add = dying
""",
    "in a checkpoint": """
import torch
save = torch.save
def dying(contents, file):
    if contents["global_step"] == 3:
        file.write(b"half")
        file.flush()
        die()
    save(contents, file)
torch.save = dying
""",
    "between a validation's row and best": """
def dying(self, row, step):
    add(self, row, step)
    if step == 8 and "val/bpd" in row: die()
MetricsTable.add = dying
""",
    "between best and last": published("best.ckpt", 2),
    "between the first best and last": published("best.ckpt", 1),
    "after a checkpoint": published("last.ckpt", 3),
    "after the last checkpoint": published("last.ckpt", 8),
    # the header of the first row, and a wider one for the first validation
    "before the wider header": published("metrics.csv", 2, before=True),
    "after the wider header": published("metrics.csv", 2),
    "between previous and last": """
def dying(self, target):
    if self.name.startswith(".last.ckpt") and Path(target).with_name("previous.ckpt").exists(): die()
    return replace(self, target)
Path.replace = dying
""",
}


# places of which each write has another one among the quick tests
SLOW = (
    "after a row",
    "between a validation's row and best",
    "between the first best and last",
    "after a checkpoint",
    "after the wider header",
    "between previous and last",
)


@pytest.mark.parametrize(
    "place", [pytest.param(each, marks=[pytest.mark.slow] if each in SLOW else []) for each in PLACES]
)
def test_killed_between_two_writes(whole: Path, tmp_path: Path, place: str) -> None:
    runs = tmp_path / "runs"
    assert Child(runs, STEPS, _BEFORE.format(alone=True) + PLACES[place]).end()[0] == -signal.SIGKILL
    drafts = ("in a checkpoint", "before the wider header", "between previous and last")
    assert len([*one_run(runs).rglob(".*.tmp")]) == (place in drafts)
    assert Child(runs, STEPS, resume=one_run(runs)).end()[0] == 0
    assert_repeats(whole, one_run(runs))
    assert_intact(runs, 8)


def assert_repeats(whole: Path, run: Path) -> None:
    """The run has the metrics, weights, best weights and scores of one that nothing happened to, to the bit."""
    assert_same(whole, run)
    best = [read_checkpoint(each / "checkpoints" / "best.ckpt") for each in (whole, run)]
    for key in ("global_step", "state_dict", "callbacks"):
        assert repr_exact(best[0][key]) == repr_exact(best[1][key]), key
    assert cells(whole) == cells(run)
    assert (whole / "images.csv").read_bytes() == (run / "images.csv").read_bytes()


def cells(run: Path) -> list[dict[str, str]]:
    """All cells of the metrics, in the order of the file, but for its times."""
    with (run / "metrics.csv").open(newline="") as file:
        found = list(csv.reader(file))
    return [{name: cell for name, cell in zip(found[0], row, strict=True) if name not in TIMES} for row in found]


def train_on_two(folder: Path, before: str = "", *options: str) -> subprocess.CompletedProcess[str]:
    """Run the command on two processes, which form one process group."""
    # both processes import the module of the callback
    callback = "\nimport pytorch_lightning as L\nclass Idle(L.Callback): pass\n"
    (folder / "kills.py").write_text("import os, signal\n" + before + callback)
    return subprocess.run(
        [*train_digits(*as_options(*SETTINGS, *STEPS)), "--devices", "2", "--callback", "kills:Idle",
         "--runs", "runs", *options],
        cwd=folder, capture_output=True, text=True, timeout=800, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.timeout(3600)  # seven runs
def test_two_processes_killed_between_two_writes(tmp_path: Path) -> None:
    """One run, killed at each place in the order of its steps."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    done = train_on_two(whole)
    assert done.returncode == 0, done.stderr
    resume: tuple[str, ...] = ()
    for place in (
        "in a checkpoint", "before the wider header", "between the first best and last", "after a row",
        "between a validation's row and best",
    ):  # fmt: skip
        done = train_on_two(killed, _BEFORE.format(alone=False) + PLACES[place], *resume)
        assert done.returncode == -signal.SIGKILL, (place, done.stderr)
        resume = ("--resume", str(one_run(killed / "runs")))
    done = train_on_two(killed, "", *resume)
    assert done.returncode == 0, done.stderr
    assert_repeats(one_run(whole / "runs"), one_run(killed / "runs"))
    assert_intact(killed / "runs", 8)


@pytest.mark.slow
@pytest.mark.ddp
def test_the_loss_of_a_process_is_named(tmp_path: Path) -> None:
    """The other one is killed in the first step of a run, which leaves no folder."""
    done = train_on_two(
        tmp_path,
        """
import torch
first = "LOCAL_RANK" not in os.environ
backward = torch.Tensor.backward
torch.Tensor.backward = lambda *a, **b: backward(*a, **b) if first else os.kill(os.getpid(), signal.SIGKILL)
""",
    )
    assert done.returncode == 1, done.stderr
    assert "training did not begin: the processes of this run cannot reach each other (" in done.stderr
    assert "/gloo/" not in done.stderr
    assert not list((tmp_path / "runs" / "digits").iterdir())


def test_killed_in_a_step_with_a_truncated_newest_checkpoint(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    assert Child(runs, STEPS, at(7, "os.kill(os.getpid(), signal.SIGKILL)")).end()[0] == -signal.SIGKILL
    run = one_run(runs)
    os.truncate(run / "checkpoints" / "last.ckpt", 1000)
    found, contents = newest_intact(run)
    assert (found.name, contents["global_step"]) == ("previous.ckpt", 5)
    assert "last.ckpt cannot be read" in (said := capsys.readouterr().err)
    assert "Continuing from previous.ckpt" in said
    assert Child(runs, STEPS, resume=run).end()[0] == 0
    assert_same(whole, run)
    for name in ("last", "previous", "best"):
        os.truncate(run / "checkpoints" / f"{name}.ckpt", 0)
    with refuses(CheckpointError, "last.ckpt"):
        newest_intact(run)


# what the machine takes away -----------------------------------------------------------------------------------


def test_a_full_disk(tmp_path: Path) -> None:
    """From step 5 on no file may grow beyond what metrics need and a checkpoint exceeds."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"
    message = Child(tmp_path / "runs", STEPS, at(5, limit)).error()
    assert "cannot write" in message
    assert "last.ckpt" in message
    assert "continues from it" in message
    assert_intact(tmp_path / "runs", 4)


@pytest.mark.parametrize("resume", ["in place", "a new run"])
@pytest.mark.parametrize("size", [0, 600, 2000, 5000, 20_000, 40_000])
def test_a_full_disk_in_the_first_step_of_a_resume(whole: Path, tmp_path: Path, size: int, resume: str) -> None:
    """Each file is as before, or newer and whole, and the run goes on when there is room."""
    run = tmp_path / "runs" / "digits" / "0"
    shutil.copytree(whole, run)
    before, contents = {each: each.read_bytes() for each in run.rglob("*") if each.is_file()}, Run(run).read()
    longer = [*STEPS, "training.max_steps=10", "training.sample_images=2"]
    first = 9 if resume == "in place" else 8
    limit = at(first, f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))")
    checkpoint = run if resume == "in place" else Run(run).previous
    assert Child(tmp_path / "runs", longer, limit, resume=checkpoint).end()[0] not in (0, None)
    if resume == "a new run":
        assert {each: each.read_bytes() for each in before} == before
        return
    assert before.keys() <= {each for each in run.rglob("*") if each.is_file()}
    for name in ("best", "last", "previous"):
        assert read_checkpoint(run / "checkpoints" / f"{name}.ckpt")["global_step"] >= 7
    found = Run(run).read()
    lines = (run / "metrics.csv").read_bytes()
    (run / "metrics.csv").write_bytes(lines[: lines.rindex(b"\n") + 1])  # a line that is cut off does not count
    old, new = rows(whole), rows(run)
    assert (new[: len(old)], found.metrics.last_step) == (old, int(new[-1]["step"]))
    assert (found.result is not None) == (len(new) == len(old))
    if found.result is not None:
        assert (found.result, found.evaluation) == (contents.result, contents.evaluation)
    assert Child(tmp_path / "runs", longer, resume=run).end()[0] == 0
    assert [row["step"] for row in rows(run) if "train/loss" in row] == list(map(str, range(1, 11)))


def pictures(folder: Path) -> list[str]:
    folder.mkdir()
    for number in range(120):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return [*STEPS, "data.name=folder", f"data.root={folder}", "data.levels=256"]


@pytest.mark.slow
def test_data_that_vanish(tmp_path: Path) -> None:
    settings = [*pictures(tmp_path / "pictures"), "data.workers=1"]
    vanish = f"import shutil; shutil.rmtree({str(tmp_path / 'pictures')!r}, ignore_errors=True)"
    # pictures that do not fit into memory are read while training
    large = "import rnode_plugin.experiments.data.folders as folders; folders._IN_MEMORY_BYTES = 0\n"
    message = Child(tmp_path / "runs", settings, large + at(3, vanish)).error()
    assert "DataError: training stopped: " in message
    assert ".png" in message
    assert "continues from it" in message
    assert read_checkpoint(one_run(tmp_path / "runs") / "checkpoints" / "last.ckpt")["global_step"] >= 2


@pytest.mark.slow
def test_a_worker_that_dies(tmp_path: Path) -> None:
    kill_children = (
        "import glob; me = os.getpid(); "
        "kids = [int(p.split('/')[2]) for p in glob.glob('/proc/[0-9]*/stat') "
        "if open(p).read().rsplit(')', 1)[1].split()[1] == str(me)]; "
        "[os.kill(pid, signal.SIGKILL) for pid in kids]; import time; time.sleep(0.3)"
    )
    message = Child(tmp_path / "runs", [*STEPS, "data.workers=1"], at(3, kill_children)).error()
    assert "training stopped: RuntimeError: DataLoader worker" in message
    assert "continues from it" in message
