"""Files of tables: each format gives the same numbers, and whatever is wrong with one is said in a sentence."""

from __future__ import annotations

import builtins
import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rnode_plugin.data.table_files import column_names, read_columns, write_rows
from rnode_plugin.data.tables import CELLS, Table, check_columns, split_rows, table
from rnode_plugin.errors import ConfigError, DataError, RnodeError
from rnode_plugin.recipes.recipe import TableData, get_recipe

NAMES = ("temperature (K)", "dose", "a, b")
ROWS = np.random.default_rng(0).normal(size=(30, 3)) * [50, 1, 1e-3] + [300, 0, 0]


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


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt", ".npy", ".parquet"])
def test_each_format_gives_the_same_numbers(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"data{suffix}")
    names = column_names(path)
    assert names == (("column_1", "column_2", "column_3") if suffix == ".npy" else NAMES)
    wanted = [names[2], names[0]]
    assert np.array_equal(read_columns(path, wanted), ROWS[:, [2, 0]])


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt", ".npy", ".parquet"])
def test_what_is_written_can_be_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    rows = ROWS.astype(np.float32)
    write_rows(path, NAMES, rows)
    names = column_names(path)
    assert names == NAMES or suffix == ".npy"
    np.testing.assert_allclose(read_columns(path, names), rows, rtol=1e-7)


@pytest.mark.parametrize("names", [("nan",), ("inf", "nan"), ("NA", "None")])
def test_names_that_are_words_for_missing_values(tmp_path: Path, names: tuple[str, ...]) -> None:
    path = write(tmp_path / "data.csv", ROWS[:, : len(names)], names)
    assert column_names(path) == names
    assert np.array_equal(read_columns(path, names), ROWS[:, : len(names)])


def test_32_bit_samples_are_written_to_the_last_bit(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(2000, 1)).astype(np.float32)
    write_rows(tmp_path / "data.csv", ["a"], rows)
    assert np.array_equal(read_columns(tmp_path / "data.csv", ["a"]).astype(np.float32), rows)


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("no.csv", None, r"no\.csv does not exist\."),
        ("data.xlsx", "a,b\n1,2\n", r"data\.xlsx is not a table: its name must end in \.csv, \.tsv, "),
        ("empty.csv", "", r"empty\.csv is empty, or its first line is\."),
        ("text.csv", "a,b\n1,2\n3,high\n", r"column 'b' .* not numeric: row 2 holds 'high'.*data\.columns='a'\."),
        ("infinite.csv", "a,b\n1,inf\n", r"column 'b' .* is infinite in row 1\."),
        ("latin.csv", b"a,b\n1,\xff\n", r"latin\.csv is not text in UTF-8"),
        ("flat.npy", np.zeros(5), r"holds float64 \(5,\), but a table is an array \(rows, columns\)"),
        (
            "nan.npy",
            np.array([[1.0, 2.0], [np.nan, 3.0]]),
            r"'column_1' .* has 1 missing value, the first in row 2",
        ),
        ("words.npy", np.array([["x", "y"]]), r"column 'column_1' .* is not numeric: row 1 holds 'x'"),
        ("pickle.npy", np.array([[None]], dtype=object), r"pickle\.npy cannot be read"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path: Path, name: str, contents: Any, message: str) -> None:
    path = tmp_path / name
    if isinstance(contents, np.ndarray):
        np.save(path, contents, allow_pickle=True)
    elif contents is not None:
        path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    with pytest.raises(RnodeError, match=message) as caught:
        read_columns(path, column_names(path))
    assert str(caught.value).endswith(".")


def test_columns_of_text_in_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.table({"a": [1.0, None], "b": ["x", "y"], "c": [1, 2]}), path)
    with pytest.raises(DataError, match=r"column 'b' .* not numeric: row 1 holds 'x'.*data.columns='c'"):
        read_columns(path, ["c", "b"])
    with pytest.raises(DataError, match=r"column 'a' .* has 1 missing value, the first in row 2"):
        read_columns(path, ["a", "c"])
    assert read_columns(path, ["c"]).tolist() == [[1.0], [2.0]]
    with pytest.raises(DataError, match=r"unknown column 'd'.*Known: a, b, c"):
        read_columns(path, ["d"])


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "data.parquet")
    original = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ModuleNotFoundError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'rnode-plugin\[parquet\]'"):
        column_names(path)


def test_the_split_is_a_function_of_its_seed() -> None:
    rows = np.arange(100.0)[:, None]
    parts = [split_rows("t", ["a"], rows, validation=0.1, held_out=0.25, seed=seed) for seed in (0, 0, 1)]
    one, same, other = parts
    assert [len(one.train), len(one.val), len(one.held_out)] == [65, 10, 25]
    together = np.concatenate([one.train, one.val, one.held_out])
    assert sorted(together[:, 0]) == rows[:, 0].tolist()
    assert np.array_equal(one.held_out, same.held_out)
    assert not np.array_equal(one.held_out, other.held_out)
    with pytest.raises(DataError, match="t has 19 rows: a density needs 20 at least"):
        split_rows("t", ["a"], rows[:19], validation=0.1, held_out=0.1, seed=0)


def _table(*columns: np.ndarray) -> Table:
    rows = np.stack(columns, axis=1)
    return Table("t", tuple("abcdef"[: len(columns)]), rows, rows, rows)


X, Y = np.random.default_rng(0).normal(size=(2, 50))


@pytest.mark.parametrize(
    ("made", "modelled", "message"),
    [
        (_table(X, np.full(50, 3.0)), 2, r"column 'b' of t is 3 in all training rows.*data\.columns='a'"),
        (_table(X, np.full(50, 3.0)), 1, r"column 'b' of t is 3 in all training rows"),  # also one that is given
        (_table(X, 101325 + 1e-3 * Y), 2, r"column 'b' of t is 101325.* ± 0\.001.*: 32-bit numbers do not tell"),
        (_table(X, Y, 3 * X - Y + 2), 3, r"column 'c' of t is a linear function of the others"),
        (_table(X, 2 * X + 1), 1, r"column 'a' of t is a linear function of the others"),  # by what is given
        (_table(X[:3], Y[:3], X[:3] ** 2), 3, r"3 training rows are too few for 3 columns"),
    ],
)
def test_columns_without_a_density(made: Table, modelled: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_columns(made, modelled)


def test_columns_that_are_only_close() -> None:
    check_columns(_table(X, 1e4 + Y, X + Y + 1e-4 * np.sin(1 / X)), 3)
    check_columns(_table(X, Y, 2 * Y), 1)  # of columns that are given, one may repeat another


def test_a_recipe_takes_the_columns_of_its_file(tmp_path: Path) -> None:
    path = write(tmp_path / "data.csv")
    recipe = get_recipe("table").override([f"data.root={path}", "data.given=dose,temperature (K)"])
    assert isinstance(recipe.data, TableData)
    assert (recipe.data.columns, recipe.data.given) == (NAMES, ("dose", "temperature (K)"))
    assert (recipe.dims, recipe.data.modelled) == (1, ("a, b",))
    loaded = recipe.table.load()
    assert loaded.columns == ("a, b", "dose", "temperature (K)")  # those that are given are behind the others
    assert loaded.train.dtype == np.float32
    whole = np.concatenate([loaded.train, loaded.val, loaded.held_out])
    np.testing.assert_allclose(np.sort(whole[:, 2]), np.sort(ROWS[:, 0]), rtol=1e-6)
    chosen = get_recipe("table").override([f"data.root={path}", "data.columns=dose,temperature (K)"])
    assert chosen.table.load().columns == ("dose", "temperature (K)")
    kept = recipe.override(["training.seed=3"])
    assert kept.data == recipe.data
    assert type(recipe).from_plain(recipe.to_plain()) == recipe


def test_the_table_that_comes_along() -> None:
    recipe = get_recipe("table")
    assert isinstance(recipe.data, TableData)
    assert recipe.data.columns == CELLS == table().columns
    loaded = recipe.table.load()
    assert (len(loaded.train), len(loaded.val), len(loaded.held_out)) == (398, 57, 114)
    assert recipe.override(["data.root=none"]).data == recipe.data


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.given=doze"], "data.given: unknown column 'doze'; did you mean 'dose'"),
        (["data.columns=dose,dose"], "names a column twice: dose, dose"),
        (["data.given=a,b"], "unknown column 'a'"),
        (["data.columns=dose", "data.given=dose"], "at least one column that is not given"),
        (["data.held_out=0.6", "data.validation=0.5"], "must leave rows to train on"),
        (["data.validation=0"], "data.validation: .*greater than 0"),
        (["data.shape=1,2,3"], "unknown setting 'data.shape'"),
        (["model.field=potential", "model.activation=tanh"], "model.field=potential has a fixed one"),
        (["training.sample_temperatures=0.5,1"], "have one temperature"),
        (["data.name=digits"], "the data set 'digits' holds images"),
    ],
)
def test_settings_that_cannot_work(tmp_path: Path, settings: list[str], message: str) -> None:
    path = write(tmp_path / "data.csv")
    with pytest.raises(ConfigError, match=message):
        get_recipe("table").override([f"data.root={path}", *settings])


def test_a_table_is_not_a_set_of_images() -> None:
    with pytest.raises(ConfigError, match="the data set 'table' holds a table"):
        get_recipe("digits").override(["data.name=table"]).load_data()
