"""``rnode-cli train RECIPE.json --run-folder FOLDER``: how another program starts a run of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from tiny_runs import rnode, rows, tiny_recipe

from rnode_plugin.errors import ConfigError
from rnode_plugin.recipes.recipe import Recipe, read_recipe


def train(*arguments: object) -> Result:
    return rnode("train", *arguments, "--accelerator", "cpu", "--devices", "1")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "arm.json"
    file.write_text(json.dumps(tiny_recipe("training.max_steps=2").to_plain()))
    return file


def test_the_file_decides_everything_and_the_folder_is_exactly_that(file: Path, tmp_path: Path) -> None:
    run = tmp_path / "deep" / "here"
    done = train(file, "--run-folder", run)
    assert done.exit_code == 0, done.output
    assert json.loads((run / "recipe.json").read_text()) == json.loads(file.read_text())
    assert json.loads((run / "result.json").read_text())["steps"] == 2
    assert sorted(each.name for each in tmp_path.iterdir()) == ["arm.json", "deep"]

    again = train(file, "--run-folder", run)
    assert again.exit_code == 2
    assert "is not empty" in again.output
    assert "--resume" in again.output

    longer = tiny_recipe("training.max_steps=3", "optimizer.lr=1e-3")
    file.write_text(json.dumps(longer.to_plain()))
    refused = train(file, "--resume", run, "--run-folder", tmp_path / "other")
    assert (refused.exit_code, "either run_folder or resume" in refused.output) == (2, True)
    resumed = train(file, "--resume", run)
    assert resumed.exit_code == 0, resumed.output
    assert Recipe.from_plain(json.loads((run / "recipe.json").read_text())) == longer
    assert [row["step"] for row in rows(run) if "train/loss" in row] == ["1", "2", "3"]


@pytest.mark.parametrize("text", [None, "{", "[" * 100_000, "\ud800", "[1]", '{"name": "a"}'])
def test_a_file_that_is_not_a_recipe(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "recipe.json"
    if text is not None:
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError, match="does not hold a recipe"):
        read_recipe(file)


def test_a_regularizer_that_only_another_program_knows(file: Path) -> None:
    plain = json.loads(file.read_text())
    file.write_text(json.dumps({**plain, "regularizers": {"of_the_parent": 0.1}}))
    with pytest.raises(ConfigError, match="unknown regularizer 'of_the_parent'"):
        read_recipe(file)
