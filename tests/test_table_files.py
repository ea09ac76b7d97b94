"""Files of tables: each format gives the same numbers, and what could be misread is refused in a sentence."""

from __future__ import annotations

import csv
import functools
import importlib.util
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from problems import refuses

from rnode_plugin.errors import ConfigError, DataError, RnodeError
from rnode_plugin.experiments.data.folders import folder
from rnode_plugin.experiments.data.table_files import check_written, column_names, read_columns, write_rows
from rnode_plugin.experiments.data.tables import CELLS, Table, check_columns, split_rows, table
from rnode_plugin.experiments.recipes.recipe import TableData, get_recipe

NAMES = ("temperature (K)", "dose", "a, b")
ROWS = np.random.default_rng(0).normal(size=(30, 3)) * [50, 1, 1e-3] + [300, 0, 0]
PAIRS = np.random.default_rng(0).normal(size=(40, 2)).round(3)
SUFFIXES = (".csv", ".tsv", ".txt", ".npy", ".parquet")


def write(path: Path, rows: np.ndarray = ROWS, names: tuple[str, ...] = NAMES) -> Path:
    """A file in the format of its ending, not by the package's own writer."""
    if path.suffix in (".csv", ".tsv", ".txt"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t")
            writer.writerow(names)
            writer.writerows([repr(float(value)) for value in row] for row in rows)
    elif path.suffix == ".npy":
        np.save(path, rows)
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(dict(zip(names, rows.T, strict=True))), path)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_each_format_gives_the_same_numbers_and_can_be_written(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"data{suffix}")
    names = column_names(path)
    assert names == (("column_1", "column_2", "column_3") if suffix == ".npy" else NAMES)
    assert np.array_equal(read_columns(path, [names[2], names[0]]), ROWS[:, [2, 0]])
    rows = ROWS.astype(np.float32)
    write_rows(path, NAMES, rows)
    assert column_names(path) == names
    assert np.array_equal(read_columns(path, names).astype(np.float32), rows)


def test_numbers_are_read_to_the_last_bit(tmp_path: Path) -> None:
    rows = np.random.default_rng(1).normal(size=(2000, 2)) * 10.0 ** np.arange(-100, 100).repeat(10)[:, None]
    path = write(tmp_path / "data.csv", rows, ("nan", "NA"))
    assert np.array_equal(read_columns(path, column_names(path)), rows)


def test_whole_numbers_of_many_digits_are_read_to_the_last_bit(tmp_path: Path) -> None:
    draw = random.Random(0)
    texts = [str(draw.randrange(10**24, 10**25)) for _ in range(200)]
    (path := tmp_path / "data.csv").write_text("\n".join(["a", *texts]))
    assert read_columns(path, ["a"])[:, 0].tolist() == list(map(float, texts))


# texts of other programs


def text_of(rows: np.ndarray, separator: str = ",", start: str = "", decimal: str = ".") -> str:
    """Lines of numbers; ``start`` begins each, with ``{k}`` for its number."""
    lines = (separator.join(repr(float(value)) for value in row) for row in rows)
    lines = (f"{start.format(k=k)}{line}\n" for k, line in enumerate(lines, 1))
    return "".join(lines).replace(".", decimal)


READ = {
    "R write.table(row.names=FALSE)": '"a" "b"\n' + text_of(PAIRS, " "),
    "SAS": "a,b\n" + text_of(PAIRS).replace("0.", "."),
    "Fortran": "  a  b\n" + text_of(PAIRS, "  ", start=" "),
    "cells all in quotes": '"a","b"\r\n' + '"' + text_of(PAIRS, '","').replace("\n", '"\r\n"')[:-1],
    "a mark of byte order": "\ufeffa,b\r\n" + text_of(PAIRS),
    "tabs in a csv": "a\tb\n" + text_of(PAIRS, "\t"),
    "bars": "a|b\n" + text_of(PAIRS, "|"),
    "spaces after semicolons": "a; b\n" + text_of(PAIRS, "; "),
    "an old Macintosh, blank lines": ("a,b\n\n" + text_of(PAIRS) + "\n\n").replace("\n", "\r"),
}


@pytest.mark.parametrize("case", READ)
def test_texts_of_other_programs(case: str, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text(READ[case], encoding="utf-8", newline="")
    assert column_names(path) == ("a", "b")
    assert np.array_equal(read_columns(path, ["a", "b"]), PAIRS)


def test_missing_cells_in_a_column_that_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("a,b\n1,\n2,x\n3,4\n4\n")  # in the last row also the separator is missing
    assert read_columns(path, ["a"])[:, 0].tolist() == [1, 2, 3, 4]
    with refuses(DataError, "'d'", "a, b"):
        read_columns(path, ["d"])


def test_parquet_of_pandas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas

    path = tmp_path / "data.parquet"
    frame = pandas.DataFrame({
        "a": PAIRS[:, 0], "whole": pandas.array([1, None] * 20, dtype="Int64"), "flag": [True, False] * 20,
        "label": pandas.Categorical(["x", "y"] * 20), "small": PAIRS[:, 1].astype(np.float16),
        "day": pandas.date_range("2026", periods=40), "list": [[1.0, 2.0]] * 40,
    })  # fmt: skip
    frame.set_index(np.arange(40) + 5).rename_axis("id").to_parquet(path)
    assert column_names(path) == tuple(frame.columns)
    read = read_columns(path, ["a", "flag", "small"])
    assert np.array_equal(read, frame[["a", "flag", "small"]].to_numpy(float))
    for name, message in (("whole", "row 2 holds"), ("label", "row 1 holds 'x'"), ("day", "row 1 holds '2026"),
                          ("list", "row 1 holds")):  # fmt: skip
        with pytest.raises(DataError, match=f"'{name}' .*{message}"):
            read_columns(path, ["a", name])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refuses(ConfigError, "pyarrow"):
        column_names(path)
    with refuses(ConfigError, "pyarrow"):
        check_written(path)  # before any row is drawn


def test_names_of_parquet_are_found_without_its_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas

    frame = pandas.DataFrame({"a": PAIRS[:, 0], "b": PAIRS[:, 1]})
    frame.rename_axis("id").to_parquet(tmp_path / "data.parquet")
    frame.iloc[:0].to_parquet(tmp_path / "empty.parquet")
    folder = tmp_path / "parts.parquet"  # as Spark writes it
    folder.mkdir()
    frame.to_parquet(folder / "0.parquet")
    monkeypatch.setattr(pandas, "read_parquet", lambda *_, **__: pytest.fail("the values were read"))
    assert column_names(tmp_path / "data.parquet") == column_names(folder) == ("a", "b")
    assert column_names(tmp_path / "empty.parquet") == ("a", "b")
    monkeypatch.undo()
    with refuses(DataError, "empty.parquet"):
        table(root=str(tmp_path / "empty.parquet"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_other_files_under_the_name_of_a_table(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"data{suffix}"
    with refuses(DataError, "data"):
        column_names(path)
    path.write_bytes(b"PK\x03\x04" + bytes(300))
    with pytest.raises(RnodeError, match="data"):
        read_columns(path, column_names(path))
    with refuses(ConfigError, "data.xlsx"):
        column_names(path.rename(tmp_path / "data.xlsx"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with a name")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["pipe.csv", "pipe.npy", "pipe.parquet", "folder.csv", "train.npy"])
def test_no_reader_waits_for_a_pipe(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.mkdir() if name.startswith("folder") else os.mkfifo(path)
    read = functools.partial(folder, root=str(tmp_path)) if name == "train.npy" else lambda: column_names(path)
    with pytest.raises(DataError, match=name):
        read()


# tables


def test_the_split_is_a_function_of_its_seed() -> None:
    rows = np.arange(100.0)[:, None]
    parts = [split_rows("t", ["a"], rows, validation=0.1, held_out=0.25, seed=seed) for seed in (0, 0, 1)]
    one, same, other = parts
    assert [len(one.train), len(one.val), len(one.held_out)] == [65, 10, 25]
    together = np.concatenate([one.train, one.val, one.held_out])
    assert sorted(together[:, 0]) == rows[:, 0].tolist()
    assert one.numbers is not None
    assert np.array_equal(rows[one.numbers - 1], one.held_out)
    assert np.array_equal(one.held_out, same.held_out)
    assert not np.array_equal(one.held_out, other.held_out)
    with refuses(DataError, "19", "20"):
        split_rows("t", ["a"], rows[:19], validation=0.1, held_out=0.1, seed=0)
    with refuses(DataError, "data.held_out", "data.validation"):
        split_rows("t", ["a"], rows[:20], validation=0.49, held_out=0.5, seed=0)
    with refuses(DataError, "t has 1 row"):
        split_rows("t", ["a"], rows[:1], validation=0.1, held_out=0.1, seed=0)


def test_held_out_rows_that_were_trained_on_are_counted() -> None:
    twice = split_rows("t", ["a", "b"], np.tile(PAIRS, (20, 1)), validation=0.1, held_out=0.2, seed=0).single()
    assert twice.described() == "t: columns a, b\n160 of 160 held-out rows equal a training row"
    zeros, rows = np.array([[0.0, 1.0], [2.0, 3.0]]), np.array([[-0.0, 1.0], [2.0, 4.0], [3.0, 2.0]])
    parts = Table("plugin's", ("a", "b"), zeros, zeros, rows)
    assert parts.described().endswith("columns a, b\n1 of 3 held-out rows equals a training row")
    assert "equal" not in table().single().described()


def _table(*columns: np.ndarray) -> Table:
    rows = np.stack(columns, axis=1)
    return Table("t", tuple("abcdef"[: len(columns)]), rows, rows, rows)


def _accept(table: Table, modeled: int) -> None:
    check_columns(table, modeled)
    table.single()


X, Y = np.random.default_rng(0).normal(size=(2, 50))


def test_rows_that_are_not_whole() -> None:
    """A file with such rows is refused when it is read, so only a table of a plugin can have them."""
    for value in (np.nan, np.inf):
        bad = np.where(np.arange(50) == 3, value, X)
        with refuses(DataError, "'b'", "1 of 50"):
            check_columns(_table(Y, bad), 2)


def test_frames_of_pandas_are_refused_and_their_columns_taken() -> None:
    frame = pd.DataFrame({"a": X, "b": Y})
    rows = frame.to_numpy()
    with refuses(DataError, "DataFrame"):
        Table("t", ("a", "b"), *[frame] * 3)  # pyright: ignore[reportArgumentType]
    table = Table("t", frame.columns, rows, rows, rows)  # pyright: ignore[reportArgumentType]
    assert table.columns == ("a", "b")
    assert np.array_equal(table.select(["b"]).train[:, 0], Y)


def test_columns_that_are_only_close() -> None:
    _accept(_table(X, 1e4 + Y, X + Y + 1e-4 * np.sin(1 / X)), 3)
    _accept(_table(1e4 + X, 1e4 + X + 1e-2 * Y), 2)
    _accept(_table(X, Y, 2 * Y), 1)  # of columns that are given, one may repeat another


def test_a_recipe_takes_the_columns_of_its_file(tmp_path: Path) -> None:
    path = write(tmp_path / "data.csv")
    recipe = get_recipe("table").override([f"data.root={path}", "data.given=dose,temperature (K)"])
    settings = recipe.data
    assert isinstance(settings, TableData)
    assert (settings.columns, settings.given) == (NAMES, ("dose", "temperature (K)"))
    assert (settings.event, settings.modeled) == (1, ("a, b",))
    loaded: Any = recipe.load_data()
    assert loaded.columns == ("a, b", "dose", "temperature (K)")  # those that are given follow the others
    assert loaded.train.dtype == np.float32
    whole = np.concatenate([loaded.train, loaded.val, loaded.held_out])
    np.testing.assert_allclose(np.sort(whole[:, 2]), np.sort(ROWS[:, 0]), rtol=1e-6)
    chosen = get_recipe("table").override([f"data.root={path}", "data.columns=dose,temperature (K)"])
    assert isinstance(chosen.data, TableData)
    assert chosen.data.modeled == ("dose", "temperature (K)")
    assert recipe.override(["training.seed=3"]).data == recipe.data
    assert type(recipe).from_plain(recipe.to_plain()) == recipe


def test_the_table_that_comes_along() -> None:
    recipe = get_recipe("table")
    assert isinstance(recipe.data, TableData)
    assert recipe.data.modeled == CELLS == table().columns
    loaded = recipe.load_data()
    assert (len(loaded.train), len(loaded.val), len(loaded.held_out)) == (398, 57, 114)
    assert recipe.override(["data.root=none"]).data == recipe.data
