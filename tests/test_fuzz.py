"""Every reader of files, on files that were damaged at random: one message of ours, or a result, never a traceback.

Formats with a checksum of their contents (a zip's members, a checkpoint) give what the whole file holds, or refuse.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import picture_bytes, random_images
from packing_sources import npz_batch, prepare, write_tar, write_zip
from published_sets import idx_images
from run_folders import write_run

from rnode_plugin import get_recipe
from rnode_plugin.data import get_dataset
from rnode_plugin.data.folders import decode
from rnode_plugin.data.table_files import column_names, read_columns, write_rows
from rnode_plugin.errors import RnodeError
from rnode_plugin.reports.runs import read_run
from rnode_plugin.training.checkpoints import export_flow, load_flow, save_flow

QUICK, SLOW = 20, 1000


def damaged(content: bytes, draw: np.random.Generator) -> bytes:
    """The content with one of seven damages, that disks, networks and editors do to files."""
    kind = draw.integers(7)
    at = int(draw.integers(len(content)))
    length = int(draw.integers(1, max(2, min(600, len(content) // 4))))
    if kind == 0:  # one bit
        return content[:at] + bytes([content[at] ^ 1 << int(draw.integers(8))]) + content[at + 1 :]
    if kind == 1:  # one byte
        return content[:at] + bytes([int(draw.integers(256))]) + content[at + 1 :]
    if kind == 2:  # the end is missing
        return content[:at]
    if kind == 3:  # a piece is missing
        return content[:at] + content[at + length :]
    if kind == 4:  # a piece is zeros
        return content[:at] + bytes(len(content[at : at + length])) + content[at + length :]
    if kind == 5:  # a piece stands twice
        return content[: at + length] + content[at:]
    return content[:at] + draw.bytes(len(content[at : at + length])) + content[at + length :]  # noise


@dataclass(frozen=True)
class Format:
    """One kind of file.

    Attributes:
        make: writes the whole file (or folder) below a folder and returns the file to damage.
        read: reads what lies below the folder: a value to compare.
        exact: whether the format has checksums of its contents, so that what is read must be equal.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    exact: bool = False


IMAGES = random_images(12, (3, 8, 8))
FILES = {f"set/{'train' if i < 9 else 'val'}/{i}.png": picture_bytes(image) for i, image in enumerate(IMAGES)}


def write(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        return folder / name

    return make


def archive(name: str, kind: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        if kind == "zip":
            write_zip(folder / name, FILES)
        else:
            write_tar(folder / name, FILES, kind)
        return folder / name

    return make


def batches(folder: Path) -> Path:
    (folder / "in").mkdir()
    (folder / "in" / "val_data.npz").write_bytes(npz_batch(IMAGES[9:]))
    (folder / "in" / "train_data_batch_1.npz").write_bytes(npz_batch(IMAGES[:9], compressed=True))
    return folder / "in" / "train_data_batch_1.npz"


def packed(folder: Path) -> Path:
    np.save(folder / "val.npy", IMAGES[9:])
    np.save(folder / "train.npy", IMAGES[:9])
    return folder / "train.npy"


def pictures(folder: Path) -> Path:
    for name, content in FILES.items():
        write(name, content)(folder)
    return folder / "set" / "train" / "3.png"


def mnist(folder: Path) -> Path:
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 5), ("t10k", 3)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx_images(random_images(count, (1, 28, 28))))
    return raw / "train-images-idx3-ubyte"


def of_prepare(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> list[bytes]:
        prepare(folder / name, target=folder / "out", overwrite=True)
        return [np.load(folder / "out" / f"{part}.npy").tobytes() for part in ("train", "val")]

    return read


def of_dataset(name: str, folder: str = ".") -> Callable[[Path], Any]:
    def read(where: Path) -> list[np.ndarray]:
        data = get_dataset(name, root=str(where / folder))
        return [data.train[:], data.val[:]]

    return read


def picture(suffix: str, kind: str) -> Format:
    def read(folder: Path) -> np.ndarray:
        with open(folder / f"a.{suffix}", "rb") as file:
            return decode(file, f"a.{suffix}", size=None, channels=3)

    return Format(write(f"a.{suffix}", picture_bytes(random_images(1, (3, 24, 24))[0], kind)), read)


def of_table(name: str) -> Format:
    rows = np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32)

    def make(folder: Path) -> Path:
        write_rows(folder / name, ("a", "b"), rows)
        return folder / name

    return Format(make, lambda folder: [read_columns(folder / name, column_names(folder / name))])


RECIPE = get_recipe("digits").override(["model.hidden=2", "model.layers=2", "test_solver.method=rk4"])


def flow(name: str) -> tuple[Callable[[Path], Path], Callable[[Path], Any]]:
    def make(folder: Path) -> Path:
        torch.manual_seed(0)
        save_flow(RECIPE.build_flow(), folder / "a.ckpt", recipe=RECIPE)
        if name.endswith(".safetensors"):
            export_flow(folder / "a.ckpt", folder / name)
        return folder / name

    def read(folder: Path) -> list[np.ndarray]:
        return [tensor.numpy() for tensor in load_flow(folder / name).state_dict().values()]

    return make, read


def run_file(name: str) -> tuple[Callable[[Path], Path], Callable[[Path], Any]]:
    def make(folder: Path) -> Path:
        write_run(folder / "run", RECIPE)
        return folder / "run" / name

    def read(folder: Path) -> None:
        read_run(folder / "run")

    return make, read


FORMATS = {
    "tar": Format(archive("a.tar", "w"), of_prepare("a.tar")),
    "tar.gz": Format(archive("a.tar.gz", "w:gz"), of_prepare("a.tar.gz")),
    "zip": Format(archive("a.zip", "zip"), of_prepare("a.zip")),
    "npz": Format(batches, of_prepare("in")),
    **{suffix: picture(suffix, kind) for suffix, kind in (("png", "PNG"), ("jpg", "JPEG"), ("tif", "TIFF"))},
    "folder": Format(pictures, of_dataset("folder", "set")),
    "npy": Format(packed, of_dataset("folder")),
    "idx": Format(mnist, of_dataset("mnist")),
    **{f"table{suffix}": of_table(f"table{suffix}") for suffix in (".csv", ".npy", ".npz", ".parquet")},
    "ckpt": Format(*flow("a.ckpt"), exact=True),
    "safetensors": Format(*flow("a.safetensors")),
    "recipe.json": Format(*run_file("recipe.json")),
    "result.json": Format(*run_file("result.json")),
    "metrics.csv": Format(*run_file("metrics.csv")),
}


def equal(one: Any, other: Any) -> bool:
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def fuzz(name: str, tries: int, folder: Path) -> None:
    form = FORMATS[name]
    file = form.make(folder)
    whole, expected = file.read_bytes(), form.read(folder)
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    refused = 0
    for number in range(tries):
        wrong = damaged(whole, draw)
        file.write_bytes(wrong)
        try:
            found = form.read(folder)
        except RnodeError as error:
            refused += 1
            if not str(error).strip():
                raise AssertionError(f"damage {number} of {name}: an error without words") from error
            continue
        except Exception as error:
            raise AssertionError(f"damage {number} of {name} ends in a traceback") from error
        if form.exact:
            assert equal(found, expected), f"damage {number} of {name}: something else was read, and no word"
    assert refused > 0


@pytest.mark.parametrize("name", FORMATS)
def test_some_damages(name: str, tmp_path: Path) -> None:
    fuzz(name, QUICK, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_many_damages(name: str, tmp_path: Path) -> None:
    fuzz(name, SLOW, tmp_path)
