"""`data prepare` on TFRecord files, the form in which CelebA-HQ is passed on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import picture_bytes, random_images
from packing_sources import assert_nothing, assert_packed, prepare, write_tar, write_zip

from rnode_plugin.data import plan_packing
from rnode_plugin.errors import ConfigError, DataError

SHAPE = (3, 8, 8)


@pytest.fixture(autouse=True)
def _needs_its_reader() -> None:
    pytest.importorskip("tfrecord")


def tfrecords(folder: Path, examples: list[dict[str, Any]]) -> bytes:
    """The records that the package writes; bytes are one value, lists are whole numbers."""
    from tfrecord import TFRecordWriter

    file = folder / "written.tmp"
    writer = TFRecordWriter(str(file))
    for example in examples:
        writer.write({k: (v, "byte" if isinstance(v, bytes) else "int") for k, v in example.items()})
    writer.close()
    content = file.read_bytes()
    file.unlink()
    return content


def progressive(folder: Path, images: np.ndarray) -> bytes:
    """As the authors of progressive growing write them: channels first."""
    return tfrecords(folder, [{"shape": list(im.shape), "data": im.tobytes()} for im in images])


def glow(folder: Path, images: np.ndarray) -> bytes:
    """As those of Glow do: channels last, more features."""
    last = images.transpose(0, 2, 3, 1)
    features = ({"shape": list(im.shape), "data": im.tobytes(), "label": [3], "attr": [1, 0, 1]} for im in last)
    return tfrecords(folder, list(features))


def test_one_file_of_progressive_growing(tmp_path):
    images = random_images(20, SHAPE)
    (tmp_path / "celebahq-r03.tfrecords").write_bytes(progressive(tmp_path, images))
    seen = []
    result = prepare(tmp_path / "celebahq-r03.tfrecords", target=tmp_path / "out", size=8, advance=seen.append)
    assert (result.train + result.val, result.shape) == (20, SHAPE)
    packed = np.concatenate([np.load(tmp_path / "out" / f"{part}.npy") for part in ("train", "val")])
    assert {each.tobytes() for each in packed} == {each.tobytes() for each in images}
    assert sum(seen) == (tmp_path / "celebahq-r03.tfrecords").stat().st_size


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_the_archive_of_glow(tmp_path, kind):
    train, val = random_images(6, SHAPE, 1), random_images(3, SHAPE, 2)
    files = {
        "celeba-tfr/train/train-r08-s-0000-of-0002.tfrecords": glow(tmp_path, train[:4]),
        "celeba-tfr/train/train-r08-s-0001-of-0002.tfrecords": glow(tmp_path, train[4:]),
        "celeba-tfr/validation/validation-r08-s-0000-of-0001.tfrecords": glow(tmp_path, val),
    }
    source = tmp_path / f"celeba-tfr.{kind}"
    if kind == "folder":
        for name, content in files.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(content)
    else:
        (write_tar if kind == "tar" else write_zip)(source, files)
    prepare(source, target=tmp_path / "out")
    assert_packed(tmp_path / "out", train, val)


def test_records_of_encoded_pictures_and_another_size(tmp_path):
    images = random_images(4, (3, 16, 16))
    (tmp_path / "a.tfrecord").write_bytes(tfrecords(tmp_path, [{"data": picture_bytes(im)} for im in images]))
    prepare(tmp_path / "a.tfrecord", target=tmp_path / "out")
    assert prepare(tmp_path / "a.tfrecord", target=tmp_path / "small", size=8).shape == SHAPE
    (tmp_path / "b.tfrecord").write_bytes(progressive(tmp_path, images))
    prepare(tmp_path / "b.tfrecord", target=tmp_path / "raw", size=8)
    for part in ("train", "val"):  # pixels and pictures are scaled alike
        assert np.array_equal(
            np.load(tmp_path / "raw" / f"{part}.npy"), np.load(tmp_path / "small" / f"{part}.npy")
        )
    assert prepare(tmp_path / "b.tfrecord", target=tmp_path / "grey", channels=1).shape == (1, 16, 16)


def test_files_of_several_resolutions_are_refused(tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    for side in (4, 8):
        (tmp_path / f"celebahq-r0{side}.tfrecords").write_bytes(
            progressive(made, random_images(3, (3, side, side)))
        )
    with pytest.raises(ConfigError, match="give the files of one resolution"):
        prepare(tmp_path, target=tmp_path / "out", size=8)
    assert_nothing(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda good, folder: good[:-3], "read the end token"),
        (lambda good, folder: good + b"more", "read the record"),
        (lambda good, folder: tfrecords(folder, [{"label": [1]}] * 3), "no feature `data` but label"),
        (lambda good, folder: tfrecords(folder, [{"data": bytes(12), "shape": [3, 2, 3]}] * 3), "reshape"),
        (lambda good, folder: tfrecords(folder, [{"data": bytes(8), "shape": [2, 2, 2]}] * 3), "1 nor 3 channels"),
    ],
)
def test_damaged_records(tmp_path, change, words):
    good = progressive(tmp_path, random_images(4, SHAPE))
    (tmp_path / "a.tfrecords").write_bytes(change(good, tmp_path))
    with pytest.raises(DataError, match=rf"a\.tfrecords.*{words}"):
        prepare(tmp_path / "a.tfrecords", target=tmp_path / "out", on_error="skip")
    assert_nothing(tmp_path / "out")


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.tfrecord").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "tfrecord", None)
    with pytest.raises(ConfigError, match=r"pip install 'rnode-plugin\[tfrecord\]'"):
        plan_packing([tmp_path / "a.tfrecord"])
