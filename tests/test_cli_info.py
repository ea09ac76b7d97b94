"""``rnode-cli info`` shows what a bug report needs, and the shell completes commands, options and values."""

from __future__ import annotations

import json

import pytest
import torch
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from rnode_plugin import __version__, hookimpl
from rnode_plugin.cli import main


def test_info_as_json_names_versions_threads_and_plugins_in_conflict(monkeypatch, register):
    class Second:
        @hookimpl
        def rnode_register_regularizers(self):
            return {"second": "somewhere.else:kinetic"}

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
    assert plugins["second"]["distribution"] == "None None"


def test_info_as_text_has_a_row_for_each_fact():
    lines = CliRunner().invoke(main, ["info"]).stdout.splitlines()
    rows = dict(line.split(maxsplit=1) for line in lines if not line.startswith("plugin "))
    assert rows["rnode-plugin"] == __version__
    assert rows["torch"] == torch.__version__
    assert [line for line in lines if line.startswith("plugin builtin") and line.endswith("loaded")]


@pytest.mark.parametrize(
    ("words", "begun", "expected"),
    [
        ([], "tr", {"train"}),
        (["train", "digits"], "--max-s", {"--max-steps"}),
        (["recipes"], "sh", {"show"}),
        (["train"], "mni", {"mnist", "mnist-fast"}),
        (["recipes", "show"], "cel", {"celebahq256"}),
        (["train", "digits", "--regularizer"], "kin", {"kinetic="}),
        (["exec", "--regularizer"], "st", {"stiffness=", "steer=", "straightness=", "strain="}),
        (["train", "table", "--set"], "data.held", {"data.held_out="}),
        (["train", "digits", "--data"], "fash", {"fashion-mnist"}),
        (["train", "digits", "--device"], "c", {"cpu", "cuda"}),
        (["sample"], "mnist-", {"mnist-pretrained"}),
        (["train", "digits", "--weights"], "mnist-", {"mnist-pretrained"}),
    ],
)
def test_a_shell_completes(words, begun, expected):
    found = ShellComplete(main, {}, "rnode-cli", "_RNODE_CLI_COMPLETE").get_completions(words, begun)
    assert {each.value for each in found} == expected
