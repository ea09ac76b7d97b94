"""`data prepare`: what is packed from where, what is refused, and that nothing half-written stays."""

from __future__ import annotations

import gzip
import os
import pickle
import tarfile
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
from rnode_plugin.errors import DataError

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
def test_the_published_imagenet_batches(tmp_path, layout):
    (tmp_path / "in").mkdir()
    sources, parts = _imagenet(tmp_path / "in", layout)
    result = prepare(*sources, target=tmp_path / "out", size=8)
    assert (result.train, result.val) == (10, 5)
    assert_packed(tmp_path / "out", np.concatenate(parts[:2]), parts[2])
    assert prepare(*sources, target=tmp_path / "small", size=4, channels=1).shape == (1, 4, 4)


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

    def interrupt(nbytes):
        raise error

    with pytest.raises((KeyboardInterrupt, DataError)):
        prepare(tmp_path / "a.zip", target=tmp_path / "out", size=4, overwrite=True, advance=interrupt)
    assert_packed(tmp_path / "out", train, val)


def test_a_source_that_changes_meanwhile(tmp_path):
    for i in range(4):
        write_picture(tmp_path / "in" / f"{i}.png", random_images(1, SHAPE)[0])
    plan = plan_packing([tmp_path / "in"])
    (tmp_path / "in" / "3.png").unlink()
    with pytest.raises(DataError, match="changed since"):
        pack(plan, tmp_path / "out")
    for name in ("3.png", "4.png"):
        write_picture(tmp_path / "in" / name, random_images(1, SHAPE)[0])
    with pytest.raises(DataError, match="changed since"):
        pack(plan, tmp_path / "out")
    assert_nothing(tmp_path / "out")


# ---- the command


def test_the_command_packs_and_reports(tmp_path):
    files, train, val = split_pictures()
    write_zip(tmp_path / "a.zip", files | {"set/notes.txt": b"?"})
    out = tmp_path / "out"
    runner = CliRunner()
    command = ["prepare", str(tmp_path / "a.zip"), str(out), "--size", "8"]
    assert isinstance(runner.invoke(data_group, command).exception, DataError)
    result = runner.invoke(data_group, [*command, "--on-error", "skip"])
    assert result.exit_code == 0, result.output
    assert f"6 images to train on and 3 held out, 3x8x8, 1 files skipped, in {out}" in result.stdout
    assert "set/notes.txt" in result.output
    assert_packed(out, train, val)


# ---- damaged, foreign and hostile sources


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_bad_files_fail_by_name_or_are_skipped_by_name(tmp_path, write):
    files, train, val = split_pictures()
    files["set/train/notes.txt"] = b"not a picture"
    files["set/train/7.png"] = b"garbage"
    files["set/val/half.png"] = files["set/val/0.png"][:60]
    source = tmp_path / "archive"
    write(source, files)
    with pytest.raises(DataError, match=r"not pictures: .*set/train/notes\.txt\. Remove .*--on-error skip"):
        prepare(source, target=tmp_path / "out")
    assert_nothing(tmp_path / "out")
    result = prepare(source, target=tmp_path / "out", on_error="skip")
    names = ["set/train/notes.txt", "set/train/7.png", "set/val/half.png"]
    assert [name.split(": ")[1] for name in result.skipped] == names
    assert_packed(tmp_path / "out", train, val)
    del files["set/train/notes.txt"]
    write(source, files)
    with pytest.raises(DataError, match=r"set/train/7\.png cannot be read.*--on-error skip"):
        prepare(source, target=tmp_path / "other")
    assert_nothing(tmp_path / "other")


def test_no_name_in_an_archive_leads_out_of_the_target(tmp_path):
    inside = tmp_path / "deep" / "inside"
    inside.mkdir(parents=True)
    names = [
        "../../evil.png",
        "/evil.png",
        str(tmp_path / "evil.png"),
        "C:\\evil.png",
        *(f"{k}.png" for k in "abcd"),
    ]
    files = {name: picture_bytes(image) for name, image in zip(names, random_images(8, SHAPE), strict=True)}
    for write, source in ((write_zip, inside / "a.zip"), (write_tar, inside / "a.tar")):
        write(source, files)
        result = prepare(source, target=inside / "out", overwrite=True)
        assert result.train + result.val == 8  # a name is only a name
    found = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {f"deep/inside/{n}" for n in ("a.zip", "a.tar", "out/train.npy", "out/val.npy")}


def test_links_and_devices_in_a_tar_are_no_pictures(tmp_path):
    files, train, val = split_pictures()
    source = tmp_path / "a.tar"
    write_tar(source, files)
    with tarfile.open(source, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"set/train/{kind.decode()}.png")
            info.type, info.linkname = kind, "/etc/hostname"
            archive.addfile(info)
    prepare(source, target=tmp_path / "out")
    assert_packed(tmp_path / "out", train, val)


def test_pictures_of_different_sizes(tmp_path):
    for i in range(4):
        write_picture(tmp_path / "in" / f"{i}.png", random_images(1, (3, 8 + i // 3, 8))[0])
    with pytest.raises(DataError, match=r"differ in size: .*3\.png is \(3, 9, 8\).*--size"):
        prepare(tmp_path / "in", target=tmp_path / "out", on_error="skip")
    assert_nothing(tmp_path / "out")
    assert prepare(tmp_path / "in", target=tmp_path / "out", size=8).shape == SHAPE


@pytest.mark.parametrize("name", ["text.zip", "nowhere"])  # test_fuzz damages archives
def test_foreign_and_missing_sources(tmp_path, name):
    (tmp_path / "text.zip").write_text("hello" * 100)
    with pytest.raises(DataError, match=rf"{name} cannot be read"):
        prepare(tmp_path / name, target=tmp_path / "out", on_error="skip")
    assert_nothing(tmp_path / "out")


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_a_damaged_header_in_a_tar_is_not_its_end(tmp_path, compress):
    """``tarfile`` takes it for the end: 3,000 pictures of 17,000, and not a word."""
    source = tmp_path / "a.tar"
    write_tar(source, split_pictures()[0], "w")
    content = source.read_bytes()
    for member in (b"set/train/3.png", b"set/val/2.png"):
        source.write_bytes(compress(content.replace(member, b"sat" + member[3:])))
        with pytest.raises(DataError, match=r"a\.tar cannot be read: .*header at byte .*Download it again"):
            prepare(source, target=tmp_path / "out", on_error="skip")
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
    (tmp_path / "val_data.npz").write_bytes(_GOOD)
    (tmp_path / "train_data_batch_1.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"train_data_batch_1\.npz cannot be read"):
        prepare(tmp_path, target=tmp_path / "out", size=8, on_error="skip")
    assert_nothing(tmp_path / "out")


def test_batches_come_together_and_alone(tmp_path):
    (tmp_path / "train_data_batch_1.npz").write_bytes(_GOOD)
    with pytest.raises(DataError, match=r"together with val_data\.npz"):
        plan_packing([tmp_path])
    (tmp_path / "val_data.npz").write_bytes(_GOOD)
    write_picture(tmp_path / "train" / "a.png", _IMAGES[0])
    with pytest.raises(DataError, match="without other pictures"):
        plan_packing([tmp_path])


def test_pickled_batches_are_not_opened(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    write_zip(tmp_path / "Imagenet64_train_part1.zip", {"train_data_batch_1": pickle.dumps(Evil())})
    with pytest.raises(DataError, match=r"no npz batches. Found instead: .*train_data_batch_1"):
        plan_packing([tmp_path / "Imagenet64_train_part1.zip"])
    assert not (tmp_path / "ran").exists()
