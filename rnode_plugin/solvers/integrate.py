"""The one integrator: fixed grid or adaptive steps, either way in time, penalties outside the error norm."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ..types import BoundDynamics, Solution
from .adaptive import Adaptive
from .health import HealthCheck, check_health, fail_max_nfe, fail_nonfinite, health
from .plan import SolvePlan
from .step import StepTaker, step_taker, weight_row
from .totals import Totals

__all__ = ["integrate"]


def integrate(
    dynamics: BoundDynamics,
    z0: Tensor,
    t_span: Tensor,
    plan: SolvePlan,
    *,
    generator: torch.Generator | None = None,
    trace: list[tuple[Tensor, Tensor]] | None = None,
    checks: list[HealthCheck] | None = None,
) -> Solution:
    """Integrate from ``t_span[0]`` through all of ``t_span``; differentiable through the steps taken.

    Args:
        dynamics: the augmented system, its noise fixed.
        z0: state ``(B, *event)`` at ``t_span[0]``.
        t_span: times ``(T,)``, increasing or decreasing.
        plan: method, accuracy and gradient.
        generator: draws the stages of a sampled quadrature.
        trace: a list that receives the time and state of every accepted step, the initial one first.
        checks: see :func:`~rnode_plugin.solvers.solve`.

    Raises:
        SolverError: non-finite state, step-size underflow, or the budget of evaluations used up.
    """
    counts = [] if plan.method.adaptive else _substeps(t_span, plan.step)
    t_span = t_span.to(z0.device)
    keep_inputs_at = (z0, t_span[0]) if plan.gradient == "checkpointed" else None
    take = step_taker(dynamics, plan.method, tolerance=(plan.atol, plan.rtol), keep_inputs_at=keep_inputs_at)
    if plan.method.adaptive:
        return Adaptive(dynamics, plan, take, z0, t_span, trace).run()
    solution, check = _fixed(plan, take, z0, t_span, counts, generator, trace)
    if checks is None:
        check_health([check])
    else:
        checks.append(check)
    return solution


def _fixed(
    plan: SolvePlan,
    take: StepTaker,
    z: Tensor,
    t_span: Tensor,
    counts: Sequence[int],
    generator: torch.Generator | None,
    trace: list[tuple[Tensor, Tensor]] | None,
) -> tuple[Solution, HealthCheck]:
    keep = [True] * len(t_span) if plan.keep is None else list(plan.keep)
    totals, checks = Totals(), []
    times, states = ([t_span[0]], [z]) if keep[0] else ([], [])
    logdets: list[Tensor | None] = [None] * len(states)
    t = t_span[0]
    if trace is not None:
        trace.append((t, z))
    for k in range(1, len(t_span)):
        count, start = counts[k - 1], t
        for i in range(1, count + 1):
            # with one step an interval this is torchdyn's grid to the bit: dt is what is left to the next time
            goal = t_span[k] if i == count else start + (t_span[k] - start) * (i / count)
            dt = goal - t
            step = take(z, t, dt, None, _draw_stage(plan, generator))
            totals.add(step)
            totals.nfe += step.nfe
            z, t = step.z, t + dt
            if trace is not None:
                trace.append((t, z))
            checks.append(health(z))
            if plan.max_nfe is not None and totals.nfe > plan.max_nfe:
                fail_max_nfe(float(t.detach()), totals.steps, totals.nfe, plan.max_nfe)
        if keep[k]:
            times.append(t_span[k])
            states.append(z)
            logdets.append(totals.logdet)
    # what is not finite stays so, and of the integrals the end will do
    checks[-1] = health(z, totals.logdet, *totals.penalties.values())

    def fail(bad: int) -> NoReturn:
        fail_nonfinite(_grid_time(t_span, counts, bad), bad, (bad + 1) * totals.nfe // totals.steps)

    return totals.solution(times, states, logdets), HealthCheck(torch.isfinite(torch.stack(checks)), fail)


def _substeps(t_span: Tensor, step: float | None) -> list[int]:
    """How many steps each interval of the grid is divided into."""
    if step is None:
        return [1] * (len(t_span) - 1)
    times = t_span.detach().tolist()
    # forgiving rounding: 1 / 0.1 is ten steps, not eleven
    return [max(1, math.ceil(abs(b - a) / step - 1e-6)) for a, b in itertools.pairwise(times)]


def _grid_time(t_span: Tensor, counts: Sequence[int], index: int) -> float:
    """The time at which step ``index`` of a fixed grid began."""
    k = 0
    while index >= counts[k]:
        index -= counts[k]
        k += 1
    t0, t1 = t_span[k : k + 2].detach().tolist()
    return t0 + (t1 - t0) * (index / counts[k])


def _draw_stage(plan: SolvePlan, generator: torch.Generator | None) -> int | None:
    """The stage that stands for the step in a sampled quadrature, drawn with its weight as probability."""
    if plan.trace_quadrature != "sampled":
        return None
    assert plan.method.weights is not None  # a sampled quadrature is for the methods known by name
    weights = weight_row(plan.method.weights, torch.float64, torch.device("cpu"))
    return int(torch.multinomial(weights, 1, generator=generator))
