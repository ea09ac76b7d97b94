"""``Facts`` tell the data that weights were trained on from other data, and from another split of the same data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from ...errors import DataError
from .images import ImageData
from .tables import Table

_Number = Annotated[float, Field(allow_inf_nan=False)]
_COMPARED = 64  # names, because a folder may have a million of them


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Facts:
    """What a file of weights says about the data that they were trained on.

    They are of all samples, whatever limits a recipe sets, and stand beside the recipe in every checkpoint and
    ``.safetensors`` file. A table has the first three, and images have the others.

    Attributes:
        rows: number of rows in all parts of the table.
        checksum: a hash of the values in these rows and of the split.
        given_ranges: the smallest and the largest value of each given column in the training rows.
        names: hashes of names of training pictures; of many names the lowest hashes. None for images without
            names, such as packed ones. A name is the path below the folder, without a folder ``train`` or ``val``.
        train, held_out: hashes of the training images and of the held-out ones.
    """

    rows: int | None = None
    checksum: str | None = None
    given_ranges: tuple[tuple[_Number, _Number], ...] | None = None
    names: tuple[str, ...] | None = None
    train: str | None = None
    held_out: str | None = None

    @staticmethod
    def of(data: ImageData | Table, given: Sequence[str] = ()) -> Facts:
        """Return the facts of ``data``, with the ranges of its columns ``given``."""
        if isinstance(data, Table):
            columns = data.train[:, [data.columns.index(name) for name in given]]
            ranges = tuple(zip(columns.min(0).tolist(), columns.max(0).tolist(), strict=True))
            return Facts(rows=data.rows, checksum=data.checksum, given_ranges=ranges or None)
        names = None if data.names is None else tuple(sorted(map(_hash, data.names[0]))[:_COMPARED])
        train, held_out = data.pixels
        return Facts(names=names, train=train, held_out=held_out)

    @staticmethod
    def from_plain(plain: object) -> Facts | None:
        """Read what :meth:`to_plain` gives, or None.

        Raises:
            ValueError: ``plain`` is neither.
        """
        return _FACTS.validate_python(plain)

    def to_plain(self) -> dict[str, Any]:
        """Convert to dictionaries, lists, numbers and texts, for JSON and checkpoints."""
        return {name: value for name, value in _FACTS.dump_python(self, mode="json").items() if value is not None}

    @property
    def measured(self) -> str | None:
        """A hash of the held-out samples. Scores of other ones cannot be paired, sample by sample."""
        return self.checksum or self.held_out


_FACTS = TypeAdapter[Facts | None](Facts | None)


def overlap_warning(facts: Facts | None, data: ImageData | Table) -> str | None:
    """Say why held-out samples of ``data`` may have been trained on by weights with these ``facts``.

    Returns:
        A sentence; None if ``data`` are the data of the training with their split, or nothing is known.
    """
    if facts is None:
        return None
    if isinstance(data, Table):
        if facts.checksum in (None, data.checksum):
            return None
        return (
            f"{data.name} has other rows than the table of the training, or another split. If the two share rows, "
            "some that were trained on may be held out now."
        )
    if facts.train in (None, data.pixels[0]):
        return None
    if moved := _moved(facts, data):
        return f"Pictures that were trained on are held out now, such as {moved[0]}."
    return (
        "The training images are not those of the training before. If some that were trained on have other names "
        "or another place now, they may be held out."
    )


def refuse_other_split(facts: Facts | None, data: ImageData | Table) -> None:
    """Refuse ``data`` that do not have the split by which weights with these ``facts`` were trained.

    These are a table that has changed, and pictures with other names, because the names decide the split. Other
    images are not refused: pictures may have been added, or decoded by another version of a library, and packed
    images have no names.

    Raises:
        DataError: the data are refused.
    """
    if facts is None or (doubt := overlap_warning(facts, data)) is None:
        return
    if isinstance(data, Table):
        now = f"{data.rows:,} rows" if data.rows != facts.rows else "as many rows, but not the same"
        raise DataError(
            f"{data.name} has changed since the training: it had {facts.rows:,} rows, and has {now} now. In a new "
            "split, rows that were trained on could be held out. Put the old file back, name it with --data-root, "
            "or train a new run on this one."
        )
    # names that are only new are of pictures that were added, and names that are only gone of deleted ones
    if _moved(facts, data) or all(_exchanged(facts, data)):
        raise DataError(
            f"{doubt} Put the pictures back as they were, name their folder with --data-root, or train a new run "
            "on these."
        )


def _moved(facts: Facts, data: ImageData) -> list[str]:
    """List the held-out pictures whose names were those of training pictures, and are no longer."""
    gone, _ = _exchanged(facts, data)
    return [name for name in (data.names[1] if data.names else ()) if _hash(name) in gone]


def _exchanged(facts: Facts, data: ImageData) -> tuple[set[str], set[str]]:
    """Return the recorded names of training pictures that are gone now, and names that are new, as hashes."""
    if facts.names is None or data.names is None:
        return set(), set()
    before, now = set(facts.names), set(map(_hash, data.names[0]))
    # only names were recorded whose hashes are at most this, unless all were
    bound = facts.names[-1] if len(facts.names) == _COMPARED else "g"
    return before - now, {each for each in now - before if each <= bound}


def _hash(name: str) -> str:
    # file names on Linux need not be valid UTF-8
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:12]
