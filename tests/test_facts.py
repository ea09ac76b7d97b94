"""Held-out samples that were trained on: every command counts them, and a run is not resumed on more of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as L
import torch
from image_files import random_images, write_picture
from PIL import Image
from tiny_runs import as_options, rnode, run, tiny_recipe
from torch.utils.data import DataLoader

from rnode_plugin import ImageDataModule, get_recipe
from rnode_plugin.errors import CheckpointError, ConfigError, DataError
from rnode_plugin.experiments.data import ImageData, Table, folders, get_dataset
from rnode_plugin.experiments.data.batches import ArrayDataset, keep_batch
from rnode_plugin.experiments.data.facts import Facts, Overlap, doubt, refuse_leak
from rnode_plugin.experiments.data.hashes import NONE, are_in, hashes_of, united
from rnode_plugin.experiments.data.tables import split_rows
from rnode_plugin.experiments.recipes.recipe import Recipe
from rnode_plugin.experiments.training.checkpoints import (
    TRAINED_ON,
    facts_of,
    header_with,
    load_with_recipe,
    read_checkpoint,
    save_flow,
)
from rnode_plugin.experiments.training.datamodule import StepOrder
from rnode_plugin.experiments.training.experiment import Experiment
from rnode_plugin.experiments.training.module import RnodeModule

IMAGES = random_images(260, (1, 8, 8))
TRAIN, HELD_OUT = 100, 20  # pictures of the sorted folder

# hashes --------------------------------------------------------------------------------------------------------


def test_a_hash_is_that_of_shape_and_bytes() -> None:
    images, rows = IMAGES[:3], np.array([[1.5, 0.0], [-2.0, 3.0]])
    for samples, each in ((images, images), (rows, rows.astype("<f4"))):
        shape = str(each.shape[1:]).encode()
        digests = [hashlib.blake2b(shape + one.tobytes(), digest_size=8).digest() for one in each]
        assert hashes_of(samples).tolist() == [int.from_bytes(one, "little") for one in digests]
    same = (rows.astype(np.float32), rows.astype(">f8"), np.asfortranarray(rows), np.where(rows == 0, -0.0, rows))
    assert all((hashes_of(each) == hashes_of(rows)).all() for each in same)
    assert len(np.unique(np.concatenate([hashes_of(images), hashes_of(images.reshape(3, 1, 4, 16))]))) == 6


def test_sets_of_hashes_are_sets() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        some, more, asked = (draw.integers(0, 30, draw.integers(0, 20)).astype(np.uint64) for _ in range(3))
        known = united(NONE, some)
        assert united(known, more).tolist() == sorted({*some.tolist(), *more.tolist()})
        assert are_in(asked, known).tolist() == [each in some.tolist() for each in asked.tolist()]


# states and changes --------------------------------------------------------------------------------------------


def pictures(where: Path, images: np.ndarray = IMAGES[: TRAIN + HELD_OUT]) -> Path:
    """Write pictures below ``where``, every other one into a folder there."""
    for number, image in enumerate(images):
        write_picture(where / ("sub" if number % 2 else "") / f"p{number:03}.png", image)
    return where


def in_parts(where: Path) -> Path:
    """Write the pictures into ``train/`` and ``val/``."""
    for number in range(TRAIN + HELD_OUT):
        part = "train/a" if number < TRAIN else "val/b"
        write_picture(where / f"{part}{number % TRAIN:03}.png", IMAGES[number])
    return where


def load(root: Path) -> ImageData:
    return get_dataset("folder", root=str(root), channels=None if (root / "train.npy").exists() else 1)


def trained(data: ImageData | Table) -> Facts:
    """The facts of weights whose steps were given all training samples."""
    return Facts.of(data, trained_on=united(NONE, hashes_of(data.train[:])))


def equal_samples(before: ImageData | Table, now: ImageData | Table) -> int:
    """Count the held-out samples of now that were trained on before, by their bytes."""
    known = {each.tobytes() for each in before.train[:]}
    return sum(each.tobytes() in known for each in now.held_out[:])


def verdict(facts: Facts | None, data: ImageData | Table, *, before: int | None = 0) -> tuple[int | None, str]:
    """The number of held-out samples that were trained on, and ``silent``, ``line`` or ``refused``."""
    overlap = Overlap.of(facts, data)
    said = doubt(facts, data, overlap)
    try:
        refuse_leak(facts, data, overlap, before=before)
    except DataError:
        assert said is not None
        return overlap and overlap.held_out, "refused"
    return overlap and overlap.held_out, "silent" if said is None else "line"


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)


def _numbers(n: int) -> list[int]:
    """Some training pictures of the sorted folder."""
    return np.random.RandomState(5).permutation(TRAIN)[:n].tolist()


def moved(n: int, name: str = "a{:03}.png") -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for k in _numbers(n):
            _move(root / f"train/a{k:03}.png", root / "val" / name.format(k))

    return change


def copied_into_val(n: int) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for k in _numbers(n):
            shutil.copy(root / f"train/a{k:03}.png", root / f"val/a{k:03}.png")

    return change


def swapped(n: int, *, names_stay: bool = False) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for place, k in enumerate(_numbers(n)):
            one, other = root / f"train/a{k:03}.png", root / f"val/b{place:03}.png"
            one.rename(root / "tmp")
            other.rename(one if names_stay else root / f"train/{other.name}")
            (root / "tmp").rename(other if names_stay else root / f"val/{one.name}")

    return change


def parts_exchanged(root: Path) -> None:
    (root / "train").rename(root / "x")
    (root / "val").rename(root / "train")
    (root / "x").rename(root / "val")


def packed(root: Path) -> Path:
    """Both parts of the folder as arrays, which have no names."""
    data, target = load(root), root.parent / "packed"
    target.mkdir()
    for part in ("train", "val"):
        np.save(target / f"{part}.npy", getattr(data, part)[:])
    return target


def packed_with(change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> Any:
    def make(root: Path) -> Path:
        target = packed(root)
        parts = change(*(np.load(target / f"{part}.npy") for part in ("train", "val")))
        for part, images in zip(("train", "val"), parts, strict=True):
            np.save(target / f"{part}.npy", images)
        return target

    return make


def _swap_arrays(train: np.ndarray, val: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([val[:8], train[8:]]), np.concatenate([train[:8], val[8:]])


def in_the_parent(root: Path) -> Path:
    return root.parent


def copied(root: Path) -> Path:
    return Path(shutil.copytree(root, root.parent / "copy" / "of" / "faces"))


def renumbered(root: Path) -> None:
    for number, file in enumerate(sorted(root.rglob("*.png"))):
        file.rename(file.with_name(f"{number:05}.png"))


def turned_round(root: Path) -> None:
    """Each picture gets the name of another one."""
    pictures(root, IMAGES[: TRAIN + HELD_OUT][::-1])


def flattened(root: Path) -> None:
    for file in list((root / "sub").iterdir()):
        file.rename(root / file.name)


def sorted_in_place(first: int) -> Callable[[Path], None]:
    """The first pictures become the held-out ones."""

    def change(root: Path) -> None:
        for number, file in enumerate(sorted(root.rglob("*.png"))):
            _move(file, root / ("val" if number < first else "train") / file.name)

    return change


def sorted_as_before(extra: int) -> Callable[[Path], None]:
    """Folders for both parts as the names have split them, with some training pictures in the wrong one."""

    def change(root: Path) -> None:
        held_out = {image.tobytes() for image in load(root).val[:]}
        wrong = 0
        for file in sorted(root.rglob("*.png")):
            is_held_out = np.asarray(Image.open(file))[None].tobytes() in held_out
            if not is_held_out and wrong < extra:
                wrong, is_held_out = wrong + 1, True
            _move(file, root / ("val" if is_held_out else "train") / file.name)

    return change


def doubled(root: Path) -> None:
    """Copies under other names, of which some are held out and some are not."""
    for file in sorted(root.rglob("*.png")):
        shutil.copy(file, file.with_name(f"copy-{file.name}"))


def deleted(part: str, n: int) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        gone = {image.tobytes() for image in getattr(load(root), part)[:n]}
        for file in list(root.rglob("*.png")):
            if np.asarray(Image.open(file))[None].tobytes() in gone:
                file.unlink()

    return change


def changed_pixels(root: Path) -> None:
    """As another version of a library decodes them."""
    pictures(root, IMAGES[: TRAIN + HELD_OUT] ^ 1)


def encoded_again(root: Path) -> None:
    for file in list(root.rglob("*.png")):
        Image.open(file).save(file.with_suffix(".jpg"), quality=95)
        file.unlink()


# n of the held-out samples, and what is said: `refused` is a line in all commands but `--resume`
CHANGES: list[tuple[Callable[[Path], Path], Callable[[Path], Path | None], int, str]] = [
    (in_parts, lambda root: root, 0, "silent"),
    *((in_parts, moved(n), n, "refused") for n in (1, 3, 5, 10, 20, 80)),
    (in_parts, moved(5, "new-{:03}.png"), 5, "refused"),
    (in_parts, copied_into_val(20), 20, "refused"),
    (in_parts, copied_into_val(TRAIN), TRAIN, "refused"),
    *((in_parts, swapped(n), n, "refused") for n in (1, 5, 20)),
    (in_parts, swapped(15, names_stay=True), 15, "refused"),
    (in_parts, parts_exchanged, TRAIN, "refused"),
    (in_parts, packed_with(lambda train, val: (train, val)), 0, "silent"),
    (in_parts, packed_with(lambda train, val: (train, train[:50])), 50, "refused"),
    (in_parts, packed_with(_swap_arrays), 8, "refused"),
    (in_parts, packed_with(lambda train, val: (train[:90], val ^ 1)), 0, "silent"),
    (pictures, lambda root: root, 0, "silent"),
    (pictures, lambda root: root.rename(root.with_name("renamed")), 0, "silent"),
    (pictures, copied, 0, "silent"),
    (pictures, packed, 0, "silent"),
    (pictures, in_the_parent, 8, "refused"),
    (pictures, lambda root: packed(root.parent / "faces"), 0, "silent"),
    (pictures, lambda root: root / "sub", 5, "refused"),
    (pictures, sorted_in_place(50), 48, "refused"),
    (pictures, sorted_as_before(0), 0, "silent"),
    (pictures, sorted_as_before(30), 30, "refused"),
    (pictures, renumbered, 5, "refused"),
    (pictures, flattened, 5, "refused"),
    (pictures, turned_round, 10, "refused"),
    (pictures, doubled, 13, "refused"),
    (pictures, deleted("val", 5), 0, "silent"),
    (pictures, deleted("train", 20), 0, "silent"),
    (pictures, lambda root: pictures(root, IMAGES), 0, "silent"),  # more of them
    # of changed copies nothing can be known but that they are no longer equal
    (pictures, changed_pixels, 0, "line"),
    (pictures, encoded_again, 0, "line"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_each_held_out_picture_that_was_trained_on_is_counted(tmp_path: Path, number: int) -> None:
    make, change, count, said = CHANGES[number]
    root = make(tmp_path / "pics" / "faces")
    before = load(root)
    now = load(change(root) or root)
    assert (equal_samples(before, now), verdict(trained(before), now)) == (count, (count, said))
    assert verdict(trained(before), now.limit(train=10, val=2)) == (count, said), (
        "of all of them, whatever the limit is"
    )
    assert verdict(None, now) == (None, "silent"), "nothing is known"


def table(rows: np.ndarray, **split: Any) -> Table:
    options = {"validation": 0.1, "held_out": 0.2, "seed": 0, **split}
    return split_rows("mine", tuple("abc"), rows, **options).single()


ROWS = np.random.RandomState(0).randn(200, 3)


@pytest.mark.parametrize(("rows", "split", "said"), [
    (ROWS, {}, "silent"),
    (ROWS.astype(np.float32), {}, "silent"),
    (ROWS, {"seed": 1}, "refused"),
    (ROWS, {"held_out": 0.3}, "line"),  # the rows that chose the weights are held out, and others choose them
    (ROWS, {"held_out": 0.4}, "refused"),
    (ROWS, {"validation": 0.2}, "line"),  # the held-out rows stay, and rows that choose the weights were trained on
    (np.concatenate([ROWS, ROWS[:1] + 1]), {}, "silent"),  # a table that has grown, and holds out no row of before
    (np.concatenate([ROWS, ROWS[:2] + 1]), {}, "refused"),
    (ROWS[::-1], {}, "refused"),
    (np.concatenate([ROWS, ROWS]), {}, "refused"),
    (ROWS + 1, {}, "line"),
])  # fmt: skip
def test_each_held_out_row_that_was_trained_on_is_counted(
    rows: np.ndarray, split: dict[str, Any], said: str
) -> None:
    before, now = table(ROWS), table(rows, **split)
    assert verdict(trained(before), now) == (equal_samples(before, now), said)
    assert verdict(trained(before), now.limit(train=30, val=5, held_out=3))[0] == equal_samples(before, now)
    known = {row.tobytes() for row in before.train}
    overlap = Overlap.of(trained(before), now.limit(train=30, val=5))
    assert overlap is not None
    assert (overlap.val, overlap.all_val) == (sum(row.tobytes() in known for row in now.val), len(now.val))
    # without the hashes, what is said is that they are other data
    unknown = "silent" if (now.checksum == before.checksum) else "refused"
    assert verdict(Facts.of(before), now) == (None, unknown)


def test_rows_that_repeat_by_nature_refuse_no_resume() -> None:
    data = table(np.concatenate([ROWS, ROWS]))
    repeated = equal_samples(data, data)
    assert data.described().endswith(f"{repeated} of 80 held-out rows equal a training row")
    assert repeated > 30
    assert verdict(trained(data), data, before=repeated) == (repeated, "line")
    assert verdict(trained(data), data, before=repeated - 1) == (repeated, "refused")
    assert verdict(trained(data), data, before=None) == (repeated, "refused")


def test_what_is_said() -> None:
    overlap = Overlap(29, 40, 3, 20)
    assert overlap.text("rows") == "29 of 40 held-out rows and 3 of 20 rows that choose the weights"
    data = table(ROWS)
    assert doubt(trained(data), data, overlap) == f"{overlap.text('rows')} of mine were trained on."
    with pytest.raises(DataError, match=r"29 of 40 .* In the data of the run these were 2 held-out ones\. Put the"):
        refuse_leak(trained(data), data, overlap, before=2)
    with pytest.raises(DataError, match="it had 200 rows, and has 201 rows now"):
        refuse_leak(Facts.of(data), table(np.concatenate([ROWS, ROWS[:1]])), None, before=None)
    images = ImageData("mine", train=IMAGES[:100], val=IMAGES[100:120], shape=(1, 8, 8))
    refuse_leak(Facts(rows=3, checksum="of a table"), images, None, before=None)  # a damaged file refuses nothing
    assert Overlap(1, 20).text("images") == "1 of 20 held-out images"
    other = dataclasses.replace(images, train=IMAGES[120:200], pixels=("", ""))
    assert doubt(Facts.of(other), images, None) == (
        "mine has other images than the data of the training, or another split. If the two share images, some that "
        "were trained on may be held out now."
    )
    said = doubt(trained(other), images, Overlap(0, 20))
    assert said is not None
    assert said.startswith("None of 64 training images of mine was trained on before: these are other images, or")
    # images in memory that are in both parts are named at the start of a run
    twice = dataclasses.replace(images, val=IMAGES[95:115], pixels=("", ""))
    assert twice.described().endswith("5 of 20 held-out images equal a training image")
    assert "equal" not in images.described()


@pytest.mark.parametrize("place", [0, 50, 98])
def test_data_have_the_identity_of_all_their_held_out_samples(place: int) -> None:
    """So scores of other ones are not paired, and seeds on them not pooled."""
    data = ImageData("mine", train=IMAGES[100:], val=IMAGES[:100], shape=(1, 8, 8))
    other = IMAGES[:100].copy()
    other[place] ^= 1
    now = ImageData("mine", train=IMAGES[100:], val=other, shape=(1, 8, 8))
    assert Facts.of(data.limit(train=10, val=3)) == Facts.of(data) == trained(data) != Facts.of(now)
    assert Facts.of(data).measured != Facts.of(now).measured


def test_pictures_on_disk_are_decoded_only_where_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = in_parts(tmp_path / "faces")
    in_memory = load(root)
    monkeypatch.setattr(folders, "_IN_MEMORY_BYTES", 0)
    data = load(root)
    assert data.held_out_hashes is None
    assert in_memory.held_out_hashes is not None
    facts, seen = trained(data), []
    assert (facts.trained_on == trained(in_memory).trained_on).all()
    moved(5)(root)
    now = load(root)
    overlap = Overlap.of(
        facts, now.limit(train=3, val=3), workers=2, progress=lambda done, of: seen.append((done, of))
    )
    assert (overlap, seen) == (Overlap(5, 25), [(1, 1)])
    # their identity has the names, the sizes of all files, and the pixels of some
    same = Facts.of(data)
    assert Facts.of(load(in_parts(tmp_path / "copy"))) == same != Facts.of(now)
    longer = tmp_path / "copy" / "val" / "b010.png"
    longer.write_bytes(longer.read_bytes() + b"\0")
    assert Facts.of(load(tmp_path / "copy")) != same


# files ---------------------------------------------------------------------------------------------------------


def test_a_file_has_the_hashes_beside_its_weights(tmp_path: Path) -> None:
    recipe = get_recipe("digits").override(["model.hidden=4"])
    flow, facts = recipe.build_flow(), trained(load(in_parts(tmp_path / "faces")))
    for name in ("a.ckpt", "a.safetensors"):
        save_flow(flow, tmp_path / name, recipe=recipe, facts=facts, trained_on=True)
        loaded, _, found = load_with_recipe(tmp_path / name)
        assert found is not None
        assert found.trained_on is not None
        assert facts.trained_on is not None
        assert (found, found.trained_on.tolist()) == (facts, facts.trained_on.tolist())
        assert loaded.state_dict().keys() == flow.state_dict().keys()
        assert str(facts.trained_on[0]) not in repr(found) + json.dumps(found.to_plain())
        # a membership test of somebody's records: only if it is asked for
        save_flow(flow, tmp_path / name, recipe=recipe, facts=facts)
        found = load_with_recipe(tmp_path / name)[2]
        assert found == facts
        assert found is not None
        assert found.trained_on is None
        with pytest.raises(ConfigError, match="not known which samples"):
            save_flow(flow, tmp_path / name, recipe=recipe, facts=found, trained_on=True)


@pytest.mark.parametrize("damaged", [
    torch.tensor([2, 1]), torch.tensor([1, 1]), torch.tensor([1.5, 2.0]), torch.zeros(2, 2, dtype=torch.int64),
    torch.tensor(1), "no",
])  # fmt: skip
def test_hashes_that_cannot_be_searched_are_refused(damaged: object) -> None:
    contents = header_with(get_recipe("digits"), Facts(trained_on=NONE))
    assert facts_of(contents) == Facts()
    with pytest.raises(CheckpointError, match="facts that cannot be read"):
        facts_of({**contents, TRAINED_ON: damaged})


def test_earlier_files_keep_the_identity_of_their_data() -> None:
    plain = {"pictures": {"0a": "0b"}, "train": "1", "held_out": "2"}
    assert Facts.from_plain(plain) == Facts(train="1", held_out="2")


# the set grows with the steps ----------------------------------------------------------------------------------


def hashes_in(file: Path) -> set[int] | None:
    facts = facts_of(read_checkpoint(file))
    return None if facts is None or facts.trained_on is None else set(facts.trained_on.tolist())


def of_steps(recipe: Recipe, images: np.ndarray, steps: range) -> set[int]:
    """The hashes of the samples that these steps take, by the order that the seed gives."""
    order = StepOrder(
        len(images), batch_size=recipe.data.batch_size, seed=recipe.training.seed,
        accumulate=recipe.training.accumulate,
    )  # fmt: skip
    numbers = [number for step in steps for batch in order.batches_of(step) for number in batch]
    return set(hashes_of(images[numbers]).tolist())


def trainer(**options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(
        accelerator="cpu", devices=1, enable_model_summary=False, **{"num_sanity_val_steps": 0, **quiet, **options}
    )


def test_the_set_is_that_of_the_steps_and_of_no_validation(tmp_path: Path) -> None:
    """Steps of flow matching, steps that are skipped, and validations before, between and after them."""
    recipe = tiny_recipe("training.matching=2", "data.train_images=none")
    module, data = RnodeModule(recipe, to_loggers=False), ImageDataModule(recipe)
    usual = module.loss

    def loss(batch: torch.Tensor, step: int) -> Any:
        terms = usual(batch, step)
        return dataclasses.replace(terms, loss=terms.loss * (float("nan") if step == 2 else 1.0))

    module.loss = loss
    mine = trainer(max_steps=5, val_check_interval=2, num_sanity_val_steps=2)
    mine.fit(module, data)
    mine.validate(module, data, verbose=False)
    mine.save_checkpoint(tmp_path / "a.ckpt")
    assert module.skipped == 1
    found = hashes_in(tmp_path / "a.ckpt")
    assert found == of_steps(recipe, data.data.train[:], range(5))
    assert found is not None
    assert len(found) == 100
    assert not found & set(hashes_of(data.data.val[:]).tolist())


def test_a_run_resumes_its_set_or_that_of_its_weights(tmp_path: Path) -> None:
    recipe = tiny_recipe("data.train_images=none", "training.max_steps=2", "training.val_every_steps=2")
    images = Experiment.of(recipe).data.train[:]
    first = run(recipe, tmp_path / "a")
    known = hashes_in(first.run.last)
    assert known == hashes_in(first.run.best) == of_steps(recipe, images, range(2))
    assert known is not None
    assert first.result.evaluation is not None
    assert first.result.evaluation.overlap == Overlap(0, 297)
    assert run(recipe.override(["training.max_steps=4"]), tmp_path / "a", resume=first.run.path).run == first.run
    known = hashes_in(first.run.last)
    assert known == of_steps(recipe, images, range(4))
    other = recipe.override([f"training.weights={first.run.path}", "training.seed=1"])
    second = run(other, tmp_path / "b")
    assert known is not None
    assert hashes_in(second.run.last) == known | of_steps(other, images, range(2))
    # weights that do not say what they were trained on make what follows unknown
    rnode("export", second.run.path, tmp_path / "c" / "c.safetensors")
    unknown = recipe.override([f"training.weights={tmp_path / 'c' / 'c.safetensors'}"])
    third = run(unknown, tmp_path / "c")
    assert hashes_in(third.run.last) is None
    assert third.result.evaluation is not None
    assert third.result.evaluation.overlap is None
    run(unknown.override(["training.max_steps=4"]), tmp_path / "c", resume=third.run.path)
    assert hashes_in(third.run.last) is None, "the first part is unknown, so the whole is"
    said("report", third.run.path, "--out", tmp_path / "r")
    page = (tmp_path / "r" / "report.html").read_text()
    assert "It is not known how many of the held-out images of “digits” were trained on." in page


class _SecondBatchError(Exception):
    pass


def test_a_step_that_fails_has_both_batches_in_the_set(tmp_path: Path) -> None:
    """The samples of a step that was not finished may have changed nothing, and a set without them would be wrong
    where they have."""
    recipe = tiny_recipe("data.train_images=none", "training.accumulate=2")
    module, data = RnodeModule(recipe, to_loggers=False), ImageDataModule(recipe)
    usual, calls = module.loss, iter(range(100))

    def loss(batch: torch.Tensor, step: int) -> Any:
        if next(calls) == 3:
            raise _SecondBatchError
        return usual(batch, step)

    module.loss = loss
    mine = trainer(max_steps=4, accumulate_grad_batches=2, limit_val_batches=0)
    with pytest.raises(_SecondBatchError):
        mine.fit(module, data)
    mine.save_checkpoint(tmp_path / "a.ckpt")
    assert hashes_in(tmp_path / "a.ckpt") == of_steps(recipe, data.data.train[:], range(2))


class _Brighter(ImageDataModule):
    def on_after_batch_transfer(self, batch: torch.Tensor, dataloader_idx: int) -> torch.Tensor:
        return (batch + torch.randint_like(batch, 3)).clamp(max=16)


class _OwnLoader(ImageDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(ArrayDataset(self.data.train), batch_size=20, collate_fn=keep_batch)


def test_what_a_loader_of_the_user_gives_is_unknown(tmp_path: Path) -> None:
    recipe = tiny_recipe("training.max_steps=5")

    def known(data: ImageDataModule, *, loader: bool = False, flow: Any = None) -> bool:
        mine = trainer(max_steps=5, limit_val_batches=0)
        module = RnodeModule(recipe, flow=flow, to_loggers=False)
        mine.fit(module, data.train_dataloader() if loader else data)
        mine.save_checkpoint(tmp_path / "a.ckpt")
        return hashes_in(tmp_path / "a.ckpt") is not None

    data = ImageDataModule(recipe)
    assert known(data)
    assert not known(data, loader=True)
    assert not known(_OwnLoader(recipe))
    assert not known(_Brighter(recipe)), "more hashes than there are training samples"
    assert not known(data, flow=recipe.build_flow()), "it may have been trained before"


def test_a_trainer_of_the_user_keeps_and_compares_facts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faces = pictures(tmp_path / "pics" / "faces")
    recipe = get_recipe("pictures").override([f"data.root={faces}", *SETTINGS])

    def fit(root: Path, steps: int, **options: Any) -> Facts | None:
        mine = trainer(max_steps=steps, limit_val_batches=0)
        mine.fit(RnodeModule(recipe, to_loggers=False), ImageDataModule(recipe.at_root(str(root))), **options)
        mine.save_checkpoint(tmp_path / "mine.ckpt")
        return load_with_recipe(tmp_path / "mine.ckpt")[2]

    assert fit(faces, 9) == Facts.of(load(faces))
    assert capsys.readouterr().err == ""
    known = hashes_in(tmp_path / "mine.ckpt")
    assert fit(faces.parent, 18, ckpt_path=tmp_path / "mine.ckpt") == Facts.of(load(faces.parent))
    assert "held-out images of folder were trained on." in capsys.readouterr().err
    assert known is not None
    assert known < (hashes_in(tmp_path / "mine.ckpt") or set())


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


def train_on(faces: Path, where: Path) -> Path:
    said("train", "pictures", "--data-root", faces, *as_options(*SETTINGS), "--quiet", "--run-folder", where)
    return where


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on all pictures in ``faces`` of the same folder."""
    folder = tmp_path_factory.mktemp("facts")
    return train_on(in_parts(folder / "faces"), folder / "run")


def test_each_command_that_reads_weights_counts(trained_run: Path, tmp_path: Path) -> None:
    n, of = 10, 30
    mine, faces = Path(shutil.copytree(trained_run, tmp_path / "run")), in_parts(tmp_path / "faces")
    line = f"{n} of {of} held-out images of folder were trained on."
    counted = {"held_out": n, "all_held_out": of, "val": 0, "all_val": 0}
    root = ["--data-root", faces]
    evaluate = ["eval", mine, *root, "--quiet", "--json", "--summary", "--limit", 2]
    assert json.loads(rnode(*evaluate).stdout)["overlap"] == {**counted, "held_out": 0, "all_held_out": HELD_OUT}
    assert said(*evaluate) == ""
    moved(n)(faces)
    before = {file: file.read_bytes() for file in mine.rglob("*") if file.is_file()}
    done = rnode(*evaluate)
    assert (done.stderr.strip(), json.loads(done.stdout)["overlap"]) == (line, counted)
    assert re.search(f"^trained on +{n} of {of} held-out images$", rnode("eval", mine, *root).stdout, re.M)
    assert line in said("diagnose", mine, *root, "--samples", 2, "--quiet", "--out", tmp_path / "d")
    assert json.loads((tmp_path / "d" / "diagnosis.json").read_text())["overlap"] == counted
    refused = said("train", "--resume", mine, *root, "--max-steps", 12, "--quiet", code=1)
    assert f"{line} In the data of the run these were 0 held-out ones." in refused
    assert {file: file.read_bytes() for file in mine.rglob("*") if file.is_file()} == before
    new = tmp_path / "new"
    train = ["train", "pictures", *root, *as_options(*SETTINGS[:-3]), "--max-steps", 1, "--quiet"]
    assert f"{line}\n" in said(*train, "--weights", mine, "--run-folder", new, *as_options(*SETTINGS[-1:]))
    assert json.loads((new / "result.json").read_text())["evaluation"]["overlap"] == counted
    # from then on the run knows it by itself
    assert line in said("eval", new, "--quiet", "--limit", 2)
    said("report", new, "--out", tmp_path / "r")
    page = (tmp_path / "r" / "report.html").read_text()
    assert f"{n} of {of} held-out images of “pictures” were trained on" in page


def test_a_run_that_goes_on_with_other_images_forgets_no_part(tmp_path: Path) -> None:
    """Its first part is known when it goes on with y, and its second part when it comes back to x."""
    images = IMAGES[:120]
    parts = {"x": (images[:100], images[100:]), "y": (np.concatenate([images[:80], images[100:]]), IMAGES[120:140])}
    for name, arrays in parts.items():
        (tmp_path / name).mkdir()
        for part, array in zip(("train", "val"), arrays, strict=True):
            np.save(tmp_path / name / f"{part}.npy", array)
    mine = train_on(tmp_path / "x", tmp_path / "run")
    resume = ["train", "--resume", mine, "--quiet", "--max-steps"]
    assert said(*resume, 31, "--data-root", tmp_path / "y") == ""  # a whole pass
    line = "20 of 20 held-out images of folder were trained on."
    assert said("eval", mine, "--quiet", "--data-root", tmp_path / "x").strip() == line
    assert line in said(*resume, 40, "--data-root", tmp_path / "x", code=1)
    assert said(*resume, 32) == ""


def chain(folder: Path) -> Iterator[tuple[Path, str]]:
    """Runs A, B and C, each from the weights of the one before, and what is said; B has another split."""
    frame = pd.DataFrame(ROWS @ np.random.RandomState(1).randn(3, 3), columns=list("abc"))
    frame.to_csv(folder / "t.csv", index=False)
    train = ["train", "table", "--data-root", folder / "t.csv", *as_options(*FEW), "--quiet", "--run-folder"]
    yield folder / "a", said(*train, folder / "a")
    train[1:1] = as_options("data.split_seed=1")
    for name, before in (("b", "a"), ("c", "b")):
        yield folder / name, said(*train, folder / name, "--weights", folder / before)


def test_the_last_of_several_runs_knows_all_sets(tmp_path: Path) -> None:
    (_, silent), (second, first_line), (third, line) = chain(tmp_path)
    orders = [np.random.RandomState(seed).permutation(len(ROWS)) for seed in (0, 1)]
    held_out, val = (len(set(orders[1][a:b]) & set(orders[0][60:])) for a, b in ((0, 40), (40, 60)))
    counted = f"{held_out} of 40 held-out rows and {val} of 20 rows that choose the weights"
    assert (silent, first_line.count(counted), line.count(counted)) == ("", 1, 1)
    for words in (("eval", second), ("eval", third), ("train", "--resume", second, "--max-steps", 4)):
        assert counted in said(*words, "--quiet")
    assert counted in said("diagnose", third, "--quiet", "--samples", 10)
    assert f"trained on: {counted}" in rnode("diagnose", third, "--quiet", "--samples", 10).stdout
    report = json.loads(rnode("report", third, "--out", tmp_path / "r", "--json").stdout)
    assert list(report["table"]["trained on"].values()) == [counted]
    assert "so its scores promise too much" in (tmp_path / "r" / "report.html").read_text()
    # a file of the weights has the hashes only if they are asked for
    alone = tmp_path / "c.safetensors"
    assert said("export", third, alone) == ""
    assert json.loads(rnode("eval", alone, "--quiet", "--json", "--summary").stdout)["overlap"] is None
    assert re.search("^trained on +unknown rows$", rnode("eval", alone, "--quiet").stdout, re.M)
    assert said("export", third, alone, "--trained-on", "--force") == ""
    assert counted in said("eval", alone, "--quiet")
    train = ["train", "table", "--data-root", tmp_path / "t.csv", *as_options(*FEW, "data.split_seed=1")]
    assert counted in said(*train, "--quiet", "--weights", alone, "--run-folder", tmp_path / "d")


def test_data_that_were_moved_or_scaled_are_named(trained_run: Path, tmp_path: Path) -> None:
    mine, faces = Path(shutil.copytree(trained_run, tmp_path / "run")), trained_run.parent / "faces"
    moved_to = faces.rename(faces.with_name("moved"))
    try:
        for command in (["eval", mine], ["diagnose", mine], ["train", "--resume", mine, "--max-steps", 12]):
            assert f"{faces} is not there: name the new path" in said(*command, code=1)
            scaled = pictures(tmp_path / "scaled", IMAGES[:60].repeat(2, axis=2).repeat(2, axis=3))
            assert "Give pictures of that size" in said(*command, "--data-root", scaled, code=1)
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
    assert "--weights" not in refused, "the new run would hold out rows that the weights were trained on"
    from_weights = said(*train, "--weights", tmp_path / "table" / "0", "--set", f"data.{setting}")
    assert "rows that choose the weights of table were trained on." in from_weights
    assert "were trained on" not in said(*train, "--weights", tmp_path / "table" / "0")
