"""`data prepare` on damaged, foreign and hostile sources: one message, and nothing left behind."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import pickle
import shutil
import tarfile
import zipfile

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


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_bad_files_fail_by_name_or_are_skipped_by_name(tmp_path, kind):
    files, train, val = split_pictures()
    files["set/train/notes.txt"] = b"not a picture"
    files["set/train/7.png"] = b"garbage"
    files["set/val/half.png"] = files["set/val/0.png"][:60]
    source = tmp_path / f"a.{kind}"
    (write_zip if kind == "zip" else write_tar)(source, files)
    with pytest.raises(DataError, match=r"not pictures: .*set/train/notes\.txt\. Remove .*--on-error skip"):
        prepare(source, target=tmp_path / "out")
    assert_nothing(tmp_path / "out")
    result = prepare(source, target=tmp_path / "out", on_error="skip")
    assert [name.split(": ")[1] for name in result.skipped] == [
        "set/train/notes.txt",
        "set/train/7.png",
        "set/val/half.png",
    ]
    assert_packed(tmp_path / "out", train, val)
    del files["set/train/notes.txt"]
    (write_zip if kind == "zip" else write_tar)(source, files)
    with pytest.raises(DataError, match=r"set/train/7\.png cannot be read as a picture.*--on-error skip"):
        prepare(source, target=tmp_path / "other")
    assert_nothing(tmp_path / "other")


def test_no_name_in_an_archive_leads_out_of_the_target(tmp_path):
    inside = tmp_path / "deep" / "inside"
    inside.mkdir(parents=True)
    images = random_images(8, SHAPE)
    names = ["../../evil.png", "/evil.png", str(tmp_path / "evil.png"), "C:\\evil.png", *"abcd"]
    files = {
        name if "." in name else f"{name}.png": picture_bytes(im) for name, im in zip(names, images, strict=True)
    }
    for write, source in ((write_zip, inside / "a.zip"), (write_tar, inside / "a.tar")):
        write(source, files)
        result = prepare(source, target=inside / "out", overwrite=True)
        assert result.train + result.val == 8  # a name is only a name
        assert sorted(p.name for p in (inside / "out").iterdir()) == ["train.npy", "val.npy"]
    found = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {f"deep/inside/{n}" for n in ("a.zip", "a.tar", "out/train.npy", "out/val.npy")}


def test_links_and_devices_in_a_tar_are_no_pictures(tmp_path):
    files, train, val = split_pictures()
    source = tmp_path / "a.tar"
    write_tar(source, files)
    with tarfile.open(source, "a") as archive:
        for kind, name in (
            (tarfile.SYMTYPE, "link.png"),
            (tarfile.FIFOTYPE, "pipe.png"),
            (tarfile.CHRTYPE, "dev.png"),
        ):
            info = tarfile.TarInfo(f"set/train/{name}")
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


def test_damaged_and_foreign_sources(tmp_path):
    files, *_ = split_pictures(40, 10)
    write_zip(tmp_path / "a.zip", files)
    write_tar(tmp_path / "b.tar", files)
    write_tar(tmp_path / "c.tar.gz", files, "w:gz")
    for name in ("a.zip", "b.tar", "c.tar.gz"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2 - 100])
        with pytest.raises(DataError, match=f"{name} .*(damaged|cannot be read)"):
            prepare(tmp_path / name, target=tmp_path / "out", on_error="skip")
    (tmp_path / "text.zip").write_text("hello")
    with pytest.raises(DataError, match="neither a folder nor a zip"):
        plan_packing([tmp_path / "text.zip"])
    with pytest.raises(DataError, match="does not exist"):
        plan_packing([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures and no npz batches"):
        plan_packing([tmp_path / "empty"])
    assert_nothing(tmp_path / "out")


def test_a_damaged_member_is_found_by_its_checksum(tmp_path):
    files, train, val = split_pictures()
    write_zip(tmp_path / "a.zip", files, zipfile.ZIP_STORED)
    content = (tmp_path / "a.zip").read_bytes()
    target = files["set/train/2.png"]
    at = content.index(target) + len(target) - 6
    (tmp_path / "a.zip").write_bytes(content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :])
    with pytest.raises(DataError, match=r"set/train/2\.png is damaged .*Bad CRC"):
        prepare(tmp_path / "a.zip", target=tmp_path / "out")
    prepare(tmp_path / "a.zip", target=tmp_path / "out", on_error="skip")
    assert_packed(tmp_path / "out", np.delete(train, 2, axis=0), val)


def _byte_changed(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_a_damaged_header_in_a_tar_is_not_its_end(tmp_path, mode):
    """``tarfile`` takes it for the end: 3,000 pictures of 17,000, and not a word."""
    files, *_ = split_pictures()
    source = tmp_path / "a.tar"
    write_tar(source, files, "w")
    content = source.read_bytes()
    for member in ("set/train/3.png", "set/val/2.png"):
        damaged = _byte_changed(content, content.index(member.encode()) + 4)
        write = {"w": lambda c: c, "w:gz": gzip.compress, "w:xz": lzma.compress}[mode]
        source.write_bytes(write(damaged))
        with pytest.raises(DataError, match=r"a\.tar is damaged .*header at byte .* is damaged") as caught:
            prepare(source, target=tmp_path / "out", on_error="skip")
        assert "Download it again" in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_files_that_claim_too_much(tmp_path, monkeypatch):
    files, *_ = split_pictures()
    write_zip(tmp_path / "a.zip", files | {"set/train/big.png": bytes(5000)})
    monkeypatch.setattr("rnode_plugin.data.packing._MAX_PICTURE_BYTES", 4000)
    with pytest.raises(DataError, match=r"big\.png is larger than"):
        prepare(tmp_path / "a.zip", target=tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(DataError, match=r"need about .* MB .* are free"):
        prepare(tmp_path / "a.zip", target=tmp_path / "out")
    assert_nothing(tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda good: good[: len(good) // 2], "damaged"),
        (lambda good: b"PK nothing", "damaged"),
        (lambda good: npz_batch(random_images(3, SHAPE), data=np.zeros((3, 192), np.float32)), "is float32"),
        (lambda good: npz_batch(random_images(3, SHAPE), data=np.zeros((3, 191), np.uint8)), r"uint8 \(3, 191\)"),
        (lambda good: npz_batch(random_images(3, SHAPE), data=np.array([{}, {}])), "is object"),
        (lambda good: npz_batch(random_images(3, (3, 9, 9))), "holds 9x9 images.*--size 9"),
        (lambda good: _zipped({"labels.npy": b""}), "no array `data`"),
        (lambda good: _zipped({"data.npy": b"\x93NUMPY\x01\x00v\x00{broken"}), "damaged"),
        (lambda good: _zipped({"data.npy": _header((5, 192)) + bytes(200)}), "ends within 5 images"),
    ],
)
def test_damaged_batches(tmp_path, content, message):
    good = npz_batch(random_images(3, SHAPE))
    (tmp_path / "val_data.npz").write_bytes(good)
    (tmp_path / "train_data_batch_1.npz").write_bytes(content(good))
    with pytest.raises(DataError, match=message) as caught:
        prepare(tmp_path, target=tmp_path / "out", size=8, on_error="skip")
    assert "train_data_batch_1.npz" in str(caught.value)
    assert_nothing(tmp_path / "out")


def _zipped(files):
    file = io.BytesIO()
    write_zip(file, files)
    return file.getvalue()


def _header(shape):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


def test_batches_come_together_and_alone(tmp_path):
    (tmp_path / "train_data_batch_1.npz").write_bytes(npz_batch(random_images(3, SHAPE)))
    with pytest.raises(DataError, match=r"together with val_data\.npz"):
        plan_packing([tmp_path])
    (tmp_path / "val_data.npz").write_bytes(npz_batch(random_images(3, SHAPE)))
    write_picture(tmp_path / "train" / "a.png", random_images(1, SHAPE)[0])
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
