"""Adaptive: a solve whose steps are as long as their error allows, bitwise by torchdyn's rules.

The first step, the controller and the stop at every output time are torchdyn's, so that a torchdyn model keeps its
numbers. NaN and a vanishing step end in an error.

Times and step sizes stay on the CPU. For each step that is tried the host reads one number from the device, the
size of the error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from ..core.dynamics import BoundDynamics, Rates
from ..core.health import health
from ..core.modes import read
from ..errors import ConfigError, SolverError
from .checks import (
    ADAPTIVE_METHODS,
    DEFAULT_MAX_NFE,
    ERROR_NORMS,
    FIXED_METHODS,
    Tolerance,
    adaptive_text,
    check_name,
    check_positive,
    check_tolerances,
)
from .solution import Solution
from .solver import Solver
from .step import (
    Problem,
    Step,
    StepTaker,
    Totals,
    draw_stage,
    fail_integrals,
    fail_max_nfe,
    fail_nonfinite,
    stepper,
)
from .tableaus import Method, get_method

_LEAST = 1e-37  # allowed error for an entry whose size is 0 if atol is 0 too, to avoid 0 / 0


@dataclass(frozen=True)
class Adaptive(Solver):
    """Takes steps as long as the errors in the state and in the log-determinant allow.

    Args:
        method: ``dopri5`` or ``tsit5``, or a :class:`~rnode_plugin.solvers.Method` with an error estimate.
        atol: absolute tolerance. One of ``atol`` and ``rtol`` may be 0.
        rtol: relative tolerance.
        first_step: first trial step; None estimates one with one more evaluation.
        error_norm: the norm that is compared with the tolerances. ``rms`` is the root mean square of the error over
            all entries of the batch, so that one of B samples may have an error of sqrt(B) times the tolerance.
            ``worst`` is the largest root mean square of one sample (dimension 0 holds the samples). With it each
            sample meets the tolerance in each step, whatever the batch, at the cost of more steps. The backward
            pass of a continuous adjoint takes ``rms``.
        max_nfe, gradient, quadrature: see :class:`FixedGrid`.

    Raises:
        ConfigError: for an unknown name, a number out of range, and a method without an error estimate.

    Example:
        >>> Adaptive("dopri5", atol=1e-6, rtol=1e-6).adaptive
        True
    """

    method: str | Method = "dopri5"
    _: KW_ONLY
    atol: Tolerance = 1e-5
    rtol: Tolerance = 1e-5
    first_step: float | None = None
    error_norm: str = "rms"
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not get_method(self.method).adaptive:
            raise ConfigError(
                f"{self.name} has no error estimate to choose steps by: use FixedGrid({self.name!r}, step=...), or "
                f"one of {', '.join(ADAPTIVE_METHODS)}."
            )
        check_tolerances(self.atol, self.rtol)
        check_positive(self.first_step, "first_step")
        check_name(self.error_norm, ERROR_NORMS, "error norm")

    @property
    def text(self) -> str:
        return adaptive_text(self.name, self.atol, self.rtol, self.error_norm)

    @property
    def tolerances(self) -> tuple[Tolerance, Tolerance]:
        return self.atol, self.rtol

    def of_adjoint(self) -> Adaptive:
        return replace(super().of_adjoint(), error_norm="rms")

    def march(self, problem: Problem, *, take: StepTaker | None = None) -> Solution:
        dynamics, z, t_span, save_steps, _, first_step = problem
        method = get_method(self.method)
        # an interpolant gives states alone, so a density stops at each output
        interpolate = None if dynamics.divergence else method.interpolate
        if z.dtype.to_real().itemsize < 4:
            raise ConfigError(
                f"{method.name} needs a state of float32 or float64, not {z.dtype}, which cannot show the errors "
                "that it compares: use autocast, which leaves the state as it is, or a fixed grid "
                f"({', '.join(FIXED_METHODS)})."
            )
        if dynamics.divergence and (getattr(self.atol, "ndim", 0) or getattr(self.rtol, "ndim", 0)):
            raise ConfigError(
                "atol and rtol of a density must be numbers, which bound the error of the log-determinant too, and "
                "not tensors with one tolerance for each entry of the state."
            )
        # Times stay on the CPU, so that comparing them does not wait for the device; t_span.cpu() keeps its graph.
        # In half precision the end of a step would be rounded far off the place that the state has reached.
        device, span = z.device, t_span.cpu()
        span = span.float() if span.dtype.itemsize < 4 else span
        take = stepper(dynamics, method, (self.atol, self.rtol)) if take is None else take
        budget = int(self.max_nfe or DEFAULT_MAX_NFE)
        sign = 1.0 if bool(span[-1] >= span[0]) else -1.0

        def before(a: Tensor, b: Tensor) -> bool:
            return bool((b - a) * sign > 0)

        t, end, upcoming = span[:1], span[-1], 1  # `upcoming` is the index of the next output time
        safe = math.inf  # smallest, over all steps tried, of the length whose error just meets the tolerances
        sampled = self.quadrature == "sampled"
        draw = draw_stage(method) if sampled else None
        rates: Rates | None = dynamics.evaluate(span[0].to(device), z, products=not draw)
        totals = Totals()
        totals.nfe += 1
        if first_step is not None:
            # With the margin of every next step, since the field has changed a little: without it, training on two
            # moons at 1e-3 took 37 to 39 evaluations where guesses took 35 to 36 and this takes 32 to 33. A step
            # that reaches the end is not made shorter
            whole = float((span[-1] - span[0]).abs())
            begin = whole if first_step >= whole else method.safety * first_step
            dt = torch.full_like(span[0].detach(), sign * begin)
        else:
            dt = _first_step(dynamics, z, rates.dz, span, sign, self, totals)
        times, states = [span[0].to(device)], [z]
        logdets: list[Tensor] = []
        passed = [(t.to(device).reshape(()), z)]
        while before(t, end):
            if method.fit is not None:
                dt = method.fit(dt, span[upcoming if interpolate is None else -1] - t, sign)
            proposed = dt
            # cut the step off at the end of the solve and, without an interpolant, at the next output
            uncut = None
            if before(end, t + dt):
                dt = end - t
            if interpolate is None and before(span[upcoming], t + dt):
                dt, uncut = span[upcoming] - t, dt.detach()
            if bool(t + dt == t):
                _fail_underflow(float(t.detach()), totals.steps, totals.nfe, abs(float(dt.detach())))
            # checked before the step; the first stage of dopri5 and tsit5 is known from the step before
            if totals.nfe + method.stages - 1 > budget:
                fail_max_nfe(float(t.detach()), totals.steps, totals.nfe, budget)
            step = take(z, t.to(device), dt.to(device), rates, draw)
            totals.nfe += step.nfe
            ratio = _error_ratio(step, z, totals.logdet, self) if z.numel() else span.new_zeros(())
            if not math.isfinite(float(ratio)):
                fail_nonfinite(float(t.detach()), totals.steps, totals.nfe)
            if bool(ratio <= 1):
                reached = t + dt
                if interpolate is not None:  # outputs strictly inside the step, read off without a stop
                    first, last = upcoming, upcoming
                    while last < len(span) - 1 and before(span[last], reached):
                        last += 1
                    inside = [x.to(device) for x in span[first:last]]
                    times += inside
                    states += interpolate(step, z, rates, t.to(device), dt.to(device), inside)
                    upcoming = last
                totals.add(step)
                # not `==`, because rounding may carry a step that was cut off at this time just past it
                if not before(reached, span[upcoming]):
                    times.append(reached.to(device).reshape(()))
                    states.append(step.z)
                    if totals.logdet is not None:
                        logdets.append(totals.logdet)
                    upcoming = min(upcoming + 1, len(span) - 1)
                t, z, rates = reached, step.z, step.last
                if sampled:
                    draw = draw_stage(method)  # one draw for each accepted step, which a rejected trial keeps
                if save_steps:
                    passed.append((t.to(device).reshape(()), z))
            else:
                totals.rejected += 1
            length = dt.detach()
            # the error of a sliver, which was cut off, is mostly rounding, from which no longer step follows
            sliver = safe < math.inf and bool((ratio <= 1) & (length.abs() < 0.1 * proposed.detach().abs()))
            if ratio > 0 and not sliver:  # the error grows with the order-th power of a step's length
                safe = min(safe, abs(float(length)) * float(ratio) ** (-1 / method.order))
            if uncut is not None:  # after a stop, torchdyn continues with the part that was cut off
                rest = uncut - length
                length = rest if bool(t + rest != t) else uncut
            dt = next_length(method, length, ratio)
        # penalties are not in the error that is read at each step, so check them once at the end
        if totals.penalties and not read(torch.isfinite(health(*totals.penalties.values()))):
            fail_integrals(z, None, totals.penalties, float(t.detach()), totals.steps, totals.nfe)
        return totals.solution(times, states, logdets, longest_safe_step=safe, passed=passed if save_steps else ())


# errors and the sizes of steps ----------------------------------------------------------------------------------


def rms_norm(x: Tensor, dim: int | None = None) -> Tensor:
    """The root mean square over ``dim``, or over all entries (Hairer, Norsett and Wanner, 1993, eq. II.4.11)."""
    return (x.abs() if x.is_complex() else x).pow(2).mean(dim).sqrt()


@torch.no_grad()
def _error_ratio(step: Step, z: Tensor, logdet: Tensor | None, solver: Adaptive) -> Tensor:
    """The error of a step from ``z``, divided by what the tolerances allow, in the solver's ``error_norm``.

    It is a root mean square over the entries of state and log-determinant, in the whole batch or in the worst
    sample. The result is a scalar on the CPU, the only number that a step reads from the device.
    """
    assert step.error is not None
    size = torch.max(z.abs(), step.z.abs())
    scaled = step.error / (solver.atol + solver.rtol * size).clamp(min=_LEAST)
    by_sample = solver.error_norm == "worst"
    if by_sample:
        scaled = scaled.reshape(len(scaled), -1)
    if step.dlogdet_error is not None and step.dlogdet is not None:
        size = step.dlogdet.abs()
        if logdet is not None:
            size = torch.max(logdet.abs(), (logdet + step.dlogdet).abs())
        of_logdet = step.dlogdet_error / (solver.atol + solver.rtol * size).clamp(min=_LEAST)
        # the log-determinant is one more entry of each sample's state, as in torchdyn's CNF
        columns = [scaled, of_logdet.unsqueeze(1)] if by_sample else [scaled.flatten(), of_logdet.flatten()]
        scaled = torch.cat(columns, -1)
    norm = rms_norm(scaled, 1).amax() if by_sample else rms_norm(scaled)
    return _on_host(get_method(solver.method), norm)[0]


@torch.no_grad()
def next_length(method: Method, dt: Tensor, error_ratio: Tensor) -> Tensor:
    """The length of the step after ``dt``, whose error was ``error_ratio`` times what the tolerances allow."""
    factors = [[method.safety], [method.min_factor], [method.max_factor]]
    safety, least, most = torch.tensor(factors, dtype=dt.dtype)
    if error_ratio == 0:
        return dt * most
    if error_ratio < 1:  # the safety factor alone must not shorten the step after an accepted one
        least = torch.ones_like(dt)
    exponent = torch.tensor(method.order, dtype=dt.dtype).reciprocal()
    return dt * torch.min(most, torch.max(safety / error_ratio**exponent, least))


def _first_step(
    dynamics: BoundDynamics,
    z: Tensor,
    velocity: Tensor,
    t_span: Tensor,
    sign: float,
    solver: Adaptive,
    totals: Totals,
) -> Tensor:
    """The first step to try, without a graph: the solver's ``first_step``, or a guess, whose evaluations count.

    The evaluations run in the grad mode of the solve, since a field may differentiate inside.
    """
    z, velocity, t_span = z.detach(), velocity.detach(), t_span.detach()
    start = t_span[0]
    if solver.first_step is not None:
        return torch.full_like(start, sign * solver.first_step)
    if z.numel() == 0:
        return t_span[-1] - start
    # Backward in time torchdyn evaluates the field itself instead of its mirror image -f(-t, z), which would be
    # right, so the first guess does the same to keep torchdyn's numbers. If it is useless, the mirror image is
    # used.
    for mirrored in (False, True) if sign < 0 else (False,):
        guess = guess_first_step(dynamics, sign * velocity, z, sign * start, solver, mirrored=mirrored)
        totals.nfe += 1
        if 0 < float(guess) < math.inf:  # an infinite velocity makes it 0
            return sign * guess
    fail_nonfinite(float(start), 0, totals.nfe)


def guess_first_step(
    dynamics: BoundDynamics,
    velocity: Tensor,
    z: Tensor,
    t: Tensor,
    solver: Adaptive,
    *,
    mirrored: bool = False,
) -> Tensor:
    """A first step whose error should be about as large as the solver's tolerances, a scalar on the CPU.

    This is the rule of Hairer, Norsett and Wanner (1993, section II.4). A small Euler step forward in time, with
    one evaluation of the field ``f``, shows how fast the ``velocity``, ``f(t, z)``, changes. With ``mirrored`` the
    field is the mirror image ``-f(-t, z)`` of the dynamics.
    """
    method, scale = get_method(solver.method), solver.atol + torch.abs(z) * solver.rtol
    scale = torch.where(scale == 0, math.inf, scale)  # an entry of size 0 does not count without atol
    size, speed = _on_host(method, rms_norm(z / scale), rms_norm(velocity / scale))
    t = t.cpu()
    tiny = torch.tensor(1e-6, dtype=t.dtype)
    probe = tiny if size < 1e-5 or speed < 1e-5 else 0.01 * size / speed
    later = t + probe
    there = dynamics.evaluate((-later if mirrored else later).to(z.device), z + probe * velocity, products=False).dz
    there = (-there if mirrored else there).detach()
    (change,) = _on_host(method, rms_norm((there - velocity) / scale) / probe)
    if speed <= 1e-15 and change <= 1e-15:  # a field at rest gives no scale
        step = torch.max(tiny, probe * 1e-3)
    else:
        step = (0.01 / max(speed, change)) ** (1.0 / float(method.order + 1))
    return torch.min(100 * probe, step).to(t)


def _on_host(method: Method, *norms: Tensor) -> Sequence[Tensor]:
    """Copy scalars to the CPU with a single read from the device."""
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
