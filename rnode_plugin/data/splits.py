"""``split_named`` and ``assign``: which pictures train and which are held out, by names of folders and files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

from ..errors import ConfigError, DataError
from .images import shuffled

__all__ = ["VAL_FRACTION", "assign", "split_named"]

VAL_FRACTION = 0.1

_FOLDERS = {
    "train": "train",
    "training": "train",
    "train_64x64": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "valid_64x64": "val",
    "test": "test",
    "testing": "test",
}
_BATCH = re.compile(r"(train|val)_data(_batch_\d+)?\.npz")  # as the ImageNet 64x64 archives name theirs
_SHARD = re.compile(r"([a-z]+)-.*\.(parquet|tfrecords?)")  # train-00000-of-00006.parquet


def split_named(name: str) -> str | None:
    """``"train"``, ``"val"`` or ``"test"`` if one of the first three folders of a path, or its file, says so."""
    *folders, file = PurePosixPath(name).parts
    if batch := _BATCH.fullmatch(file):
        return batch[1]
    if (shard := _SHARD.fullmatch(file)) and shard[1] in _FOLDERS:
        return _FOLDERS[shard[1]]
    return next((_FOLDERS[f.lower()] for f in folders[:3] if f.lower() in _FOLDERS), None)


def assign(
    splits: Sequence[str | None], names: Sequence[str], *, val_fraction: float, where: str
) -> list[str | None]:
    """Say of each picture whether it is ``"train"``, ``"val"`` or None (left out).

    With folders for both, these count, and ``test`` only if there is no ``val``. Without, a fixed random
    ``val_fraction`` of all pictures is held out.

    Args:
        splits: what :func:`split_named` found, one per picture.
        names: of the pictures, for messages.
        val_fraction: between 0 and 1.
        where: the folder or archive, for messages.

    Raises:
        DataError: pictures beside the folders for training and validation, or too few to hold one out.
        ConfigError: a fraction outside (0, 1).
    """
    found = Counter(splits)
    held_out = "val" if found["val"] else "test"
    if found["train"] and found[held_out]:
        if found[None]:
            stray = names[splits.index(None)]
            raise DataError(
                f"{where}: {stray} lies beside the folders for training and validation "
                f"({found[None]} such files); move it into one of them, or away."
            )
        return ["train" if s == "train" else "val" if s == held_out else None for s in splits]
    if not 0 < val_fraction < 1:
        raise ConfigError(f"the held-out fraction must lie between 0 and 1, not {val_fraction}.")
    if len(splits) < 2:
        raise DataError(f"{where}: {len(splits)} picture is too few to hold one out; at least two are needed.")
    n_val = min(max(1, round(len(splits) * val_fraction)), len(splits) - 1)
    result: list[str | None] = ["train"] * len(splits)
    for position in shuffled(len(splits))[:n_val]:
        result[position] = "val"
    return result
