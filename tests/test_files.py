"""The one writer of files: what it replaces, what it leaves, and which names may become paths."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import refuses

from rnode_plugin.errors import CheckpointError
from rnode_plugin.experiments.files import check_path_name, missing, write_atomically

posix = pytest.mark.skipif(os.name != "posix", reason="links, pipes and signals of POSIX")


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


@posix
def test_links_are_replaced(tmp_path: Path) -> None:
    for folder in ("data", "links"):
        (tmp_path / folder).mkdir()
    (tmp_path / "data" / "real").write_bytes(b"old")
    (tmp_path / "links" / "one").symlink_to("../data/real")
    (tmp_path / "links" / "dangling").symlink_to("../data/new")
    for name in ("one", "dangling"):
        write_atomically(tmp_path / "links" / name, b"new")
        assert (tmp_path / "links" / name).read_bytes() == b"new"
        assert not (tmp_path / "links" / name).is_symlink()
    assert (tmp_path / "data" / "real").read_bytes() == b"old"
    assert names(tmp_path / "data") == ["real"]
    assert names(tmp_path / "links") == ["dangling", "one"]


def test_what_a_killed_process_has_left_is_written_anew(tmp_path: Path) -> None:
    (tmp_path / ".a.tmp").write_bytes(b"half of a file that was longer")
    write_atomically(tmp_path / "a", b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole"
    assert names(tmp_path) == ["a"]


def test_no_folder_is_made(tmp_path: Path) -> None:
    with refuses(CheckpointError, "gone", "No such file"):
        write_atomically(tmp_path / "gone" / "a", b"x")
    assert names(tmp_path) == []


@posix
def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "to_device").symlink_to("/dev/null")
    for name in (tmp_path / "pipe", tmp_path / "to_device", tmp_path / "folder", ".", "..", "/"):
        with refuses(CheckpointError, "regular"):
            write_atomically(name, b"x")
    assert (tmp_path / "pipe").is_fifo()
    assert names(tmp_path) == ["folder", "pipe", "to_device"]


def test_what_was_there_can_be_kept(tmp_path: Path) -> None:
    for content in (b"1", b"2", b"3"):
        write_atomically(tmp_path / "last", content, keep=tmp_path / "previous")
    assert (tmp_path / "last").read_bytes() == b"3"
    assert (tmp_path / "previous").read_bytes() == b"2"
    assert names(tmp_path) == ["last", "previous"]


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"old")

    def fail(file) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with refuses(CheckpointError, "No space left"):
        write_atomically(tmp_path / "a", fail)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_full_disk_is_called_that_by_torch_s_writer_too(tmp_path: Path) -> None:
    """In the middle of a tensor; test_killed_runs has a disk that is full before."""

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, content: Any) -> int:
            if self.file.tell() + memoryview(content).nbytes > 500_000:
                raise OSError(27, "File too large")
            return self.file.write(content)

        def flush(self) -> None:
            self.file.flush()

    def write(file: Any) -> None:
        full: Any = Full(file)
        torch.save({"w": torch.zeros(10**6)}, full)

    with refuses(CheckpointError, "weights", "File too large"):
        write_atomically(tmp_path / "weights", write)
    assert names(tmp_path) == []


def test_a_missing_file_in_a_missing_folder_has_no_similar_name(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").touch()
    assert missing(tmp_path / "row.csv").endswith(f"; did you mean {str(tmp_path / 'rows.csv')!r}?")
    assert missing(tmp_path / "none" / "row.csv") == f"{tmp_path / 'none' / 'row.csv'} does not exist."


@pytest.mark.parametrize("name", ["digits", "my recipe 2", "é-1", "a.b,c+d=e@f", "_x", "x" * 100])
def test_names_that_may_become_paths(name: str) -> None:
    assert check_path_name(name, "recipe") == name
