"""``Facts`` tell the data that weights were trained on from other data, and from another split of the same data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from ...errors import DataError
from .images import ImageData, name_hash
from .tables import Table

_Number = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Facts:
    """What a file of weights says about the data that they were trained on.

    They describe all samples, whatever limits a recipe sets, and stand next to the recipe in every checkpoint and
    ``.safetensors`` file. A table has the first three, and images have the others.

    Attributes:
        rows: number of rows in all parts of the table.
        checksum: a hash of the values in these rows and of the split.
        given_ranges: the smallest and the largest value of each given column in the training rows.
        pictures: hashes of the pixels of training pictures by hashes of their names, as
            :class:`~rnode_plugin.experiments.data.ImageData` has them. None for images without names, such as
            packed ones.
        train, held_out: hashes of the training images and of the held-out ones.
    """

    rows: int | None = None
    checksum: str | None = None
    given_ranges: tuple[tuple[_Number, _Number], ...] | None = None
    pictures: dict[str, str] | None = None
    train: str | None = None
    held_out: str | None = None

    @staticmethod
    def of(data: ImageData | Table, given: Sequence[str] = ()) -> Facts:
        """Return the facts of ``data``, with the ranges of its columns ``given``."""
        if isinstance(data, Table):
            columns = data.train[:, [data.columns.index(name) for name in given]]
            ranges = tuple(zip(columns.min(0).tolist(), columns.max(0).tolist(), strict=True))
            return Facts(rows=data.rows, checksum=data.checksum, given_ranges=ranges or None)
        pictures = None if data.pictures is None else dict(data.pictures)
        return Facts(pictures=pictures, train=data.pixels[0], held_out=data.pixels[1])

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
    def identity(self) -> tuple[str | None, ...]:
        """What tells the data from others, as hashes of their samples and of the split."""
        return self.checksum, self.train, self.held_out

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
    if facts.train in (None, data.pixels[0]) or has_more(facts, data):
        return None
    if moved := _moved(facts, data):
        return f"Pictures that were trained on are held out now, such as {moved[0]}."
    return (
        "The weights were trained on other images, or on these under other names. Some that were trained on may be "
        "held out now."
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
    # if names are only gone, their pictures were deleted
    if _moved(facts, data) or (_gone(facts, data) and _new(facts, data)):
        raise DataError(
            f"{doubt} Put the pictures back as they were, name their folder with --data-root, or train a new run "
            "on these."
        )


def has_more(facts: Facts, data: ImageData | Table) -> bool:
    """Whether pictures were added to the training pictures, which moves none of those to the held-out ones."""
    if isinstance(data, Table):
        return False
    before, now = facts.pictures or {}, data.pictures or {}
    known = before.keys() & now.keys()
    return bool(known) and not _gone(facts, data) and all(before[name] == now[name] for name in known)


def _moved(facts: Facts, data: ImageData) -> list[str]:
    """List the held-out pictures whose names were those of training pictures, and are no longer."""
    # train/1.png and val/1.png have one name, so a deleted picture would look moved
    gone = set() if facts.held_out == data.pixels[1] else _gone(facts, data)
    return [name for name in (data.names[1] if data.names else ()) if name_hash(name) in gone]


def _gone(facts: Facts, data: ImageData) -> set[str]:
    """Return the recorded names, as hashes, that no training picture has now; empty for images without names."""
    if facts.pictures is None or data.names is None:
        return set()
    return facts.pictures.keys() - set(map(name_hash, data.names[0]))


def _new(facts: Facts, data: ImageData) -> set[str]:
    """Return the names of training pictures, as hashes, that would have been recorded if they had been there."""
    before, now = facts.pictures or {}, data.pictures or {}
    return {name for name in now.keys() - before.keys() if name <= max(before)}
