"""Readers of files that were damaged at random give a result, or one message that names the file."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import picture_bytes, random_images
from run_folders import write_run

from rnode_plugin import get_recipe
from rnode_plugin.errors import RnodeError
from rnode_plugin.experiments.data import get_dataset
from rnode_plugin.experiments.data.table_files import column_names, read_columns, write_rows
from rnode_plugin.experiments.runs.run import Run
from rnode_plugin.experiments.training.checkpoints import load_flow, save_flow

FILES_OF_A_RUN = "recipe.json", "environment.json", "result.json", "metrics.csv", "images.csv"
IMAGES = random_images(12, (3, 8, 8))
ROWS = np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32)
RECIPE = get_recipe("digits").override(["model.hidden=2", "model.layers=2", "test_solver.method=rk4"])


def damaged(content: bytes, draw: np.random.Generator) -> bytes:
    """The content with a bit flipped, its end missing, or a piece missing, doubled or noise."""
    at, length = int(draw.integers(len(content))), int(draw.integers(1, max(2, min(600, len(content) // 4))))
    piece, end = content[at : at + length], content[at + length :]
    flipped = bytes([content[at] ^ 1 << int(draw.integers(8))]) + content[at + 1 :]
    return content[:at] + (flipped, b"", end, piece + piece + end, draw.bytes(len(piece)) + end)[draw.integers(5)]


def packed(folder: Path) -> None:
    np.save(folder / "val.npy", IMAGES[9:])
    np.save(folder / "train.npy", IMAGES[:9])


def pictures(kind: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for number, image in enumerate(IMAGES[:3]):
            (folder / f"{number}.png").write_bytes(picture_bytes(image, kind))

    return make


def flow(folder: Path) -> None:
    torch.manual_seed(0)
    for name in ("a.ckpt", "a.safetensors"):
        save_flow(RECIPE.build_flow(), folder / name, recipe=RECIPE)


def whole_run(folder: Path) -> None:
    write_run(folder / "run", RECIPE, images=[2.0] * 30)


def dataset(file: Path) -> None:
    data = get_dataset("folder", root=str(file.parent))
    _ = data.train[:], data.val[:]


# file to damage, what writes it (and others) into a folder, what reads it
FORMATS: list[tuple[str, Callable[[Path], Any], Callable[[Path], Any]]] = [
    *(("1.png", pictures(kind), dataset) for kind in ("PNG", "JPEG", "TIFF")),
    ("train.npy", packed, dataset),
    *(
        (f"a{end}", lambda folder, end=end: write_rows(folder / f"a{end}", ("a", "b"), ROWS),
         lambda file: read_columns(file, column_names(file)))
        for end in (".csv", ".npy", ".parquet")
    ),
    ("a.ckpt", flow, load_flow),
    ("a.safetensors", flow, load_flow),
    *((f"run/{name}", whole_run, lambda file: Run(file.parent).read()) for name in FILES_OF_A_RUN),
]  # fmt: skip


@pytest.mark.parametrize(("name", "make", "read"), FORMATS)
def test_damaged_files(name: str, make: Callable[[Path], Any], read: Callable[[Path], Any], tmp_path: Path) -> None:
    file = tmp_path / "in" / name
    (tmp_path / "in").mkdir()
    make(tmp_path / "in")
    whole, draw, refused = file.read_bytes(), np.random.default_rng(zlib.crc32(name.encode())), list[RnodeError]()
    read(file)
    for _ in range(20):
        file.write_bytes(damaged(whole, draw))
        try:
            read(file)
        except RnodeError as error:
            refused.append(error)
    assert refused
    assert all(file.name in str(error) for error in refused)
