"""tune_step: the coarsest step of a fixed grid that agrees with a tight adaptive solve, by measurement.

The paper halves the step from 0.5 until the discrete dynamics are stable and perform well (section 6). Here they
must agree with those of a tight adaptive solve in the likelihood of held-out samples, and in their latents.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.objective import FlowOutput, output_log_prob
from ..errors import ConfigError
from ..solvers import Solver
from .measures import FlowInput, ImageMeasure, Measure
from .solver_gap import measure_solver_gap

if TYPE_CHECKING:
    from ..flows.base import BlockFlow

REFERENCE = Solver(method="dopri5", atol=1e-6, rtol=1e-6)
"""The adaptive solve that a discrete flow has to agree with."""


@dataclass(frozen=True)
class StepRow:
    """The measurements of one step size.

    Attributes:
        step: its length.
        nfe: evaluations of all blocks together.
        score: mean over the samples in the measure's unit, such as bits/dim; infinite if the solve fails.
        gap: mean over the samples of the distance of their scores from the adaptive solve, with the same noise.
        round_trip: samples go to the latent with these steps and back with the adaptive solve; their root mean
            square error, in levels of a pixel, or in deviations of a column.
        agrees: whether both are within the tolerances.
    """

    step: float
    nfe: int
    score: float
    gap: float
    round_trip: float
    agrees: bool


@dataclass(frozen=True)
class StepTable:
    """The measurements of :func:`tune_step`, coarse to fine.

    Attributes:
        rows: one for each step that was tried; all but the last disagree with the adaptive solve.
        score: that of the adaptive solve, mean over the samples.
        nfe: its evaluations.
        max_gap, max_round_trip: the tolerances.
    """

    rows: tuple[StepRow, ...]
    score: float
    nfe: int
    max_gap: float
    max_round_trip: float

    @property
    def step(self) -> float | None:
        """The coarsest step that agrees; None if none did."""
        return self.rows[-1].step if self.rows[-1].agrees else None


def check_tuning(solver: Solver, *, start: float, smallest: float) -> None:
    """Check the arguments of :func:`tune_step`: a ConfigError for an adaptive ``solver`` or steps out of order."""
    if solver.adaptive:
        raise ConfigError(f"{solver.method} chooses its own steps: tune the step of a fixed grid, such as rk4_38.")
    if not 0 < smallest <= start < math.inf:
        raise ConfigError(f"start and smallest must be positive numbers, start the larger: {start}, {smallest}.")


@torch.no_grad()
def tune_step(
    flow: BlockFlow,
    x: Tensor | FlowInput,
    *,
    measure: Measure | None = None,
    solver: Solver | None = None,
    start: float = 1.0,
    smallest: float = 1 / 32,
    max_gap: float | None = None,
    max_round_trip: float | None = None,
    reference: Solver = REFERENCE,
    generator: torch.Generator | None = None,
    progress: Callable[[StepRow], None] | None = None,
) -> StepTable:
    """Halve the step from ``start`` until the discrete flow agrees with ``reference``.

    Args:
        flow: the model; a fresh one (f = 0) agrees at any step.
        x: held-out samples on the flow's device: images ``(B, C, H, W)`` in [0, 1], dequantised, or the ``inputs``
            of a measure.
        measure: of the kind of data; None for images.
        solver: the fixed grid; None for the 3/8 rule.
        start: first step to try.
        smallest: no step below it is tried.
        max_gap: tolerance of :attr:`StepRow.gap`; None for 0.005 bits/dim, or 0.02 nats of a table.
        max_round_trip: tolerance of :attr:`StepRow.round_trip`; None for 0.5 levels, or 0.01 deviations of a table.
        reference: the adaptive solve.
        generator: draws the noise of the divergence, once for all solves; of the flow's device.
        progress: called with each row as it is found.

    Raises:
        ConfigError: see :func:`check_tuning`.
        SolverError: if the adaptive solve itself fails.
    """
    if measure is None:
        measure = ImageMeasure(flow.image_shape, flow.levels)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    x, given = x if isinstance(x, FlowInput) else FlowInput(x, {})
    max_gap = measure.step_gap if max_gap is None else max_gap
    max_round_trip = measure.step_round_trip if max_round_trip is None else max_round_trip
    solver = solver or Solver()
    check_tuning(solver, start=start, smallest=smallest)
    noise = flow.draw_noise(len(x), generator=generator)
    exact = all(probe is None for probe in noise)

    def encode(solver: Solver) -> FlowOutput:
        return flow(x, **given, noise=None if exact else noise, solver=solver, penalties=False)

    def scores(output: FlowOutput) -> Tensor:
        return measure.scores(output_log_prob(output)).cpu().double()

    def there_and_back(solver: Solver) -> tuple[FlowOutput, Tensor]:
        output = encode(solver)
        return output, flow.solved_with(solver=reference).inverse(output.z, **given)

    accurate = encode(reference)
    expected = scores(accurate)

    def row_at(step: float) -> StepRow:
        at_step = dataclasses.replace(solver, step=step)
        found = measure_solver_gap(there_and_back, lambda both: scores(both[0]), at_step, expected)
        if found.failure is not None:  # this step is too coarse for these dynamics: they blow up
            return StepRow(step, found.failure.nfe, math.inf, math.inf, math.inf, agrees=False)
        assert found.output is not None
        output, back = found.output
        round_trip = measure.distance(flow, back, x)
        agrees = found.typical <= max_gap and round_trip <= max_round_trip
        return StepRow(step, output.nfe, float(scores(output).mean()), found.typical, round_trip, agrees)

    rows: list[StepRow] = []
    step = start
    while step >= smallest and not (rows and rows[-1].agrees):
        rows.append(row_at(step))
        if progress is not None:
            progress(rows[-1])
        step /= 2
    return StepTable(tuple(rows), float(expected.mean()), accurate.nfe, max_gap, max_round_trip)
