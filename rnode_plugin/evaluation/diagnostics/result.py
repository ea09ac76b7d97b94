"""The result of a diagnosis: one ``Check`` for each question, and the ``Diagnosis`` with all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

__all__ = ["VERDICTS", "Check", "Diagnosis", "Verdict", "worse_of"]

Verdict = Literal["ok", "left out", "cannot tell", "warning", "failed"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
"""From the best to the worst."""


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: of the check, such as ``round trip``.
        verdict: ``ok``, ``warning``, ``failed``, ``cannot tell`` if the data are too few to see a difference that
            matters, or ``left out`` for a check that could not be made.
        sentence: the finding, its meaning and advice.
        numbers: measurements by name.
        curves: data of the figure, by name.
    """

    name: str
    verdict: Verdict
    sentence: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Diagnosis:
    """All checks of one model.

    Attributes:
        checks: in the order in which they were made.
        samples: held-out samples that were used.
        dims: number of dimensions of one sample.
        solver: the model's own, in words.
        seed: of all noise.
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

    def to_plain(self) -> dict[str, Any]:
        """As dictionaries, lists, numbers and texts, for JSON; a number that is not finite is None."""
        return _finite(asdict(self))

    @staticmethod
    def from_plain(plain: Any) -> Diagnosis:
        """The inverse of :meth:`to_plain`; None is NaN.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it is not that of a diagnosis.
        """
        checks = tuple(map(_check, plain["checks"]))
        counts = (int(plain["samples"]), int(plain["dims"]), str(plain["solver"]), int(plain["seed"]))
        return Diagnosis(checks, *counts, float(plain["seconds"]))


def worse_of(value: float, *, warn: float, fail: float) -> Verdict:
    """The verdict on a number that should be small; one that is not a number fails."""
    if not value <= fail:
        return "failed"
    return "warning" if value > warn else "ok"


def _check(plain: Any) -> Check:
    name, verdict, sentence = (str(plain[key]) for key in ("name", "verdict", "sentence"))
    known = VERDICTS[VERDICTS.index(verdict)]  # pyright: ignore[reportArgumentType]  (a ValueError if unknown)
    numbers = {str(key): _number(value) for key, value in plain["numbers"].items()}
    curves = {str(key): [_number(value) for value in values] for key, values in plain["curves"].items()}
    return Check(name, known, sentence, numbers, curves)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
