"""Adaptive: a solve whose steps are as long as their error allows, by torchdyn's rules to the bit.

First step, controller and a stop at every output time are torchdyn's, so that a torchdyn model keeps its numbers.
NaN and a vanishing step end in an error.

Times and step sizes stay on the CPU. For each step that is tried the host reads one number from the device, its
error's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..core.derivatives import RATES, VELOCITY
from ..core.dynamics import BoundDynamics, Rates
from ..errors import ConfigError, SolverError
from .checkpoint import checkpointed
from .config import DEFAULT_MAX_NFE, FIXED_METHODS, Solver, count_steps
from .fixed import (
    Step,
    Totals,
    Trace,
    draw_stage,
    fail_integrals,
    fail_max_nfe,
    fail_nonfinite,
    health,
    read,
    stepper,
)
from .solution import Solution
from .tableaus import Method

_LEAST = 1e-37  # allowed error of an entry whose size is 0, if atol is 0 too


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


def solve_adaptive(
    dynamics: BoundDynamics,
    z: Tensor,
    t_span: Tensor,
    solver: Solver,
    method: Method,
    *,
    trace: Trace | None = None,
    memory: StepMemory | None = None,
) -> Solution:
    """Solve with steps that the errors of the state and of the log-determinant decide on.

    Arguments and errors are those of :func:`~rnode_plugin.solvers.solve`; a list ``trace`` receives the time and
    the state of every accepted step. A state in half precision is refused.
    """
    if z.dtype.to_real().itemsize < 4:
        raise ConfigError(
            f"{method.name} needs a state of float32 or float64, not {z.dtype}, which cannot show the errors that "
            "it compares: use autocast, which leaves the state as it is, or a fixed grid "
            f"({', '.join(FIXED_METHODS)})."
        )
    device, span = z.device, t_span.cpu()
    take = stepper(dynamics, method, solver)
    if solver.gradient == "checkpointed":
        take = checkpointed(take, dynamics, z, span[0].to(device))
    budget = int(solver.max_nfe or DEFAULT_MAX_NFE)
    every_step = method.every_step and solver.gradient == "interpolated_adjoint"
    sign = 1.0 if bool(span[-1] >= span[0]) else -1.0

    def before(a: Tensor, b: Tensor) -> bool:
        return bool((b - a) * sign > 0)

    t, end, upcoming = span[:1], span[-1], 1  # upcoming of the output times
    sampled = solver.quadrature == "sampled"
    draw = draw_stage(method) if sampled else None
    rates: Rates | None = dynamics.evaluate(span[0].to(device), z, VELOCITY if draw else RATES)
    totals = Totals()
    totals.nfe += 1
    dt = _first_step(dynamics, z, rates.dz, span, sign, solver, method, memory, totals)
    if method.even_steps:
        dt = _evenly(dt, span[-1 if method.interpolator is not None else upcoming] - t, sign)
    times, states = [span[0].to(device)], [z]
    logdets: list[Tensor | None] = [None]
    if trace is not None:
        trace.append((t.to(device), z))
    while before(t, end):
        # the chosen step, cut off at the end and, if the solve stops there, at the next output
        uncut = None
        if before(end, t + dt):
            dt = end - t
        if method.interpolator is None and before(span[upcoming], t + dt):
            dt, uncut = span[upcoming] - t, dt.detach()
        if bool(t + dt == t):
            _fail_underflow(float(t.detach()), totals.steps, totals.nfe, abs(float(dt.detach())))
        if totals.nfe + method.stages - 1 > budget:
            fail_max_nfe(float(t.detach()), totals.steps, totals.nfe, budget)
        step = take(z, t.to(device), dt.to(device), rates, draw)
        totals.nfe += step.nfe
        ratio = _error_ratio(step, z, totals.logdet, solver, method) if z.numel() else span.new_zeros(())
        if not math.isfinite(float(ratio)):
            fail_nonfinite(float(t.detach()), totals.steps, totals.nfe)
        if bool(ratio <= 1):
            reached = t + dt
            if method.interpolator is not None:
                first, last = upcoming, upcoming
                while last < len(span) - 1 and before(span[last], reached):
                    last += 1
                inside = [x.to(device) for x in span[first:last]]
                times += inside
                states += _interpolate(method.interpolator, step, z, rates, t.to(device), dt.to(device), inside)
                logdets += [None] * len(inside)
                upcoming = last
            totals.add(step)
            # not equality: rounding may have carried a step that was cut off at this time just past it
            arrived = not before(reached, span[upcoming])
            if arrived or every_step:
                times.append(reached.to(device).reshape(()))
                states.append(step.z)
                logdets.append(totals.logdet)
            if arrived:
                upcoming = min(upcoming + 1, len(span) - 1)
            t, z, rates = reached, step.z, step.last
            if sampled:
                draw = draw_stage(method)  # for a step until it is accepted
            if trace is not None:
                trace.append((t.to(device), z))
        else:
            totals.rejected += 1
        length = dt.detach()
        if memory is not None:
            memory.note(abs(float(length)), float(ratio), method.order)
        if uncut is not None:
            rest = uncut - length
            length = rest if bool(t + rest != t) else uncut
        dt = next_step(method, length, ratio)
        if method.even_steps:
            dt = _evenly(dt, span[-1 if method.interpolator is not None else upcoming] - t, sign)
    if totals.penalties and not math.isfinite(read(health(*totals.penalties.values()))):
        fail_integrals(z, None, totals.penalties, float(t.detach()), totals.steps, totals.nfe)
    if memory is not None:
        memory.keep()
    return totals.solution(times, states, logdets)


def _interpolate(
    interpolator: Any, step: Step, z: Tensor, first: Rates | None, t: Tensor, dt: Tensor, times: Sequence[Tensor]
) -> list[Tensor]:
    """States at times inside an accepted step from ``(t, z)``, by torchdyn's fourth-order interpolant."""
    if not times:
        return []
    assert first is not None
    assert step.last is not None
    assert step.stages is not None
    middle = z + dt * sum(w * k for w, k in zip(interpolator.bmid, step.stages, strict=True))
    coefficients = interpolator.fit(dt, first.dz, step.last.dz, z, step.z, middle)
    return [interpolator.evaluate(coefficients, t, t + dt, time) for time in times]


# errors and the sizes of steps ----------------------------------------------------------------------------------


def rms_norm(x: Tensor) -> Tensor:
    """The root of the mean square of all entries (Hairer, Norsett and Wanner, 1993, eq. II.4.11)."""
    return (x.abs() if x.is_complex() else x).pow(2).mean().sqrt()


@torch.no_grad()
def _error_ratio(step: Step, z: Tensor, logdet: Tensor | None, solver: Solver, method: Method) -> Tensor:
    """The error of a step from ``z`` over what the tolerances allow, over all entries of state and log-determinant.

    A scalar on the CPU, the one number that a step reads from the device.
    """
    assert step.error is not None
    size = torch.max(z.abs(), step.z.abs())
    scaled = step.error / (solver.atol + solver.rtol * size).clamp(min=_LEAST)
    if step.dlogdet_error is not None and step.dlogdet is not None:
        size = step.dlogdet.abs()
        if logdet is not None:
            size = torch.max(logdet.abs(), (logdet + step.dlogdet).abs())
        of_logdet = step.dlogdet_error / (solver.atol + solver.rtol * size).clamp(min=_LEAST)
        scaled = torch.cat([scaled.flatten(), of_logdet.flatten()])
    return _on_host(method, rms_norm(scaled))[0]


@torch.no_grad()
def next_step(method: Method, dt: Tensor, error_ratio: Tensor) -> Tensor:
    """The step after ``dt``, whose error was ``error_ratio`` times what the tolerances allow."""
    factors = [[method.safety], [method.min_factor], [method.max_factor]]
    safety, least, most = torch.tensor(factors, dtype=dt.dtype)
    if error_ratio == 0:
        return dt * most
    if error_ratio < 1:  # an accepted step is not followed by a smaller one
        least = torch.ones_like(dt)
    exponent = torch.tensor(method.order, dtype=dt.dtype).reciprocal()
    return dt * torch.min(most, torch.max(safety / error_ratio**exponent, least))


@torch.no_grad()
def _evenly(dt: Tensor, rest: Tensor, sign: float) -> Tensor:
    """A step no longer than ``dt`` that divides ``rest``, what is left up to the next stop, evenly."""
    rest = rest.detach()
    if not bool(rest):
        return dt
    # the last step is cut off at its end, by which a gradient for the time finds its way
    count = count_steps(float(rest / dt), 1.0)
    return rest / count if count > 1 else torch.maximum(dt * sign, 2 * rest * sign) * sign


@torch.no_grad()
def _first_step(
    dynamics: BoundDynamics,
    z: Tensor,
    velocity: Tensor,
    t_span: Tensor,
    sign: float,
    solver: Solver,
    method: Method,
    memory: StepMemory | None,
    totals: Totals,
) -> Tensor:
    """The first step to try: what the solver or the memory knows, or a guess, whose evaluations are counted."""
    z, velocity, t_span = z.detach(), velocity.detach(), t_span.detach()
    start, known = t_span[0], solver.first_step
    remembered = None if memory is None else memory.begin()
    if remembered is not None:
        known = min(remembered, float((t_span[-1] - start).abs()))
    if known is not None:
        return torch.full_like(start, sign * known)
    if z.numel() == 0:
        return t_span[-1] - start
    options: dict[str, Any] = {"method": method, "atol": solver.atol, "rtol": solver.rtol}

    # Backward in time torchdyn evaluates the field itself, not its mirror image, and the same guess gives the same
    # numbers. A guess of no use is made again with the mirror image.
    def field(t: Tensor, z: Tensor) -> Tensor:
        totals.nfe += 1
        return dynamics.evaluate(t.to(z.device), z, VELOCITY).dz

    guess = guess_first_step(field, sign * velocity, z, sign * start, **options)
    if sign < 0 and not (0 < float(guess) < math.inf):
        guess = guess_first_step(lambda t, z: -field(-t, z), sign * velocity, z, sign * start, **options)
    if not math.isfinite(float(guess)):
        fail_nonfinite(float(start), 0, totals.nfe)
    return sign * guess


def guess_first_step(
    f: Callable[[Tensor, Tensor], Tensor],
    velocity: Tensor,
    z: Tensor,
    t: Tensor,
    *,
    method: Method,
    atol: Any,
    rtol: Any,
) -> Tensor:
    """A first step whose error should be about as large as the tolerances, a scalar on the CPU.

    The rule of Hairer, Norsett and Wanner (1993, section II.4): a small Euler step, for one evaluation of the field
    ``f``, forward in time, shows how fast the ``velocity``, ``f(t, z)``, changes.
    """
    scale = atol + torch.abs(z) * rtol
    scale = torch.where(scale == 0, math.inf, scale)  # an entry of size 0 does not count without atol
    size, speed = _on_host(method, rms_norm(z / scale), rms_norm(velocity / scale))
    t = t.cpu()
    tiny = torch.tensor(1e-6, dtype=t.dtype)
    probe = tiny if size < 1e-5 or speed < 1e-5 else 0.01 * size / speed
    (change,) = _on_host(method, rms_norm((f(t + probe, z + probe * velocity) - velocity) / scale) / probe)
    if speed <= 1e-15 and change <= 1e-15:
        step = torch.max(tiny, probe * 1e-3)
    else:
        step = (0.01 / max(speed, change)) ** (1.0 / float(method.order + 1))
    return torch.min(100 * probe, step).to(t)


def _on_host(method: Method, *norms: Tensor) -> Sequence[Tensor]:
    """Scalars as scalars on the CPU, by one read from the device."""
    together = torch.stack(norms)
    values = read(together)
    if values is None:
        raise ConfigError(
            f"{method.name} chooses its steps by the size of their errors, which cannot be read inside "
            f"torch.func.vmap or on the device meta: use a fixed grid ({', '.join(FIXED_METHODS)}) there."
        )
    return torch.tensor(values, dtype=together.dtype).unbind()


def _fail_underflow(t: float, step: int, nfe: int, dt: float) -> NoReturn:
    raise SolverError(
        "underflow",
        f"underflow in dt: the step size fell to {dt:.3g}",
        "The dynamics have become too stiff for the tolerances: raise lambda of 'jacfrob' or 'kinetic', "
        "loosen atol and rtol, use float64, or train with a fixed grid.",
        t=t, step=step, nfe=nfe,
    )  # fmt: skip
