"""The result of a diagnosis: one ``Check`` for each question, and the ``Diagnosis`` with all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import TypeAdapter

from ..validation import NULL_IS_NAN, refused

Verdict = Literal["ok", "left out", "cannot tell", "warning", "failed"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
"""All verdicts, from the best to the worst."""

_Number = Annotated[int | float, NULL_IS_NAN]


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: the name of the check, such as ``invertibility``.
        verdict: ``ok``, ``warning``, ``failed``, ``cannot tell`` if the data do not suffice to see a difference
            that matters, or ``left out`` for a check that could not run.
        sentence: the finding, its meaning and advice.
        numbers: all measurements in the sentence, by name.
        curves: the data for the figure, by name.
    """

    name: str
    verdict: Verdict
    sentence: str
    numbers: Mapping[str, _Number] = field(default_factory=dict)
    curves: Mapping[str, Sequence[_Number]] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        """The name of its figure's files, without a suffix."""
        return self.name.replace(" ", "-")


@dataclass(frozen=True)
class Diagnosis:
    """All checks of one model.

    Attributes:
        checks: all checks in the order in which they ran.
        samples: number of held-out samples that were used for solves.
        dims: number of dimensions of one sample.
        solver: description of the model's solver.
        seed: the seed of all noise.
        seconds: wall-clock time.
    """

    checks: tuple[Check, ...]
    samples: int
    dims: int
    solver: str
    seed: int
    seconds: float

    @property
    def failed(self) -> bool:
        """Whether a check failed."""
        return any(check.verdict == "failed" for check in self.checks)

    def to_plain(self) -> dict[str, object]:
        """Convert to dictionaries, lists, numbers and texts for JSON; a number that is not finite becomes None."""
        return json.loads(TypeAdapter(type(self)).dump_json(self))

    @classmethod
    def from_plain(cls, plain: Any) -> Self:
        """The inverse of :meth:`to_plain`; None becomes NaN.

        Raises:
            ConfigError: if ``plain`` is not a diagnosis.
        """
        with refused("diagnosis"):
            return TypeAdapter(cls).validate_python(plain)
