"""Which training steps count, and what is said when too many in a row did not."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Sequence

__all__ = ["StepGuard"]

_REMEMBERED = 20  # steps whose NFE and Jacobian norm a message compares
_LISTED = 16  # samples that a message names


class StepGuard:
    """Counts the steps without a usable gradient, and remembers how hard the last solves were.

    Args:
        limit: steps in a row that may be skipped before training stops.
    """

    def __init__(self, limit: int) -> None:
        self.skipped = self.in_row = 0
        self._limit = limit
        self._solves: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)

    def remember(self, nfe: float, jacfrob: float) -> None:
        """NFE and mean Jacobian penalty per dimension of one solve; NaN where it was not measured."""
        self._solves.append((nfe, jacfrob))

    def made(self) -> None:
        """Count a step whose gradient was used."""
        self.in_row = 0

    def skip(self) -> bool:
        """Count a skipped step; return whether it was one too many."""
        self.skipped += 1
        self.in_row += 1
        return self.in_row >= self._limit

    def message(
        self,
        step: int,
        problem: str,
        samples: Sequence[int],
        listed_in: str | os.PathLike[str] | None,
        called: str = "images",
    ) -> str:
        """Why training stops at ``step``, and what can be done.

        Args:
            step: number of the step, from 1.
            problem: what was wrong with it.
            samples: its batch; empty if that is not known.
            listed_in: file that names all of the images if they are too many for a sentence; None for no file.
            called: what samples are called.
        """
        first = step - self.in_row + 1
        which = f"steps {first} to {step} were" if first < step else f"step {step} was"
        sentences = (
            f"{problem} at training step {step}; {which} skipped, and so many in a row are too many.",
            _named(samples, listed_in, called),
            self.trend(),
            "Raise regularizers.jacfrob, or lower solver.step or optimizer.lr.",
        )
        return " ".join(filter(None, sentences))

    def trend(self) -> str:
        """How NFE and Jacobian norm moved over the last solves: a sentence, or nothing if none is known."""
        said = []
        for name, column in (("NFE", 0), ("the Jacobian norm (jacfrob / dim)", 1)):
            values = [solve[column] for solve in self._solves if math.isfinite(solve[column])]
            if len(values) > 1:
                first, last = values[0], values[-1]
                verb = "rose" if last > first else "fell"
                way = f"{verb} from {first:.3g} to {last:.3g}" if last != first else f"stayed at {first:.3g}"
                said.append(f"{name} {way}")
        return f"Over the last {len(self._solves)} solves {' and '.join(said)}." if said else ""


def _named(samples: Sequence[int], listed_in: str | os.PathLike[str] | None, called: str) -> str:
    if not samples:
        return ""
    named = ", ".join(map(str, samples[:_LISTED]))
    where = f" (all in {listed_in})" if listed_in is not None else ""
    more = f" and {len(samples) - _LISTED} more{where}" if len(samples) > _LISTED else ""
    return f"The batch was the training {called} {named}{more}."
