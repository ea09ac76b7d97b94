"""`data prepare`: what is packed from where, what is refused, and that nothing half-written stays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from image_files import npz_batch, picture_bytes, random_images

from rnode_plugin.cli.lists import data as data_group
from rnode_plugin.errors import ConfigError, DataError
from rnode_plugin.experiments.data import get_dataset, pack
from rnode_plugin.experiments.recipes.recipe import Data, get_recipe

SHAPE = (3, 8, 8)
TRAIN, VAL = random_images(6, SHAPE, 1), random_images(3, SHAPE, 2)
PICTURES = {f"set/{part}/{i}.png": picture_bytes(image)
            for part, images in (("train", TRAIN), ("val", VAL)) for i, image in enumerate(images)}  # fmt: skip


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def assert_packed(target: Path, train: np.ndarray = TRAIN, val: np.ndarray = VAL) -> None:
    for name, images in (("train", train), ("val", val)):
        packed = np.load(target / f"{name}.npy", allow_pickle=False)
        assert packed.dtype == np.uint8
        assert np.array_equal(packed, images)
    assert sorted(path.name for path in target.iterdir()) == ["train.npy", "val.npy"]


def assert_refused(message: str, *sources: Path, target: Path, **options: Any) -> None:
    with pytest.raises((DataError, ConfigError), match=message):
        pack(sources, target, **options)
    assert not target.exists()


def test_the_command_packs_folders_of_the_split(tmp_path: Path) -> None:
    files = {
        **PICTURES,
        "set/.DS_Store": b"left behind",
        "__MACOSX/set/train/._0.png": b"?",
        "labels.csv": b"?",
    }
    source, out = write(tmp_path / "in", files), tmp_path / "out"
    result = CliRunner().invoke(data_group, ["prepare", str(source), str(out), "--size", "8"])
    assert result.exit_code == 0, result.output
    assert f"6 images to train on and 3 held out, 3x8x8, in {out}" in result.stdout
    assert f"{source}: left out 1 file without a known suffix of pictures, such as labels.csv" in result.output
    assert_packed(out)
    data = get_dataset("folder", root=str(out))
    assert np.array_equal(data.train[:], TRAIN)


def test_folders_named_for_their_split(tmp_path: Path) -> None:
    for name, images in (("train_64x64", TRAIN), ("valid_64x64", VAL)):
        write(tmp_path / name, {f"{i}.png": picture_bytes(image) for i, image in enumerate(images)})
    seen: list[Any] = []

    def progress(sources: Sequence[Any]) -> Iterator[Any]:
        seen.extend(sources)
        yield from sources

    pack([tmp_path / "train_64x64", tmp_path / "valid_64x64"], tmp_path / "out", progress=progress)
    assert len(seen) == 9
    assert_packed(tmp_path / "out")


def test_a_folder_holds_out_the_same_pictures_packed_or_not(tmp_path: Path) -> None:
    images = random_images(20, SHAPE)
    write(tmp_path / "in", {f"{i:02}.png": picture_bytes(image) for i, image in enumerate(images)})
    packed = pack([tmp_path / "in"], tmp_path / "out")
    unpacked = get_dataset("folder", root=str(tmp_path / "in"))
    assert np.array_equal(packed.train[:], unpacked.train[:])
    assert np.array_equal(packed.val[:], unpacked.val[:])
    assert len(packed.val) == 2


def test_gray_pictures_stay_gray_and_one_in_color_makes_all_colored(tmp_path: Path) -> None:
    """As in the folder itself, because three equal channels would be another data set with other bits/dim."""
    images = random_images(20, (1, 8, 8))
    gray = write(tmp_path / "in", {f"{i:02}.png": picture_bytes(image) for i, image in enumerate(images)})
    recipe = get_recipe("pictures").override([f"data.root={gray}"])
    assert isinstance(recipe.data, Data)
    assert recipe.data.load().shape == pack([gray], tmp_path / "gray").shape == (1, 8, 8)
    write(gray, {"20.png": picture_bytes(TRAIN[0])})
    assert pack([gray], tmp_path / "color").shape == (3, 8, 8)


@pytest.mark.parametrize("folders", [1, 2])
def test_the_published_imagenet_batches(tmp_path: Path, folders: int) -> None:
    """The published files, with fewer and smaller images."""
    parts = [random_images(5, SHAPE, seed) for seed in range(3)]
    names = ["train_data_batch_1.npz", "train_data_batch_2.npz", "val_data.npz"]
    contents = [npz_batch(part, mean=np.zeros(192), compressed=folders == 2) for part in parts]
    files = dict(zip(names, contents, strict=True))
    sources = [write(tmp_path / "a", files)]
    if folders == 2:
        sources.append(write(tmp_path / "b", {names[2]: files[names[2]]}))
        (tmp_path / "a" / names[2]).unlink()
    result = pack(sources, tmp_path / "out", size=8)
    assert (len(result.train), len(result.val)) == (10, 5)
    assert_packed(tmp_path / "out", np.concatenate(parts[:2]), parts[2])
    assert_refused("3x8x8, which are packed as they are", *sources, target=tmp_path / "small", size=4)


def test_packed_files_are_replaced_on_request_only(tmp_path: Path) -> None:
    source, target = write(tmp_path / "in", PICTURES), write(tmp_path / "out", {"val.npy": b"precious"})
    with pytest.raises(DataError, match=r"val\.npy exist already. Pass --overwrite"):
        pack([source], target)
    assert (target / "val.npy").read_bytes() == b"precious"
    pack([source], target, overwrite=True)
    assert_packed(target)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_run_leaves_the_old_files(tmp_path: Path, error: Any) -> None:
    source = write(tmp_path / "in", PICTURES)
    pack([source], tmp_path / "out")

    def interrupt(sources: Sequence[Any]) -> Iterator[Any]:
        yield from sources[:4]
        raise error

    with pytest.raises((KeyboardInterrupt, DataError)):
        pack([source], tmp_path / "out", size=4, overwrite=True, progress=interrupt)
    assert_packed(tmp_path / "out")


# damaged and foreign sources

IMAGES = random_images(3, SHAPE)
GOOD = npz_batch(IMAGES)


def _tall() -> bytes:
    return picture_bytes(random_images(1, (3, 9, 8))[0])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({**PICTURES, "set/train/7.png": b"garbage"}, r"set/train/7\.png cannot be read"),
        ({**PICTURES, "set/train/z.png": _tall()}, r"differ in size: .*z\.png is 3x9x8.*--size"),
        ({"a.zip": b"hello" * 100}, "neither pictures nor ImageNet batches. Unpack archives"),
        ({"train_data_batch_1.npz": GOOD}, r"together with val_data\.npz"),
        ({"train_data_batch_1.npz": GOOD, "val_data.npz": GOOD, "train/a.png": _tall()}, "no other pictures"),
        *(({"val_data.npz": GOOD, "train_data_batch_1.npz": bad},
           r"train_data_batch_1\.npz (cannot be read|holds float32).*Download")
          for bad in (GOOD[: len(GOOD) // 2], npz_batch(IMAGES, data=np.zeros((3, 192), np.float32)),
                      npz_batch(IMAGES, data=np.zeros((3, 191), np.uint8)))),
    ],
)  # fmt: skip
def test_sources_that_are_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    assert_refused(message, write(tmp_path / "in", files), target=tmp_path / "out")
    assert_refused("nowhere cannot be read: no such", tmp_path / "nowhere", target=tmp_path / "out")


def test_a_folder_that_is_given_twice_would_train_on_held_out_pictures(tmp_path: Path) -> None:
    source = write(tmp_path / "in", PICTURES)
    for other in (source, source / "set"):
        assert_refused("is given twice", source, other, target=tmp_path / "out")


def test_pictures_of_different_sizes_are_scaled(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {**PICTURES, "set/train/z.png": _tall()})
    assert pack([source], tmp_path / "out", size=8, channels=1).shape == (1, 8, 8)
