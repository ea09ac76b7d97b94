"""Start: smaller batches and coarser steps of the solver for the first training steps."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ...errors import ConfigError
from ...solvers.config import Solver

__all__ = ["Start"]


@dataclass(frozen=True)
class Start:
    """What the first training steps do otherwise; a fresh flow is smooth, and a rough gradient will do.

    Attributes:
        steps: optimizer steps of the start; 0 for none.
        batch_size: images per device and step until then, if ``data.batch_size`` is not smaller; None for that.
        step: of the training solver, a fixed grid, until then; None for ``solver.step``.
    """

    steps: int = 0
    batch_size: int | None = None
    step: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ConfigError(f"start.steps must be at least 0, not {self.steps}.")
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"start.batch_size must be at least 1, not {self.batch_size}.")
        if self.step is not None and self.step <= 0:
            raise ConfigError(f"start.step must be positive, not {self.step}.")
        given = (self.batch_size, self.step) != (None, None)
        if self.steps and not given:
            raise ConfigError("start.steps does nothing alone: give start.batch_size or start.step, or both.")
        if given and not self.steps:
            raise ConfigError(
                "start.batch_size and start.step do nothing without start.steps: say for how many, or set both to "
                "none."
            )

    def check(self, solver: Solver) -> None:
        """Refuse a step size for a solver that chooses its own.

        Raises:
            ConfigError: ``solver`` is adaptive.
        """
        if self.step is not None and solver.adaptive:
            raise ConfigError(
                f"start.step needs a fixed grid, but {solver.method} chooses its own steps: set start.step=none, "
                "or solver.method=rk4_38."
            )

    def size_at(self, step: int, batch_size: int) -> int:
        """Images per device and batch of a step, counted from 0, where ``batch_size`` are those after the start."""
        return min(self.batch_size or batch_size, batch_size) if step < self.steps else batch_size

    def solver_at(self, step: int, solver: Solver) -> Solver:
        """The training solver of a step, counted from 0, where ``solver`` is that after the start."""
        return dataclasses.replace(solver, step=self.step) if self.gives_step_at(step) else solver

    def described(self, batch_size: int) -> str:
        """The batches of a run in words: ``50``, or ``50 (25 and solver.step 1 in the first 50 steps)``."""
        size = self.size_at(0, batch_size)
        other = [str(size)] if size != batch_size else []
        other += [] if self.step is None else [f"solver.step {self.step:g}"]
        return f"{batch_size} ({' and '.join(other)} in the first {self.steps} steps)" if other else str(batch_size)

    def gives_step_at(self, step: int) -> bool:
        """Whether a step, counted from 0, takes the solver's step size from here."""
        return step < self.steps and self.step is not None
