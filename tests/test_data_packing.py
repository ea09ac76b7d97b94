"""`data prepare`: what is packed from where, what is refused, and that nothing half-written stays."""

from __future__ import annotations

import numpy as np
import pytest
from click.testing import CliRunner
from image_files import picture_bytes, random_images, write_picture
from packing_sources import SHAPE, assert_nothing, assert_packed, npz_batch, prepare, split_pictures, write_files

from rnode_plugin.cli.lists import data as data_group
from rnode_plugin.data import get_dataset
from rnode_plugin.errors import ConfigError, DataError

# ---- sources


def test_pictures_with_folders_for_the_split(tmp_path):
    files, train, val = split_pictures()
    files["set/.DS_Store"] = files["__MACOSX/set/train/._0.png"] = b"left behind"
    seen = []

    def progress(sources):
        for each in sources:
            seen.append(each)
            yield each

    result = prepare(write_files(tmp_path / "in", files), target=tmp_path / "out", size=8, progress=progress)
    assert (result.train, result.val, result.shape, result.skipped) == (6, 3, SHAPE, [])
    assert len(seen) == 9
    assert_packed(tmp_path / "out", train, val)
    data = get_dataset("folder", root=str(tmp_path / "out"))
    assert np.array_equal(data.train[:], train)


def test_folders_named_for_their_split(tmp_path):
    _, train, val = split_pictures()
    for name, images in (("train_64x64", train), ("valid_64x64", val)):
        write_files(tmp_path / name, {f"{i}.png": picture_bytes(image) for i, image in enumerate(images)})
    prepare(tmp_path / "train_64x64", tmp_path / "valid_64x64", target=tmp_path / "out")
    assert_packed(tmp_path / "out", train, val)


def test_a_folder_holds_out_the_same_pictures_packed_or_not(tmp_path):
    images = random_images(20, SHAPE)
    for i, image in enumerate(images):
        write_picture(tmp_path / "in" / f"{i:02}.png", image)
    prepare(tmp_path / "in", target=tmp_path / "out")
    unpacked, packed = (
        get_dataset("folder", root=str(tmp_path / "in")),
        get_dataset("folder", root=str(tmp_path / "out")),
    )
    assert np.array_equal(packed.train[:], unpacked.train[:])
    assert np.array_equal(packed.val[:], unpacked.val[:])
    assert len(packed.val) == 2


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("folders", [1, 2])
def test_the_published_imagenet_batches(tmp_path, compressed, folders):
    """The published files, with fewer and smaller images."""
    parts = [random_images(5, SHAPE, seed) for seed in range(3)]
    names = ["train_data_batch_1.npz", "train_data_batch_2.npz", "val_data.npz"]
    contents = [npz_batch(part, mean=np.zeros(192), compressed=compressed) for part in parts]
    files = dict(zip(names, contents, strict=True))
    sources = [write_files(tmp_path / "a", files)]
    if folders == 2:
        sources.append(write_files(tmp_path / "b", {names[2]: files[names[2]]}))
        (tmp_path / "a" / names[2]).unlink()
    result = prepare(*sources, target=tmp_path / "out", size=8)
    assert (result.train, result.val) == (10, 5)
    assert_packed(tmp_path / "out", np.concatenate(parts[:2]), parts[2])
    with pytest.raises(ConfigError, match="3x8x8, which are packed as they are"):
        prepare(*sources, target=tmp_path / "small", size=4)


# ---- the target


def test_packed_files_are_replaced_on_request_only(tmp_path):
    files, train, val = split_pictures()
    source, target = write_files(tmp_path / "in", files), tmp_path / "out"
    target.mkdir()
    (target / "val.npy").write_bytes(b"precious")
    with pytest.raises(DataError, match=r"val\.npy exist already. Pass --overwrite"):
        prepare(source, target=target)
    assert (target / "val.npy").read_bytes() == b"precious"
    prepare(source, target=target, overwrite=True)
    assert_packed(target, train, val)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_run_leaves_the_old_files(tmp_path, error):
    files, train, val = split_pictures()
    source = write_files(tmp_path / "in", files)
    prepare(source, target=tmp_path / "out")

    def interrupt(sources):
        yield from sources[:4]
        raise error

    with pytest.raises((KeyboardInterrupt, DataError)):
        prepare(source, target=tmp_path / "out", size=4, overwrite=True, progress=interrupt)
    assert_packed(tmp_path / "out", train, val)


# ---- the command


def test_the_command_packs_and_reports(tmp_path):
    files, train, val = split_pictures()
    source, out = write_files(tmp_path / "in", files | {"set/notes.txt": b"?"}), tmp_path / "out"
    runner = CliRunner()
    command = ["prepare", str(source), str(out), "--size", "8"]
    assert isinstance(runner.invoke(data_group, command).exception, DataError)
    result = runner.invoke(data_group, [*command, "--on-error", "skip"])
    assert result.exit_code == 0, result.output
    assert f"6 images to train on and 3 held out, 3x8x8, 1 file skipped, in {out}" in result.stdout
    assert "set/notes.txt" in result.output
    assert_packed(out, train, val)


# ---- damaged and foreign sources


def test_bad_files_fail_by_name_or_are_skipped_by_name(tmp_path):
    files, train, val = split_pictures()
    files["set/train/notes.txt"] = b"not a picture"
    files["set/train/7.png"] = b"garbage"
    files["set/val/half.png"] = files["set/val/0.png"][:60]
    source = write_files(tmp_path / "in", files)
    with pytest.raises(DataError, match=r"not pictures: .*set/train/notes\.txt\. Remove .*--on-error skip"):
        prepare(source, target=tmp_path / "out")
    assert_nothing(tmp_path / "out")
    result = prepare(source, target=tmp_path / "out", skip=True)
    names = ["set/train/notes.txt", "set/train/7.png", "set/val/half.png"]
    assert result.skipped == [str(source / name) for name in names]
    assert_packed(tmp_path / "out", train, val)
    (source / "set/train/notes.txt").unlink()
    with pytest.raises(DataError, match=r"set/train/7\.png cannot be read.*--on-error skip"):
        prepare(source, target=tmp_path / "other")
    assert_nothing(tmp_path / "other")


def test_pictures_of_different_sizes(tmp_path):
    for i in range(4):
        write_picture(tmp_path / "in" / f"{i}.png", random_images(1, (3, 8 + i // 3, 8))[0])
    with pytest.raises(DataError, match=r"differ in size: .*3\.png is 3x9x8.*--size"):
        prepare(tmp_path / "in", target=tmp_path / "out", skip=True)
    assert_nothing(tmp_path / "out")
    assert prepare(tmp_path / "in", target=tmp_path / "out", size=8).shape == SHAPE


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.zip", r"a\.zip is not a folder\. Unpack"), ("nowhere", "nowhere cannot be read: no such"),
     ("empty", "no pictures and no ImageNet batches in .*Found instead: .*train_data_batch_1")],
)  # fmt: skip
def test_foreign_and_missing_sources(tmp_path, name, message):
    (tmp_path / "a.zip").write_text("hello" * 100)
    write_files(tmp_path / "empty", {"train_data_batch_1": b"a pickled batch, which is not opened"})
    with pytest.raises(DataError, match=message):
        prepare(tmp_path / name, target=tmp_path / "out", skip=True)
    assert_nothing(tmp_path / "out")


_IMAGES = random_images(3, SHAPE)
_GOOD = npz_batch(_IMAGES)


@pytest.mark.parametrize(
    "content",
    [
        _GOOD[: len(_GOOD) // 2],
        npz_batch(_IMAGES, data=np.zeros((3, 192), np.float32)),
        npz_batch(_IMAGES, data=np.zeros((3, 191), np.uint8)),
        npz_batch(_IMAGES, data=np.array([{}, {}])),
    ],
    ids=["half", "float", "width", "objects"],
)
def test_damaged_batches(tmp_path, content):
    source = write_files(tmp_path / "in", {"val_data.npz": _GOOD, "train_data_batch_1.npz": content})
    with pytest.raises(DataError, match=r"train_data_batch_1\.npz (cannot be read|holds float32).*Download"):
        prepare(source, target=tmp_path / "out", size=8, skip=True)
    assert_nothing(tmp_path / "out")


def test_batches_come_together_and_alone(tmp_path):
    source = write_files(tmp_path / "in", {"train_data_batch_1.npz": _GOOD})
    with pytest.raises(DataError, match=r"together with val_data\.npz"):
        prepare(source, target=tmp_path / "out")
    (source / "val_data.npz").write_bytes(_GOOD)
    write_picture(source / "train" / "a.png", _IMAGES[0])
    with pytest.raises(DataError, match="no other pictures"):
        prepare(source, target=tmp_path / "out")
