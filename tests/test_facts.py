"""Data that hold out samples which were trained on: each command warns or refuses, and a true copy is silent."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as L
from image_files import random_images, write_picture
from tiny_runs import as_options, rnode

from rnode_plugin import ImageDataModule, get_recipe
from rnode_plugin.errors import DataError
from rnode_plugin.experiments.data import ImageData, Table, get_dataset
from rnode_plugin.experiments.data.facts import Facts, overlap_warning, refuse_other_split
from rnode_plugin.experiments.training.checkpoints import load_with_recipe
from rnode_plugin.experiments.training.module import RnodeModule
from rnode_plugin.experiments.training.plan import Resumed

IMAGES = random_images(130, (1, 8, 8))
FEW, MANY = 60, 100  # less and more than the training pictures whose names are kept


def pictures(where: Path, images: np.ndarray = IMAGES[:FEW]) -> Path:
    """Write pictures below ``where``, every other one into a folder there."""
    for number, image in enumerate(images):
        write_picture(where / ("sub" if number % 2 else "") / f"p{number}.png", image)
    return where


def load(root: Path) -> ImageData:
    return get_dataset("folder", root=str(root), channels=None if (root / "train.npy").exists() else 1)


def verdict(facts: Facts | None, data: ImageData | Table) -> str:
    """``silent``, ``line``, or ``refused`` where a run would be resumed."""
    doubt = overlap_warning(facts, data)
    try:
        refuse_other_split(facts, data)
    except DataError:
        assert doubt is not None
        return "refused"
    return "silent" if doubt is None else "line"


def trained_and_held_out(before: ImageData, now: ImageData) -> int:
    """Count the held-out pictures of now that were trained on before."""
    trained = {image.tobytes() for image in before.train[:]}
    return sum(image.tobytes() in trained for image in now.val[:])


# each changes the folder `faces` of the training, or makes another one, and returns the folder to read


def _used(faces: Path) -> np.ndarray:
    return IMAGES[: len(list(faces.rglob("*.png")))]


def _copied(faces: Path) -> Path:
    return Path(shutil.copytree(faces, faces.parent / "copy" / "of" / "faces"))


def _packed(faces: Path) -> Path:
    """Both parts of the folder as arrays, which have no names."""
    data, target = load(faces), faces.parent / "packed"
    target.mkdir()
    for part in ("train", "val"):
        np.save(target / f"{part}.npy", getattr(data, part)[:])
    return target


def _parent_copied(faces: Path) -> Path:
    return Path(shutil.copytree(faces, faces.parent / "backup" / "faces")).parent


def _parent_packed(faces: Path) -> Path:
    return _packed(faces.parent)


def _sorted_in_place(faces: Path) -> Path:
    for number, file in enumerate(sorted(faces.rglob("*.png"))):
        place = faces / ("val" if number < 20 else "train") / file.relative_to(faces)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.rename(place)
    return faces


def _one_folder_deeper(faces: Path) -> Path:
    """The name of this folder is left out when names are compared, and counts when they are split."""
    faces.rename(faces.with_name("inner"))
    faces.mkdir()
    faces.with_name("inner").rename(faces / "train")
    return faces


def _renumbered(faces: Path) -> Path:
    for number, file in enumerate(sorted(faces.rglob("*.png"))):
        file.rename(file.with_name(f"{number:05}.png"))
    return faces


def _turned_round(faces: Path) -> Path:
    """Each picture gets the name of another one."""
    return pictures(faces, _used(faces)[::-1])


def _flattened(faces: Path) -> Path:
    for file in list((faces / "sub").iterdir()):
        file.rename(faces / file.name)
    return faces


def _fewer(faces: Path) -> Path:
    for file in sorted(faces.rglob("*.png"))[:10]:
        file.unlink()
    return faces


@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.parametrize(("change", "expected"), [
    (lambda faces: faces, "silent"),
    (lambda faces: faces.rename(faces.with_name("renamed")), "silent"),
    (_copied, "silent"),
    (_packed, "silent"),
    (lambda faces: faces.parent, "refused"),
    (_parent_copied, "refused"),
    (_parent_packed, "line"),
    (lambda faces: faces / "sub", "refused"),
    (_sorted_in_place, "refused"),
    (_one_folder_deeper, "refused"),
    (_renumbered, "refused"),
    (_flattened, "refused"),
    (_turned_round, "line"),
    (_fewer, "line"),
    (lambda faces: pictures(faces, IMAGES), "silent"),  # more of them
    (lambda faces: pictures(faces, _used(faces) ^ 1), "line"),  # decoded otherwise
    (lambda faces: pictures(faces, IMAGES ^ 1), "line"),  # both
    (lambda faces: pictures(faces, _used(faces) // 2), "line"),  # replaced
])  # fmt: skip
def test_no_picture_that_was_trained_on_is_called_held_out_in_silence(
    tmp_path: Path, change: Callable[[Path], Path], expected: str, count: int
) -> None:
    faces = pictures(tmp_path / "pics" / "faces", IMAGES[:count])
    before = load(faces)
    facts = Facts.from_plain(Facts.of(before.limit(10, 2)).to_plain())
    now = load(change(faces))
    assert verdict(facts, now) == expected
    assert expected != "silent" or not trained_and_held_out(before, now)
    assert verdict(None, now) == "silent", "no comparison without facts"


def test_a_training_picture_that_is_moved_to_the_held_out_ones_is_named(tmp_path: Path) -> None:
    faces = _sorted_in_place(pictures(tmp_path / "faces"))
    facts = Facts.of(load(faces))
    picture = next((faces / "train").glob("*.png"))
    picture.rename(faces / "val" / picture.name)
    with pytest.raises(DataError, match=f"trained on are held out now, such as {picture.name}.*as they were"):
        refuse_other_split(facts, load(faces))
    assert overlap_warning(facts, load(faces)) is not None


def test_pictures_that_a_resumed_run_was_given_are_known_to_be_trained_on(tmp_path: Path) -> None:
    faces = _sorted_in_place(pictures(tmp_path / "faces"))
    first = Resumed(tmp_path, 0, 0.0, Facts.of(load(faces)), None)
    for number, image in enumerate(IMAGES[FEW : FEW + 5]):
        write_picture(faces / "train" / f"new{number}.png", image)
    more = load(faces)
    second = Resumed(tmp_path, 0, 0.0, first.facts_with(Facts.of(more), more), None)
    for picture in ("new0.png", next((faces / "train").glob("p*.png")).name):  # of the second part and of the first
        (faces / "train" / picture).rename(faces / "val" / picture)
        with pytest.raises(DataError, match=f"trained on are held out now, such as {picture}"):
            refuse_other_split(second.facts, load(faces))
        (faces / "val" / picture).rename(faces / "train" / picture)
    assert verdict(second.facts, load(faces)) == "silent"


def test_a_deleted_picture_whose_name_a_held_out_one_has_too_was_not_moved(tmp_path: Path) -> None:
    for part, images in (("train", IMAGES[:FEW]), ("val", IMAGES[FEW : FEW + 20])):
        for number, image in enumerate(images):
            write_picture(tmp_path / part / f"{number}.png", image)
    facts = Facts.of(load(tmp_path))
    (tmp_path / "train" / "3.png").unlink()
    assert verdict(facts, load(tmp_path)) == "line"
    assert "under other names" in (overlap_warning(facts, load(tmp_path)) or "")


@pytest.mark.parametrize("place", [0, 50, 98])
def test_images_without_names_are_compared_from_first_to_last(place: int) -> None:
    train, val = IMAGES[:MANY], IMAGES[MANY:]
    other = train.copy()
    other[place] ^= 1
    before, now = (ImageData("mine", train=each, val=val, shape=(1, 8, 8)) for each in (train, other))
    assert (verdict(Facts.of(before), before), verdict(Facts.of(before), now)) == ("silent", "line")


# commands ------------------------------------------------------------------------------------------------------

SETTINGS = [
    "model.hidden=4", "model.layers=2", "solver.step=0.5", "test_solver.method=midpoint", "test_solver.step=none",
    "data.batch_size=10", "training.max_steps=2", "training.val_every_steps=2", "training.sample_images=0",
]  # fmt: skip
OTHER = "The weights were trained on other images, or on these under other names."


def said(*words: object, code: int = 0) -> str:
    """What a command prints on standard error."""
    done = rnode(*words)
    assert done.exit_code == code, done.output
    return done.stderr


def trained(faces: Path, runs: Path) -> Path:
    said("train", "pictures", "--data-root", faces, *as_options(*SETTINGS), "--quiet", "--run-folder", runs)
    return runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the pictures in ``pics/faces`` of the same folder."""
    folder = tmp_path_factory.mktemp("facts")
    return trained(pictures(folder / "pics" / "faces"), folder / "run")


def test_each_command_that_reads_weights_warns(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, copy = run.parent / "pics", shutil.copytree(run.parent / "pics" / "faces", tmp_path / "copy")
    alone = tmp_path / "alone.safetensors"
    said("export", run, alone)
    train = ["train", "pictures", *as_options(*SETTINGS), "--quiet", "--runs", tmp_path / "runs", "--weights"]
    for weights in (run, run / "checkpoints" / "last.ckpt", alone):
        assert said("eval", weights, "--data-root", copy, "--quiet") == ""
        assert OTHER in said("eval", weights, "--data-root", parent, "--quiet")
    # a report would show a diagnosis in the folder of the run as one on its own data
    monkeypatch.chdir(tmp_path)
    other = _packed(Path(shutil.copytree(copy, tmp_path / "other")))
    np.save(other / "val.npy", np.load(other / "val.npy") ^ 1)  # the same training pictures
    places = ((copy, run), (parent, tmp_path / "diagnosis"), (other, tmp_path / "diagnosis-1"))
    for root, folder in places:
        line = rnode("diagnose", run, "--samples", 2, "--data-root", root, "--quiet").stderr
        assert (OTHER in line, (folder / "diagnosis.json").exists()) == (root == parent, True)
    assert said(*train, alone, "--data-root", copy) == ""
    assert f"{alone}: {OTHER}" in said(*train, alone, "--data-root", parent)


def test_a_run_is_not_resumed_on_another_split(run: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(run, tmp_path / "run"))
    before = {file: file.read_bytes() for file in mine.rglob("*") if file.is_file()}
    resume = ["train", "--resume", mine, "--max-steps", 4, "--quiet", "--data-root"]
    assert OTHER in said(*resume, run.parent / "pics", code=1)
    assert {file: file.read_bytes() for file in mine.rglob("*") if file.is_file()} == before
    assert said(*resume, shutil.copytree(run.parent / "pics" / "faces", tmp_path / "copy")) == ""


def test_data_that_were_moved_or_scaled_are_named(run: Path, tmp_path: Path) -> None:
    mine, faces = Path(shutil.copytree(run, tmp_path / "run")), run.parent / "pics" / "faces"
    moved = faces.rename(faces.with_name("moved"))
    try:
        for command in (["eval", mine], ["diagnose", mine], ["train", "--resume", mine, "--max-steps", 4]):
            assert f"{faces} is not there: name the new place" in said(*command, code=1)
            scaled = pictures(tmp_path / "scaled", IMAGES[:FEW].repeat(2, axis=2).repeat(2, axis=3))
            assert "Give pictures of that size" in said(*command, "--data-root", scaled, code=1)
        assert said("train", "--resume", mine, "--max-steps", 4, "--data-root", moved, "--quiet") == ""
        assert said("eval", mine, "--quiet") == "", "the run has the new place"
    finally:
        moved.rename(faces)


def test_a_table_is_the_same_with_more_columns_and_in_another_order(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(60, 4))
    frame = pd.DataFrame(rows, columns=list("abcd"))
    frame.iloc[:, :3].to_csv(tmp_path / "t.csv", index=False)
    settings = as_options("model.hidden=4", *SETTINGS[3:])
    said(
        "train", "table", "--data-root", tmp_path / "t.csv", *settings, "--quiet", "--run-folder", tmp_path / "run"
    )
    frame[list("dcab")].to_parquet(tmp_path / "t.parquet")
    for command in (["train", "--resume", tmp_path / "run", "--max-steps", 4], ["eval", tmp_path / "run"]):
        assert said(*command, "--data-root", tmp_path / "t.parquet", "--quiet") == ""
    frame[list("abd")].to_csv(tmp_path / "t.csv", index=False)
    assert "unknown column 'c'" in said(*command, "--data-root", tmp_path / "t.csv", code=1)


def test_what_a_run_was_first_trained_on_is_not_forgotten(tmp_path: Path) -> None:
    """Packed images have no names, so they are not refused. The next command still warns."""
    faces = pictures(tmp_path / "pics" / "faces")
    mine, packed = trained(faces, tmp_path / "run"), _parent_packed(faces)
    for steps in (4, 6):
        resumed = said("train", "--resume", mine, "--max-steps", steps, "--data-root", packed, "--quiet")
        assert resumed.count(OTHER) == 1
    assert OTHER in said("eval", mine, "--quiet")
    assert said("eval", mine, "--data-root", faces, "--quiet") == ""


def test_a_trainer_of_the_user_keeps_and_compares_facts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faces = pictures(tmp_path / "pics" / "faces")
    recipe = get_recipe("pictures").override([f"data.root={faces}", *SETTINGS])

    def fit(root: Path, steps: int, **options: Any) -> Facts | None:
        trainer = L.Trainer(
            max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(RnodeModule(recipe), ImageDataModule(recipe.at_root(str(root))), **options)
        trainer.save_checkpoint(tmp_path / "mine.ckpt")
        return load_with_recipe(tmp_path / "mine.ckpt")[2]

    facts = Facts.of(load(faces))
    assert fit(faces, 1) == facts
    capsys.readouterr()
    assert fit(faces.parent, 2, ckpt_path=tmp_path / "mine.ckpt") == facts
    assert OTHER in capsys.readouterr().err
    assert fit(faces, 3, ckpt_path=tmp_path / "mine.ckpt") == facts
    more = load(pictures(faces, IMAGES))
    assert fit(faces, 4, ckpt_path=tmp_path / "mine.ckpt") == Facts.of(more) != facts
    assert OTHER not in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["split_seed=1", "validation=0.2", "held_out=0.3"])
def test_another_split_of_a_table(tmp_path: Path, setting: str) -> None:
    settings = as_options("model.hidden=4", *SETTINGS[3:], "training.max_steps=1", "training.val_every_steps=1")
    train = ["train", "table", *settings, "--quiet", "--runs", tmp_path]
    said(*train)
    refused = said("train", "--resume", tmp_path / "table" / "0", "--set", f"data.{setting}", code=1)
    assert "Leave these settings out, or train a new run without --resume." in refused
    assert "--weights" not in refused, "the new run would hold out rows that the weights were trained on"
    from_weights = said(*train, "--weights", tmp_path / "table" / "0", "--set", f"data.{setting}")
    assert "table has other rows than the table of the training, or another split." in from_weights
    assert "table has other rows" not in said(*train, "--weights", tmp_path / "table" / "0")
