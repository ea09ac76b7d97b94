"""The five tables of density estimation: POWER, GAS, HEPMASS, MINIBOONE and BSDS300.

The preprocessing follows Papamakarios, Pavlakou and Murray, "Masked Autoregressive Flow for Density Estimation"
(2017), appendix D and the authors' program (github.com/gpapamak/maf), so that likelihoods can be compared with the
papers since: that program's order of rows and choice of columns, centered and scaled. The files are theirs too:
https://zenodo.org/records/1161203.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rnode_plugin.errors import ConfigError, DataError
from rnode_plugin.experiments.data import Table
from rnode_plugin.experiments.data.images import naming

__all__ = ["bsds300", "gas", "hepmass", "miniboone", "power"]

_SHARE = 0.1  # of the rows to hold out, then of the others to choose weights by


def power(*, root: str | None = None) -> Table:
    """POWER: 2 million minutes of a household's electricity, 6 columns; from the files of the MAF paper."""
    rows = _loaded_npy(_file("power", root, "power/data.npy"), 8)
    random = np.random.RandomState(42)
    random.shuffle(rows)
    rows = np.delete(rows, (1, 3), axis=1)
    n = len(rows)
    # the values come in steps: noise as wide as a step, drawn in this order
    voltage, active, meters = 0.01 * random.rand(n, 1), 0.001 * random.rand(n, 1), random.rand(n, 3)
    rows = rows + np.hstack([active, voltage, meters, np.zeros((n, 1))])
    return _split("power", rows, 6, names=("active_power", "voltage", "meter_1", "meter_2", "meter_3", "time"))


def gas(*, root: str | None = None) -> Table:
    """GAS: a million readings of gas sensors, 8 columns; from the files of the MAF paper."""
    place = Path(root or "data") / "gas"
    file = place / "ethylene_CO.csv"
    if not file.is_file():
        pickled = _file("gas", root, "gas/ethylene_CO.pickle")
        raise DataError(
            f"{pickled} is a pickle, which could run code and is not opened. Turn it into {file} once: python -c "
            f"\"import pandas; pandas.read_pickle('{pickled}').to_csv('{file}', index=False)\"."
        )
    import pandas

    with naming(file):
        frame = pandas.read_csv(file, dtype="float64")
    rows = frame.drop(columns=["Meth", "Eth", "Time"], errors="ignore").to_numpy()
    while True:  # the first of the columns that repeat another goes, until none does
        repeats = (np.corrcoef(rows.T) > 0.98).sum(1) > 1
        if not repeats.any():
            break
        rows = np.delete(rows, int(np.argmax(repeats)), axis=1)
    rows = (rows - rows.mean(0)) / rows.std(0, ddof=1)
    return _split("gas", rows, 8, scale=False)


def hepmass(*, root: str | None = None) -> Table:
    """HEPMASS: 525,000 simulated particle collisions, 21 columns; from the files of the MAF paper."""
    train = _signals(_file("hepmass", root, "hepmass/1000_train.csv"))
    test = _signals(_file("hepmass", root, "hepmass/1000_test.csv"), train.shape[1])
    mean, deviation = train.mean(0), train.std(0, ddof=1)
    train, test = (train - mean) / deviation, (test - mean) / deviation
    # the program of the paper counts the smallest value of a column, and not the most frequent one
    kept = [place for place, column in enumerate(train.T) if (column == column.min()).sum() <= 5]
    train, test = train[:, kept], test[:, kept]
    n_val = int(_SHARE * len(train))
    return _made("hepmass", train[:-n_val], train[-n_val:], test, 21)


def miniboone(*, root: str | None = None) -> Table:
    """MINIBOONE: 36,000 neutrino events, 43 columns; from the files of the MAF paper."""
    return _split("miniboone", _loaded_npy(_file("miniboone", root, "miniboone/data.npy"), 43), 43)


def bsds300(*, root: str | None = None) -> Table:
    """BSDS300: 1.3 million patches of photographs, 63 columns; from the files of the MAF paper."""
    file = _file("bsds300", root, "BSDS300/BSDS300.hdf5")
    try:
        import h5py  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ConfigError("reading BSDS300 needs h5py: pip install h5py.") from None
    with naming(file), h5py.File(file, "r") as stored:
        train, val, held_out = (np.asarray(stored[part]) for part in ("train", "validation", "test"))
    return _made("bsds300", train, val, held_out, 63)


def _signals(file: Path, columns: int | None = None) -> np.ndarray:
    """The rows of one class, without their label; only the first ``columns`` of them."""
    wanted = None if columns is None else range(columns + 1)
    with naming(file):
        rows = np.loadtxt(file, delimiter=",", skiprows=1, usecols=wanted, ndmin=2)
    return rows[rows[:, 0] == 1, 1:]


def _split(
    name: str, rows: np.ndarray, columns: int, *, names: tuple[str, ...] | None = None, scale: bool = True
) -> Table:
    """The last rows are held out; ``scale`` by the mean and the deviation of the others."""
    n_held_out = int(_SHARE * len(rows))
    rest = len(rows) - n_held_out
    if scale:
        rows = (rows - rows[:rest].mean(0)) / rows[:rest].std(0)
    train = rest - int(_SHARE * rest)
    return _made(name, rows[:train], rows[train:rest], rows[rest:], columns, names=names)


def _made(
    name: str,
    train: np.ndarray,
    val: np.ndarray,
    held_out: np.ndarray,
    columns: int,
    *,
    names: tuple[str, ...] | None = None,
) -> Table:
    if train.shape[1] != columns:
        raise DataError(
            f"the files of {name} give {train.shape[1]} columns, not the {columns} of the published set."
        )
    names = names or tuple(f"column_{number}" for number in range(1, columns + 1))
    return Table(name, names, np.asarray(train), np.asarray(val), np.asarray(held_out))


def _loaded_npy(file: Path, columns: int) -> np.ndarray:
    with naming(file):
        rows = np.load(file, allow_pickle=False)
    if rows.ndim != 2 or rows.shape[1] != columns:
        raise DataError(f"{file} holds an array {rows.shape}; the published one has {columns} columns.")
    return rows.astype(np.float64)


def _file(name: str, root: str | None, path: str) -> Path:
    folder = Path(root or "data")
    if not (folder / path).is_file():
        raise DataError(
            f"{name} is missing: {folder / path} is not there. Download data.tar.gz of the MAF paper from "
            f"https://zenodo.org/records/1161203 and unpack it so that its folders lie in {folder}; --data-root "
            "names another folder."
        )
    return folder / path
