"""Checkpoints: there and back, and everything that is not one."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from rnode_plugin import get_recipe, load_flow
from rnode_plugin.errors import CheckpointError, ConfigError
from rnode_plugin.recipes.recipe import Recipe
from rnode_plugin.training.checkpoints import (
    export_flow,
    find_checkpoint,
    header_with,
    load_with_recipe,
    read_checkpoint,
    save_flow,
)


@pytest.fixture
def recipe() -> Recipe:
    return get_recipe("digits").override(["model.hidden=4", "solver.step=none"])


@pytest.fixture
def file(recipe: Recipe, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    flow = recipe.build_flow()
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_flow(flow, tmp_path / "flow.ckpt", recipe=recipe)
    torch.save(flow.state_dict(), tmp_path / "weights.pt")
    return tmp_path / "flow.ckpt"


def test_there_and_back(file: Path, recipe: Recipe) -> None:
    flow, found = load_with_recipe(file)
    assert found == recipe
    assert flow.solver == recipe.test_solver
    assert not flow.training
    for name, tensor in torch.load(file.parent / "weights.pt").items():
        assert torch.equal(flow.state_dict()[name], tensor)


def test_a_run_folder_means_its_best_checkpoint_else_its_last(file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*expected .*best\.ckpt"):
        find_checkpoint(run)
    last = run / "checkpoints" / "last.ckpt"
    last.write_bytes(file.read_bytes())
    assert find_checkpoint(run) == last
    best = run / "checkpoints" / "best.ckpt"
    best.write_bytes(file.read_bytes())
    assert find_checkpoint(run) == best
    assert find_checkpoint(run, prefer="last.ckpt") == last
    load_flow(run)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load_flow(tmp_path / "nothing.ckpt")


@pytest.mark.parametrize("size", [0, 1, 100, 5000, -1])
def test_truncated(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_flow(file)


@pytest.mark.parametrize("contents", [b"hello", b"\x89PNG\r\n\x1a\n", b"PK\x03\x04nonsense"])
def test_not_a_checkpoint(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "x.ckpt").write_bytes(contents)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_flow(tmp_path / "x.ckpt")


def test_foreign(tmp_path: Path) -> None:
    for contents in ({"state_dict": {}}, [1, 2], {"rnode_plugin": 1, "state_dict": {}}, torch.zeros(3)):
        torch.save(contents, tmp_path / "x.ckpt")
        with pytest.raises(CheckpointError, match="holds no recipe"):
            load_flow(tmp_path / "x.ckpt")


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_the_file_is_executed(file: Path, tmp_path: Path) -> None:
    contents = read_checkpoint(file)
    torch.save({**contents, "extra": _Bomb(tmp_path / "ran")}, file)
    with pytest.raises(CheckpointError, match="could run code"):
        load_flow(file)
    file.write_bytes(pickle.dumps(_Bomb(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="not a zip"):
        load_flow(file)
    assert not (tmp_path / "ran").exists()


def test_another_format_names_the_version_that_wrote_it(file: Path) -> None:
    contents = read_checkpoint(file)
    contents["rnode_plugin"] = {**contents["rnode_plugin"], "format": 99, "version": "7.0"}
    torch.save(contents, file)
    with pytest.raises(CheckpointError, match=r"rnode-plugin 7\.0 in format 99"):
        load_flow(file)


def test_a_recipe_of_another_time(file: Path) -> None:
    contents = read_checkpoint(file)
    contents["rnode_plugin"]["recipe"]["model"]["colour"] = "red"
    torch.save(contents, file)
    with pytest.raises(CheckpointError, match=r"the recipe in .*unknown setting 'model.colour'"):
        load_flow(file)


def test_weights_of_another_model(file: Path, recipe: Recipe) -> None:
    contents = {**read_checkpoint(file), **header_with(recipe.override(["model.hidden=5"]))}
    torch.save(contents, file)
    with pytest.raises(CheckpointError, match="does not fit the model of its recipe"):
        load_flow(file)


def test_a_folder_that_cannot_be_made(file: Path, recipe: Recipe) -> None:
    with pytest.raises(CheckpointError, match="cannot write"):
        save_flow(recipe.build_flow(), file / "below" / "flow.ckpt", recipe=recipe)


# safetensors ---------------------------------------------------------------------------------------------------


def test_export_holds_weights_and_recipe(file: Path, recipe: Recipe, tmp_path: Path) -> None:
    from safetensors import safe_open

    out = tmp_path / "deep" / "model.safetensors"
    assert export_flow(file, out) == (file, recipe)
    flow, found = load_with_recipe(out)
    assert found == recipe
    for name, tensor in load_flow(file).state_dict().items():
        assert torch.equal(flow.state_dict()[name], tensor)
    x = torch.rand(2, 1, 8, 8)
    noise = flow.draw_noise(2)
    assert torch.equal(flow(x, noise=noise).z, load_flow(file)(x, noise=noise).z)
    with safe_open(out, framework="pt") as stranger:  # the names that the module itself uses
        assert set(stranger.keys()) == set(flow.state_dict())
        assert json.loads(stranger.metadata()["rnode_plugin"])["recipe"] == recipe.to_plain()


def test_export_refuses_another_suffix(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must end in \.safetensors, not .*model\.pt"):
        export_flow(file, tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()


@pytest.mark.parametrize("size", [0, 7, 500, -1])
def test_a_truncated_export(file: Path, tmp_path: Path, size: int) -> None:
    out = tmp_path / "model.safetensors"
    export_flow(file, out)
    out.write_bytes(out.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="cannot be read, it is truncated"):
        load_flow(out)


def test_a_safetensors_file_of_somebody_else(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for metadata in (None, {"rnode_plugin": '"text"'}, {"rnode_plugin": "{}"}):
        save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors", metadata=metadata)
        with pytest.raises(CheckpointError, match="holds no recipe"):
            load_flow(tmp_path / "x.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors", metadata={"rnode_plugin": "{"})
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_flow(tmp_path / "x.safetensors")
