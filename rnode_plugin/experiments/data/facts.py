"""``Facts`` say which data weights were trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from .images import ImageData
from .tables import Table

_Number = Annotated[float, Field(allow_inf_nan=False)]
Identity = tuple[str, str]
"""Hashes of all samples of a data set: of those of the training, and of the held-out ones."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Facts:
    """What a file of weights says about the data that they were trained on.

    Reports and comparisons tell data from others by ``train`` and ``held_out``. They describe all samples, whatever
    limits a recipe sets, and every file of weights has them in its header.

    Attributes:
        train: a hash of the training samples, and of the rows of a table that choose the weights.
        held_out: a hash of the held-out samples.
        given_ranges: the smallest and the largest value of each given column in the training rows of a table.
        before: the identities of other data that the weights were trained on before these, in the runs whose
            weights they began with, each once; None if they are not known.
    """

    train: str
    held_out: str
    given_ranges: tuple[tuple[_Number, _Number], ...] | None = None
    before: tuple[Identity, ...] | None = field(default=None, compare=False)

    @staticmethod
    def of(
        data: ImageData | Table, given: Sequence[str] = (), *, trained_on: Sequence[Identity] | None = None
    ) -> Facts:
        """Return the facts of ``data``, with the ranges of its columns ``given``.

        ``trained_on`` are the identities of what the weights were trained on before; None if they are not known.
        """
        ranges = data.ranges(given) if isinstance(data, Table) and given else None
        before = None if trained_on is None else tuple(each for each in trained_on if each != data.identity)
        return Facts(*data.identity, ranges, before)

    @staticmethod
    def from_plain(plain: object) -> Facts | None:
        """Read what :meth:`to_plain` gives, or None.

        Raises:
            ValueError: ``plain`` is neither.
        """
        return _FACTS.validate_python(plain)

    def to_plain(self) -> dict[str, Any]:
        """Convert to dictionaries, lists, numbers and texts, for JSON and checkpoints."""
        return _FACTS.dump_python(self, mode="json", exclude_none=True)

    @property
    def identity(self) -> Identity:
        """What tells the data from others."""
        return self.train, self.held_out

    @property
    def trained_on(self) -> tuple[Identity, ...] | None:
        """The identities of all data that the weights were trained on; None if they are not known."""
        return None if self.before is None else (*self.before, self.identity)

    def describe(self, data: ImageData | Table) -> bool:
        """Whether the weights were last trained on ``data``, with the same split."""
        return self.identity == data.identity


_FACTS = TypeAdapter[Facts | None](Facts | None)


def doubt(facts: Facts | None, data: ImageData | Table) -> str | None:
    """Say that the held-out samples of ``data`` may be among those that weights were trained on.

    Args:
        facts: the facts of the weights; None if they are not known.
        data: any data.

    Returns:
        A sentence; None if all data that the weights were trained on hold out the same samples.
    """
    samples = f"the held-out {data.noun} of {data.name}"
    _, held_out = data.identity
    if facts is not None and any(other != held_out for _, other in (facts.identity, *(facts.before or ()))):
        return f"{samples} are others than those of the training: some of them may have been trained on."
    if facts is None or facts.before is None:
        return f"it is not known whether these weights were trained on some of {samples}."
    return None
