"""`data prepare` on files that hold many images: TFRecord files as CelebA-HQ is passed on, and parquet files."""

from __future__ import annotations

import struct
import sys

import numpy as np
import pytest
from image_files import picture_bytes, random_images
from packing_sources import assert_nothing, assert_packed, prepare, write_tar, write_zip

from rnode_plugin.data import get_dataset, plan_packing
from rnode_plugin.data.packing.tfrecords import crc32c
from rnode_plugin.errors import ConfigError, DataError

SHAPE = (3, 8, 8)


# ---- TFRecord files, written here by the definition of the format


def plain_crc32c(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    value = plain_crc32c(data)
    return struct.pack("<L", ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def example(*, packed: bool = True, **features: bytes | list[int]) -> bytes:
    entries = b""
    for name, value in features.items():
        if isinstance(value, bytes):
            feature = field(1, field(1, value))
        elif packed:
            feature = field(3, field(1, b"".join(map(varint, value))))
        else:
            feature = field(3, b"".join(b"\x08" + varint(each) for each in value))
        entries += field(1, field(1, name.encode()) + field(2, feature))
    return field(1, entries)


def tfrecords(examples: list[bytes]) -> bytes:
    heads = [struct.pack("<Q", len(each)) for each in examples]
    return b"".join(head + masked(head) + each + masked(each) for head, each in zip(heads, examples, strict=True))


def progressive(images: np.ndarray) -> bytes:
    """As the authors of progressive growing write them: channels first."""
    return tfrecords([example(shape=list(im.shape), data=im.tobytes()) for im in images])


def glow(images: np.ndarray) -> bytes:
    """As those of Glow do: channels last, unpacked numbers, more features."""
    last = images.transpose(0, 2, 3, 1)
    return tfrecords(
        [example(packed=False, shape=list(im.shape), data=im.tobytes(), label=[3], attr=[1, 0, 1]) for im in last]
    )


def test_the_checksum_is_crc_32c():
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    draw = np.random.default_rng(0)
    for length in (0, 1, 1023, 1024, 2047, 2048, 5003):
        data = draw.bytes(length)
        assert crc32c(data) == plain_crc32c(data), length


def test_one_file_of_progressive_growing(tmp_path):
    images = random_images(20, SHAPE)
    (tmp_path / "celebahq-r03.tfrecords").write_bytes(progressive(images))
    seen = []
    result = prepare(tmp_path / "celebahq-r03.tfrecords", target=tmp_path / "out", size=8, advance=seen.append)
    assert (result.train, result.val, result.shape) == (18, 2, SHAPE)
    packed = np.concatenate([np.load(tmp_path / "out" / f"{part}.npy") for part in ("train", "val")])
    assert {each.tobytes() for each in packed} == {each.tobytes() for each in images}
    assert sum(seen) == (tmp_path / "celebahq-r03.tfrecords").stat().st_size


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_the_archive_of_glow(tmp_path, kind):
    train, val = random_images(6, SHAPE, 1), random_images(3, SHAPE, 2)
    files = {
        "celeba-tfr/train/train-r08-s-0000-of-0002.tfrecords": glow(train[:4]),
        "celeba-tfr/train/train-r08-s-0001-of-0002.tfrecords": glow(train[4:]),
        "celeba-tfr/validation/validation-r08-s-0000-of-0001.tfrecords": glow(val),
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


def test_celebahq_from_records_to_what_training_reads(tmp_path):
    images = random_images(5, (3, 256, 256))
    (tmp_path / "celebahq-r08.tfrecords").write_bytes(progressive(images))
    prepare(tmp_path / "celebahq-r08.tfrecords", target=tmp_path / "data" / "celebahq256", size=256)
    data = get_dataset("celebahq256", root=str(tmp_path / "data"))
    assert (data.shape, data.levels, len(data.train), len(data.val)) == ((3, 256, 256), 32, 4, 1)
    assert {each.tobytes() for each in [*data.train[:], *data.val[:]]} == {(im // 8).tobytes() for im in images}


def test_records_of_encoded_pictures_and_another_size(tmp_path):
    images = random_images(4, (3, 16, 16))
    (tmp_path / "a.tfrecord").write_bytes(tfrecords([example(data=picture_bytes(im)) for im in images]))
    prepare(tmp_path / "a.tfrecord", target=tmp_path / "out")
    assert prepare(tmp_path / "a.tfrecord", target=tmp_path / "small", size=8).shape == SHAPE
    (tmp_path / "b.tfrecord").write_bytes(progressive(images))
    prepare(tmp_path / "b.tfrecord", target=tmp_path / "raw", size=8)
    for part in ("train", "val"):  # pixels and pictures are scaled alike
        assert np.array_equal(
            np.load(tmp_path / "raw" / f"{part}.npy"), np.load(tmp_path / "small" / f"{part}.npy")
        )
    assert prepare(tmp_path / "b.tfrecord", target=tmp_path / "grey", channels=1).shape == (1, 16, 16)


def test_files_of_several_resolutions_are_refused(tmp_path):
    for side in (4, 8):
        (tmp_path / f"celebahq-r0{side}.tfrecords").write_bytes(progressive(random_images(3, (3, side, side))))
    with pytest.raises(ConfigError, match="is 3x8x8, those before are 3x4x4: give the files of one resolution"):
        prepare(tmp_path, target=tmp_path / "out", size=8)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda good: good[:-3], "ends within record 3"),
        (lambda good: good[: len(good) // 2 - 5], "ends within record 1"),
        (lambda good: flipped(good, 3), "length of record 0 is damaged"),
        (lambda good: flipped(good, 40), "record 0 is damaged: its checksum differs"),
        (lambda good: good + b"more", "ends within record 4"),
        (lambda good: tfrecords([example(label=[1])] * 3), "no feature `data` but label"),
        (
            lambda good: tfrecords([example(data=bytes(12), shape=[3, 2, 3])] * 3),
            r"`shape` is \[3, 2, 3\], but its",
        ),
        (lambda good: tfrecords([example(data=bytes(8), shape=[2, 2, 2])] * 3), "with neither 1 nor 3 channels"),
        (lambda good: tfrecords([b"\xff" * 20] * 3), "protocol buffer"),
    ],
)
def test_damaged_records(tmp_path, content, words):
    good = progressive(random_images(4, SHAPE))
    (tmp_path / "a.tfrecords").write_bytes(content(good))
    with pytest.raises(DataError, match=rf"a\.tfrecords is damaged: .*({words})"):
        prepare(tmp_path / "a.tfrecords", target=tmp_path / "out", on_error="skip")
    assert_nothing(tmp_path / "out")


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :]


# ---- parquet files, as the Hugging Face Hub has them


def parquet(path, images, column="image"):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    cells = [{"bytes": picture_bytes(im), "path": f"{i}.png"} for i, im in enumerate(images)]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table(
        {"label": pyarrow.array([0] * len(images)), column: pyarrow.array(cells, kind)},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(table, path, row_group_size=2, write_page_checksum=True)


def test_parquet_files_with_a_split(tmp_path):
    train, val = random_images(7, SHAPE, 1), random_images(3, SHAPE, 2)
    parquet(tmp_path / "data" / "train-00000-of-00002.parquet", train[:4])
    parquet(tmp_path / "data" / "train-00001-of-00002.parquet", train[4:])
    parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", val)
    prepare(tmp_path / "data", target=tmp_path / "out")
    assert_packed(tmp_path / "out", train, val)


def test_a_parquet_file_without_a_split(tmp_path):
    parquet(tmp_path / "a.parquet", random_images(20, SHAPE), column="img")
    result = prepare(tmp_path / "a.parquet", target=tmp_path / "out")
    assert (result.train, result.val) == (18, 2)


def test_damaged_and_foreign_parquet_files(tmp_path):
    path = tmp_path / "a.parquet"
    parquet(path, random_images(6, SHAPE))
    good = path.read_bytes()
    for wrong in (good[:-9], good[9:], b"", b"PAR1" * 5, flipped(good, good.index(b"IDAT") + 20)):
        path.write_bytes(wrong)
        with pytest.raises(DataError, match=r"a\.parquet.*(is damaged|cannot be read)"):
            prepare(path, target=tmp_path / "out")
        assert_nothing(tmp_path / "out")
    parquet(path, random_images(6, SHAPE), column="photo")
    with pytest.raises(DataError, match=r"no column of pictures \(image or img\) but label, photo"):
        prepare(path, target=tmp_path / "out")


def test_without_pyarrow_it_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"pip install 'rnode-plugin\[parquet\]'"):
        plan_packing([tmp_path / "a.parquet"])
