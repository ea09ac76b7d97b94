"""The march of a :class:`~rnode_plugin.FixedGrid`, whose steps divide each interval of the times evenly.

Here are also the stages that are drawn on these steps.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from ..core.health import HealthCheck, health
from ..core.modes import read
from ..errors import ConfigError
from .solution import Solution
from .step import (
    Draw,
    Problem,
    Step,
    Totals,
    draw_stage,
    fail_integrals,
    fail_max_nfe,
    fail_nonfinite,
)
from .tableaus import Method, count_steps, get_method

if TYPE_CHECKING:
    from .solver import FixedGrid

_MOST_STEPS = 1_000_000


def march(solver: FixedGrid, problem: Problem, *, take: Callable[..., Step] | None = None) -> Solution:
    """Take all steps of a solve, see :meth:`Solver.march <rnode_plugin.Solver.march>`."""
    rhs, z, t_span = problem.rhs, problem.z, problem.t_span
    method = get_method(solver.method)
    counts = _counts(solver, t_span)
    draws = None
    # A density draws one stage in each step, below. Penalties alone draw fewer evaluations, over the whole solve.
    if solver.quadrature == "sampled" and not rhs.divergence:
        draws = _draw_stages(method, _lengths(t_span, counts))
    take = problem.stepper(method, solver.tolerances) if take is None else take
    # times on the CPU stay there, so that step lengths are numbers for the host, unless they require a gradient
    if t_span.device.type != "cpu" or t_span.requires_grad:
        t_span = t_span.to(z.device)
    outputs, grid = _grid(t_span, counts, z.device)
    totals = Totals([outputs[0]], [z], knots=[(outputs[0], z)] if problem.save_steps else None)
    finite, steps = list[Tensor](), iter(grid)
    for output, count in zip(outputs[1:], counts, strict=True):
        for start, dt, end in itertools.islice(steps, count):
            draw = None
            if solver.quadrature == "sampled":
                draw = draw_stage(method) if draws is None else draws[totals.steps]
            step = take(z, start, dt, None, draw)
            totals.add(step, end)
            totals.nfe += step.nfe
            z = step.z
            finite.append(health(z))
            if solver.max_nfe is not None and totals.nfe > solver.max_nfe:
                fail_max_nfe(float(end.detach()), totals.steps, totals.nfe, int(solver.max_nfe))
        totals.save(output, z)
    return totals.solution(health=(_health_of(totals, z, finite, grid),))


def _counts(solver: FixedGrid, t_span: Tensor) -> list[int]:
    """The number of steps in each interval of the times."""
    if solver.step is None:
        return [1] * (len(t_span) - 1)
    counts = [count_steps(b - a, float(solver.step)) for a, b in itertools.pairwise(t_span.tolist())]
    if sum(counts) > _MOST_STEPS:
        raise ConfigError(
            f"step={solver.step:g} divides the times of this solve into {sum(counts):,} steps, and more than "
            f"{_MOST_STEPS:,} would take too long: choose a longer step."
        )
    return counts


def _health_of(
    totals: Totals, z: Tensor, finite: list[Tensor], grid: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> HealthCheck:
    """The check that a solve stayed finite, up to the state ``z`` at its end.

    Args:
        totals: the whole solve.
        z: its last state.
        finite: the health of the state after each step.
        grid: start, length and end of each step.
    """
    # the check outlives the solve, and must not refer to its outputs
    logdet, penalties, steps, evaluations = totals.logdet, totals.penalties, totals.steps, totals.nfe
    # an integral that is not finite once never is again, so one check at the end is enough
    integrals = [*penalties.values()] if logdet is None else [logdet, *penalties.values()]
    if integrals:
        finite[-1] = health(torch.cat([finite[-1].reshape(1), *map(torch.flatten, integrals)]))

    def fail(bad: int) -> NoReturn:
        t = float(grid[bad][0].detach())
        nfe = (bad + 1) * evaluations // steps  # all steps of a grid cost the same
        if bad < steps - 1:
            fail_nonfinite(t, bad, nfe)
        fail_integrals(z, logdet, penalties, t, bad, nfe)

    return HealthCheck(torch.stack(finite), fail)


def _grid(
    t_span: Tensor, counts: Sequence[int], device: torch.device
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor, Tensor]]]:
    """The times of ``t_span`` on ``device``, and the steps between them: start, length and end.

    Starts and ends are on ``device``, lengths where ``t_span`` is. With one step per interval this is bitwise
    torchdyn's grid, in which the length of a step is the time left to the next output.
    """
    times, lengths = [t_span[0]], []
    for k, count in enumerate(counts, start=1):
        start = times[-1]
        for i in range(1, count + 1):
            goal = t_span[k] if i == count else start + (t_span[k] - start) * (i / count)
            # not `goal`, because torchdyn's next step starts at start + length, which may round differently
            lengths.append(goal - times[-1])
            times.append(times[-1] + lengths[-1])
    outputs = list(t_span)
    if t_span.device != device:
        moved = _on_device(torch.cat([t_span, torch.stack(times)]), device)
        outputs, times = moved[: len(t_span)], moved[len(t_span) :]
    return outputs, list(zip(times, lengths, times[1:], strict=False))


def _on_device(times: Tensor, device: torch.device) -> list[Tensor]:
    """The times ``(T,)`` on another device, one by one."""
    known = read(times) if times.device.type == "cpu" else None
    if known is None:
        return list(times.to(device).unbind())
    # fill each time by a separate kernel: a copy from the host would synchronize
    made = {time: torch.full((), time, dtype=times.dtype, device=device) for time in {*known}}
    return [made[time] for time in known]


def _lengths(t_span: Tensor, counts: Sequence[int]) -> list[float]:
    """The length of each step in a fixed grid; of intervals that cannot be read, as if they were equally long."""
    intervals = itertools.pairwise(read(t_span) or range(len(t_span)))
    return [abs(b - a) / n for (a, b), n in zip(intervals, counts, strict=True) for _ in range(n)]


def _draw_stages(method: Method, lengths: Sequence[float]) -> list[Draw | None]:
    """Draw about one in eight of all evaluations in a fixed grid, as a stratified sample.

    Each evaluation has weight ``w_i * dt``. The weights are laid end to end on a line, which is divided into equal
    strata. One point is drawn in each stratum. The evaluation that it falls on counts with the inverse of its
    probability, so that the integral is unbiased.
    """
    stages = method.stages
    if method.draws is None or stages == 1:
        return [None] * len(lengths)
    count = max(1, round(len(lengths) * stages / 8))
    size = sum(lengths) / count  # method.draws sums to one in each step, so the line is as long as the solve
    if max(lengths) > (stages - 2) * size and min(method.draws) > 0:
        # Points could fall on all stages of a step. But the quadrature recognizes a sampled step by a stage without
        # the penalties that need a product, so take one stage in each step instead.
        return [draw_stage(method) for _ in lengths]
    points = (torch.rand(count, dtype=torch.float64) + torch.arange(count)) * size
    draws: list[Draw] = [{} for _ in lengths]
    starts, ends = [0.0, *itertools.accumulate(lengths)], list(itertools.accumulate(method.draws))
    for point in points.tolist():  # first the step in which a point lies, then the stage
        k = min(bisect.bisect_right(starts, point), len(lengths)) - 1
        stage = min(bisect.bisect_right(ends, (point - starts[k]) / lengths[k]), len(ends) - 1)
        draw = draws[k]
        # relative to the step's length; a stage that is drawn twice counts twice
        draw[stage] = draw.get(stage, 0.0) + size / lengths[k]
    return list(draws)
