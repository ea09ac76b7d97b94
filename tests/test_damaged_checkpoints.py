"""Damaged checkpoints: one message, nothing is executed, and no run folder is left."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import run, tiny_recipe

from rnode_plugin import load_flow
from rnode_plugin.errors import CheckpointError, RnodeError
from rnode_plugin.training.checkpoints import read_checkpoint
from rnode_plugin.training.runs import newest_intact

WHOLE = Path(__file__).parent / "old_runs" / "interrupted" / "checkpoints" / "last.ckpt"

Damage = Callable[[dict[str, Any]], object]


def put(value: Any, *path: str) -> Damage:
    """Put ``value`` in the place of what lies under ``path``."""

    def damage(contents: dict[str, Any]) -> None:
        *outer, last = path
        for name in outer:
            contents = contents[name]
        contents[last] = value

    return damage


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


LOOP = ("loops", "fit_loop")
UNREADABLE: list[tuple[Damage, str]] = [
    (put([1, 2], "state_dict"), "does not fit the model"),
    (put({"a": 1}, "state_dict"), "does not fit the model"),
    (put({}, "state_dict"), "does not fit the model"),
    (put(None, "rnode_plugin", "recipe"), "the recipe in"),
    (put({1: 2}, "rnode_plugin", "recipe"), "the recipe in"),
    (put(nested(200), "rnode_plugin", "recipe", "data"), "the recipe in"),
    (put("../../../x", "rnode_plugin", "recipe", "name"), "the recipe in .*cannot name a folder"),
]
UNUSABLE: list[tuple[Damage, str]] = [
    (lambda contents: contents.pop("progress"), "has no progress, it holds weights only"),
    (lambda contents: contents.pop("optimizer_states"), "has no optimizer_states"),
    (put([{}], "optimizer_states"), "does not hold what a run goes on from"),
    (put({}, *LOOP), "does not hold what a run goes on from"),
    (lambda contents: contents.pop("pytorch-lightning_version"), "does not hold what a run goes on from"),
]


@pytest.mark.parametrize(("damage", "message"), UNREADABLE)
def test_what_is_no_flow_is_one_message(tmp_path: Path, damage: Damage, message: str) -> None:
    contents = torch.load(WHOLE, weights_only=True)
    damage(contents)
    torch.save(contents, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=message):
        load_flow(tmp_path / "last.ckpt")


@pytest.mark.parametrize(("damage", "message"), UNUSABLE)
def test_what_a_run_cannot_go_on_from_is_one_message(tmp_path: Path, damage: Damage, message: str) -> None:
    contents = torch.load(WHOLE, weights_only=True)
    damage(contents)
    torch.save(contents, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=message):
        run(tiny_recipe(), tmp_path / "runs", resume=tmp_path / "last.ckpt")
    assert not list(tmp_path.glob("runs/*/*"))


def test_the_checkpoint_before_takes_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "previous.ckpt").write_bytes(WHOLE.read_bytes())
    (tmp_path / "last.ckpt").write_bytes(WHOLE.read_bytes()[:-500])
    assert newest_intact(tmp_path)[0].name == "previous.ckpt"
    assert "last.ckpt cannot be read" in capsys.readouterr().err


def test_nested_metadata_of_safetensors(tmp_path: Path) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors", metadata={"rnode_plugin": deep})
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_flow(tmp_path / "x.safetensors")


def test_a_model_that_no_memory_holds(tmp_path: Path) -> None:
    contents = torch.load(WHOLE, weights_only=True)
    put(2_000_000, "rnode_plugin", "recipe", "model", "hidden")(contents)
    torch.save(contents, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"the model of .* cannot be built: .*memory"):
        load_flow(tmp_path / "x.ckpt")
    with pytest.raises(RnodeError, match=r"no more memory.*Lower --batch-size"):
        run(tiny_recipe("model.hidden=2000000"), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def damaged(data: bytes, numbers: random.Random) -> bytes:
    """One of: bytes changed, a piece cut out, a piece doubled."""
    changed = bytearray(data)
    at = numbers.randrange(len(data))
    kind = numbers.randrange(3)
    if kind == 0:
        for _ in range(numbers.choice([1, 4, 64])):
            changed[numbers.randrange(len(data))] = numbers.randrange(256)
    elif kind == 1:
        del changed[at : at + numbers.choice([1, 100, 10_000])]
    else:
        changed[at:at] = changed[at : at + numbers.choice([1, 100, 10_000])]
    return bytes(changed)


@pytest.mark.parametrize("tries", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_damage_is_read_or_refused(tmp_path: Path, tries: int) -> None:
    """Archives carry checksums that torch does not check, so damage to a tensor's numbers may pass."""
    data, numbers = WHOLE.read_bytes(), random.Random(tries)
    refused = 0
    for _ in range(tries):
        (tmp_path / "x.ckpt").write_bytes(damaged(data, numbers))
        try:
            read_checkpoint(tmp_path / "x.ckpt")
        except CheckpointError:
            refused += 1
    assert refused > tries // 3
