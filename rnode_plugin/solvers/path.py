"""Penalties of steps and trajectories: what a solve does for them before, after and beside its own steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from ..errors import ConfigError
from ..types import BoundDynamics, Solution, SolveStats
from .health import HealthCheck, check_health, fail_integrals, health
from .plan import SolvePlan
from .steps.step import step_taker
from .steps.tableaus import Method, get_method

if TYPE_CHECKING:
    from ..core.path_penalties import PathPenalties

__all__ = ["check_steps", "solve_with_path"]

Trace = list[tuple[Tensor, Tensor]]
Run = Callable[[Tensor, SolvePlan, "Trace | None"], Solution]

_WITHOUT = {
    "error": ("has no error estimate", "dopri5 or tsit5"),
    "pair": ("has no two stages at one time", "dopri5, tsit5 or rk4"),
}


def check_steps(penalties: Sequence[Any], method: Method, gradient: str) -> None:
    """Refuse penalties on accepted steps that the solver cannot give.

    Raises:
        ConfigError: for a continuous adjoint, which knows no steps, or a method without what a penalty reads; it
            names what works.
    """
    for penalty in penalties:
        if penalty.local:
            continue
        if gradient.endswith("adjoint"):
            raise ConfigError(
                f"{penalty.name!r} is a penalty on the solver's steps, and gradient {gradient!r} does not go "
                "through them: use 'autograd' or 'checkpointed', or 'local_error' or 'local_stiffness' instead."
            )
        has = {"error": method.adaptive, "pair": method.pair is not None}
        for use in penalty.uses:
            if not has[use]:
                what, good = _WITHOUT[use]
                raise ConfigError(
                    f"{penalty.name!r} cannot be computed: the method {method.name!r} {what}; use {good}, or "
                    f"'local_error' or 'local_stiffness', which take a step of their own with any method."
                )


def solve_with_path(
    dynamics: BoundDynamics,
    path: PathPenalties,
    t_span: Tensor,
    plan: SolvePlan,
    run: Run,
    *,
    checks: list[HealthCheck] | None = None,
) -> Solution:
    """A solve whose solution holds the penalties of ``path`` too.

    Args:
        dynamics, t_span, plan: as for a solve without them.
        path: the penalties.
        run: makes the solve at the times that it is given.
        checks: a list that receives what tells whether they are finite; None: it is read.

    Raises:
        ConfigError: from :func:`check_steps`, and for a time outside of the solve.
        SolverError: a penalty is not finite.
    """
    if path.steps:
        if not torch.is_grad_enabled() and plan.gradient.endswith("adjoint"):
            plan = replace(plan, gradient="autograd")  # values alone are the same in every mode
        check_steps(path.steps, plan.method, plan.gradient)
    stops = _Stops(path, t_span, plan)
    trace: Trace | None = [] if path.local else None
    solution = run(stops.times, stops.plan, trace)
    penalties, beside = dict(solution.penalties), {}
    for i in range(len(path.trajectories)):
        times, rows = stops.of_trajectory(i, solution.t)
        name, value = path.of_trajectory(i, times, [solution.z[row] for row in rows], solution.penalties)
        beside[name] = value
    stats = solution.stats
    if trace is not None:
        local, nfe = _local_penalties(dynamics, plan, trace)
        beside |= local
        stats = replace(stats, nfe=stats.nfe + nfe)
    if beside:
        check = _finite(beside, solution, t_span, stats)
        if checks is None:
            check_health([check])
        else:
            checks.append(check)
    penalties |= beside
    penalties = {name: value for name, value in penalties.items() if name not in path.hidden}
    return stops.without_extra(replace(solution, penalties=penalties, stats=stats))


def _finite(penalties: dict[str, Tensor], solution: Solution, t_span: Tensor, stats: SolveStats) -> HealthCheck:
    """Whether the penalties that no step of the solve has looked at are finite."""

    def fail(_: int) -> NoReturn:
        where = (float(t_span[-1].detach()), stats.steps, stats.nfe)
        fail_integrals(solution.z[-1], None, penalties, *where)

    return HealthCheck(torch.stack([health(value) for value in penalties.values()]), fail)


class _Stops:
    """The times of a solve together with those that trajectory penalties want states at."""

    def __init__(self, path: PathPenalties, t_span: Tensor, plan: SolvePlan) -> None:
        self.times, self.plan = t_span, plan
        self._mine: list[set[float]] = []  # the times of each penalty
        self._asked = [True] * len(t_span)  # which of self.times are outputs
        if not path.trajectories:
            return
        tensors = dict(zip(t_span.tolist(), t_span, strict=True))
        keep = dict(zip(tensors, self._asked if plan.keep is None else plan.keep, strict=True))
        first, last = t_span[0].item(), t_span[-1].item()
        for penalty, wanted in zip(path.trajectories, path.times(t_span[0], t_span[-1]), strict=True):
            wanted = wanted.to(t_span)
            values = wanted.tolist()
            if any(not min(first, last) <= value <= max(first, last) for value in values):
                raise ConfigError(
                    f"{penalty.name!r} wants states at {values}, outside of the solve {first} to {last}."
                )
            self._mine.append({first, last, *values})
            for value, tensor in zip(values, wanted, strict=True):
                tensors.setdefault(value, tensor)
        self._values = sorted(tensors, reverse=last < first)
        self._tensors = tensors
        self.times = torch.stack([tensors[value] for value in self._values])
        self._asked = [keep.get(value, False) for value in self._values]
        needed = set().union(*self._mine)
        if plan.keep is not None or not plan.method.adaptive:
            flags = [asked or value in needed for asked, value in zip(self._asked, self._values, strict=True)]
            self.plan = replace(plan, keep=flags)
            kept = [k for k, flag in enumerate(flags) if flag]
            self._values = [self._values[k] for k in kept]
            self._asked = [self._asked[k] for k in kept]

    def of_trajectory(self, index: int, t: Tensor) -> tuple[Tensor, list[int]]:
        """The times of trajectory penalty ``index`` and the rows of the outputs at ``t`` that hold its states.

        The times are those that the solve was given, which carry the graph of ``t_span``: the outputs of a
        continuous adjoint do not.
        """
        wanted = [k for k, value in enumerate(self._values) if value in self._mine[index]]
        times = torch.stack([self._tensors[self._values[k]] for k in wanted]).to(t.device)
        if len(t) != len(self._values):  # each step is an output, and rounding may have moved it
            wanted = [int((t.detach() - self._values[k]).abs().argmin()) for k in wanted]
        return times, wanted

    def without_extra(self, solution: Solution) -> Solution:
        """The solution at the times that the caller asked for."""
        if all(self._asked) or len(solution.t) != len(self._asked):
            return solution
        rows = [k for k, asked in enumerate(self._asked) if asked]
        logdet = None if solution.logdet is None else solution.logdet[rows]
        return replace(solution, t=solution.t[rows], z=solution.z[rows], logdet=logdet)


def _local_penalties(dynamics: BoundDynamics, plan: SolvePlan, trace: Trace) -> tuple[dict[str, Tensor], int]:
    """The local penalties of one step of tsit5 from a uniformly random time, and the evaluations that it took.

    The step starts, detached, on the cubic interpolant of the accepted states, and is as long as the accepted step
    there, or as what is left of the solve.
    """
    knots = torch.stack([t.detach().reshape(()) for t, _ in trace])
    start, end = knots[0], knots[-1]
    # drawn on the CPU, so that one seed gives the same time on every device
    s = start + (end - start) * torch.rand((), dtype=torch.float64).to(knots)
    backward = bool(end < start)
    passed = (knots >= s) if backward else (knots <= s)
    k = min(max(int(passed.sum()) - 1, 0), len(trace) - 2)
    (t0, z0), (t1, z1) = ((t.detach().reshape(()), z.detach()) for t, z in trace[k : k + 2])
    with torch.no_grad():
        z = _hermite(dynamics, t0, z0, t1, z1, s)
    h = torch.minimum((t1 - t0).abs(), (end - s).abs())
    take = step_taker(dynamics, get_method("tsit5"), tolerance=(plan.atol, plan.rtol), local=True)
    step = take(z, s, -h if backward else h, None, None)
    return {name: value for name, (_, value) in step.path.items()}, step.nfe + 2


def _hermite(dynamics: BoundDynamics, t0: Tensor, z0: Tensor, t1: Tensor, z1: Tensor, t: Tensor) -> Tensor:
    """The cubic through two states with their velocities, at ``t``."""
    h = t1 - t0
    x = ((t - t0) / h).to(z0.dtype)
    v0, v1 = (dynamics(t, z, products=False).dz * h.to(z.dtype) for t, z in ((t0, z0), (t1, z1)))
    rise = z1 - z0
    return z0 + x * rise + x * (1 - x) * ((1 - x) * (v0 - rise) - x * (v1 - rise))
