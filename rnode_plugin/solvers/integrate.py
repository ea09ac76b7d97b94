"""integrate: the one integrator, for fixed grids and adaptive steps, in both directions of time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from ..core.tensors.exporting import on_host
from ..types import BoundDynamics, Solution
from .adaptive import Adaptive
from .health import HealthCheck, check_health, fail_integrals, fail_max_nfe, fail_nonfinite, health
from .host import numbers, read
from .plan import SolvePlan
from .steps.step import StepTaker, step_taker, weight_row
from .steps.step_memory import StepMemory
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
    memory: StepMemory | None = None,
) -> Solution:
    """Integrate from ``t_span[0]`` through all of ``t_span``; differentiable through the steps taken.

    Args:
        dynamics: the augmented system, its noise fixed.
        z0: state ``(B, *event)`` at ``t_span[0]``.
        t_span: times ``(T,)``, increasing or decreasing.
        plan: method, accuracy and gradient.
        generator: draws the stages of a sampled quadrature.
        trace: a list that receives the time and state of every accepted step, the initial one first.
        checks, memory: see :func:`~rnode_plugin.solvers.solve`.

    Raises:
        SolverError: non-finite state, step-size underflow, or the budget of evaluations used up.
    """
    counts = [] if plan.method.adaptive else _substeps(t_span, plan.step)
    host_knows = t_span.device.type == "cpu" and (plan.method.adaptive or not t_span.requires_grad)
    if not host_knows:
        t_span = t_span.to(z0.device)
    keep_inputs_at = (z0, t_span[0].to(z0.device)) if plan.gradient == "checkpointed" else None
    take = step_taker(dynamics, plan.method, tolerance=(plan.atol, plan.rtol), keep_inputs_at=keep_inputs_at)
    if plan.method.adaptive:
        return Adaptive(dynamics, plan, take, z0, t_span, trace, memory).run()
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
    with on_host():
        outputs, grid = _grid(t_span, counts, z.device)
    times, states = ([outputs[0]], [z]) if keep[0] else ([], [])
    logdets: list[Tensor | None] = [None] * len(states)
    if trace is not None:
        trace.append((outputs[0], z))
    steps = iter(grid)
    for k in range(1, len(t_span)):
        for start, dt, t in itertools.islice(steps, counts[k - 1]):
            step = take(z, start, dt, None, _draw_stage(plan, generator))
            totals.add(step)
            totals.nfe += step.nfe
            z = step.z
            if trace is not None:
                trace.append((t, z))
            checks.append(health(z))
            if plan.max_nfe is not None and totals.nfe > plan.max_nfe:
                fail_max_nfe(float(t.detach()), totals.steps, totals.nfe, plan.max_nfe)
        if keep[k]:
            z = _with_its_own_layout(z)
            times.append(outputs[k])
            states.append(z)
            logdets.append(totals.logdet)
    # what is not finite stays so: it is enough to look at the integrals at the end
    checks[-1] = health(z, totals.logdet, *totals.penalties.values())

    def fail(bad: int) -> NoReturn:
        where = (_grid_time(t_span, counts, bad), bad, (bad + 1) * totals.nfe // totals.steps)
        if bad < totals.steps - 1:
            fail_nonfinite(*where)
        fail_integrals(z, totals.logdet, totals.penalties, *where)

    return totals.solution(times, states, logdets), HealthCheck(torch.stack(checks), fail)


def _with_its_own_layout(z: Tensor) -> Tensor:
    """``z``, whose gradient comes in the memory layout of ``z``: the stack of all outputs has another one."""
    if not z.requires_grad or z.is_contiguous():
        return z
    shape, strides = z.shape, z.stride()
    z = z.view_as(z)
    z.register_hook(lambda g: g if g.stride() == strides else g.new_empty_strided(shape, strides).copy_(g))
    return z


class _GridStep(NamedTuple):
    start: Tensor
    dt: Tensor
    end: Tensor


def _grid(
    t_span: Tensor, counts: Sequence[int], device: torch.device
) -> tuple[Tensor | list[Tensor], list[_GridStep]]:
    """The times of ``t_span`` on ``device``, and the steps of a fixed grid between them.

    Starts and ends of the steps are on ``device``, their lengths where ``t_span`` is.

    With one step per interval this is torchdyn's grid to the bit: dt is what is left to the next time.
    """
    times, lengths = [t_span[0]], []
    for k, count in enumerate(counts, start=1):
        start = times[-1]
        for i in range(1, count + 1):
            goal = t_span[k] if i == count else start + (t_span[k] - start) * (i / count)
            lengths.append(goal - times[-1])
            times.append(times[-1] + lengths[-1])
    outputs: Tensor | list[Tensor] = t_span
    if t_span.device != device:
        moved = _on_device(torch.cat([t_span, torch.stack(times)]), device)
        outputs, times = moved[: len(t_span)], moved[len(t_span) :]
    return outputs, [_GridStep(*step) for step in zip(times, lengths, times[1:], strict=False)]


def _on_device(times: Tensor, device: torch.device) -> list[Tensor]:
    """Each of the times ``(T,)`` on another device."""
    known = read(times) if times.device.type == "cpu" else None
    if known is None:
        return list(times.to(device).unbind())
    # a kernel for each: the host would wait for a copy, and a CUDA graph cannot hold one
    made = {time: torch.full((), time, dtype=times.dtype, device=device) for time in {*known}}
    return [made[time] for time in known]


def _substeps(t_span: Tensor, step: float | None) -> list[int]:
    """How many steps each interval of the grid is divided into."""
    if step is None:
        return [1] * (len(t_span) - 1)
    times = numbers(t_span)
    # forgives rounding: from 0.8 to 1.1 there are three steps of 0.1, not four
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
    assert plan.method.weights is not None  # only methods known by name have a sampled quadrature
    weights = weight_row(plan.method.weights, torch.float64, torch.device("cpu"))
    return int(torch.multinomial(weights, 1, generator=generator))
