"""Tables as other programs write them: R, pandas, polars, Excel, Stata, SPSS, NumPy. Read right, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rnode_plugin.data.table_files import column_names, read_columns
from rnode_plugin.data.tables import Table
from rnode_plugin.errors import ConfigError, DataError, RnodeError
from rnode_plugin.recipes.recipe import get_recipe

ROWS = np.random.default_rng(0).normal(size=(40, 2)).round(3)


def text_of(rows: np.ndarray, separator: str = ",", start: str = "", decimal: str = ".") -> str:
    """Lines of numbers; ``start`` begins each, with ``{k}`` for its number."""
    lines = (separator.join(repr(float(value)) for value in row) for row in rows)
    lines = (f"{start.format(k=k)}{line}\n" for k, line in enumerate(lines, 1))
    return "".join(lines).replace(".", decimal)


READ = {
    "R write.table(row.names=FALSE)": ('"a" "b"\n' + text_of(ROWS, " "), ("a", "b")),
    "SAS": ("a,b\n" + text_of(ROWS).replace("0.", "."), ("a", "b")),
    "Fortran": ("  a  b\n" + text_of(ROWS, "  ", start=" "), ("a", "b")),
    "cells all in quotes": ('"a","b"\r\n' + '"' + text_of(ROWS, '","').replace("\n", '"\r\n"')[:-1], ("a", "b")),
    "commas in quoted names": ('"temp, mean, C";"dose"\n' + text_of(ROWS, ";"), ("temp, mean, C", "dose")),
    "a mark of byte order": ("\ufeffa,b\r\n" + text_of(ROWS), ("a", "b")),
    "tabs in a csv": ("a\tb\n" + text_of(ROWS, "\t"), ("a", "b")),
    "tabs, and names with spaces": ("a 1\tb 2\n" + text_of(ROWS, "\t"), ("a 1", "b 2")),
    "bars": ("a|b\n" + text_of(ROWS, "|"), ("a", "b")),
    "spaces after commas": ("a, b\n" + text_of(ROWS, ", "), ("a", "b")),
    "an old Macintosh": (("a,b\n" + text_of(ROWS)).replace("\n", "\r"), ("a", "b")),
    "blank lines": ("a,b\n\n" + text_of(ROWS) + "\n\n", ("a", "b")),
}


@pytest.mark.parametrize("case", READ)
def test_texts_of_other_programs(case: str, tmp_path: Path) -> None:
    text, names = READ[case]
    path = tmp_path / "data.csv"
    path.write_text(text, encoding="utf-8", newline="")
    assert column_names(path) == names
    assert np.array_equal(read_columns(path, names), ROWS)


ROW_NAMES = "index=False in pandas, row.names=FALSE in R"
REFUSED = {
    "R write.table(sep=',')": (
        '"a","b"\n' + text_of(ROWS, start='"{k}",'),
        f"3 cells, .* 2 names.*{ROW_NAMES}",
    ),
    "R rows with names": ("a,b\n" + text_of(ROWS, start="Mazda RX4 {k},"), f"3 cells, .* 2 names.*{ROW_NAMES}"),
    "R write.csv": ('"","a","b"\n' + text_of(ROWS, start='"{k}",'), f"column without a name.*{ROW_NAMES}"),
    "R write.table": ('"a" "b"\n' + text_of(ROWS, " ", start='"{k}" '), f"3 cells, .* 2 names.*{ROW_NAMES}"),
    "pandas with its index": (",a,b\n" + text_of(ROWS, start="{k},"), f"column without a name.*{ROW_NAMES}"),
    "pandas, read and written again": ("Unnamed: 0,a,b\n" + text_of(ROWS, start="{k},"), "column without a name"),
    "readr, read and written again": ("...1,a,b\n" + text_of(ROWS, start="{k},"), "column without a name"),
    "pandas' numbered columns": ("0,1\n" + text_of(ROWS), "first line .* holds the number 0, but the names"),
    "a pivot table": ("site,2020\n" + text_of(ROWS), "first line .* holds the number 2020"),
    "no header": (text_of(ROWS), r"first line .* holds the number .*Add a line of names"),
    "no header, a missing value first": ("nan,1.5\n" + text_of(ROWS), r"holds the number 1\.5"),
    "savetxt": (text_of(ROWS, " "), "first line .* holds the number"),
    "savetxt with a header": ("# a,b\n" + text_of(ROWS), "begins with a comment"),
    "Excel's sep=": ("sep=;\r\na;b\r\n" + text_of(ROWS, ";"), "column without a name"),
    "Excel with empty rows": ("a,b\n" + text_of(ROWS) + ",\n" * 3, "3 missing values, the first in row 41"),
    "Excel with empty columns": ("a,b,,\n" + text_of(ROWS).replace("\n", ",,\n"), "column without a name"),
    "a separator at the end of rows": (
        "a;b\n" + text_of(ROWS, ";").replace("\n", ";\n"),
        "3 cells, but .* 2 names",
    ),
    "a separator in a name": ("a;b,c\n" + text_of(ROWS, ";"), "holds ',' and ';', and either may separate"),
    "a name with spaces": ("temp (K)\n" + text_of(ROWS[:, :1]), "1 cells, but there are 2 names.*double quotes"),
    "a line break in a name": ('"temp\n(K)",b\n' + text_of(ROWS), "quotation mark in its first line"),
    "more cells than the header": ("a,b\n1,2,3\n4,5,6\n", "row 1 .* 3 cells, but there are 2 names"),
    "a later row with more": ("a,b\n1,2\n3,4\n4,5,6\n", "row 3 .* 3 cells, but"),
    "a row with fewer, of columns that are not read": ("a,b,c\n1,2,3\n4,5\n6,7,8\n", "row 2 .* 2 cells, but"),
    "an open quotation mark": (
        'a,b\n1,"2\n3,4\n',
        "quotation marks|row 1 .* cells|not numeric",
    ),
    "decimal commas between commas": ("a,b\n" + text_of(ROWS, decimal=","), "4 cells, but .* with a point"),
    "one column with decimal commas": ("a\n" + text_of(ROWS[:, :1], decimal=","), "2 cells, but .* with a point"),
    "a row of missing values": ("a,b\n1,2\nNA,NA\n3,4\n", "missing"),
    "a row of the word nan": ("a,b\n1,2\nnan,nan\n3,4\n", "'a'.*1 missing value.*row 2"),
    "an empty row between others": ("a,b\n1,2\n,\n3,4\n", "'a'.*1 missing value.*row 2"),
    "underscores": ("month,a\n2020_01,1.5\n2020_02,2.5\n", "'month'.*not numeric: row 1 holds '2020_01'"),
    "dates": ("day,a\n2020-01-01,1.5\n2020-01-02,2.5\n", "'day'.*not numeric: row 1 holds '2020-01-01'"),
    "hexadecimal numbers": ("a,b\n0x10,1\n0x11,2\n", "'a'.*not numeric: row 1 holds '0x10'"),
    "a quotation mark for inches": ('size ("),b\n1,2\n3,4\n', "quotation mark"),
    "a single column with the word nan": ("a\n1\nnan\n3\n", "'a'.*1 missing value.*row 2"),
    "decimal commas, R's write.csv2": ("a;b\n" + text_of(ROWS, ";", decimal=","), "decimal comma"),
    "decimal commas without a header": (text_of(ROWS, ";", decimal=","), "either may separate the names"),
    "decimal commas and tabs": ("a\tb\n" + text_of(ROWS, "\t", decimal=","), "decimal comma"),
    "thousands": ('a,b\n"1,234",2\n', "row 1 holds '1,234', with a decimal comma or a comma between thousands"),
    "a header alone": ("a,b\n", "no rows"),
    "Stata's missing values": ("a,b\n1,.\n2,.a\n", "'b' .* not numeric: row 1 holds '.'"),
    "SPSS' missing values": ("a,b\n1, \n2,#NULL!\n", "'b' .* not numeric: row 2 holds '#NULL!'"),
    "labels": ("a,b\n1,male\n2,female\n", "'b' .* not numeric: row 1 holds 'male'"),
    "units below the names": ("a,b\nK,m\n" + text_of(ROWS), "'a' .* not numeric: row 1 holds 'K'"),
    "Fortran's exponents": ("a b\n1.0D-01 2\n", "'a' .* not numeric: row 1 holds '1.0D-01'"),
    "a title": ("Our measurements\na,b\n" + text_of(ROWS), "cells, but there are 2 names|not numeric"),
    "a sum below": ("a,b\n" + text_of(ROWS) + "Sum,\n", "'a' .* not numeric: row 41 holds 'Sum'"),
    "two columns of one name": ("a,b,a\n1,2,3\n", "2 columns of the name 'a'"),
    "an unnamed column between": ("a,,b\n1,2,3\n", "column without a name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_texts_that_are_refused(case: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    text, message = REFUSED[case]
    path = tmp_path / "data.csv"
    path.write_text(text, encoding="utf-8", newline="")
    with pytest.raises(DataError, match=message) as caught:
        read_columns(path, column_names(path)[:2])
    assert not recwarn.list
    assert str(caught.value).count(str(path)) == 1


def test_unicode_text_of_excel_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text("température\tb\r\n" + text_of(ROWS, "\t"), encoding="utf-16", newline="")
    with pytest.raises(DataError, match="is not text in UTF-8"):
        column_names(path)


def test_missing_cells_in_a_column_that_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("a,b\n1,\n2,x\n3,4\n")
    assert read_columns(path, ["a"])[:, 0].tolist() == [1, 2, 3]


def test_numbers_are_read_to_the_last_bit(tmp_path: Path) -> None:
    rows = np.random.default_rng(1).normal(size=(2000, 2)) * 10.0 ** np.arange(-100, 100).repeat(10)[:, None]
    path = tmp_path / "data.csv"
    path.write_text("a,b\n" + text_of(rows))
    assert np.array_equal(read_columns(path, ["a", "b"]), rows)


def test_arrays_that_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "records.npy", np.zeros(30, dtype=[("q", "f8"), ("r", "f8")]))
    with pytest.raises(DataError, match=r"but a table is an array \(rows, columns\)"):
        column_names(tmp_path / "records.npy")
    np.save(tmp_path / "when.npy", np.zeros((30, 2), dtype="M8[s]"))
    with pytest.raises(DataError, match=r"'column_1' .* not numeric: it is datetime64"):
        read_columns(tmp_path / "when.npy", ["column_1"])
    np.save(tmp_path / "complex.npy", np.zeros((30, 2), dtype=complex))
    with pytest.raises(DataError, match="not numeric: it is complex128"):
        read_columns(tmp_path / "complex.npy", ["column_1"])


def _frame(**columns: Any) -> Any:
    import pandas

    return pandas.DataFrame({"a": ROWS[:, 0], **columns})


def test_parquet_of_pandas_leaves_the_index_out(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    frame = _frame(b=ROWS[:, 1])
    for chosen in (frame[frame.a > 0], frame.set_index(np.arange(40) + 5).rename_axis("id"), frame):
        chosen.to_parquet(path)
        assert column_names(path) == ("a", "b")
        assert np.array_equal(read_columns(path, ["a", "b"]), chosen.to_numpy())


def test_parquet_columns_of_other_types(tmp_path: Path) -> None:
    import pandas
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "data.parquet"
    _frame(
        whole=pandas.array([1, None] * 20, dtype="Int64"), label=pandas.Categorical(["x", "y"] * 20),
        level=pandas.Categorical([1.5, 2.5] * 20), day=pandas.date_range("2026", periods=40),
        flag=[True, False] * 20, small=ROWS[:, 1].astype(np.float16), exact=pandas.array(range(40), dtype="UInt8"),
    ).to_parquet(path)  # fmt: skip
    read = read_columns(path, ["flag", "small", "exact", "level"])
    assert read[:2, 3].tolist() == [1.5, 2.5]
    assert read[:2, 0].tolist() == [1, 0]
    assert np.array_equal(read[:, 1], ROWS[:, 1].astype(np.float16))
    for name, message in (("whole", "20 missing values"), ("label", "not numeric"),
                          ("day", "not numeric: it is datetime64")):  # fmt: skip
        with pytest.raises(DataError, match=f"'{name}' .*{message}"):
            read_columns(path, ["a", name])
    nested = pyarrow.table({"a": ROWS[:, 0], "list": [[1.0, 2.0]] * 40, "large": [2**60 + k for k in range(40)]})
    parquet.write_table(nested, path)
    with pytest.raises(DataError, match=r"'list' .* not numeric"):
        read_columns(path, ["list"])
    assert read_columns(path, ["large"])[0, 0] == 2.0**60


@pytest.mark.parametrize(("size", "message"), [(1e39, "outside of 32-bit"), (1e-46, "too small for 32-bit")])
def test_values_that_32_bit_numbers_do_not_hold(size: float, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("a,b\n" + text_of(ROWS * [1, size]))
    recipe = get_recipe("table").override([f"data.root={path}"])
    with pytest.raises(DataError, match=f"column 'b' .*{message}"):
        recipe.table.load()


def test_a_value_out_of_range_among_held_out_rows(tmp_path: Path) -> None:
    huge = np.concatenate([ROWS[:3], [[0, 1e39]]])
    with pytest.raises(DataError, match="column 'b'"):
        Table("t", ("a", "b"), ROWS, ROWS, huge).single()


@pytest.mark.parametrize(
    "content", [b"\x00\x01\x02" * 50, b"PK\x03\x04" + bytes(300), b"\xff\xfe\x00", b'"a,b\n1,2\n']
)
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt", ".npy", ".parquet"])
def test_other_files_under_the_name_of_a_table(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_bytes(content)
    with pytest.raises(RnodeError, match="data"):
        read_columns(path, column_names(path))
    with pytest.raises(ConfigError, match="must end in"):
        column_names(path.rename(tmp_path / "data.xlsx"))
