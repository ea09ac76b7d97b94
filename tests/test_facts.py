"""Data have the identity of all their samples: a run is resumed on its own data alone, and commands name others."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as L
from image_files import random_images, write_picture
from tiny_runs import as_options, rnode, run, tiny_recipe
from torch.utils.data import DataLoader

from rnode_plugin import ImageDataModule, get_recipe, load_flow
from rnode_plugin.experiments.data import ImageData, Table, folders, get_dataset, identity
from rnode_plugin.experiments.data.batches import ArrayDataset, keep_batch
from rnode_plugin.experiments.data.facts import Facts, doubt
from rnode_plugin.experiments.data.identity import of_files, of_samples
from rnode_plugin.experiments.data.tables import split_rows
from rnode_plugin.experiments.training.checkpoints import facts_of, load_with_recipe, read_checkpoint, save_flow
from rnode_plugin.experiments.training.experiment import Experiment
from rnode_plugin.experiments.training.module import RnodeModule
from rnode_plugin.experiments.training.step import loss_of

IMAGES = random_images(260, (1, 8, 8))
TRAIN, HELD_OUT = 100, 20  # pictures of the sorted folder
ROWS = np.random.RandomState(0).randn(200, 3)

# hashes --------------------------------------------------------------------------------------------------------


def test_samples_have_the_hash_of_shapes_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_CHUNK", 7)  # whose border lies inside
    rows = np.array([[1.5, 0.0], [-2.0, 3.0]] * 5)
    for samples in (IMAGES[:20], rows):
        expected = hashlib.sha256(str(samples.shape).encode() + samples.tobytes()).hexdigest()
        assert of_samples(samples) == expected[:16]
    same = (rows.astype(np.float32), rows.astype(">f8"), np.asfortranarray(rows))
    assert {of_samples(each) for each in same} == {of_samples(rows)}
    assert of_samples(rows[:5], rows[5:]) != of_samples(rows[:6], rows[6:]), "the border is part of a split"
    assert of_samples(IMAGES) != of_samples(IMAGES.reshape(260, 1, 4, 16))


def test_files_have_the_hash_of_names_and_contents(tmp_path: Path) -> None:
    names = ["a.png", "b/c.png"]
    for folder, change in (("x", ""), ("y", ""), ("z", "!")):
        (tmp_path / folder / "b").mkdir(parents=True)
        for name in names:
            (tmp_path / folder / name).write_text(name + (change if name == names[1] else ""))
    expected = of_files(tmp_path / "x", names)
    assert of_files(tmp_path / "y", names) == expected, "a copy is the same data"
    assert expected not in (of_files(tmp_path / "z", names), of_files(tmp_path / "x", names[::-1]))
    assert of_files(tmp_path / "x", names[:1]) != expected


def test_the_hash_of_files_is_kept_until_one_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file, reads = tmp_path / "a.png", []
    usual = identity._of_contents

    def counted(folder: Path, names: list[str]) -> str:
        reads.append(names)
        return usual(folder, names)

    monkeypatch.setattr(identity, "_of_contents", counted)

    def hashed(*, is_settled: bool) -> str:
        now = max(file.stat().st_mtime_ns, file.stat().st_ctime_ns) + (3 if is_settled else 1) * 10**9
        monkeypatch.setattr(identity, "time", SimpleNamespace(time_ns=lambda: now))
        return of_files(tmp_path, ["a.png"])

    file.write_text("one")
    first = hashed(is_settled=False)
    assert not (tmp_path / "cache").exists(), "it may change again within the resolution of the clock"
    assert [hashed(is_settled=True) for _ in range(3)] == [first] * 3
    assert len(reads) == 2
    before = file.stat()
    file.write_text("two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # ctime shows the change
    second = hashed(is_settled=True)
    assert second != first
    (kept,) = [each for each in (tmp_path / "cache" / "rnode-plugin").iterdir() if each.read_text() == second]
    kept.write_text("cut off")
    assert hashed(is_settled=True) == second
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # which is no folder
    assert hashed(is_settled=True) == second


@pytest.mark.parametrize("place", [0, 63, 159])
@pytest.mark.parametrize("part", ["train", "val"])
def test_each_image_counts(place: int, part: str) -> None:
    parts = {"train": IMAGES[:160], "val": IMAGES[100:]}
    data = ImageData("mine", parts["train"], parts["val"], shape=(1, 8, 8))
    changed = parts[part].copy()
    changed[place] ^= 1
    now = dataclasses.replace(data, identity=("", ""), **{part: changed})
    assert [a == b for a, b in zip(data.identity, now.identity, strict=True)] == [part == "val", part == "train"]
    assert data.limit(train=10, val=3).identity == data.identity


def test_an_array_may_offer_its_identity() -> None:
    class Mine(np.ndarray):
        def identity(self) -> str:
            return "version 3"

    data = ImageData("mine", train=IMAGES.view(Mine), val=IMAGES[:5], shape=(1, 8, 8))
    assert data.identity == ("version 3", of_samples(IMAGES[:5]))


def table(rows: np.ndarray = ROWS, **split: Any) -> Table:
    options = {"validation": 0.1, "held_out": 0.2, "seed": 0, **split}
    return split_rows("mine", tuple("abc"), rows, **options).single()


@pytest.mark.parametrize(("rows", "split", "same"), [
    (ROWS, {}, (True, True)),
    (ROWS.astype(np.float32), {}, (False, False)),
    (ROWS, {"seed": 1}, (False, False)),
    (ROWS, {"validation": 0.2}, (False, True)),  # the border between training and validation counts
    (ROWS, {"held_out": 0.3}, (False, False)),
    (ROWS[::-1], {}, (False, False)),
    (np.concatenate([ROWS, ROWS[:2]]), {}, (False, False)),
])  # fmt: skip
def test_rows_and_their_split_count(rows: np.ndarray, split: dict[str, Any], same: tuple[bool, bool]) -> None:
    pairs = zip(table().identity, table(rows, **split).identity, strict=True)
    assert tuple(one == other for one, other in pairs) == same


# folders -------------------------------------------------------------------------------------------------------


def in_parts(where: Path) -> Path:
    """Write the pictures into ``train/`` and ``val/``."""
    for number in range(TRAIN + HELD_OUT):
        part = "train/a" if number < TRAIN else "val/b"
        write_picture(where / f"{part}{number % TRAIN:03}.png", IMAGES[number])
    return where


def load(root: Path) -> ImageData:
    return get_dataset("folder", root=str(root), channels=None if (root / "train.npy").exists() else 1)


def moved(root: Path) -> None:
    (root / "train" / "a000.png").rename(root / "val" / "a000.png")


def one_more(root: Path) -> None:
    write_picture(root / "train" / "z.png", IMAGES[-1])


def replaced(root: Path) -> None:
    write_picture(root / "val" / "b011.png", IMAGES[-1])


@pytest.mark.parametrize("is_in_memory", [True, False])
@pytest.mark.parametrize(("change", "same"), [
    (lambda root: root.rename(root.with_name("renamed")), (True, True)),
    (moved, (False, False)), (one_more, (False, True)), (replaced, (True, False)),
])  # fmt: skip
def test_pictures_count_by_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], Path | None],
    same: tuple[bool, bool], is_in_memory: bool,
) -> None:  # fmt: skip
    if not is_in_memory:
        monkeypatch.setattr(folders, "_IN_MEMORY_BYTES", 0)
    root = in_parts(tmp_path / "faces")
    before = load(root).identity
    now = load(change(root) or root).identity
    assert tuple(one == other for one, other in zip(before, now, strict=True)) == same


def test_arrays_count_by_their_files(tmp_path: Path) -> None:
    for part, images in (("train", IMAGES[:TRAIN]), ("val", IMAGES[TRAIN:])):
        np.save(tmp_path / f"{part}.npy", images)
    before = load(tmp_path).identity
    assert load(Path(shutil.copytree(tmp_path, tmp_path / "copy"))).identity == before
    changed = IMAGES[:TRAIN].copy()
    changed[70] ^= 1
    np.save(tmp_path / "train.npy", changed)
    assert [a == b for a, b in zip(before, load(tmp_path).identity, strict=True)] == [False, True]


# what is said --------------------------------------------------------------------------------------------------

OTHERS, UNKNOWN = "are others than those of the training", "it is not known whether"


def test_doubt_asks_all_data_of_the_weights() -> None:
    here, more, other = (
        ImageData("mine", train=IMAGES[a:b], val=IMAGES[c:d], shape=(1, 8, 8))
        for a, b, c, d in ((0, 90, 200, 260), (0, 99, 200, 260), (0, 90, 190, 250))
    )
    cases = [
        (None, UNKNOWN),
        (Facts.of(here), UNKNOWN),
        (Facts.of(here, trained_on=()), None),
        (Facts.of(here, trained_on=[here.identity]), None),
        (Facts.of(more, trained_on=[here.identity]), None),  # which hold out the same images
        (Facts.of(other, trained_on=()), OTHERS),
        (Facts.of(other), OTHERS),
        (Facts.of(here, trained_on=[other.identity, more.identity]), OTHERS),
    ]
    for facts, expected in cases:
        line = doubt(facts, here)
        assert line is None if expected is None else line is not None and expected in line


def test_repeated_samples_are_counted() -> None:
    twice = ImageData("mine", train=IMAGES[:100], val=IMAGES[95:115], shape=(1, 8, 8))
    assert twice.described().endswith("5 of 20 held-out images equal a training image")
    other = dataclasses.replace(twice, val=IMAGES[100:120], identity=("", ""))
    assert "equal" not in other.described()


# files and runs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
def test_a_file_has_the_facts(tmp_path: Path, name: str) -> None:
    recipe = get_recipe("digits").override(["model.hidden=4"])
    for before in (None, (), (("1", "2"), ("3", "4"))):
        facts = Facts("5", "6", ((0.5, 1.0),), before)
        save_flow(recipe.build_flow(), tmp_path / name, recipe=recipe, facts=facts)
        found = load_with_recipe(tmp_path / name)[2]
        assert found is not None
        assert dataclasses.astuple(found) == dataclasses.astuple(facts)


def trained_on(file: Path) -> tuple[tuple[str, str], ...] | None:
    facts = facts_of(read_checkpoint(file))
    return facts and facts.trained_on


def test_weights_hand_on_what_they_were_trained_on(tmp_path: Path) -> None:
    recipe = tiny_recipe("training.max_steps=2", "training.val_every_steps=2")
    first = run(recipe, tmp_path / "a")
    own = Experiment.of(recipe).data.identity
    assert trained_on(first.run.last) == trained_on(first.run.best) == (own,)
    run(recipe.override(["training.max_steps=4"]), tmp_path / "a", resume=first.run.path)
    assert trained_on(first.run.last) == (own,)
    flow, there, facts = load_with_recipe(first.run.path)
    save_flow(flow, tmp_path / "w.ckpt", recipe=there, facts=facts)
    again = recipe.override([f"training.weights={tmp_path / 'w.ckpt'}", "training.seed=1"])
    assert trained_on(run(again, tmp_path / "b").run.last) == (own,)
    save_flow(flow, tmp_path / "w.ckpt", recipe=there)
    third = run(again, tmp_path / "c")
    assert trained_on(third.run.last) is None
    run(again.override(["training.max_steps=4"]), tmp_path / "c", resume=third.run.path)
    assert trained_on(third.run.last) is None


def test_weights_that_were_put_into_a_flow_are_unknown(tmp_path: Path) -> None:
    """Only weights that are those of the seed were trained on nothing."""
    recipe = tiny_recipe("training.max_steps=2", "training.val_every_steps=2")
    first = run(recipe, tmp_path)
    other = recipe.override(["training.seed=1"])
    assert Experiment.of(other).facts.before == ()
    flow: Any = load_flow(first.run.path)
    replaced = dataclasses.replace(Experiment.of(other), flow=flow, loss=loss_of(flow, other))
    assert replaced.facts.before is None
    loaded = Experiment.of(other)
    loaded.flow.load_state_dict(flow.state_dict())
    assert loaded.facts.before is None


def trainer(**options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(
        accelerator="cpu", devices=1, enable_model_summary=False, **{"num_sanity_val_steps": 0, **quiet, **options}
    )


class _OwnLoader(ImageDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(ArrayDataset(self.data.train), batch_size=20, collate_fn=keep_batch)


def test_a_trainer_of_the_user_keeps_facts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = get_recipe("pictures").override([f"data.root={in_parts(tmp_path / 'a')}", *SETTINGS])
    file = tmp_path / "mine.ckpt"
    moved(in_parts(tmp_path / "b"))
    a, b = (ImageDataModule(recipe.at_root(str(tmp_path / name))) for name in "ab")

    def fit(module: RnodeModule, data: Any, steps: int, **options: Any) -> object:
        mine = trainer(max_steps=steps, limit_val_batches=0)
        mine.fit(module, data, **options)
        mine.save_checkpoint(file)
        return trained_on(file)

    module = RnodeModule(recipe)
    assert fit(module, a, 2) == (a.data.identity,)
    assert capsys.readouterr().err == ""
    assert fit(module, b, 2) == (a.data.identity, b.data.identity)
    assert OTHERS in capsys.readouterr().err
    again = RnodeModule(recipe)
    assert fit(again, b, 4, ckpt_path=file) == (a.data.identity, b.data.identity)
    loaded = RnodeModule(recipe)
    loaded.flow.load_state_dict(module.flow.state_dict())
    assert fit(loaded, a, 2) is None
    assert fit(RnodeModule(recipe), a.train_dataloader(), 2) is None


# commands ------------------------------------------------------------------------------------------------------

SETTINGS = [
    "model.hidden=4", "model.layers=2", "solver.step=0.5", "test_solver.method=midpoint", "test_solver.step=none",
    "data.batch_size=10", "training.max_steps=11", "training.val_every_steps=11", "training.sample_images=0",
]  # fmt: skip
FEW = [*SETTINGS[3:5], "model.hidden=4", "training.max_steps=2", "training.val_every_steps=2"]


def said(*words: object, code: int = 0) -> str:
    """What a command prints on standard error."""
    done = rnode(*words)
    assert done.exit_code == code, done.output
    return done.stderr


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on all pictures in ``faces`` of the same folder."""
    where = tmp_path_factory.mktemp("facts")
    faces = in_parts(where / "faces")
    said(
        "train", "pictures", "--data-root", faces, *as_options(*SETTINGS), "--quiet", "--run-folder", where / "run"
    )
    return where / "run"


def test_each_command_that_reads_weights_names_other_data(trained_run: Path, tmp_path: Path) -> None:
    mine, faces = Path(shutil.copytree(trained_run, tmp_path / "run")), in_parts(tmp_path / "faces")
    root = ["--data-root", faces]
    evaluate = ["eval", mine, *root, "--quiet", "--limit", 2]
    assert said(*evaluate) == ""
    replaced(faces)
    before = {file: file.read_bytes() for file in mine.rglob("*") if file.is_file()}
    line = f"the held-out images of folder {OTHERS}: some of them may have been trained on.\n"
    assert said(*evaluate) == line
    assert line in rnode("diagnose", mine, *root, "--samples", 2).stderr
    refused = said("train", "--resume", mine, *root, "--max-steps", 12, "--quiet", code=1)
    assert "folder has other images than the training of" in refused
    assert "--weights" in refused
    assert {file: file.read_bytes() for file in mine.rglob("*") if file.is_file()} == before
    train = ["train", "pictures", *root, *as_options(*SETTINGS[:-3]), "--max-steps", 1, "--quiet"]
    assert line in said(*train, "--weights", mine, "--run-folder", tmp_path / "new", *as_options(*SETTINGS[-1:]))
    # from then on the run knows both by itself
    assert line in said("eval", tmp_path / "new", "--quiet", "--limit", 2)
    assert line in said(
        "eval", tmp_path / "new", "--quiet", "--limit", 2, "--data-root", trained_run.parent / "faces"
    )


def test_the_last_of_several_runs_knows_all_data(tmp_path: Path) -> None:
    """A, B and C, each from the weights of the one before: C has the data of B, and A had another split."""
    frame = pd.DataFrame(ROWS @ np.random.RandomState(1).randn(3, 3), columns=list("abc"))
    frame.to_csv(tmp_path / "t.csv", index=False)
    train = ["train", "table", "--data-root", tmp_path / "t.csv", *as_options(*FEW), "--quiet", "--run-folder"]
    assert said(*train, tmp_path / "a") == ""
    train[1:1] = as_options("data.split_seed=1")
    for name, before in (("b", "a"), ("c", "b")):
        assert OTHERS in said(*train, tmp_path / name, "--weights", tmp_path / before)
    for words in (("eval", tmp_path / "c", "--quiet"), ("diagnose", tmp_path / "c", "--samples", 10)):
        assert OTHERS in said(*words)
    said("export", tmp_path / "c", tmp_path / "c.safetensors")
    assert OTHERS in said("eval", tmp_path / "c.safetensors", "--quiet")


def test_data_that_were_moved_or_scaled_are_named(trained_run: Path, tmp_path: Path) -> None:
    mine, faces = Path(shutil.copytree(trained_run, tmp_path / "run")), trained_run.parent / "faces"
    moved_to = faces.rename(faces.with_name("moved"))
    for number, image in enumerate(IMAGES[:60].repeat(2, axis=2).repeat(2, axis=3)):
        write_picture(tmp_path / "scaled" / f"{number}.png", image)
    try:
        for command in (["eval", mine], ["diagnose", mine], ["train", "--resume", mine, "--max-steps", 12]):
            assert f"{faces} is not there: name the new path" in said(*command, code=1)
            assert "Give pictures of that size" in said(*command, "--data-root", tmp_path / "scaled", code=1)
        assert said("train", "--resume", mine, "--max-steps", 12, "--data-root", moved_to, "--quiet") == ""
        assert said("eval", mine, "--quiet") == "", "the run has the new place"
    finally:
        moved_to.rename(faces)


def test_a_table_is_the_same_with_more_columns(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(60, 4))
    frame = pd.DataFrame(rows, columns=list("abcd"))
    frame.iloc[:, :3].to_csv(tmp_path / "t.csv", index=False)
    train = ["train", "table", "--data-root", tmp_path / "t.csv", *as_options(*FEW), "--quiet"]
    said(*train, "--run-folder", tmp_path / "run")
    frame[list("dcab")].to_parquet(tmp_path / "t.parquet")
    for command in (["train", "--resume", tmp_path / "run", "--max-steps", 4], ["eval", tmp_path / "run"]):
        assert said(*command, "--data-root", tmp_path / "t.parquet", "--quiet") == ""
    frame[list("abd")].to_csv(tmp_path / "t.csv", index=False)
    assert "unknown column 'c'" in said(*command, "--data-root", tmp_path / "t.csv", code=1)


def test_another_split_of_a_table(tmp_path: Path) -> None:
    setting, train = "held_out=0.3", ["train", "table", *as_options(*FEW), "--quiet", "--runs", tmp_path]
    said(*train)
    refused = said("train", "--resume", tmp_path / "table" / "0", "--set", f"data.{setting}", code=1)
    assert "Leave these settings out, or train a new run without --resume." in refused
    assert OTHERS in said(*train, "--weights", tmp_path / "table" / "0", "--set", f"data.{setting}")
    assert said(*train, "--weights", tmp_path / "table" / "0") == ""
