"""``solver.step=auto``: the step of a fixed grid while training, measured again as the field changes."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from ...core.random_streams import Stream, seeded
from ...errors import SolverError
from ...evaluation.measures import Measure, batch_of
from ...evaluation.step_size import StepTable, tune_step
from ...solvers import Solver

if TYPE_CHECKING:
    import torch

__all__ = ["AutoStep"]

_START = 0.5  # the paper's; what trains on coarser steps soon learns to exploit them
_CALM = 1 / 4  # share of the tolerances that a coarser step may use up, so that it does not come and go
_SAMPLES = 16


class AutoStep:
    """The coarsest step, from 0.5 down, at which a flow agrees with a tight adaptive solve.

    A coarser one than that of the moment has to agree four times as well.

    Each check measures on the same held-out samples with the same noise
    (:func:`~rnode_plugin.evaluation.step_size.tune_step`), so that its result is a function of the weights alone.

    Args:
        solver: the fixed grid.
        measure: of the kind of data.
        seed: of the noise.

    Attributes:
        step: as found by the last check; None before the first one.
    """

    def __init__(self, solver: Solver, measure: Measure[Any], *, seed: int) -> None:
        self.step: float | None = None
        self._solver, self._measure, self._seed = solver, measure, seed
        self._failing = False

    @property
    def solver(self) -> Solver:
        """The grid with the step of the moment."""
        return dataclasses.replace(self._solver, step=self.step or _START)

    def measure(self, flow: Any, samples: Any, device: torch.device) -> StepTable | None:
        """What each step gives now; None if the adaptive solve itself fails.

        Args:
            flow: the model.
            samples: held-out ones as the data come, ``(N, ...)``; the first 16 are used.
            device: of the model.
        """
        mode = flow.training
        flow.eval()
        try:
            with seeded(self._seed, Stream.TUNE):
                x = self._measure.inputs(batch_of(samples, slice(0, _SAMPLES)).to(device))
                return tune_step(flow, x, measure=self._measure, solver=self._solver, start=_START)
        except SolverError:
            return None
        finally:
            flow.train(mode)

    def take(self, found: StepTable | None, at: int) -> str | None:
        """Switch to the step that was found at training step ``at``.

        Returns:
            One line where the user should hear of it; None where nothing has changed.
        """
        old = self.step or _START
        again, self._failing = self._failing, found is None
        if found is None:
            self.step = old
            line = f"solver.step stays {old:g} at step {at}: the adaptive solve that it is held against fails."
            return None if again else line
        best = found.rows[-1]
        new = best.step
        calm = best.gap <= _CALM * found.max_gap and best.round_trip <= _CALM * found.max_round_trip
        if new > old and not calm:
            new = max(old, new / 2)
        self.step = new
        if new == old:
            return None
        line = f"solver.step {old:g} -> {new:g} at step {at}"
        # a finer one: why the old one would not do; a coarser one: that it does
        row = next((row for row in found.rows if row.step == max(old, new)), best)
        line += f": {self._figures(row.gap, row.round_trip)} at {row.step:g}"
        if found.step is None:
            line += f", and no step down to {new:g} agrees with an adaptive solve: raise the lambdas"
        return line + "."

    def _figures(self, gap: float, round_trip: float) -> str:
        if math.isinf(gap):
            return "the solve fails"
        measure = self._measure
        return f"gap {gap:.2g} {measure.unit}, round trip {round_trip:.2g} {measure.step_unit}"
