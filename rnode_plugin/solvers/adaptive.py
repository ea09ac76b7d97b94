"""The march of an :class:`~rnode_plugin.Adaptive` solver, whose steps are as long as their errors allow.

The first step, the controller and the stop at every output time are torchdyn's, so that a torchdyn model keeps its
numbers. NaN and a vanishing step end in an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.health import health
from ..core.modes import on_device, read
from ..core.system import Derivative, RightHandSide
from ..errors import ConfigError, SolverError
from .controller import StepController
from .solution import Solution
from .step import (
    Problem,
    Step,
    Totals,
    draw_stage,
    fail_integrals,
    fail_max_nfe,
    fail_nonfinite,
)
from .tableaus import FIXED_METHODS, Method, get_method

if TYPE_CHECKING:
    from .solver import Adaptive

DEFAULT_MAX_NFE = 100_000
"""Most evaluations of a solve by default, so that a solve of a stiff field ends."""


def march(solver: Adaptive, problem: Problem, *, take: Callable[..., Step] | None = None) -> Solution:
    """Take all steps of a solve, see :meth:`Solver.march <rnode_plugin.Solver.march>`."""
    rhs, z, t_span, safe_step = problem.rhs, problem.z, problem.t_span, problem.safe_step
    _check_state(solver, rhs, z)
    # Times stay on the CPU, so that comparing them does not wait for the device; t_span.cpu() keeps its graph.
    # In half precision the end of a step would be rounded far off the place that the state has reached.
    device, span = z.device, t_span.cpu()
    span = span.float() if span.dtype.itemsize < 4 else span
    method, sampled = get_method(solver.method), solver.quadrature == "sampled"
    # an interpolant gives states alone, so a density stops at each output
    interpolate = None if rhs.divergence else method.interpolate
    take = problem.stepper(method, solver.tolerances) if take is None else take
    budget = int(solver.max_nfe or DEFAULT_MAX_NFE)
    sign = 1.0 if bool(span[-1] >= span[0]) else -1.0
    control = StepController(method, solver.atol, solver.rtol, sign)
    t, end, upcoming = span[:1], span[-1], 1  # `upcoming` is the index of the next output time
    draw = draw_stage(method) if sampled else None
    start = on_device(span[0], device)
    begun = rhs(start, z, products=not draw)
    first: Derivative | None = begun
    totals = Totals([start], [z], knots=[(start, z)] if problem.save_steps else None, nfe=1)
    known = solver.first_step if safe_step is None else control.warm_start(safe_step, span)
    dt, totals.nfe = control.first_length(rhs, z, begun.dz, span, totals.nfe, known=known)
    safe = math.inf  # the longest step that all trials would have accepted
    while control.before(t, end):
        trial = control.trial(dt, t, end, span[upcoming] if interpolate is None else None)
        _check_trial(t, trial.dt, totals, method, budget)
        begin, length = _both_on(device, t, trial.dt)
        step = take(z, begin, length, first, draw)
        totals.nfe += step.nfe
        ratio = control.error_ratio(step, z, totals.logdet)
        if not math.isfinite(float(ratio)):
            if safe_step is None or totals.steps + totals.rejected > 0:
                fail_nonfinite(float(t.detach()), totals.steps, totals.nfe)
            # from another state this step was safe, but here a solve that begins without it may succeed
            totals.rejected, known = 1, solver.first_step
            dt, totals.nfe = control.first_length(rhs, z, begun.dz, span, totals.nfe, known=known)
            continue
        if bool(ratio <= 1):
            reached = t + trial.dt
            if interpolate is not None:  # outputs strictly inside the step, read off without a stop
                passed = upcoming
                while upcoming < len(span) - 1 and control.before(span[upcoming], reached):
                    upcoming += 1
                inside = [on_device(x, device) for x in span[passed:upcoming]]
                states = interpolate(step, z, first, begin, length, inside)
                for time, state in zip(inside, states, strict=True):
                    totals.save(time, state)
            totals.add(step, reached.reshape(()))
            # not `==`, because by rounding a step that was cut off at this time may end just after it
            if not control.before(reached, span[upcoming]):
                totals.save(reached.reshape(()), step.z)
                upcoming = min(upcoming + 1, len(span) - 1)
            t, z, first = reached, step.z, step.last
            # one draw for each accepted step, which a rejected trial keeps
            draw = draw_stage(method) if sampled else None
        else:
            totals.rejected += 1
        safe = control.safe_length(trial, ratio, safe)
        dt = control.next_length(trial, t, ratio)
    # penalties are not in the error that is read at each step, so check them once at the end
    if totals.penalties and not read(torch.isfinite(health(*totals.penalties.values()))):
        fail_integrals(z, None, totals.penalties, float(t.detach()), totals.steps, totals.nfe)
    return totals.solution(longest_safe_step=safe if z.numel() > 0 else None)  # no sample shows what is safe


def _both_on(device: torch.device, t: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Start and length of a step, with one copy to the device if they have a graph, and none otherwise."""
    if device == t.device or not (t.requires_grad or dt.requires_grad):
        return on_device(t, device), on_device(dt, device)
    both = torch.cat([t, dt.reshape(1)]).to(device)
    return both[:1], both[1:].reshape(dt.shape)


def _check_state(solver: Adaptive, rhs: RightHandSide, z: Tensor) -> None:
    """Refuse states and tolerances whose errors cannot be compared (ConfigError)."""
    if z.dtype.to_real().itemsize < 4:
        raise ConfigError(
            f"{solver.name} needs a state of float32 or float64, not {z.dtype}, which cannot show the errors "
            "that it compares: use autocast, which leaves the state as it is, or a fixed grid "
            f"({', '.join(FIXED_METHODS)})."
        )
    if rhs.divergence and (getattr(solver.atol, "ndim", 0) or getattr(solver.rtol, "ndim", 0)):
        raise ConfigError(
            "atol and rtol of a density must be numbers, which bound the error of the log-determinant too, and "
            "not tensors with one tolerance for each entry of the state."
        )


def _check_trial(t: Tensor, dt: Tensor, totals: Totals, method: Method, budget: int) -> None:
    """Refuse a step from ``t`` that is too short, or that may exceed the budget of evaluations (SolverError)."""
    if bool(t + dt == t):
        raise SolverError(
            "underflow",
            f"underflow in dt: the step size fell to {abs(float(dt.detach())):.3g}",
            "The dynamics have become too stiff for the tolerances: raise lambda of 'jacfrob' or 'kinetic', "
            "loosen atol and rtol, use float64, or train with a fixed grid.",
            t=float(t.detach()), step=totals.steps, nfe=totals.nfe,
        )  # fmt: skip
    # the first stage of dopri5 and tsit5 is known from the step before
    if totals.nfe + method.stages - 1 > budget:
        fail_max_nfe(float(t.detach()), totals.steps, totals.nfe, budget)
