"""Checkpoints that can be read and are not what training writes: one message, at reading, and no run folder."""

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
DAMAGES: list[tuple[Damage, str]] = [
    (put(None, "state_dict"), "state_dict"),
    (put([1, 2], "state_dict"), "state_dict"),
    (put({1: torch.zeros(2)}, "state_dict"), "state_dict"),
    (put({"a": 1}, "state_dict"), "state_dict"),
    (put({}, "state_dict"), "does not fit the model"),
    (put(None, "progress"), "progress"),
    (put(-1, "progress", "batches"), "progress"),
    (put(True, "progress", "batches"), "progress"),
    (put("5", "progress", "batches"), "progress"),
    (put(float("nan"), "progress", "seconds"), "progress"),
    (put("fast", "progress", "step_size"), "progress"),
    (lambda contents: contents.pop("optimizer_states"), "optimizer_states is missing"),
    (put([{}], "optimizer_states"), "optimizer_states"),
    (put(None, "lr_schedulers"), "lr_schedulers"),
    (lambda contents: contents.pop("loops"), "loops is missing"),
    (put({}, *LOOP), "loops"),
    (put(None, *LOOP, "epoch_loop.batch_progress"), "loops"),
    (put({}, *LOOP, "epoch_loop.automatic_optimization.optim_progress", "optimizer"), "loops"),
    (put(None, "callbacks"), "callbacks"),
    (put({"best": "low"}, "callbacks", "RunControl"), "callbacks"),
    (lambda contents: contents.pop("pytorch-lightning_version"), "pytorch-lightning_version is missing"),
    (put(None, "rnode_plugin", "recipe"), "the recipe in"),
    (put({1: 2}, "rnode_plugin", "recipe"), "the recipe in"),
    (put(nested(200), "rnode_plugin", "recipe", "data"), "the recipe in"),
    (put("../../../x", "rnode_plugin", "recipe", "name"), "the recipe in .*cannot name a folder"),
]


@pytest.mark.parametrize("number", range(len(DAMAGES)))
def test_one_message_and_no_run_folder(tmp_path: Path, number: int) -> None:
    damage, message = DAMAGES[number]
    contents = torch.load(WHOLE, weights_only=True)
    damage(contents)
    torch.save(contents, tmp_path / "last.ckpt")
    if message.startswith(("state_dict", "does not", "the recipe")):
        with pytest.raises(CheckpointError, match=message):
            load_flow(tmp_path / "last.ckpt")
    if "fit the model" not in message:
        with pytest.raises(RnodeError, match=message):
            run(tiny_recipe(), tmp_path / "runs", resume=tmp_path / "last.ckpt")
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]


def test_the_checkpoint_before_takes_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents = torch.load(WHOLE, weights_only=True)
    torch.save(contents, tmp_path / "previous.ckpt")
    torch.save({**contents, "progress": None}, tmp_path / "last.ckpt")
    assert newest_intact(tmp_path)[0].name == "previous.ckpt"
    assert "progress is not what training writes" in capsys.readouterr().err


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
