"""``Facts`` say which data weights were trained on, and which samples. ``Overlap`` counts held-out ones of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from ...errors import DataError
from .hashes import are_in, hashes_of, spread
from .images import ImageData
from .tables import Table

_Number = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", arbitrary_types_allowed=True))
class Facts:
    """What a file of weights says about the data that they were trained on.

    All but the last attribute identify the data: reports and comparisons tell them from others by these, and two
    facts are equal if these are. They describe all samples, whatever limits a recipe sets, and every file of
    weights has them in its header.

    Attributes:
        rows: number of rows in all parts of the table; None for images.
        checksum: a hash of the values in these rows and of the split; None for images.
        given_ranges: the smallest and the largest value of each given column in the training rows.
        train, held_out: hashes of the training images and of the held-out ones; None for a table.
        trained_on: the hash of each sample that a step was given, in this run and in those whose weights it began
            with, as :func:`~rnode_plugin.experiments.data.hashes.hashes_of` computes it: sorted, each once. None if
            they are not known. Checkpoints have it beside their weights.
    """

    rows: int | None = None
    checksum: str | None = None
    given_ranges: tuple[tuple[_Number, _Number], ...] | None = None
    train: str | None = None
    held_out: str | None = None
    trained_on: np.ndarray | None = field(default=None, repr=False, compare=False)

    @staticmethod
    def of(data: ImageData | Table, given: Sequence[str] = (), *, trained_on: np.ndarray | None = None) -> Facts:
        """Return the facts of ``data``, with the ranges of its columns ``given``."""
        return Facts(**data.facts(given), trained_on=trained_on)

    @staticmethod
    def from_plain(plain: object) -> Facts | None:
        """Read what :meth:`to_plain` gives, or None.

        Raises:
            ValueError: ``plain`` is neither.
        """
        if isinstance(plain, dict):
            plain = dict(plain)
            plain.pop("pictures", None)  # of earlier files
        return _FACTS.validate_python(plain)

    def to_plain(self) -> dict[str, Any]:
        """Convert the identity of the data to dictionaries, lists, numbers and texts, for JSON and checkpoints."""
        return _FACTS.dump_python(self, mode="json", exclude={"trained_on"}, exclude_none=True)

    @property
    def identity(self) -> tuple[str | None, ...]:
        """What tells the data from others, as hashes of their samples and of the split."""
        return self.checksum, self.train, self.held_out

    @property
    def measured(self) -> str | None:
        """A hash of the held-out samples. Scores of other ones cannot be paired, sample by sample."""
        return self.checksum or self.held_out

    def describe(self, data: ImageData | Table) -> bool:
        """Whether the weights were last trained on ``data``, with the same split."""
        return self.identity == Facts.of(data).identity


_FACTS = TypeAdapter[Facts | None](Facts | None)


@dataclasses.dataclass(frozen=True)
class Overlap:
    """The number of held-out samples that weights were trained on, and of all of them, whatever a limit says.

    Attributes:
        held_out, all_held_out: of the samples that measure the result.
        val, all_val: of the rows of a table that choose the weights; 0 for images, whose held-out ones do that.
    """

    held_out: int
    all_held_out: int
    val: int = 0
    all_val: int = 0

    @staticmethod
    def of(
        facts: Facts | None,
        data: ImageData | Table,
        *,
        workers: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Overlap | None:
        """Count the held-out samples of ``data`` among those that weights with these ``facts`` were trained on.

        Args:
            facts: of the weights.
            data: with all held-out samples.
            workers: number of processes that decode pictures on disk.
            progress: called with the number of batches of such pictures that are hashed, and of all of them.

        Returns:
            The numbers; None if the facts do not say what the weights were trained on.
        """
        if facts is None or facts.trained_on is None:
            return None
        hashes = data.held_out_hashes
        if hashes is None:
            from .batches import hashes_on_disk

            hashes = hashes_on_disk(data.all_held_out, workers=workers, progress=progress)
        held_out, val = are_in(hashes, facts.trained_on), are_in(data.val_hashes, facts.trained_on)
        return Overlap(int(held_out.sum()), len(held_out), int(val.sum()), len(val))

    def text(self, samples: str) -> str:
        """``29 of 40 held-out rows and 3 of 20 rows that choose the weights``; ``samples`` is the noun."""
        text = f"{self.held_out:,} of {self.all_held_out:,} held-out {samples}"
        return (
            f"{text} and {self.val:,} of {self.all_val:,} {samples} that choose the weights"
            if self.all_val
            else text
        )


def doubt(facts: Facts | None, data: ImageData | Table, overlap: Overlap | None) -> str | None:
    """Say why held-out samples of ``data`` are none for weights with these ``facts``, or may be none.

    Args:
        facts: of the weights.
        data: with a training part, of which 64 samples are looked at.
        overlap: the :class:`Overlap` of both.

    Returns:
        A sentence; None if the held-out samples were not trained on, or nothing is known.
    """
    samples = data.noun
    if overlap is not None and (overlap.held_out or overlap.val):
        return f"{overlap.text(samples)} of {data.name} were trained on."
    if facts is None or facts.describe(data):
        return None
    if facts.trained_on is not None:
        some = spread(data.train)
        if are_in(hashes_of(some), facts.trained_on).any():
            return None
        # images that were scaled or encoded again have other pixels, and rows that were rounded other values
        return (
            f"None of {len(some)} training {samples} of {data.name} was trained on before: these are other "
            f"{samples}, or changed copies, of which a held-out one cannot be recognized."
        )
    if facts.identity == (None, None, None):
        return None
    return (
        f"{data.name} has other {samples} than the data of the training, or another split. If the two share "
        f"{samples}, some that were trained on may be held out now."
    )


def refuse_leak(
    facts: Facts | None, data: ImageData | Table, overlap: Overlap | None, *, before: int | None
) -> None:
    """Refuse to resume a run on data that hold out more samples which it was trained on than its own data do.

    Of a run that does not say what it was trained on, a table is refused that has changed, because its new split
    holds out others.

    Args:
        facts: of the run.
        data: what it would continue with.
        overlap: the :class:`Overlap` of both.
        before: the number of such samples in the data of the run so far; None counts as 0.

    Raises:
        DataError: the data are refused.
    """
    advice = "Put the old data back, name them with --data-root, or train a new run on these."
    if overlap is not None and overlap.held_out > (before or 0):
        raise DataError(
            f"{overlap.text(data.noun)} of {data.name} were trained on. In the data of the run these were "
            f"{before or 0:,} held-out ones. {advice}"
        )
    if facts is None or facts.trained_on is not None:
        return
    now = Facts.of(data)
    if None not in (facts.checksum, now.checksum) and facts.checksum != now.checksum:
        has = f"{now.rows:,} rows" if now.rows != facts.rows else "as many rows, but not the same"
        raise DataError(
            f"{data.name} has changed since the training: it had {facts.rows:,} rows, and has {has} now. In a new "
            f"split, rows that were trained on could be held out. {advice}"
        )
