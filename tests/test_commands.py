"""The contract of every command, in tables: help, JSON, and requests that are refused, as early as possible."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from problems import refuses
from test_messages import REQUESTS
from tiny_runs import SETTINGS, as_options, rnode

from rnode_plugin.cli.options import check_folder
from rnode_plugin.errors import CheckpointError
from rnode_plugin.plugins.builtin import COMMANDS
from rnode_plugin.plugins.registry import get

QUICK = as_options(*SETTINGS, "training.max_steps=1", "training.val_every_steps=1")
# the arguments of a command with --json, and some keys of its value
JSON: dict[str, tuple[list[str], set[str]]] = {
    "train": (
        ["digits", "--device", "cpu", "--runs", "NEW", "--callback", "tiny_runs:Loud", *QUICK],
        {
            "folder",
            "checkpoint",
            "samples",
            "stopped",
            "steps",
            "planned",
            "training_seconds",
            "processor_seconds",
            "evaluation",
        },
    ),
    "compare": (
        ["digits", "--configuration", "none", "--device", "cpu", "--out", "NEW", *QUICK],
        {"runs", "failed", "html", "figures", "table"},
    ),
    "eval": (
        ["RUN", "--draws", "1", "--limit", "4", "--summary"],
        {"checkpoint", "recipe", "weights", "solver", "samples", "means", "nfe_mean", "penalties", "seconds"},
    ),
    "report": (["RUN", "--out", "NEW"], {"html", "figures", "left_out", "table"}),
    "diagnose": (["RUN", "--samples", "4"], {"checkpoint", "recipe", "samples", "findings", "seed"}),
    "recipes": (["digits"], {"name", "data", "model", "solver", "regularizers", "training"}),
    "regularizers": ([], {"name", "kind", "formula", "cost", "source", "installed_from"}),
}

_WRITES = {"out", "runs", "run_folder", "file", "target"}  # parameters that name what a command writes
_READS = {"run", "resume", "weights", "data_root"}  # and what it reads


ALL = {name: get("commands", name) for section in COMMANDS.values() for name in section}


def _parameters(name: str) -> set[str]:
    return {each.name for each in ALL[name].params if each.name is not None}


@pytest.mark.parametrize("name", ALL)
def test_every_command_has_its_rows(name: str) -> None:
    """A new command, or a new option that names a file, is refused in these tables before it is released."""
    found = _parameters(name)
    rows = {
        kind: [
            words
            for requests in REQUESTS
            if requests.heading.startswith(kind)
            for words in requests.commands
            if f"{words} ".startswith(f"{name} ")
        ]
        for kind in ("requests that", "files that are not", "folders that cannot")
    }
    arguments = {each.name for each in ALL[name].params if isinstance(each, click.Argument)}
    assert rows["requests that"] or not arguments
    assert rows["files that are not"] or not found & _READS
    assert ("as_json" in found) == (name in JSON)
    # `runs` of `report` are runs to read
    writes = {each for each in found & _WRITES if not (each in arguments and each == "runs")}
    for each in writes:
        option = "" if each in arguments else f" --{each.replace('_', '-')} "
        assert any(option in words for words in rows["folders that cannot"]), each


@pytest.mark.parametrize("name", ALL)
def test_help_and_an_unknown_option(name: str) -> None:
    shown = rnode(*name.split(), "--help")
    assert (shown.exit_code, shown.output.startswith("Usage: rnode-cli")) == (0, True)
    assert rnode(*name.split(), "-h").output == shown.output
    assert ALL[name].help
    for each in ALL[name].params:
        if isinstance(each, click.Option) and not each.hidden:
            assert each.help, each.name
            assert each.opts[0] in shown.output
    refused = rnode(*name.split(), "--no-such-option")
    assert (refused.exit_code, refused.output.count("Error:")) == (2, 1), refused.output


@pytest.mark.parametrize("name", JSON)
def test_json_is_one_value_on_the_standard_output(
    finished_run: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    words, keys = JSON[name]
    given = [{"RUN": str(finished_run("images")), "NEW": str(tmp_path / "new")}.get(each, each) for each in words]
    quiet = ["--quiet"] if "quiet" in _parameters(name) else []
    done = rnode(*name.split(), *given, *quiet, "--json")
    assert done.exit_code in ((0, 3) if name == "diagnose" else (0,)), done.output
    found = json.loads(done.stdout)
    assert keys <= set(found[0] if isinstance(found, list) else found)
    assert done.stderr == ("training starts\n" if name == "train" else "")  # by the callback


def test_a_folder_is_checked_without_a_trace(tmp_path: Path) -> None:
    check_folder(tmp_path)
    check_folder(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    refused = [tmp_path / "file", tmp_path / "file" / "a", *([Path("/proc")] if sys.platform == "linux" else [])]
    for each in refused:  # nobody can write into /proc, not even a user whom permissions do not stop
        with refuses(CheckpointError, str(each)):
            check_folder(each)
