"""A disk that fills up or becomes read-only while a run writes to it: one message, and the checkpoint is intact."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from child_runs import STEPS, Child, assert_intact, assert_same, at, one_run
from click.testing import CliRunner
from tiny_runs import SETTINGS

from rnode_plugin.cli import main


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own, as the folder of all runs."""
    place = tmp_path / "runs"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", place], capture_output=True).returncode:
        pytest.skip("this test may not mount a file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)
        subprocess.run(["umount", place], capture_output=True)  # what a test has mounted over it


def test_full(tmp_path: Path, disk: Path) -> None:
    fill = "open('FOLDER/filler', 'wb', buffering=0).write(bytes(1 << 23))".replace("FOLDER", str(disk))
    message = Child(disk, STEPS, at(5, fill)).error()
    assert "training stopped: " in message
    assert "No space left on device" in message
    assert f"--resume {one_run(disk)} goes on from it" in message
    assert_intact(disk, 4)
    (disk / "filler").unlink()
    assert Child(disk, STEPS, resume=one_run(disk)).end()[0] == 0
    assert Child(tmp_path / "elsewhere", STEPS).end()[0] == 0
    assert_same(one_run(tmp_path / "elsewhere"), one_run(disk))


def test_read_only(disk: Path) -> None:
    """While a run trains, for a run that goes on, for one that begins, and for an export."""
    # over the disk, because the disk itself is busy: the run holds the file of its lock open
    cover = f"os.system('mount --bind {disk} {disk} && mount -o remount,ro,bind {disk}')"
    message = Child(disk, STEPS, at(5, cover)).error()
    assert "training stopped: " in message
    assert "Read-only file system" in message
    assert "goes on from it" in message
    assert_intact(disk, 4)
    checkpoint = one_run(disk) / "checkpoints" / "last.ckpt"
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    for arguments, code, words in (
        (
            ["train", "--resume", str(one_run(disk)), "--accelerator", "cpu"],
            1,
            f"cannot write into {one_run(disk)}",
        ),
        (
            ["train", "digits", *settings, "--accelerator", "cpu", "--runs", str(disk)],
            2,
            "Choose another with --runs",
        ),
        (["export", str(checkpoint), str(disk / "model.safetensors")], 1, "cannot write"),
    ):
        done = CliRunner().invoke(main, arguments)
        assert (done.exit_code, done.output.count("Read-only file system")) == (code, 1), done.output
        assert words in done.output
        assert done.output.startswith("Error: ")
    assert_intact(disk, 4)
