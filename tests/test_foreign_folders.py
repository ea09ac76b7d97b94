"""A run folder from somebody else: its links, pipes, packed and edited files harm nothing outside of it."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from problems import refuses
from run_folders import write_run
from tiny_runs import rnode, run, tiny_recipe

from rnode_plugin import get_recipe
from rnode_plugin.errors import CheckpointError, ConfigError
from rnode_plugin.experiments.runs.run import Run
from rnode_plugin.experiments.training.checkpoints import read_checkpoint


@pytest.fixture
def theirs(finished_run: Callable[[str], Path], tmp_path: Path) -> Run:
    """A run of eight steps, as it comes out of an archive."""
    shutil.copytree(finished_run("images"), tmp_path / "theirs")
    return Run(tmp_path / "theirs")


def resume(theirs: Run) -> None:
    run(tiny_recipe("training.max_steps=9"), theirs.path.parent, resume=theirs.path)


def test_links_to_files_are_replaced(theirs: Run, tmp_path: Path) -> None:
    """A run is resumed, and the files of the user that its links name stay."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("environment.json", "metrics.csv", "checkpoints/last.ckpt"):
        link = theirs.path / name
        target = home / link.name
        target.write_bytes(link.read_bytes() if link.exists() else b"mine")
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    (theirs.path / "result.json").unlink()
    (theirs.path / "result.json").symlink_to(home / "missing.json")
    (theirs.path / "notes.txt").symlink_to(home / "environment.json")
    before = {each.name: each.read_bytes() for each in home.iterdir()}
    resume(theirs)
    assert {each.name: each.read_bytes() for each in home.iterdir()} == before
    # the link that was last.ckpt has another name, and is not written through
    links = sorted(each.name for each in theirs.path.rglob("*") if each.is_symlink())
    assert links == ["notes.txt", "previous.ckpt"]
    found = theirs.read()
    assert found.metrics.last_step == 9
    assert found.result is not None
    assert read_checkpoint(theirs.previous)["global_step"] == 8


def test_a_packed_checkpoint_is_refused_unread(theirs: Run) -> None:
    """A megabyte of it may be a gigabyte of zeros."""
    contents = {**read_checkpoint(theirs.best), "more": torch.zeros(10**6)}
    torch.save(contents, stored := theirs.path / "stored.zip")
    packed = theirs.path / "packed.ckpt"
    with zipfile.ZipFile(stored) as a, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as b:
        for each in a.infolist():
            b.writestr(each.filename, a.read(each))
    assert packed.stat().st_size < 100_000 < stored.stat().st_size
    with refuses(CheckpointError, "packed.ckpt"):
        read_checkpoint(packed)
    shutil.copy(stored, plain := theirs.path / "plain.ckpt")
    assert read_checkpoint(plain)["more"].shape == (10**6,)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with a name")
@pytest.mark.timeout(300)  # it would wait for a writer for ever
@pytest.mark.parametrize("name", ["metrics.csv", "result.json", "environment.json"])
def test_a_pipe_is_not_read(theirs: Run, name: str) -> None:
    (theirs.path / name).unlink()
    os.mkfifo(theirs.path / name)
    with refuses(ConfigError, name):
        theirs.read()


@pytest.mark.parametrize("what", ["a link out", "another file", "a picture"])
def test_a_report_shows_pictures_alone(tmp_path: Path, what: str) -> None:
    path = write_run(tmp_path / "run", get_recipe("digits"), steps=2, checks=(2,))
    picture = Run(path).picture()
    if what == "a link out":
        Image.new("L", (50, 50), 200).save(secret := tmp_path / "secret.png")
        picture.unlink()
        picture.symlink_to(secret)
    elif what == "another file":
        picture.write_text("the password is swordfish")
    done = rnode("report", path, "--out", tmp_path / "report")
    assert done.exit_code == 0, done.output
    found = [each.name for each in (tmp_path / "report").rglob("samples-*")]
    assert bool(found) == (what == "a picture")


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "steps that are a text": lambda file: file.update(global_step="x"),
    "no plan": lambda file: file["callbacks"]["rnode_plugin.rows"].clear(),
    "a plan of another kind": lambda file: file["callbacks"]["rnode_plugin.rows"].update(plan={"a": 1}),
    "no best score": lambda file: file["callbacks"]["rnode_plugin.saves"].pop("best"),
    "no loops": lambda file: file.update(loops={}),
    "no count of skipped steps": lambda file: file["progress"].pop("skipped"),
    "no optimizer": lambda file: file.update(optimizer_states=[{}]),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_checkpoint_is_one_sentence(theirs: Run, edit: str) -> None:
    contents = read_checkpoint(theirs.last)
    EDITS[edit](contents)
    torch.save(contents, theirs.last)
    before = (theirs.path / "result.json").read_bytes()
    with pytest.raises(
        CheckpointError, match=r"last\.ckpt does not hold what a run writes \(\w+Error: .*--weights"
    ):
        resume(theirs)
    assert (theirs.path / "result.json").read_bytes() == before
