"""`data prepare`: what is packed from where, and that nothing half-written stays."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
from click.testing import CliRunner
from image_files import picture_bytes, random_images, write_picture
from packing_sources import (
    SHAPE,
    assert_nothing,
    assert_packed,
    npz_batch,
    prepare,
    split_pictures,
    write_tar,
    write_zip,
)

from rnode_plugin.cli.lists import data as data_group
from rnode_plugin.data import get_dataset, pack, plan_packing
from rnode_plugin.errors import ConfigError, DataError

# ---- sources


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz", "tar.xz"])
def test_pictures_with_folders_for_the_split(tmp_path, kind):
    files, train, val = split_pictures()
    files["set/.DS_Store"] = files["__MACOSX/set/train/._0.png"] = b"left behind"
    source = tmp_path / f"source.{kind}"
    if kind == "folder":
        for name, content in files.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(content)
    elif kind == "zip":
        write_zip(source, files)
    else:
        write_tar(source, files, "w" + kind[3:].replace(".", ":"))
    seen = []
    result = prepare(source, target=tmp_path / "out", size=8, advance=seen.append)
    assert (result.train, result.val, result.shape, result.skipped) == (6, 3, SHAPE, [])
    assert_packed(tmp_path / "out", train, val)
    assert sum(seen) == plan_packing([source]).nbytes == sum(len(c) for c in files.values() if c != b"left behind")
    data = get_dataset("folder", root=str(tmp_path / "out"))
    assert np.array_equal(data.train[:], train)


def test_archives_named_for_their_split(tmp_path):
    _, train, val = split_pictures()
    write_tar(tmp_path / "train_64x64.tar", {f"{i}.png": picture_bytes(image) for i, image in enumerate(train)})
    write_tar(
        tmp_path / "valid_64x64.tar", {f"valid_64x64/{i}.png": picture_bytes(image) for i, image in enumerate(val)}
    )
    prepare(tmp_path / "train_64x64.tar", tmp_path / "valid_64x64.tar", target=tmp_path / "out")
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


def _imagenet(tmp_path, layout):
    """The published layout: npz files in zip archives, with fewer and smaller images."""
    parts = [random_images(5, SHAPE, seed) for seed in range(3)]
    names = ["train_data_batch_1.npz", "train_data_batch_2.npz", "val_data.npz"]
    contents = [npz_batch(p, mean=np.zeros(192), compressed=layout == "compressed") for p in parts]
    files = dict(zip(names, contents, strict=True))
    if layout in ("folder", "files"):
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        return [tmp_path] if layout == "folder" else [tmp_path / name for name in names], parts
    archives = {"Imagenet64_train_part1_npz.zip": names[:2], "Imagenet64_val_npz.zip": names[2:]}
    for archive, members in archives.items():
        write_zip(tmp_path / archive, {f"Imagenet64/{name}": files[name] for name in members}, zipfile.ZIP_STORED)
    return [tmp_path / archive for archive in archives], parts


@pytest.mark.parametrize("layout", ["zips", "compressed", "folder", "files"])
def test_the_published_imagenet_batches(tmp_path, layout, monkeypatch):
    monkeypatch.setattr("rnode_plugin.data.packing._ROWS", 2)
    (tmp_path / "in").mkdir()
    sources, parts = _imagenet(tmp_path / "in", layout)
    result = prepare(*sources, target=tmp_path / "out", size=8)
    assert (result.train, result.val) == (10, 5)
    assert_packed(tmp_path / "out", np.concatenate(parts[:2]), parts[2])


# ---- the target


def test_packed_files_are_replaced_on_request_only(tmp_path):
    files, train, val = split_pictures()
    write_zip(tmp_path / "a.zip", files)
    target = tmp_path / "out"
    target.mkdir()
    (target / "val.npy").write_bytes(b"precious")
    with pytest.raises(DataError, match=r"val\.npy exist already; pass --overwrite"):
        prepare(tmp_path / "a.zip", target=target)
    assert (target / "val.npy").read_bytes() == b"precious"
    prepare(tmp_path / "a.zip", target=target, overwrite=True)
    assert_packed(target, train, val)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_run_leaves_the_old_files(tmp_path, error):
    files, train, val = split_pictures()
    write_zip(tmp_path / "a.zip", files)
    prepare(tmp_path / "a.zip", target=tmp_path / "out")
    seen = []

    def interrupt(nbytes):
        seen.append(nbytes)
        if len(seen) == 5:
            raise error

    expected = KeyboardInterrupt if error is KeyboardInterrupt else DataError
    with pytest.raises(expected):
        prepare(tmp_path / "a.zip", target=tmp_path / "out", size=4, overwrite=True, advance=interrupt)
    assert len(seen) == 5
    assert_packed(tmp_path / "out", train, val)


def test_a_failed_run_leaves_no_folder_that_was_not_there(tmp_path):
    files, *_ = split_pictures()
    write_zip(tmp_path / "a.zip", files | {"set/val/0.png": b"bad"})
    (tmp_path / "there").mkdir()
    for target in (tmp_path / "new" / "deep" / "out", tmp_path / "there" / "out", tmp_path / "there"):
        with pytest.raises(DataError, match="not a picture"):
            prepare(tmp_path / "a.zip", target=target)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.zip", "there"]
    assert list((tmp_path / "there").iterdir()) == []


def test_a_source_that_changes_meanwhile(tmp_path):
    for i in range(4):
        write_picture(tmp_path / "in" / f"{i}.png", random_images(1, SHAPE)[0])
    plan = plan_packing([tmp_path / "in"])
    (tmp_path / "in" / "3.png").unlink()
    with pytest.raises(DataError, match="changed since"):
        pack(plan, tmp_path / "out")
    write_picture(tmp_path / "in" / "0a.png", random_images(1, SHAPE)[0])
    with pytest.raises(DataError, match="changed since"):
        pack(plan, tmp_path / "out")
    assert_nothing(tmp_path / "out")


@pytest.mark.parametrize("options", [{"on_error": "ignore"}, {"channels": 2}, {"size": 0}])
def test_options_that_cannot_be_are_refused(tmp_path, options):
    files, *_ = split_pictures()
    write_zip(tmp_path / "a.zip", files)
    with pytest.raises(ConfigError):
        prepare(tmp_path / "a.zip", target=tmp_path / "out", **options)


def test_many_images_have_a_header_that_fits(tmp_path):
    from rnode_plugin.data.packing import _Writer

    with _Writer(tmp_path / "train.npy") as writer:
        writer.append(random_images(1, (3, 256, 256)))
        start = writer.file.tell()
        writer.shape = (10**12, 3, 256, 256)  # as if there were so many
        writer.finish()
        writer.publish()
    with open(tmp_path / "train.npy", "rb") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        assert np.lib.format.read_array_header_1_0(file) == ((10**12, 3, 256, 256), False, np.uint8)
        assert file.tell() == start - 3 * 256 * 256


# ---- the command


def test_the_command_packs_and_reports(tmp_path):
    files, train, val = split_pictures()
    write_zip(tmp_path / "a.zip", files | {"set/notes.txt": b"?"})
    out = tmp_path / "out"
    runner = CliRunner()
    result = runner.invoke(data_group, ["prepare", str(tmp_path / "a.zip"), str(out), "--size", "8"])
    assert isinstance(result.exception, DataError)
    result = runner.invoke(
        data_group, ["prepare", str(tmp_path / "a.zip"), str(out), "--size", "8", "--on-error", "skip"]
    )
    assert result.exit_code == 0, result.output
    assert f"6 images to train on and 3 held out, 3x8x8, 1 files skipped, in {out}" in result.stdout
    assert "set/notes.txt" in result.output
    assert_packed(out, train, val)


@pytest.mark.parametrize(
    "arguments",
    [[], ["only-one"], ["a", "b", "--size", "0"], ["a", "b", "--val-fraction", "1"], ["a", "b", "--channels", "2"]],
)
def test_wrong_usage_is_exit_code_2(arguments):
    assert CliRunner().invoke(data_group, ["prepare", *arguments]).exit_code == 2
