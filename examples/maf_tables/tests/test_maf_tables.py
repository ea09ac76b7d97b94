"""The five tables, on small files of the published layout; installed or not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rnode_plugin import get_recipe
from rnode_plugin.errors import ConfigError, DataError
from rnode_plugin.experiments.data import get_table
from rnode_plugin.plugins import registry

sys.path.insert(0, str(Path(__file__).parents[1]))
import rnode_maf_tables

COLUMNS = {"power": 6, "gas": 8, "hepmass": 21, "miniboone": 43, "bsds300": 63}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    installed = any(each.name == "maf_tables" for each in registry.report())  # by `pip install .`
    if not installed:
        registry.register(rnode_maf_tables, name="maf_tables")
    yield
    if not installed:
        registry.unregister("maf_tables")


def write(path: Path, rows: np.ndarray, names: tuple[str, ...]) -> None:
    path.parent.mkdir(exist_ok=True)
    np.savetxt(path, rows, fmt="%.17g", delimiter=",", header=",".join(names), comments="")


def save(path: Path, rows: np.ndarray) -> np.ndarray:
    path.parent.mkdir()
    np.save(path, rows)
    return rows


def test_power_is_shuffled_and_smeared(tmp_path: Path) -> None:
    rows = save(tmp_path / "power" / "data.npy", np.random.default_rng(0).normal(size=(200, 8)))
    made = get_table("power", root=str(tmp_path))
    assert [len(made.train), len(made.val), len(made.held_out)] == [162, 18, 20]
    everything = np.concatenate([made.train, made.val, made.held_out])
    shuffled = rows[np.random.RandomState(42).permutation(200)][:, [0, 2, 4, 5, 6, 7]]
    fitted = shuffled[:180]
    # time has no noise: the order and the scaling are the ones of the shuffled rows
    np.testing.assert_allclose(everything[:, 5], (shuffled[:, 5] - fitted[:, 5].mean()) / fitted[:, 5].std())
    # meters have noise as wide as their steps, between 0 and 1
    assert 0.9 < np.corrcoef(everything[:, 2], shuffled[:, 2])[0, 1] < 0.999


def test_gas_leaves_out_what_repeats(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = random.normal(size=(300, 8))
    repeated = rows[:, [2]] + 0.01 * random.normal(size=(300, 1))  # correlated by more than 0.98
    names = ("Time", "Meth", "Eth", *(f"s{k}" for k in range(9)))
    stored = np.hstack([random.normal(size=(300, 3)), rows[:, :2], repeated, rows[:, 2:]])
    write(tmp_path / "gas" / "ethylene_CO.csv", stored, names)
    made = get_table("gas", root=str(tmp_path))
    everything = np.concatenate([made.train, made.val, made.held_out])
    np.testing.assert_allclose(everything, (rows - rows.mean(0)) / rows.std(0, ddof=1), atol=1e-9)


def test_hepmass_keeps_the_signals_and_the_continuous_columns(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    kept = []
    for name, extra in (("1000_train", 0), ("1000_test", 1)):
        labels, rows = random.integers(0, 2, (200, 1)), random.normal(size=(200, 23 + extra))
        rows[:, [3, 11]] = random.integers(0, 3, (200, 2))  # the smallest value occurs often
        names = ("# label", *map(str, range(23 + extra)))
        write(tmp_path / "hepmass" / f"{name}.csv", np.hstack([labels, rows]), names)
        kept.append(np.delete(rows[labels[:, 0] == 1, :23], (3, 11), axis=1))
    made = get_table("hepmass", root=str(tmp_path))
    fitted = np.concatenate([made.train, made.val])
    np.testing.assert_allclose(fitted, (kept[0] - kept[0].mean(0)) / kept[0].std(0, ddof=1), atol=1e-9)
    assert made.held_out.shape[1] == 21


def test_miniboone_is_cut_from_the_end(tmp_path: Path) -> None:
    rows = save(tmp_path / "miniboone" / "data.npy", np.random.default_rng(0).normal(size=(200, 43)) * 5 + 3)
    made = get_table("miniboone", root=str(tmp_path))
    expected = (rows - rows[:180].mean(0)) / rows[:180].std(0)
    assert np.array_equal(made.train, expected[:162])
    assert np.array_equal(made.held_out, expected[180:])


def test_bsds300_comes_split(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    (tmp_path / "BSDS300").mkdir()
    parts = {name: np.full((9, 63), float(k)) for k, name in enumerate(("train", "validation", "test"))}
    with h5py.File(tmp_path / "BSDS300" / "BSDS300.hdf5", "w") as file:
        for name, rows in parts.items():
            file[name] = rows
    made = get_table("bsds300", root=str(tmp_path))
    assert np.array_equal(made.held_out, parts["test"])


@pytest.mark.parametrize("name", COLUMNS)
def test_recipes_and_what_is_said_of_a_missing_file(name: str, tmp_path: Path) -> None:
    recipe = get_recipe(name).override([f"data.root={tmp_path}"])
    assert recipe.data.event == COLUMNS[name]
    with pytest.raises(DataError, match=rf"{name} is missing: {tmp_path}.*zenodo\.org/records/1161203"):
        recipe.load_data()
    with pytest.raises(ConfigError, match=r"fixed split"):
        recipe.override(["data.held_out=0.3"]).load_data()


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "gas").mkdir()
    (tmp_path / "gas" / "ethylene_CO.pickle").touch()
    with pytest.raises(DataError, match="could run code"):
        get_table("gas", root=str(tmp_path))
