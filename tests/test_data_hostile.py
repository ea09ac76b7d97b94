"""`data prepare` on damaged, foreign and hostile sources: one message, and nothing left behind."""

from __future__ import annotations

import gzip
import lzma
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest
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

from rnode_plugin.data import plan_packing
from rnode_plugin.errors import DataError


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
    with pytest.raises(DataError, match=r"differ in size: .*3\.png is 3x9x8, those before are 3x8x8.*--size"):
        prepare(tmp_path / "in", target=tmp_path / "out", on_error="skip")
    assert_nothing(tmp_path / "out")
    assert prepare(tmp_path / "in", target=tmp_path / "out", size=8).shape == SHAPE


def test_truncated_and_foreign_sources(tmp_path):
    files, *_ = split_pictures(40, 10)
    write_zip(tmp_path / "a.zip", files)
    write_tar(tmp_path / "b.tar", files)
    write_tar(tmp_path / "c.tar.gz", files, "w:gz")
    for name in ("a.zip", "b.tar", "c.tar.gz"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2 - 100])
    (tmp_path / "text.zip").write_text("hello")
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("a.zip", "cannot be read"),
        ("b.tar", "cannot be read"),
        ("c.tar.gz", "cannot be read"),
        ("text.zip", "neither a folder nor a zip"),
        ("nowhere", "does not exist"),
        ("empty", "no pictures and no npz batches"),
    ):
        with pytest.raises(DataError, match=f"{name}.* {words}"):
            prepare(tmp_path / name, target=tmp_path / "out", on_error="skip")
    assert_nothing(tmp_path / "out")


@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress])
def test_a_damaged_header_in_a_tar_is_not_its_end(tmp_path, compress):
    """``tarfile`` takes it for the end: 3,000 pictures of 17,000, and not a word."""
    source = tmp_path / "a.tar"
    write_tar(source, split_pictures()[0], "w")
    content = source.read_bytes()
    for member in (b"set/train/3.png", b"set/val/2.png"):
        source.write_bytes(compress(content.replace(member, b"sat" + member[3:])))
        with pytest.raises(DataError, match=r"a\.tar cannot be read: .*header at byte .*Download it again"):
            prepare(source, target=tmp_path / "out", on_error="skip")
        assert not (tmp_path / "out").exists()


def test_files_that_claim_too_much(tmp_path, monkeypatch):
    write_zip(tmp_path / "a.zip", split_pictures()[0] | {"set/train/big.png": bytes(5000)})
    monkeypatch.setattr("rnode_plugin.data.packing._MAX_PICTURE_BYTES", 4000)
    with pytest.raises(DataError, match=r"big\.png is larger than"):
        prepare(tmp_path / "a.zip", target=tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(DataError, match=r"need about .* MB .* are free"):
        prepare(tmp_path / "a.zip", target=tmp_path / "out")
    assert_nothing(tmp_path / "out")


_IMAGES = random_images(3, SHAPE)
_GOOD = npz_batch(_IMAGES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_GOOD[: len(_GOOD) // 2], "cannot be read"),
        (b"PK nothing", "cannot be read"),
        (npz_batch(_IMAGES, data=np.zeros((3, 192), np.float32)), "is float32"),
        (npz_batch(_IMAGES, data=np.zeros((3, 191), np.uint8)), r"uint8 \(3, 191\)"),
        (npz_batch(_IMAGES, data=np.array([{}, {}])), "is object"),
        (npz_batch(random_images(3, (3, 9, 9))), "holds 9x9 images.*--size 9"),
    ],
    ids=["half", "text", "float", "width", "objects", "size"],
)
def test_damaged_batches(tmp_path, content, message):
    (tmp_path / "val_data.npz").write_bytes(_GOOD)
    (tmp_path / "train_data_batch_1.npz").write_bytes(content)
    with pytest.raises(DataError, match=rf"train_data_batch_1\.npz.*{message}"):
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
    with pytest.raises(DataError, match=r"Python pickle.*Imagenet64_train_part1_npz"):
        plan_packing([tmp_path / "Imagenet64_train_part1.zip"])
    assert not (tmp_path / "ran").exists()
