"""Calls of the application that are refused, for the page of ``test_messages``."""

from __future__ import annotations

import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import picture_bytes, random_images, write_picture
from PIL import Image
from test_table_files import PAIRS, text_of, write

from rnode_plugin import get_recipe
from rnode_plugin.errors import RnodeError
from rnode_plugin.experiments.comparison.configurations import configured_recipes
from rnode_plugin.experiments.data import ImageData, get_dataset, get_table
from rnode_plugin.experiments.data.table_files import column_names, read_columns
from rnode_plugin.experiments.data.tables import Table, check_columns
from rnode_plugin.experiments.recipes.recipe import Recipe


def in_folder(act: Callable[[Path], object]) -> Callable[[], object]:
    """A call in a folder that the sentence names HERE, once at most. No warning comes beside the sentence."""

    def call() -> None:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                act(Path(folder))
            except RnodeError as error:
                if (sentence := str(error)).count(folder) > 1:
                    raise AssertionError(f"the folder stands twice in: {sentence}") from error
                raise type(error)(sentence.replace(folder, "HERE")) from None

    return call


TEXTS: dict[str, str | bytes] = {
    'R rows with names': "a,b\n" + text_of(PAIRS, start="Mazda RX4 {k},"),
    'R write.csv': '"","a","b"\n' + text_of(PAIRS, start='"{k}",'),
    'a pivot table': "site,2020\n" + text_of(PAIRS),
    'Excel with empty rows': "a,b\n" + text_of(PAIRS) + ",\n" * 3,
    'a separator at the end of rows': "a;b\n" + text_of(PAIRS, ";").replace("\n", ";\n"),
    'a separator in a name': "a;b,c\n" + text_of(PAIRS, ";"),
    'a later row with more': "a,b\n1,2\n3,4\n4,5,6\n",
    'an empty cell between spaces, before a column that is not read': "a b c\n1 2 3\n  5 6\n6 7 8\n",
    'an open quotation mark': 'a,b\n1,"2\n3,4\n',
    'a name that csv refuses': "a,b" + "x" * 200_000 + "\n1,2\n",
    'decimal commas': "a,b\n" + text_of(PAIRS, decimal=","),
    'decimal commas and tabs': "a\tb\n" + text_of(PAIRS, "\t", decimal=","),
    'thousands': 'a,b\n"1,234",2\n',
    'a row of the word nan': "a,b\n1,2\nnan,nan\n3,4\n",
    'infinite': "a,b\n1,2\ninf,2\n",
    'dates': "day,a\n2020-01-01,1.5\n2020-01-02,2.5\n",
    'underscores': "a,b\n1,2\n1_000,2\n",
    'a header alone': "a,b\n",
    'two columns of one name': "a,b,a\n1,2,3\n",
    'an empty row of one column': "a\n1\n\n3\n",
    'nothing': "",
    'Latin-1': b"a,b\n1,\xff\n",
}  # fmt: skip


def read_text(text: str | bytes) -> Callable[[], object]:
    def act(here: Path) -> None:
        (path := here / "data.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
        read_columns(path, column_names(path)[:2])

    return in_folder(act)


ARRAYS = {
    "a row": np.zeros(5),
    "a structured array": np.zeros(30, dtype=[("q", "f8"), ("r", "f8")]),
    "complex numbers": np.zeros((30, 2), dtype=complex),
    "words": np.array([["x", "y"]]),
    "objects": np.array([[None]], dtype=object),
}  # fmt: skip


def read_array(array: np.ndarray) -> Callable[[], object]:
    def act(here: Path) -> None:
        np.save(here / "a.npy", array, allow_pickle=True)
        read_columns(here / "a.npy", column_names(here / "a.npy"))

    return in_folder(act)


X, Y = np.random.default_rng(0).normal(size=(2, 50))
COLUMNS: dict[str, tuple[tuple[np.ndarray, ...], int]] = {
    "a constant column": ((X, np.full(50, 3.0)), 2),
    "a constant column that is given": ((X, np.full(50, 3.0)), 1),
    "a column of a large mean": ((X, 101325 + 1e-3 * Y), 2),
    "a column of tiny numbers": ((X, 1e-46 * Y), 2),
    "a column of huge numbers": ((X, 1e39 * Y), 2),
    "a linear function of two columns": ((X, Y, 3 * X - Y + 2), 3),
    "a linear function in 64 bits": ((1e4 + X, Y, 1e4 + X - Y), 3),
    "a nearly linear function": ((1e4 + X, 1e4 + X + 1e-4 * Y), 2),
    "a linear function of what is given": ((X, 2 * X + 1), 1),
    "more columns than rows allow": ((X[:3], Y[:3], X[:3] ** 2), 3),
}  # fmt: skip


def accept(columns: tuple[np.ndarray, ...], modeled: int) -> Callable[[], object]:
    def call() -> None:
        rows = np.stack(columns, axis=1)
        table = Table("t", tuple("abcdef"[: len(columns)]), rows, rows, rows)
        check_columns(table, modeled)
        table.single()

    return call


TABLE_SETTINGS = [
    ["data.given=doze"],
    ["data.columns=dose,dose"],
    ["data.columns=dose", "data.given=dose"],
    ["data.held_out=0.6", "data.validation=0.5"],
    ["data.validation=0"],
    ["data.split_seed=4294967296"],
    ["data.shape=1,2,3"],
    ["data.name=digits"],
    ["data.columns=doze", "data.given="],
]  # fmt: skip


def override_table(settings: list[str]) -> Callable[[], object]:
    return in_folder(
        lambda here: get_recipe("table").override([f"data.root={write(here / 'data.csv')}", *settings])
    )


class _Unfaithful:
    """A plugin's array, which returns something else than its shape and dtype say."""

    shape, dtype = (10, 1, 4, 4), np.dtype(np.uint8)

    def __init__(self, value: object) -> None:
        self.value = value

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: object) -> object:
        return self.value


IMAGES: dict[str, dict[str, Any]] = {
    "an array that returns one image for two": {"train": _Unfaithful(np.zeros((1, 1, 4, 4), np.uint8))},
    "an array that returns other numbers": {"val": _Unfaithful(np.zeros((2, 1, 4, 4)))},
    "an array that returns a list": {"val": _Unfaithful([0, 1])},
    "floats": {"train": np.zeros((10, 1, 4, 4), np.float32)},
    "images without channels": {"val": np.zeros((10, 4, 4), np.uint8)},
    "no images": {"train": np.zeros((0, 1, 4, 4), np.uint8)},
    "a value above the levels": {"train": np.full((10, 1, 4, 4), 17, np.uint8)},
    "a list": {"train": [[0]]},
    "too many levels": {"levels": 257},
}  # fmt: skip


def image_data(changes: dict[str, Any]) -> Callable[[], object]:
    images: Any = np.zeros((10, 1, 4, 4), np.uint8)
    return lambda: ImageData(**{
        "name": "x", "train": images, "val": images, "shape": (1, 4, 4), "levels": 17, **changes
    })  # fmt: skip


def _deep_color() -> bytes:
    """An 8x8 PNG of three colors with 16 bits each, which PIL reads but does not write."""
    lines = np.zeros((8, 1 + 8 * 3 * 2), np.uint8)  # each begins with its filter, none

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(lines.tobytes())) + chunk(b"IEND", b"")


PICTURES: dict[str, Callable[[Path], object]] = {
    "an empty file": lambda path: path.write_bytes(b""),
    "16 bits": lambda path: Image.new("I;16", (8, 8)).save(path),
    "16 bits of color": lambda path: path.write_bytes(_deep_color()),
    "colors in LAB": lambda path: Image.new("LAB", (8, 8)).save(path, "TIFF"),
    "too many pixels": lambda path: Image.new("L", (100, 100)).save(path),
    "a file cut off": lambda path: path.write_bytes(picture_bytes(random_images(1, (3, 64, 64))[0])[:5000]),
    "a drawing": lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"),
}  # fmt: skip


def read_picture(write: Callable[[Path], object]) -> Callable[[], object]:
    def act(here: Path) -> None:
        write_picture(here / "a.png", random_images(1)[0])
        write(here / "b.png")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64)
            get_dataset("folder", root=str(here))

    return in_folder(act)


PACKED: dict[str, tuple[np.ndarray, np.ndarray | None]] = {
    "packed floats": (np.zeros((4, 3, 8, 8), np.float32), None),
    "packed channels that come last": (np.zeros((4, 8, 8, 3), np.uint8), None),
    "no packed images": (np.zeros((0, 3, 8, 8), np.uint8), None),
    "packed objects": (np.array([{}] * 4), None),
    "two sizes of packed images": (random_images(4), random_images(4, (3, 9, 9))),
}  # fmt: skip


def read_packed(train: np.ndarray, val: np.ndarray | None) -> Callable[[], object]:
    def act(here: Path) -> None:
        np.save(here / "train.npy", train)
        np.save(here / "val.npy", train[:2] if val is None else val)
        get_dataset("folder", root=str(here))

    return in_folder(act)


PLAIN: list[dict[str, object]] = [
    {"colour": 1},
    {"data": {"name": "mnist", "shape": [1, 2, 2], "depth": 3}},
    {"data": {"name": "mnist"}},
    {"data": [1, 2]},
    {"regularizers": {"kinetic": "much"}},
    {"optimizer": {"warmup": 0.5}},
    {"test_solver": {"method": "tsit5", "atol": -1}},
]  # fmt: skip


def read_plain(changes: dict[str, object]) -> Callable[[], object]:
    return lambda: Recipe.from_plain({**get_recipe("mnist").to_plain(), **changes})


CONFIGURATIONS = [
    "",
    "taylor:9",
    "none",
    "{",
    "[" * 100_000,
    '{"a": 1}',
    '{"a": {"kinetic": 1}, "a": {"kinetic": 2}}',
    '{"a": {"kinetic": 1, "kinetic": 2}}',
    '{"a": {} "kinetic": 1}',
    '{"": {}}',
    "{}",
    '{"a": {"kinetic": 1}, "b": {"kinetic": [], "l1": [1]}}',
    '{"a": {"kinetic": -1}}',
    '{"a:b": {"kinetic": 1}, "a-b": {"kinetic": 2}}',
    '{"../a": {"kinetic": 1}}',
    '{"a": {"kinetics": 1}}',
    '{"a": {"kinetic": 1}, "b": {"kinetic": 1}}',
]  # fmt: skip


def configure(text: str) -> Callable[[], object]:
    def act(here: Path) -> None:
        if text.startswith(("[", "{")):
            (here / "a.json").write_text(text)
        name = str(here / "a.json") if text.startswith(("[", "{")) else text
        configured_recipes(get_recipe("digits"), ("none", name))

    return in_folder(act)


CALLS: dict[str, dict[str, Callable[[], object]]] = {
    "recipes in JSON": {f"mnist with {changes}": read_plain(changes) for changes in PLAIN},
    "settings of a table": {f"table {' '.join(settings)}": override_table(settings) for settings in TABLE_SETTINGS},
    "configurations": {f"configuration {text[:60]!r}": configure(text) for text in CONFIGURATIONS},
    "texts of tables": {name: read_text(text) for name, text in TEXTS.items()},
    "arrays of tables": {name: read_array(array) for name, array in ARRAYS.items()},
    "columns without a density": {name: accept(*columns) for name, columns in COLUMNS.items()},
    "arrays of images": {name: image_data(changes) for name, changes in IMAGES.items()},
    "pictures": {name: read_picture(write) for name, write in PICTURES.items()},
    "packed images": {name: read_packed(*parts) for name, parts in PACKED.items()},
    "names and options of data sets": {
        "mnits": lambda: get_dataset("mnits"),
        "a table with colums": lambda: get_table("table", colums=("radius",)),
        "digits with bits": lambda: get_dataset("digits", bits=5),
        "cifar10 with a size": lambda: get_dataset("cifar10", size=20),
        "a folder without a name": lambda: get_dataset("folder"),
        "a table in the place of images": lambda: get_recipe("digits").override(["data.name=table"]).load_data(),
        "digits with the shape of mnist": lambda: get_recipe("mnist").override(["data.name=digits"]).load_data(),
    },
}
