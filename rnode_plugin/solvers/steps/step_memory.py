"""StepMemory: the step that suited one adaptive solve, for the next solve of the same field to begin with."""

from __future__ import annotations

import math

__all__ = ["StepMemory"]


class StepMemory:
    """The longest step that would have passed everywhere in the last solve.

    Solves of one field in a row, such as those of a data set's batches, need about the same steps. One that begins
    with the step of the one before wastes no evaluation on finding it. The result then depends, within the
    tolerances, on what was solved before: give each series of solves a memory of its own.

    Attributes:
        step: its length, positive; None before the first solve.
    """

    def __init__(self) -> None:
        self.step: float | None = None
        self._shortest = math.inf

    def begin(self) -> float | None:
        """A solve starts: the step to begin with; None if there is none yet."""
        self._shortest = math.inf
        return self.step

    def note(self, length: float, error_ratio: float, order: int) -> None:
        """Learn from a step that was tried: its error grows with the ``order``-th power of its length."""
        if error_ratio > 0:
            self._shortest = min(self._shortest, length * error_ratio ** (-1 / order))

    def keep(self) -> None:
        """The solve is over: remember the step for the next one."""
        self.step = self._shortest
