"""Pictures and packed arrays that a user brings, and batches of them."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import re
import runpy
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import picture_bytes, random_images, write_picture
from PIL import Image
from problems import refuses
from torch.utils.data import DataLoader

from rnode_plugin import ImageDataModule, get_recipe
from rnode_plugin.errors import DataError
from rnode_plugin.experiments.data import ImageData, folders, get_dataset
from rnode_plugin.experiments.data.arrays import Selection
from rnode_plugin.experiments.data.batches import ArrayDataset, keep_batch, leave_signals_to_parent
from rnode_plugin.experiments.data.folders import ImageFiles, PackedImages, decode


def _write(where, images, split="train", suffix=".png"):
    for i, image in enumerate(images):
        write_picture(where / split / f"class{i % 2}" / f"{i:03}{suffix}", image)


def _rows(images):
    return {row.tobytes() for row in images[:]}


# ---- pictures


@pytest.mark.parametrize("held_out", ["val", "test", "valid", "validation", "Val"])
def test_folders_make_the_split(tmp_path, held_out):
    train, val = random_images(6, seed=1), random_images(4, seed=2)
    _write(tmp_path, train)
    _write(tmp_path, val, held_out, ".bmp")
    (tmp_path / "labels.csv").write_text("ignored")
    if held_out == "val":
        _write(tmp_path, train, "test")
    data = get_dataset("folder", root=str(tmp_path))
    assert (data.shape, data.levels) == ((3, 8, 8), 256)
    assert _rows(data.train) == _rows(train)
    assert _rows(data.val) == _rows(val)


def test_without_folders_new_pictures_move_no_old_one(tmp_path):
    images = random_images(200)
    for i, image in enumerate(images[:150]):
        write_picture(tmp_path / "any" / f"{i:03}.png", image)
    data = get_dataset("folder", root=str(tmp_path))
    assert 5 < len(data.val) < 27  # 15 on average, with a deviation of 3.7
    assert _rows(data.train) | _rows(data.val) == _rows(images[:150])
    for i, image in enumerate(images[150:], start=150):
        write_picture(tmp_path / "any" / f"{i:03}.png", image)
    more = get_dataset("folder", root=str(tmp_path))
    assert _rows(more.train) > _rows(data.train)
    assert _rows(more.val) > _rows(data.val)


def test_size_scales_the_shorter_side_and_cuts_the_middle(tmp_path):
    # left third red, middle green, right blue: of 24 x 8 only the middle stays
    wide = np.zeros((3, 8, 24), np.uint8)
    wide[0, :, :8], wide[1, :, 8:16], wide[2, :, 16:] = 255, 255, 255
    write_picture(tmp_path / "a.png", wide)
    write_picture(tmp_path / "b.png", wide.transpose(0, 2, 1))
    data = get_dataset("folder", root=str(tmp_path), size=8)
    green = np.zeros((3, 8, 8), np.uint8)
    green[1] = 255
    for images in (data.train, data.val):
        assert np.array_equal(images[0], green)

    noise = random_images(1, (3, 16, 48))[0]
    with io.BytesIO(picture_bytes(noise)) as file:
        small = decode(file, size=8, channels=3)
    whole = Image.fromarray(noise.transpose(1, 2, 0)).resize((24, 8), Image.Resampling.LANCZOS)
    assert np.array_equal(small, np.asarray(whole).transpose(2, 0, 1)[:, :, 8:16])


def test_large_sets_are_decoded_when_asked_for(tmp_path, monkeypatch):
    images = random_images(8)
    _write(tmp_path, images)
    _write(tmp_path, images, "val")
    kept = get_dataset("folder", root=str(tmp_path), bits=5)
    monkeypatch.setattr(folders, "_IN_MEMORY_BYTES", 1000)
    read = get_dataset("folder", root=str(tmp_path), bits=5)
    assert isinstance(kept.train, np.ndarray)
    assert isinstance(read.train, ImageFiles)
    assert np.array_equal(read.train[:], kept.train)
    assert np.array_equal(ArrayDataset(read.train).__getitems__([5, 2]).numpy(), kept.train[[5, 2]])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1"])
def test_kinds_of_pixels_become_rgb_and_upright(mode):
    value = 255 if mode == "1" else 90
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    file = io.BytesIO()
    Image.new("L", (4, 8), value).convert(mode).save(file, "PNG", exif=exif)
    assert np.array_equal(decode(file, size=None, channels=3), np.full((3, 4, 8), value))


@pytest.mark.skipif(os.name != "posix", reason="links and pipes")
@pytest.mark.timeout(300)
def test_links_in_circles_and_pipes_do_not_hang(tmp_path):
    _write(tmp_path, random_images(4), "a")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "a" / "pipe.png")
    data = get_dataset("folder", root=str(tmp_path))
    assert len(data.train) + len(data.val) == 4


def test_empty_missing_and_unclear_folders(tmp_path):
    with refuses(DataError, "nowhere"):
        get_dataset("folder", root=str(tmp_path / "nowhere"))
    with refuses(DataError, "train.npy"):
        get_dataset("folder", root=str(tmp_path))
    write_picture(tmp_path / "one.png", random_images(1)[0])
    with refuses(DataError, str(tmp_path)):
        get_dataset("folder", root=str(tmp_path))
    _write(tmp_path, random_images(2), "train")
    _write(tmp_path, random_images(2), "val")
    with refuses(DataError, "one.png"):
        get_dataset("folder", root=str(tmp_path))


@pytest.mark.parametrize(("shape", "options", "found"), [
    ((3, 12, 20), [], (3, 12, 20)),
    ((1, 8, 8), [], (1, 8, 8)),
    ((3, 12, 20), ["data.size=6"], (3, 6, 6)),
    ((1, 9, 8), ["data.size=4", "data.shape=3,4,4"], (3, 4, 4)),
])  # fmt: skip
def test_a_recipe_takes_the_shape_of_the_pictures(tmp_path, shape, options, found):
    for i, image in enumerate(random_images(30, shape)):
        write_picture(tmp_path / f"{i}.png", image)
    recipe = get_recipe("pictures").override([f"data.root={tmp_path}", *options])
    assert (recipe.data.event, recipe.data.model_options) == (found, {"levels": 256})
    data = recipe.load_data(all_val=True)
    assert isinstance(data, ImageData)
    assert (data.shape, len(data.train) + len(data.val)) == (found, 30)
    assert data.described() == f"folder: images of {'x'.join(map(str, found))}, 256 levels"
    assert recipe.override(["training.seed=3"]).data == recipe.data
    for name in ("mnist", "digits", "celebahq256"):  # of 256, 17 and 32 levels
        other = get_recipe(name).override(["data.name=folder", f"data.root={tmp_path}", *options])
        assert (other.data.event, other.data.model_options) == (found, {"levels": 256})
        other.load_data()
    assert other.override(["data.levels=32"]).data.model_options == {"levels": 32}
    published = vars(other.override(["data.name=cifar10"]).data)
    assert (published["root"], published["size"]) == (None, None)  # not downloaded into the folder of pictures
    assert other.override(["data.name=cifar10", "data.root=sets"]).data.root == os.path.abspath("sets")


def test_colours_and_sizes_are_those_of_all_pictures(tmp_path):
    _write(tmp_path, random_images(3, (1, 8, 8)))
    write_picture(tmp_path / "val" / "z.png", random_images(1)[0])
    recipe = get_recipe("pictures").override([f"data.root={tmp_path}"])
    assert recipe.data.event == (3, 8, 8)
    write_picture(tmp_path / "train" / "z.png", random_images(1, (3, 9, 8))[0])
    for load in (lambda: recipe.load_data(), lambda: get_recipe("pictures").override([f"data.root={tmp_path}"])):
        with refuses(DataError, "z.png", "9x8", "--size"):
            load()
    assert get_dataset("folder", root=str(tmp_path), size=8).train.shape == (4, 3, 8, 8)


def test_pictures_of_a_camera_need_a_size(tmp_path):
    write_picture(tmp_path / "a.png", random_images(1, (3, 300, 200))[0])
    with refuses(DataError, "300x200", "--size 32"):
        get_recipe("pictures").override([f"data.root={tmp_path}"])
    assert get_recipe("pictures").override([f"data.root={tmp_path}", "data.size=32"]).data.event == (3, 32, 32)


# ---- packed arrays


def _pack(where, train, val=None):
    where.mkdir(parents=True, exist_ok=True)
    np.save(where / "train.npy", train)
    np.save(where / "val.npy", train[:2] if val is None else val)


def test_celebahq256_is_five_bits_from_packed_and_from_pictures(tmp_path):
    with refuses(DataError, "CelebAMask-HQ.zip", f"{tmp_path}/celebahq256"):
        get_dataset("celebahq256", root=str(tmp_path), download=True)
    images = random_images(4, (3, 256, 256))
    _pack(tmp_path / "packed" / "celebahq256", images, images[:2])
    for split, part in (("train", images), ("val", images[:2])):
        for i, image in enumerate(part):
            write_picture(tmp_path / "pictures" / "celebahq256" / split / f"{i}.png", image)
    for source in ("packed", "pictures"):
        data = get_dataset("celebahq256", root=str(tmp_path / source))
        assert (data.shape, data.levels) == ((3, 256, 256), 32)
        assert np.array_equal(data.train[:], images // 8)
        assert np.array_equal(data.val[:], images[:2] // 8)
        assert isinstance(data.train, np.ndarray) == (source == "pictures")  # packed ones are mapped, not loaded
        assert data.limit(train=3).train.shape == (3, 3, 256, 256)


def test_packed_images_need_both_files(tmp_path):
    _pack(tmp_path, random_images(4))
    (tmp_path / "val.npy").unlink()
    with refuses(DataError, "val.npy"):
        get_dataset("folder", root=str(tmp_path))


def test_a_published_set_is_read_with_its_shape_and_bits(tmp_path):
    _pack(tmp_path / "imagenet64", random_images(4, (3, 32, 32)))
    with refuses(DataError, "3x32x32", "3x64x64"):
        get_dataset("imagenet64", root=str(tmp_path))
    _pack(tmp_path / "celebahq256", random_images(4, (3, 256, 256)) // 8)
    with refuses(DataError, "8"):
        get_dataset("celebahq256", root=str(tmp_path))


def published_batches(folder: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    """The files of ImageNet 64x64 with two images each, and the images by part."""
    names = [*(f"train_data_batch_{number}.npz" for number in range(1, 11)), "val_data.npz"]
    for number, name in enumerate(names):
        rows = images[2 * number : 2 * number + 2].reshape(2, -1)
        np.savez(folder / name, data=rows, labels=np.arange(2), mean=np.zeros(rows.shape[1]))
    return {"train": images[:20], "val": images[20:]}


def test_the_program_that_the_message_names_writes_imagenet64(tmp_path, monkeypatch):
    with pytest.raises(DataError) as caught:
        get_dataset("imagenet64", root=str(tmp_path))
    (program,) = re.findall(r"python (\S+\.py) FOLDER", str(caught.value))
    parts = published_batches(tmp_path, random_images(22, (3, 64, 64)))
    monkeypatch.setattr(sys, "argv", [program, str(tmp_path), str(tmp_path / "imagenet64")])
    path = Path(__file__).parents[1] / program
    runpy.run_path(str(path), run_name="__main__")
    data = get_dataset("imagenet64", root=str(tmp_path))
    assert (data.shape, data.levels) == ((3, 64, 64), 256)
    assert np.array_equal(data.train[:], parts["train"])
    assert np.array_equal(data.val[:], parts["val"])
    assert sorted(each.name for each in (tmp_path / "imagenet64").iterdir()) == ["train.npy", "val.npy"]
    # a batch of another size or kind leaves both arrays as they were
    for wrong in (np.zeros((4, 3 * 32 * 32), np.uint8), np.zeros((2, 3 * 64 * 64), np.float32)):
        np.savez(tmp_path / "train_data_batch_10.npz", data=wrong, labels=np.arange(len(wrong)))
        with refuses(SystemExit, "train_data_batch_10.npz"):
            runpy.run_path(str(path), run_name="__main__")
        assert np.array_equal(np.load(tmp_path / "imagenet64" / "val.npy"), parts["val"])


# ---- batches


@pytest.fixture(params=["memory", "packed", "files", "selection"])
def stored(request, tmp_path):
    """The same twenty images, wherever they lie, and as they should come out."""
    images = random_images(20, (3, 4, 4))
    if request.param == "memory":
        return images, images
    if request.param == "files":
        names = [f"{i:02}.png" for i in range(20)]
        for name, image in zip(names, images, strict=True):
            write_picture(tmp_path / name, image)
        return ImageFiles(tmp_path, names, size=None, channels=3), images
    np.save(tmp_path / "train.npy", images)
    packed = PackedImages(tmp_path / "train.npy")
    if request.param == "packed":
        return packed, images
    chosen = np.array([1, 4, 5, 9, 17])
    return Selection(packed, chosen), images[chosen]


def test_a_batch_is_a_slice_in_the_order_asked_for(stored):
    images, expected = stored
    dataset = ArrayDataset(images)
    wanted = [3, 0, 4, 0, 2]
    batch = dataset.__getitems__(wanted)
    assert batch.dtype == torch.uint8
    assert torch.equal(batch, torch.from_numpy(expected[wanted]))
    assert torch.equal(dataset[1], torch.from_numpy(expected[1]))
    assert len(dataset) == len(expected)
    batch.zero_()
    assert np.array_equal(images[:], expected), "a batch is a copy"


def test_workers_open_a_packed_file_themselves(tmp_path):
    images = random_images(12)
    np.save(tmp_path / "train.npy", images)
    packed = PackedImages(tmp_path / "train.npy", shift=3)
    assert len(pickle.dumps(packed)) < 1000
    assert np.array_equal(pickle.loads(pickle.dumps(packed))[:], images >> 3)
    batches = DataLoader(ArrayDataset(packed), collate_fn=keep_batch, batch_size=5, num_workers=1)
    assert torch.equal(torch.cat(list(batches)), torch.from_numpy(images >> 3))


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="signals have no sender here")
def test_a_signal_to_a_worker_that_starts_is_held_back(monkeypatch):
    """It is sent right after the fork, when the worker has not prepared for signals yet."""
    recipe = get_recipe("digits").override(["data.workers=1", "data.batch_size=20", "data.train_images=200"])
    start = BaseProcess.start

    def signalled(process):
        start(process)
        for name in ("TERM", "INT", "HUP"):
            subprocess.run(["kill", f"-{name}", str(process.pid)], check=True)

    def slow(worker, prepare=leave_signals_to_parent):
        time.sleep(1)
        prepare(worker)

    monkeypatch.setattr(BaseProcess, "start", signalled)
    monkeypatch.setattr("rnode_plugin.experiments.training.datamodule.leave_signals_to_parent", slow)
    assert len(list(ImageDataModule(recipe).train_dataloader())) == 10
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


ORPHANS = """
import multiprocessing, os, signal
from torch.utils.data._utils import worker
from rnode_plugin import ImageDataModule, get_recipe

worker.MP_STATUS_CHECK_INTERVAL = 900  # of PyTorch's own watch
recipe = get_recipe("digits").override(["data.workers=2", "data.batch_size=20", "data.train_images=200"])
next(batches := iter(ImageDataModule(recipe).train_dataloader()))
print(*(each.pid for each in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="signals have no sender here")
def test_workers_of_a_killed_process_end_at_once(tmp_path):
    """Otherwise they may hold the lock of its run for as long as they take to notice, and a resume is refused."""
    with (tmp_path / "workers").open("w") as file:  # a pipe would not end before the workers
        killed = subprocess.run([sys.executable, "-c", ORPHANS], stdout=file, check=False)
    end = time.monotonic() + 300
    assert killed.returncode == -signal.SIGKILL
    workers = (tmp_path / "workers").read_text().split()
    assert len(workers) == 2

    def runs(pid: str) -> bool:
        stat = Path(f"/proc/{pid}/stat")
        return stat.exists() and stat.read_text().rpartition(") ")[2][0] != "Z"

    while any(map(runs, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(runs, workers))


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="signals have no sender here")
def test_workers_outlive_the_signals_to_all_processes_of_a_run():
    """A scheduler sends SIGTERM to all processes of a job, and a terminal sends Ctrl-C to them."""
    recipe = get_recipe("digits").override(["data.workers=1", "data.batch_size=20", "data.train_images=200"])
    before = multiprocessing.active_children()
    batches = iter(ImageDataModule(recipe).train_dataloader())
    next(batches)
    (worker,) = {*multiprocessing.active_children()} - {*before}
    for name in ("TERM", "INT", "HUP"):  # by another process, because the parent ends its workers by SIGTERM
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert len(list(batches)) == 9
    worker.terminate()
    worker.join(600)
    assert worker.exitcode == 0


def test_a_picture_that_breaks_while_training_is_named(tmp_path):
    names = ["a.png", "b.png"]
    for name in names:
        write_picture(tmp_path / name, random_images(1)[0])
    files = ImageFiles(tmp_path, names, size=None, channels=3)
    (tmp_path / "b.png").write_bytes(b"gone")
    with refuses(DataError, "b.png"):
        ArrayDataset(files).__getitems__([0, 1])
    (tmp_path / "b.png").unlink()
    with refuses(DataError, "b.png"):
        files[1:2]
