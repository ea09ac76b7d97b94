"""Checkpoints: there and back; damaged ones are one message, run nothing, and leave no run folder."""

from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from problems import refuses
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_runs import run, tiny_recipe

from rnode_plugin import get_recipe, load_flow
from rnode_plugin.errors import CheckpointError, RnodeError
from rnode_plugin.experiments.data.facts import Facts
from rnode_plugin.experiments.recipes.recipe import Recipe
from rnode_plugin.experiments.training.checkpoints import (
    checksum,
    find_checkpoint,
    header_with,
    load_with_recipe,
    read_checkpoint,
    save_flow,
)

FACTS = Facts(train="1", held_out="2")


@pytest.fixture
def recipe() -> Recipe:
    return get_recipe("digits").override(["model.hidden=4", "solver.step=none"])


@pytest.fixture
def file(recipe: Recipe, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    flow = recipe.build_flow()
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_flow(flow, tmp_path / "flow.ckpt", recipe=recipe, facts=FACTS)
    torch.save(flow.state_dict(), tmp_path / "weights.pt")
    return tmp_path / "flow.ckpt"


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_there_and_back(file: Path, recipe: Recipe, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / "deep" / f"model{suffix}"
    save_flow(load_flow(file), out, recipe=recipe, facts=FACTS)
    flow, found, facts = load_with_recipe(out)
    assert (found, facts) == (recipe, FACTS)
    assert flow.solver == recipe.test_solver
    assert not flow.training
    for name, tensor in torch.load(file.parent / "weights.pt").items():
        assert torch.equal(flow.state_dict()[name], tensor)
    if suffix == ".safetensors":  # the names that the module itself uses
        with safe_open(out, framework="pt") as stranger:
            assert set(stranger.keys()) == set(flow.state_dict())
            assert json.loads(stranger.metadata()["rnode_plugin"])["recipe"] == recipe.to_plain()


def test_a_run_folder_means_its_best_checkpoint_else_its_last(file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with refuses(CheckpointError, "best.ckpt"):
        find_checkpoint(run)
    last = run / "checkpoints" / "last.ckpt"
    last.write_bytes(file.read_bytes())
    assert find_checkpoint(run) == last
    best = run / "checkpoints" / "best.ckpt"
    best.write_bytes(file.read_bytes())
    assert find_checkpoint(run) == best
    assert find_checkpoint(run, prefer="last.ckpt") == last
    load_flow(run)


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_the_file_is_executed(file: Path, tmp_path: Path) -> None:
    contents = read_checkpoint(file)
    torch.save({**contents, "extra": _Bomb(tmp_path / "ran")}, file)
    with refuses(CheckpointError, "code"):
        load_flow(file)
    file.write_bytes(pickle.dumps(_Bomb(tmp_path / "ran")))
    with refuses(CheckpointError, "truncated"):
        load_flow(file)
    assert not (tmp_path / "ran").exists()


# safetensors ---------------------------------------------------------------------------------------------------


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], header: str | None) -> None:
    """A file with any header and its checksum."""
    metadata = None if header is None else {"rnode_plugin": header, "sha256": checksum(tensors, header)}
    tensors = {name: each.contiguous() for name, each in tensors.items()}
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(("name", "setting"), [("digits", "hidden"), ("digits", "layers"), ("table", "blocks")])
@pytest.mark.parametrize("value", [10**9, 10**30])
def test_a_small_file_cannot_ask_for_a_huge_model(tmp_path: Path, name: str, setting: str, value: int) -> None:
    recipe = get_recipe(name)
    header = header_with(recipe)
    header["rnode_plugin"]["recipe"]["model"][setting] = value
    tensors = {key: each.clone() for key, each in recipe.build_flow().state_dict().items()}
    write_safetensors(tmp_path / "x.safetensors", tensors, json.dumps(header["rnode_plugin"]))
    with refuses(CheckpointError, "recipe"):
        load_flow(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("digits", "model.hidden=5", r"fields\.0.* is 5x.* there and 4x.* in the model"),
        ("digits", "model.alpha=0.01", "to another sample"),
        ("table", "model.activation=tanh", "to another sample"),
    ],
)
def test_a_flow_that_its_recipe_does_not_build_is_not_saved(
    name: str, change: str, message: str, tmp_path: Path
) -> None:
    recipe = get_recipe(name).override(["model.hidden=4", *(["data.given=texture"] if name == "table" else [])])
    other = recipe.override([change])
    torch.manual_seed(0)
    flow = other.build_flow().double()
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    before = torch.get_rng_state()
    with refuses(CheckpointError, name):
        save_flow(flow, tmp_path / "flow.ckpt", recipe=recipe)
    assert not list(tmp_path.iterdir())
    save_flow(flow, tmp_path / "flow.ckpt", recipe=other)
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.dtype for p in load_flow(tmp_path / "flow.ckpt").parameters()} == {torch.float32}


def test_any_flipped_bit_is_noticed(file: Path, recipe: Recipe, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    save_flow(load_flow(file), good, recipe=recipe)
    whole, draw = good.read_bytes(), random.Random(0)
    for _ in range(40):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        bad.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            load_flow(bad)


def test_complex_weights_are_refused(file: Path, recipe: Recipe, tmp_path: Path) -> None:
    flow = load_flow(file)
    name, tensor = next(iter(flow.state_dict().items()))
    state = {**flow.state_dict(), name: tensor.to(torch.complex64)}
    header = json.dumps(header_with(recipe)["rnode_plugin"])
    try:
        write_safetensors(tmp_path / "x.safetensors", state, header)
    except KeyError:
        pytest.skip("safetensors before 0.7 knows no complex numbers")
    with refuses(CheckpointError, name):
        load_flow(tmp_path / "x.safetensors")


def test_a_file_that_may_not_be_read_is_not_called_truncated(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:  # since nothing stops a superuser
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("zipfile.ZipFile", refuse)
    with refuses(CheckpointError, "permission"):
        load_flow(file)


def test_foreign(tmp_path: Path) -> None:
    for contents in ({"state_dict": {}}, [1, 2], {"rnode_plugin": 1, "state_dict": {}}, torch.zeros(3)):
        torch.save(contents, tmp_path / "x.ckpt")
        with refuses(CheckpointError, "recipe"):
            load_flow(tmp_path / "x.ckpt")
    for header in (None, '"text"', "{}"):
        write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(2)}, header)
        with refuses(CheckpointError, "recipe"):
            load_flow(tmp_path / "x.safetensors")


# damaged ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "value", "message"), [
    ("state_dict", [1, 2], "does not fit the model"),
    ("state_dict", {}, "does not fit the model"),
    ("rnode_plugin.recipe", None, "the recipe in"),
    ("rnode_plugin.recipe.model.colour", "red", r"the recipe in .*unknown setting 'model.colour'"),
    ("rnode_plugin.recipe.model.hidden", 5, "does not fit the model of its recipe"),
    ("rnode_plugin.recipe.name", "../../../x", "the recipe in .*cannot name a folder"),
    ("rnode_plugin.facts", {"colour": "red"}, "has written facts that cannot be read"),
    ("rnode_plugin.format", 1, "in format 1; this is .*, which reads format 3. Install that version to use it"),
    ("rnode_plugin.format", 99, "in format 99"),
])  # fmt: skip
def test_contents_that_do_not_fit_are_one_message(
    file: Path, tmp_path: Path, place: str, value: Any, message: str
) -> None:
    contents = inner = torch.load(file, weights_only=True)
    *outer, last = place.split(".")
    for name in outer:
        inner = inner[name]
    inner[last] = value
    torch.save(contents, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=message):
        load_flow(tmp_path / "last.ckpt")


@pytest.mark.parametrize("place", ["state_dict", "callbacks"])
def test_a_tensor_claims_no_more_than_its_storage(file: Path, tmp_path: Path, place: str) -> None:
    """A stride of 0 would let a file of a few kilobytes ask for a tensor of any size."""
    contents = torch.load(file, weights_only=True)
    contents.setdefault(place, {})["hashes"] = [torch.zeros(1, dtype=torch.int64).expand(10**9)]
    torch.save(contents, tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").stat().st_size < 100_000
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "last.ckpt")
    assert "1000000000" in str(caught.value.__cause__)


def test_a_model_that_no_memory_holds(tmp_path: Path) -> None:
    with refuses(RnodeError, "--batch-size"):
        run(tiny_recipe("model.hidden=2000000", "model.layers=3"), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
