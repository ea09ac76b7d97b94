"""``plan_packing``: which files of folders and archives are packed, and which of their images are held out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ...errors import DataError, RnodeError
from ..splits import VAL_FRACTION, assign, split_named
from . import parquet, tfrecords
from .archives import Member, members
from .pictures import is_picture

__all__ = ["PackingPlan", "PlannedFile", "is_batch", "is_parquet", "is_tfrecords", "is_wanted", "listing",
           "plan_packing"]  # fmt: skip

_PICKLE = re.compile(r"(train_data_batch_\d+|val_data)")
_SHOWN = 5


@dataclass(frozen=True)
class PlannedFile:
    """A file to read.

    Attributes:
        name: its source and its name there.
        splits: ``"train"``, ``"val"`` or None (left out) for each of its images; one for all of an npz batch.
    """

    name: str
    splits: list[str | None]


@dataclass(frozen=True)
class PackingPlan:
    """What will be packed.

    Attributes:
        sources: folders and archives, in the order in which they are read.
        files: to read.
        rejected: names of files that are not pictures by their names.
        nbytes: size of the files to read, the measure of progress.
    """

    sources: tuple[Path, ...]
    files: list[PlannedFile]
    rejected: list[str]
    nbytes: int


def plan_packing(sources: Sequence[Path], *, val_fraction: float = VAL_FRACTION) -> PackingPlan:
    """List the sources and decide what trains and what is held out, as :func:`splits.assign` says.

    Args:
        sources: folders, zip and tar archives of pictures, TFRecord or parquet files; folders, archives or files of
            the published ImageNet batches (``train_data_batch_1.npz`` to ``_10``, ``val_data.npz``). Several make
            one data set.

    Raises:
        DataError: a source is missing, damaged, empty, or its split is unclear.
    """
    names: list[str] = []
    splits: list[str | None] = []
    counts: list[int] = []
    rejected: list[str] = []
    nbytes = 0
    for source in sources:
        # a source that is all of one split, such as train.zip, says so by its own name
        fallback = split_named(f"{source.name.split('.')[0]}/file")
        for member in members(source):
            name = f"{source}: {member.name}"
            if is_wanted(member.name):
                names.append(name)
                splits.append(split_named(member.name) or fallback)
                counts.append(_image_count(member, name))
                nbytes += member.nbytes
            elif _PICKLE.fullmatch(PurePosixPath(member.name).name):
                raise DataError(
                    f"{name} is a Python pickle, which can run any code when it is read. Get the archives with npz "
                    "files instead: Imagenet64_train_part1_npz.zip and so on."
                )
            else:
                rejected.append(name)
    where = " ".join(map(str, sources))
    if not names:
        raise DataError(f"{where}: no pictures and no npz batches.{listing(' Found instead', rejected)}")
    _check_batches(where, names, splits)
    assigned = iter(
        assign(_repeated(splits, counts), _repeated(names, counts), val_fraction=val_fraction, where=where)
    )
    files = [PlannedFile(name, [next(assigned) for _ in range(n)]) for name, n in zip(names, counts, strict=True)]
    return PackingPlan(tuple(sources), files, rejected, nbytes)


def is_wanted(name: str) -> bool:
    """Whether a file calls itself a picture or a container of images."""
    return is_batch(name) or is_tfrecords(name) or is_parquet(name) or is_picture(name)


def is_batch(name: str) -> bool:
    return name.endswith(".npz")


def is_tfrecords(name: str) -> bool:
    return name.endswith((".tfrecords", ".tfrecord"))


def is_parquet(name: str) -> bool:
    return name.endswith(".parquet")


def listing(what: str, names: Sequence[str]) -> str:
    """``what: a, b, c and 7 more.``, or nothing if there are no names."""
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what}: {', '.join(names[:_SHOWN])}{more}."


def _image_count(member: Member, name: str) -> int:
    """Images of a file that has no split of its own; an npz batch is of one split, so it counts as one."""
    if not (is_tfrecords(member.name) or is_parquet(member.name)):
        return 1
    try:
        with member.open() as file:
            if is_tfrecords(member.name):
                return sum(1 for _ in tfrecords.records(file, read=False))
            return parquet.row_count(file)
    except RnodeError:
        raise
    except Exception as error:  # on garbage a reader raises whatever it stumbled over
        raise DataError(f"{name} is damaged: {' '.join(str(error).split())}. Download it again.") from error


def _check_batches(where: str, names: Sequence[str], splits: Sequence[str | None]) -> None:
    batches = [is_batch(name) for name in names]
    if any(batches) and not (all(batches) and {"train", "val"} <= set(splits)):
        raise DataError(
            f"{where}: npz batches must come without other pictures, and train_data_batch_1.npz, ... together with "
            "val_data.npz; give all archives in one command."
        )


def _repeated(values: Sequence, counts: Sequence[int]) -> list:
    return [value for value, count in zip(values, counts, strict=True) for _ in range(count)]
