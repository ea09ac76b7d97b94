"""`data prepare`: what is packed, what is refused, and that nothing half-written stays."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
from click.testing import CliRunner
from image_files import picture_bytes, random_images, real_data, write_picture

from rnode_plugin.cli.data import data as data_group
from rnode_plugin.data import get_dataset, pack, packing, plan_packing
from rnode_plugin.errors import ConfigError, DataError

SHAPE = (3, 8, 8)


def _prepare(*sources, target, val_fraction=0.1, **options):
    return pack(plan_packing(sources, val_fraction=val_fraction), target, **options)


def _tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def _zip(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def _pictures(n_train=6, n_val=3):
    """Files by name as an archive has them, and the images."""
    train, val = random_images(n_train, SHAPE, 1), random_images(n_val, SHAPE, 2)
    files = {f"set/train/{i}.png": picture_bytes(image) for i, image in enumerate(train)}
    files |= {f"set/val/{i}.png": picture_bytes(image) for i, image in enumerate(val)}
    return files, train, val


def _npz(images, *, compressed=False, **arrays):
    file = io.BytesIO()
    save = np.savez_compressed if compressed else np.savez
    save(file, **({"data": images.reshape(len(images), -1), "labels": np.arange(len(images))} | arrays))
    return file.getvalue()


def _assert_packed(target, train, val):
    for name, images in (("train", train), ("val", val)):
        packed = np.load(target / f"{name}.npy", allow_pickle=False)
        assert packed.dtype == np.uint8
        assert np.array_equal(packed, images)
    assert sorted(path.name for path in target.iterdir()) == ["train.npy", "val.npy"]


def _assert_nothing(target):
    assert not target.exists() or list(target.iterdir()) == []


# ---- sources


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz", "tar.xz"])
def test_pictures_with_folders_for_the_split(tmp_path, kind):
    files, train, val = _pictures()
    files["set/.DS_Store"] = files["__MACOSX/set/train/._0.png"] = b"left behind"
    source = tmp_path / f"source.{kind}"
    if kind == "folder":
        for name, content in files.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(content)
    elif kind == "zip":
        _zip(source, files)
    else:
        _tar(source, files, "w" + kind[3:].replace(".", ":"))
    seen = []
    result = _prepare(source, target=tmp_path / "out", size=8, advance=seen.append)
    assert (result.train, result.val, result.shape, result.skipped) == (6, 3, SHAPE, [])
    _assert_packed(tmp_path / "out", train, val)
    assert sum(seen) == plan_packing([source]).nbytes == sum(len(c) for c in files.values() if c != b"left behind")
    data = get_dataset("folder", root=str(tmp_path / "out"))
    assert np.array_equal(data.train[:], train)


def test_archives_named_for_their_split(tmp_path):
    _, train, val = _pictures()
    _tar(tmp_path / "train_64x64.tar", {f"{i}.png": picture_bytes(image) for i, image in enumerate(train)})
    _tar(
        tmp_path / "valid_64x64.tar", {f"valid_64x64/{i}.png": picture_bytes(image) for i, image in enumerate(val)}
    )
    _prepare(tmp_path / "train_64x64.tar", tmp_path / "valid_64x64.tar", target=tmp_path / "out")
    _assert_packed(tmp_path / "out", train, val)


def test_a_folder_holds_out_the_same_pictures_packed_or_not(tmp_path):
    images = random_images(20, SHAPE)
    for i, image in enumerate(images):
        write_picture(tmp_path / "in" / f"{i:02}.png", image)
    _prepare(tmp_path / "in", target=tmp_path / "out")
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
    contents = [_npz(p, mean=np.zeros(192), compressed=layout == "compressed") for p in parts]
    files = dict(zip(names, contents, strict=True))
    if layout == "folder":
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        return [tmp_path], parts
    if layout == "files":
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        return [tmp_path / name for name in names], parts
    archives = {"Imagenet64_train_part1_npz.zip": names[:2], "Imagenet64_val_npz.zip": names[2:]}
    for archive, members in archives.items():
        _zip(tmp_path / archive, {f"Imagenet64/{name}": files[name] for name in members}, zipfile.ZIP_STORED)
    return [tmp_path / archive for archive in archives], parts


@pytest.mark.parametrize("layout", ["zips", "compressed", "folder", "files"])
def test_the_published_imagenet_batches(tmp_path, layout, monkeypatch):
    monkeypatch.setattr("rnode_plugin.data.npz._ROWS", 2)
    (tmp_path / "in").mkdir()
    sources, parts = _imagenet(tmp_path / "in", layout)
    result = _prepare(*sources, target=tmp_path / "out", size=8)
    assert (result.train, result.val) == (10, 5)
    _assert_packed(tmp_path / "out", np.concatenate(parts[:2]), parts[2])


def test_real_photographs_from_their_archive(tmp_path):
    source = real_data("cifar10-jpeg.tar")
    with tarfile.open(source) as archive, tarfile.open(tmp_path / "some.tar", "w") as some:
        for member in archive:
            if member.isfile() and member.name.endswith(("000.jpg", "1.jpg")) and "/t" in member.name:
                some.addfile(member, archive.extractfile(member))
    result = _prepare(tmp_path / "some.tar", target=tmp_path / "out", size=16, channels=1)
    assert result.shape == (1, 16, 16)
    assert result.train > 7 * result.val > 1000
    data = get_dataset("folder", root=str(tmp_path / "out"))
    assert 50 < data.val[:].mean() < 200


# ---- what is wrong with files


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_bad_files_fail_by_name_or_are_skipped_by_name(tmp_path, kind):
    files, train, val = _pictures()
    files["set/train/notes.txt"] = b"not a picture"
    files["set/train/7.png"] = b"garbage"
    files["set/val/half.png"] = files["set/val/0.png"][:60]
    source = tmp_path / f"a.{kind}"
    (_zip if kind == "zip" else _tar)(source, files)
    with pytest.raises(DataError, match=r"no pictures: .*set/train/notes\.txt\. Remove .*--on-error skip"):
        _prepare(source, target=tmp_path / "out")
    _assert_nothing(tmp_path / "out")
    result = _prepare(source, target=tmp_path / "out", on_error="skip")
    assert [name.split(": ")[1] for name in result.skipped] == [
        "set/train/notes.txt",
        "set/train/7.png",
        "set/val/half.png",
    ]
    _assert_packed(tmp_path / "out", train, val)
    del files["set/train/notes.txt"]
    (_zip if kind == "zip" else _tar)(source, files)
    with pytest.raises(DataError, match=r"set/train/7\.png cannot be read as a picture.*--on-error skip"):
        _prepare(source, target=tmp_path / "other")
    _assert_nothing(tmp_path / "other")


def test_no_name_in_an_archive_leads_out_of_the_target(tmp_path):
    inside = tmp_path / "deep" / "inside"
    inside.mkdir(parents=True)
    images = random_images(8, SHAPE)
    names = ["../../evil.png", "/evil.png", str(tmp_path / "evil.png"), "C:\\evil.png", *"abcd"]
    files = {
        name if "." in name else f"{name}.png": picture_bytes(im) for name, im in zip(names, images, strict=True)
    }
    for write, source in ((_zip, inside / "a.zip"), (_tar, inside / "a.tar")):
        write(source, files)
        result = _prepare(source, target=inside / "out", overwrite=True)
        assert result.train + result.val == 8  # a name is only a name
        assert sorted(p.name for p in (inside / "out").iterdir()) == ["train.npy", "val.npy"]
    found = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {f"deep/inside/{n}" for n in ("a.zip", "a.tar", "out/train.npy", "out/val.npy")}


def test_links_and_devices_in_a_tar_are_no_pictures(tmp_path):
    files, train, val = _pictures()
    source = tmp_path / "a.tar"
    _tar(source, files)
    with tarfile.open(source, "a") as archive:
        for kind, name in (
            (tarfile.SYMTYPE, "link.png"),
            (tarfile.FIFOTYPE, "pipe.png"),
            (tarfile.CHRTYPE, "dev.png"),
        ):
            info = tarfile.TarInfo(f"set/train/{name}")
            info.type, info.linkname = kind, "/etc/hostname"
            archive.addfile(info)
    _prepare(source, target=tmp_path / "out")
    _assert_packed(tmp_path / "out", train, val)


def test_pictures_of_different_sizes(tmp_path):
    for i in range(4):
        write_picture(tmp_path / "in" / f"{i}.png", random_images(1, (3, 8 + i // 3, 8))[0])
    with pytest.raises(DataError, match=r"differ in size: .*3\.png is 3x9x8, those before are 3x8x8.*--size"):
        _prepare(tmp_path / "in", target=tmp_path / "out", on_error="skip")
    _assert_nothing(tmp_path / "out")
    assert _prepare(tmp_path / "in", target=tmp_path / "out", size=8).shape == SHAPE


def test_damaged_and_foreign_sources(tmp_path):
    files, *_ = _pictures(40, 10)
    _zip(tmp_path / "a.zip", files)
    _tar(tmp_path / "b.tar", files)
    _tar(tmp_path / "c.tar.gz", files, "w:gz")
    for name in ("a.zip", "b.tar", "c.tar.gz"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2 - 100])
        with pytest.raises(DataError, match=f"{name} .*(damaged|cannot be read)"):
            _prepare(tmp_path / name, target=tmp_path / "out", on_error="skip")
    (tmp_path / "text.zip").write_text("hello")
    with pytest.raises(DataError, match="neither a folder nor a zip"):
        plan_packing([tmp_path / "text.zip"])
    with pytest.raises(DataError, match="does not exist"):
        plan_packing([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures and no npz batches"):
        plan_packing([tmp_path / "empty"])
    _assert_nothing(tmp_path / "out")


def test_a_damaged_member_is_found_by_its_checksum(tmp_path):
    files, train, val = _pictures()
    _zip(tmp_path / "a.zip", files, zipfile.ZIP_STORED)
    content = (tmp_path / "a.zip").read_bytes()
    target = files["set/train/2.png"]
    at = content.index(target) + len(target) - 6
    (tmp_path / "a.zip").write_bytes(content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :])
    with pytest.raises(DataError, match=r"set/train/2\.png cannot be read: Bad CRC"):
        _prepare(tmp_path / "a.zip", target=tmp_path / "out")
    _prepare(tmp_path / "a.zip", target=tmp_path / "out", on_error="skip")
    _assert_packed(tmp_path / "out", np.delete(train, 2, axis=0), val)


def test_files_that_claim_too_much(tmp_path, monkeypatch):
    files, *_ = _pictures()
    _zip(tmp_path / "a.zip", files | {"set/train/big.png": bytes(5000)})
    monkeypatch.setattr(packing, "_MAX_PICTURE_BYTES", 4000)
    with pytest.raises(DataError, match=r"big\.png is larger than"):
        _prepare(tmp_path / "a.zip", target=tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(DataError, match=r"need about 0\.0 GB .* where 0\.0 GB are free"):
        _prepare(tmp_path / "a.zip", target=tmp_path / "out")
    _assert_nothing(tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda good: good[: len(good) // 2], "damaged"),
        (lambda good: b"PK nothing", "damaged"),
        (lambda good: _npz(random_images(3, SHAPE), data=np.zeros((3, 192), np.float32)), "is float32"),
        (lambda good: _npz(random_images(3, SHAPE), data=np.zeros((3, 191), np.uint8)), r"uint8 \(3, 191\)"),
        (lambda good: _npz(random_images(3, SHAPE), data=np.array([{}, {}])), "is object"),
        (lambda good: _npz(random_images(3, (3, 9, 9))), "holds 9x9 RGB images"),
        (lambda good: _zipped({"labels.npy": b""}), "no array `data`"),
        (lambda good: _zipped({"data.npy": b"\x93NUMPY\x01\x00v\x00{broken"}), "damaged"),
        (lambda good: _zipped({"data.npy": _header((5, 192)) + bytes(200)}), "ends within 5 images"),
        (lambda good: _zipped({"data.npy": _header((10**9, 192))}), "unpacks to more than 16 GB"),
    ],
)
def test_damaged_batches(tmp_path, content, message):
    good = _npz(random_images(3, SHAPE))
    (tmp_path / "val_data.npz").write_bytes(good)
    (tmp_path / "train_data_batch_1.npz").write_bytes(content(good))
    with pytest.raises(DataError, match=message) as caught:
        _prepare(tmp_path, target=tmp_path / "out", size=8, on_error="skip")
    assert "train_data_batch_1.npz" in str(caught.value)
    _assert_nothing(tmp_path / "out")


def _zipped(files):
    file = io.BytesIO()
    _zip(file, files)
    return file.getvalue()


def _header(shape):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


def test_batches_come_together_and_alone(tmp_path):
    (tmp_path / "train_data_batch_1.npz").write_bytes(_npz(random_images(3, SHAPE)))
    with pytest.raises(DataError, match=r"together with val_data\.npz"):
        plan_packing([tmp_path])
    (tmp_path / "val_data.npz").write_bytes(_npz(random_images(3, SHAPE)))
    write_picture(tmp_path / "train" / "a.png", random_images(1, SHAPE)[0])
    with pytest.raises(DataError, match="without other pictures"):
        plan_packing([tmp_path])


def test_pickled_batches_are_not_opened(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    _zip(tmp_path / "Imagenet64_train_part1.zip", {"train_data_batch_1": pickle.dumps(Evil())})
    with pytest.raises(DataError, match=r"Python pickle.*Imagenet64_train_part1_npz"):
        plan_packing([tmp_path / "Imagenet64_train_part1.zip"])
    assert not (tmp_path / "ran").exists()


# ---- the target


def test_packed_files_are_replaced_on_request_only(tmp_path):
    files, train, val = _pictures()
    _zip(tmp_path / "a.zip", files)
    target = tmp_path / "out"
    target.mkdir()
    (target / "val.npy").write_bytes(b"precious")
    with pytest.raises(DataError, match=r"val\.npy exist already; pass --overwrite"):
        _prepare(tmp_path / "a.zip", target=target)
    assert (target / "val.npy").read_bytes() == b"precious"
    _prepare(tmp_path / "a.zip", target=target, overwrite=True)
    _assert_packed(target, train, val)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_run_leaves_the_old_files(tmp_path, error):
    files, train, val = _pictures()
    _zip(tmp_path / "a.zip", files)
    _prepare(tmp_path / "a.zip", target=tmp_path / "out")
    seen = []

    def interrupt(nbytes):
        seen.append(nbytes)
        if len(seen) == 5:
            raise error

    expected = KeyboardInterrupt if error is KeyboardInterrupt else DataError
    with pytest.raises(expected):
        _prepare(tmp_path / "a.zip", target=tmp_path / "out", size=4, overwrite=True, advance=interrupt)
    assert len(seen) == 5
    _assert_packed(tmp_path / "out", train, val)


def test_a_target_that_cannot_be_written(tmp_path):
    files, *_ = _pictures()
    _zip(tmp_path / "a.zip", files)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot write to"):
        _prepare(tmp_path / "a.zip", target=tmp_path / "file" / "out")


def test_a_source_that_changes_meanwhile(tmp_path):
    for i in range(4):
        write_picture(tmp_path / "in" / f"{i}.png", random_images(1, SHAPE)[0])
    plan = plan_packing([tmp_path / "in"])
    (tmp_path / "in" / "3.png").unlink()
    with pytest.raises(DataError, match=r"3\.png is gone"):
        pack(plan, tmp_path / "out")
    write_picture(tmp_path / "in" / "0a.png", random_images(1, SHAPE)[0])
    with pytest.raises(DataError, match="has changed"):
        pack(plan, tmp_path / "out")
    _assert_nothing(tmp_path / "out")


@pytest.mark.parametrize("options", [{"on_error": "ignore"}, {"channels": 2}, {"size": 0}])
def test_options_that_cannot_be_are_refused(tmp_path, options):
    files, *_ = _pictures()
    _zip(tmp_path / "a.zip", files)
    with pytest.raises(ConfigError):
        _prepare(tmp_path / "a.zip", target=tmp_path / "out", **options)


def test_many_images_have_a_header_that_fits(tmp_path):
    from rnode_plugin.data.packed import PackedWriter

    with PackedWriter(tmp_path / "train.npy") as writer:
        writer.append(random_images(1, (3, 256, 256)))
        writer.count = 10**12  # as if there were so many
        writer.finish()
        writer.publish()
    with open(tmp_path / "train.npy", "rb") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        assert np.lib.format.read_array_header_1_0(file) == ((10**12, 3, 256, 256), False, np.uint8)
        assert file.tell() == 128


# ---- the command


def test_the_command_packs_and_reports(tmp_path):
    files, train, val = _pictures()
    _zip(tmp_path / "a.zip", files | {"set/notes.txt": b"?"})
    out = tmp_path / "out"
    runner = CliRunner()
    result = runner.invoke(data_group, ["prepare", str(tmp_path / "a.zip"), str(out), "--size", "8"])
    assert isinstance(result.exception, DataError)
    result = runner.invoke(
        data_group, ["prepare", str(tmp_path / "a.zip"), str(out), "--size", "8", "--on-error", "skip"]
    )
    assert result.exit_code == 0, result.output
    assert f"6 images to train on and 3 held out, 3x8x8, 1 files skipped, in {out}" in result.stdout
    assert "set/notes.txt" in result.stderr
    _assert_packed(out, train, val)


@pytest.mark.parametrize(
    "arguments",
    [[], ["only-one"], ["a", "b", "--size", "0"], ["a", "b", "--val-fraction", "1"], ["a", "b", "--channels", "2"]],
)
def test_wrong_usage_is_exit_code_2(arguments):
    assert CliRunner().invoke(data_group, ["prepare", *arguments]).exit_code == 2


def test_the_list_names_every_data_set():
    result = CliRunner().invoke(data_group, ["list"])
    assert result.exit_code == 0
    lines = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert {"digits", "mnist", "fashion-mnist", "cifar10", "svhn", "imagenet64", "celebahq256", "folder"} <= set(
        lines
    )
    assert "17 grey levels" in lines["digits"]
