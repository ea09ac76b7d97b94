"""solve: the one entry to all solves, which finds the engine and adds the penalties of steps and trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..core.derivatives import VELOCITY
from ..core.dynamics import BoundDynamics, PathPenalties
from ..core.ops import on_host, transforms_active
from ..errors import ConfigError
from . import config
from .adaptive import StepMemory, solve_adaptive
from .adjoint import solve_adjoint
from .config import Solver, refuse_sampled_density
from .fixed import HealthCheck, Trace, check_health, fail_integrals, health, solve_fixed, stepper
from .solution import Solution
from .tableaus import Method, get_method, hermite


def solve(
    dynamics: BoundDynamics,
    z0: Tensor,
    t_span: Tensor,
    solver: Solver | None = None,
    *,
    method: Method | None = None,
    keep: Sequence[bool] | None = None,
    checks: list[HealthCheck] | None = None,
    memory: StepMemory | None = None,
) -> Solution:
    """Solve the augmented system (RNODE) from ``t_span[0]`` through all of ``t_span``.

    Args:
        dynamics: the system with its noise fixed: ``Dynamics(...).bind(noise)``.
        z0: state ``(B, *event)`` at ``t_span[0]``.
        t_span: times ``(T,)``, increasing or decreasing; on the CPU they are read without waiting for the device.
        solver: method, accuracy and gradient. Inside a transform of torch.func every gradient mode is that of the
            steps taken, as with ``autograd``.
        method: steps in place of those of ``solver.method``, such as a solver object's of torchdyn.
        keep: for each time of ``t_span`` whether its state is an output; None: all are, as always with an adaptive
            method.
        checks: a list that receives, instead of an error, what tells whether a fixed grid stayed finite.
            :func:`~rnode_plugin.solvers.fixed.check_health` looks at several solves together.
        memory: carries the step of an adaptive solve to the next one; a continuous adjoint does not use it.

    Returns:
        Solution: states at all of ``t_span``, log-determinant (nats), integrals of the penalties, and the cost.

    Raises:
        ConfigError: for times that are not finite and strictly monotonic, for a step penalty that the method or the
            gradient mode cannot have, and for an adaptive method where nothing can be read: inside
            ``torch.func.vmap`` and on the device ``meta``.
        SolverError: non-finite state, step-size underflow, or the budget of evaluations used up.
    """
    solver = solver or Solver()
    method = method or get_method(solver.method)
    if solver.step == "auto":
        raise ConfigError(
            "solver.step='auto' is found while a recipe trains. Give a number everywhere else: the log of a "
            "run with solver.step=auto has one."
        )
    if dynamics.divergence:
        refuse_sampled_density(solver)
    _check_times(t_span)
    chosen, times, trace = solver, t_span, None
    asked, inner = None, []
    path = dynamics.path
    if path is not None:
        if path.steps:
            if not torch.is_grad_enabled() and solver.gradient.endswith("adjoint"):
                chosen = replace(solver, gradient="autograd")  # values alone are the same in every mode
            check_steps(path.steps, method, chosen.gradient)
        if path.trajectories:
            times, asked, inner = path.stops(t_span)
            asked, keep = asked if keep is None else asked[torch.tensor(keep)], None
        if path.local:
            trace = []
    if chosen.gradient.endswith("adjoint") and not transforms_active():
        solution = solve_adjoint(dynamics, z0, times.to(z0.device), chosen, method, keep=keep, trace=trace)
    elif method.adaptive:
        solution = solve_adaptive(dynamics, z0, times, chosen, method, trace=trace, memory=memory)
    else:
        solution = solve_fixed(dynamics, z0, times, chosen, method, keep=keep, trace=trace, checks=checks)
    if path is not None:
        solution = _with_path_penalties(solution, dynamics, path, chosen, times, inner, trace, checks)
    if asked is not None and len(asked) < len(times) == len(solution.t):
        logdet = None if solution.logdet is None else solution.logdet[asked]
        solution = replace(solution, t=solution.t[asked], z=solution.z[asked], logdet=logdet)
    for observer in config.observers:
        observer(solution, solver)
    return solution


def _check_times(t_span: Tensor) -> None:
    """Refuse times that are not a finite, strictly monotonic row of at least two."""
    good = t_span.ndim == 1 and len(t_span) >= 2 and t_span.is_floating_point()
    if good:
        with on_host():
            steps = t_span.detach().diff()
            good = bool(((steps > 0).all() | (steps < 0).all()) & torch.isfinite(t_span.detach()).all())
    if not good:
        raise ConfigError(
            "t_span must be finite and strictly increasing or decreasing, a row of at least two floating-point "
            f"times, not {t_span.tolist()}: where it turns back or stands still, start another solve from the last "
            "state."
        )


# penalties of steps and trajectories ----------------------------------------------------------------------------

_WITHOUT = {
    "error": ("has no error estimate", "dopri5 or tsit5"),
    "pair": ("has no two stages at one time", "dopri5, tsit5 or rk4"),
}


def check_steps(penalties: Sequence[Any], method: Method, gradient: str) -> None:
    """Refuse penalties on accepted steps that the method or the gradient mode cannot give, and name what works."""
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


def _with_path_penalties(
    solution: Solution,
    dynamics: BoundDynamics,
    path: PathPenalties,
    solver: Solver,
    times: Tensor,
    inner: Sequence[Tensor],
    trace: Trace | None,
    checks: list[HealthCheck] | None,
) -> Solution:
    """The solution with trajectory penalties at ``inner`` places of ``times``, local ones along the ``trace``."""
    beside, stats = {}, solution.stats
    for i, places in enumerate(inner):
        found = places.tolist()
        if len(solution.t) != len(times):  # each step is an output, and rounding may have moved it
            found = [int((solution.t.detach() - float(times[k].detach())).abs().argmin()) for k in found]
        # the times that the solve was given carry the graph of t_span: the outputs of a continuous adjoint do not
        mine, states = times[places].to(solution.t.device), [solution.z[k] for k in found]
        name, value = path.of_trajectory(i, mine, states, solution.penalties)
        beside[name] = value
    if trace is not None:
        local, nfe = _local_penalties(dynamics, solver, trace)
        beside |= local
        stats = replace(stats, nfe=stats.nfe + nfe)
    penalties = {name: x for name, x in (solution.penalties | beside).items() if name not in path.hidden}
    if beside:

        def fail(_: int) -> NoReturn:
            fail_integrals(solution.z[-1], None, penalties, float(solution.t[-1].detach()), stats.steps, stats.nfe)

        check = HealthCheck(torch.stack([health(value) for value in beside.values()]), fail)
        if checks is None:
            check_health([check])
        else:
            checks.append(check)
    return replace(solution, penalties=penalties, stats=stats)


def _local_penalties(dynamics: BoundDynamics, solver: Solver, trace: Trace) -> tuple[dict[str, Tensor], int]:
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
        v0, v1 = (dynamics.evaluate(t, z, VELOCITY).dz for t, z in ((t0, z0), (t1, z1)))
        z = hermite(t0, z0, v0, t1, z1, v1, s)
    h = torch.minimum((t1 - t0).abs(), (end - s).abs())
    take = stepper(dynamics, get_method("tsit5"), solver, local=True)
    step = take(z, s, -h if backward else h, None, {})  # no stage makes products
    return {name: value for name, (_, value) in step.path.items()}, step.nfe + 2
