"""AutoStep: the step of ``solver.step=auto``, the coarsest one that agrees with a tight adaptive solve.

The paper halves the step from 0.5 until the discrete dynamics are stable and perform well (section 6). Here they
must agree with a tight adaptive solve in the likelihood of held-out samples, and in their latents.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.distribution import DensityModel
from ..core.objective import FlowOutput
from ..core.random_streams import Stream, seeded
from ..errors import SolverError
from ..evaluation.measures import batch_of, measure_solver_gap
from ..recipes.task import FlowInput, Task
from ..solvers import Solver

REFERENCE = Solver(method="dopri5", atol=1e-6, rtol=1e-6)
"""The adaptive solve that a discrete flow has to agree with."""

FIRST_STEP = 0.5
"""The first step that is tried, as in the paper: a flow that trains on coarser ones soon exploits them."""

_CALM = 1 / 4  # share of the tolerances that a coarser step may use up, so that it does not come and go
_SAMPLES = 16


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


@torch.no_grad()
def tune_step(
    flow: DensityModel,
    inputs: FlowInput,
    *,
    task: Task,
    solver: Solver,
    smallest: float = 1 / 32,
    reference: Solver = REFERENCE,
) -> tuple[StepRow, ...]:
    """Halve the step from :data:`FIRST_STEP` until the discrete flow agrees with ``reference``.

    Args:
        flow: the model; a fresh one (f = 0) agrees at any step. torch's generator draws the noise of its
            divergence, once for all solves.
        inputs: held-out samples on the flow's device.
        task: has the tolerances ``step_gap`` and ``step_round_trip``.
        solver: the fixed grid.
        smallest: no step below it is tried.
        reference: the adaptive solve.

    Returns:
        One row for each step that was tried, coarse to fine; all but the last disagree with the adaptive solve.

    Raises:
        SolverError: the adaptive solve itself fails.
    """
    x, context = inputs
    noise = flow.draw_noise(len(x))
    exact = all(probe is None for probe in noise)

    def encode(solver: Solver) -> FlowOutput:
        return flow.encode(x, context=context, noise=None if exact else noise, solver=solver, penalties=False)

    def scores(output: FlowOutput) -> Tensor:
        return task.scores(flow.log_prob_of(output)).cpu().double()

    def there_and_back(solver: Solver) -> tuple[FlowOutput, Tensor]:
        output = encode(solver)
        return output, flow.inverse(output.z, context=context, solver=reference)

    accurate = scores(encode(reference))
    rows: list[StepRow] = []
    step = FIRST_STEP
    while step >= smallest and not (rows and rows[-1].agrees):
        grid = dataclasses.replace(solver, step=step)
        found = measure_solver_gap(there_and_back, lambda both: scores(both[0]), grid, accurate)
        if found.failure is not None:  # this step is too coarse for these dynamics: they blow up
            rows.append(StepRow(step, found.failure.nfe, math.inf, math.inf, math.inf, agrees=False))
        else:
            assert found.output is not None
            output, back = found.output
            trip = task.distance(flow, back, x)
            agrees = found.typical <= task.step_gap and trip <= task.step_round_trip
            score = float(scores(output).mean())
            rows.append(StepRow(step, output.nfe, score, found.typical, trip, agrees))
        step /= 2
    return tuple(rows)


class AutoStep:
    """The coarsest step, from 0.5 down, at which a flow agrees with a tight adaptive solve.

    A step that is coarser than the current one has to agree four times as well. Each check measures on the same
    held-out samples with the same noise, so that its result is a function of the weights alone.

    Attributes:
        step: the result of the last check; None before the first one.
    """

    def __init__(self, solver: Solver, task: Task, *, seed: int) -> None:
        self.step: float | None = None
        self._solver, self._task, self._seed = solver, task, seed

    @property
    def solver(self) -> Solver:
        """The grid with the current step."""
        return dataclasses.replace(self._solver, step=self.step or FIRST_STEP)

    def measure(self, flow: Any, samples: Any, device: torch.device) -> tuple[StepRow, ...] | None:
        """The measurements of each step now; None if the adaptive solve itself fails.

        ``samples`` are held-out ones as the data come, ``(N, ...)``; the first 16 are used.
        """
        mode = flow.training
        flow.eval()
        try:
            with seeded(self._seed, Stream.TUNE):
                x, context = self._task.inputs(batch_of(samples, slice(0, _SAMPLES)).to(device))
                kind = next(flow.parameters(), x).dtype  # of 64-true
                inputs = FlowInput(x.to(kind), None if context is None else context.to(kind))
                return tune_step(flow, inputs, task=self._task, solver=self._solver)
        except SolverError:
            return None
        finally:
            flow.train(mode)

    def take(self, rows: tuple[StepRow, ...] | None, at: int) -> str | None:
        """Switch to the step that was found at training step ``at``; lines for the user if something changed."""
        old, task = self.step or FIRST_STEP, self._task
        if rows is None:
            self.step = old
            return f"solver.step stays {old:g} at step {at}: the adaptive solve that it is compared with fails."
        best = rows[-1]
        calm = best.gap <= _CALM * task.step_gap and best.round_trip <= _CALM * task.step_round_trip
        self.step = new = best.step if best.step <= old or calm else max(old, best.step / 2)
        if new == old:
            return None
        lines = [f"solver.step {old:g} -> {new:g} at step {at}:"]
        lines += [
            f"  step {row.step:g}: NFE {row.nfe}, gap {row.gap:.2g} {task.unit}, "
            f"round trip {row.round_trip:.2g} {task.step_unit}"
            for row in rows
        ]
        lines += [] if best.agrees else ["No step agrees with an adaptive solve: raise the lambdas."]
        return "\n".join(lines)
