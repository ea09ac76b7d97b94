"""Adaptive: a solve whose steps are as long as their error allows, bitwise by torchdyn's rules.

The first step, the controller and the stop at every output time are torchdyn's, so that a torchdyn model keeps its
numbers. NaN and a vanishing step end in an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from typing import ClassVar

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
from .controller import StepController
from .solution import Solution
from .solver import Solver
from .step import (
    Problem,
    Step,
    Stepper,
    Totals,
    draw_stage,
    fail_integrals,
    fail_max_nfe,
    fail_nonfinite,
)
from .tableaus import Method, get_method


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

    def march(self, problem: Problem, *, take: Callable[..., Step] | None = None) -> Solution:
        dynamics, z, t_span, save_steps, safe_step, *_ = problem
        self._check_state(dynamics, z)
        # Times stay on the CPU, so that comparing them does not wait for the device; t_span.cpu() keeps its graph.
        # In half precision the end of a step would be rounded far off the place that the state has reached.
        device, span = z.device, t_span.cpu()
        span = span.float() if span.dtype.itemsize < 4 else span
        method, sampled = get_method(self.method), self.quadrature == "sampled"
        # an interpolant gives states alone, so a density stops at each output
        interpolate = None if dynamics.divergence else method.interpolate
        take = Stepper(dynamics, method, self.tolerances) if take is None else take
        budget = int(self.max_nfe or DEFAULT_MAX_NFE)
        sign = 1.0 if bool(span[-1] >= span[0]) else -1.0
        control = StepController(method, self.atol, self.rtol, self.error_norm, sign)
        t, end, upcoming = span[:1], span[-1], 1  # `upcoming` is the index of the next output time
        draw = draw_stage(method) if sampled else None
        start = span[0].to(device)
        rates: Rates | None = dynamics.evaluate(start, z, products=not draw)
        totals = Totals([start], [z], knots=[(start, z)] if save_steps else None, nfe=1)
        known = self.first_step if safe_step is None else control.warm_start(safe_step, span)
        dt, totals.nfe = control.first_length(dynamics, z, rates.dz, span, totals.nfe, known=known)
        safe = math.inf  # the longest step that all trials would have accepted
        while control.before(t, end):
            trial = control.trial(dt, t, end, span[upcoming] if interpolate is None else None)
            _check_trial(t, trial.dt, totals, method, budget)
            step = take(z, t.to(device), trial.dt.to(device), rates, draw)
            totals.nfe += step.nfe
            ratio = control.error_ratio(step, z, totals.logdet)
            if not math.isfinite(float(ratio)):
                fail_nonfinite(float(t.detach()), totals.steps, totals.nfe)
            if bool(ratio <= 1):
                reached = t + trial.dt
                if interpolate is not None:  # outputs strictly inside the step, read off without a stop
                    first = upcoming
                    while upcoming < len(span) - 1 and control.before(span[upcoming], reached):
                        upcoming += 1
                    inside = [x.to(device) for x in span[first:upcoming]]
                    states = interpolate(step, z, rates, t.to(device), trial.dt.to(device), inside)
                    for time, state in zip(inside, states, strict=True):
                        totals.save(time, state)
                totals.add(step, reached.reshape(()))
                # not `==`, because rounding may carry a step that was cut off at this time just past it
                if not control.before(reached, span[upcoming]):
                    totals.save(reached.reshape(()), step.z)
                    upcoming = min(upcoming + 1, len(span) - 1)
                t, z, rates = reached, step.z, step.last
                # one draw for each accepted step, which a rejected trial keeps
                draw = draw_stage(method) if sampled else None
            else:
                totals.rejected += 1
            safe = control.safe_length(trial, ratio, safe)
            dt = control.next_length(trial, t, ratio)
        # penalties are not in the error that is read at each step, so check them once at the end
        if totals.penalties and not read(torch.isfinite(health(*totals.penalties.values()))):
            fail_integrals(z, None, totals.penalties, float(t.detach()), totals.steps, totals.nfe)
        return totals.solution(longest_safe_step=safe)

    def _check_state(self, dynamics: BoundDynamics, z: Tensor) -> None:
        """Refuse states and tolerances whose errors cannot be compared (ConfigError)."""
        if z.dtype.to_real().itemsize < 4:
            raise ConfigError(
                f"{self.name} needs a state of float32 or float64, not {z.dtype}, which cannot show the errors "
                "that it compares: use autocast, which leaves the state as it is, or a fixed grid "
                f"({', '.join(FIXED_METHODS)})."
            )
        if dynamics.divergence and (getattr(self.atol, "ndim", 0) or getattr(self.rtol, "ndim", 0)):
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
