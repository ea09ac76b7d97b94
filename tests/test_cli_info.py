"""``rnode-cli info`` tells what a bug report needs, and the shell completes commands and options."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from rnode_plugin import __version__, hookimpl
from rnode_plugin.cli import main


def test_info_as_json_names_versions_threads_and_plugins_in_conflict(monkeypatch, register):
    class Second:
        @hookimpl
        def rnode_register_regularizers(self):
            return {"kinetic": "somewhere.else:kinetic"}

    monkeypatch.setenv("RNODE_PLUGINS_BLOCK", "nobody")
    register(Second(), "second")
    result = CliRunner().invoke(main, ["info", "--json"])
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts["rnode-plugin"] == __version__
    assert facts["torch"] == torch.__version__
    assert {"torchdyn", "pytorch-lightning", "numpy", "python", "platform"} <= facts.keys()
    assert facts["threads"] == torch.get_num_threads()
    assert len(facts["devices"]) >= torch.cuda.device_count()
    assert facts["variables"]["RNODE_PLUGINS_BLOCK"] == "nobody"
    plugins = {plugin["name"]: plugin for plugin in facts["plugins"]}
    assert plugins["builtin"]["status"] == "loaded"
    assert "kinetic" in plugins["second"]["error"]


def test_info_as_text_has_a_row_for_each_fact():
    lines = CliRunner().invoke(main, ["info"]).stdout.splitlines()
    rows = dict(line.split(maxsplit=1) for line in lines if not line.startswith("plugin "))
    assert rows["rnode-plugin"] == __version__
    assert rows["torch"] == torch.__version__
    assert [line for line in lines if line.startswith("plugin builtin") and line.endswith("loaded")]


BASH = shutil.which("bash")


@pytest.mark.skipif(BASH is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [(["tr"], {"train"}), (["train", "digits", "--max-s"], {"--max-steps"}), (["recipes", "sh"], {"show"})],
    ids=["command", "option", "subcommand"],
)
def test_bash_completes(words, expected, tmp_path):
    program = tmp_path / "rnode-cli"  # click asks for completion by a variable with this name in it
    start = "from rnode_plugin.cli import main; main(prog_name='rnode-cli')"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{start}" "$@"\n')
    program.chmod(0o755)
    script = f"""
        source <(_RNODE_CLI_COMPLETE=bash_source rnode-cli)
        complete -p rnode-cli >/dev/null || exit 3
        COMP_WORDS=(rnode-cli {" ".join(words)}); COMP_CWORD={len(words)}
        _rnode_cli_completion rnode-cli
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    done = subprocess.run(
        [str(BASH), "-c", script], env={**os.environ, "PATH": path}, cwd=Path(__file__).parents[1],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == expected
