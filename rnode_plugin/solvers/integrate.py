"""solve: the one entry to all solves, which finds the engine and adds the penalties of steps and trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..core.derivatives import VELOCITY
from ..core.dynamics import BoundDynamics, PathPenalties, refuse_held
from ..core.health import HealthCheck, health
from ..core.modes import on_host, transforms_active
from ..errors import ConfigError
from .adaptive import solve_adaptive
from .config import Solver, refuse_sampled_density
from .fixed import solve_fixed
from .gradients import gradient_of
from .solution import Solution, Steps
from .step import fail_integrals, stepper
from .tableaus import Method, get_method, hermite


def solve(
    dynamics: BoundDynamics,
    z0: Tensor,
    t_span: Tensor,
    solver: Solver | None = None,
    *,
    first_step: float | None = None,
    save_steps: bool = False,
) -> Solution:
    """Solve the augmented system (RNODE) from ``t_span[0]`` through all of ``t_span``.

    Args:
        dynamics: the system with its noise fixed: ``Dynamics(...).bind(noise)``.
        z0: state ``(B, *event)`` at ``t_span[0]``.
        t_span: times ``(T,)``, increasing or decreasing; on the CPU they are read without waiting for the device.
        solver: method, accuracy and gradient. Inside a transform of torch.func every gradient mode goes through
            the steps, as ``autograd`` does.
        first_step: first step that an adaptive method tries, such as the ``next_step`` of a solve of the same
            field; it is cut off at the end. None: ``solver.first_step``.
        save_steps: whether the solution holds the accepted steps.

    Returns:
        Solution: states at all of ``t_span``, log-determinant (nats), integrals of the penalties, and the cost. A
        fixed grid does not look whether it stayed finite: call :meth:`Solution.check`.

    Raises:
        ConfigError: for times that are not finite and strictly monotonic, for a quadrature or a penalty that the
            method or the gradient mode cannot have, and for an adaptive method where nothing can be read: inside
            ``torch.func.vmap`` and on the device ``meta``.
        SolverError: non-finite state of an adaptive method, step-size underflow, or the budget of evaluations
            used up.
    """
    solver = solver or Solver()
    method, gradient = get_method(solver.method), gradient_of(solver)
    if dynamics.divergence and solver.quadrature == "sampled":
        refuse_sampled_density(solver)
    check_times(t_span)
    if gradient.through_steps or transforms_active():
        refuse_held(dynamics.held, t_span)
    times, asked, inner = t_span, None, []
    path = dynamics.path
    if path is not None:
        check_steps(path.steps, method)
        if torch.is_grad_enabled():  # values alone are the same in every mode
            gradient.check_penalties(path.steps)
        if path.trajectories:
            times, asked, inner = path.stops(t_span)
    saves = save_steps or (path is not None and bool(path.local))
    engine = solve_adaptive if method.adaptive else solve_fixed
    solution = gradient.solve(engine, dynamics, z0, times, solver, first_step=first_step, save_steps=saves)
    if path is not None:
        solution = _with_path_penalties(solution, dynamics, path, solver, times, inner)
    if asked is not None and len(asked) < len(times) == len(solution.t):
        logdet = None if solution.logdet is None else solution.logdet[asked]
        solution = replace(solution, t=solution.t[asked], z=solution.z[asked], logdet=logdet)
    return solution if save_steps or solution.steps is None else replace(solution, steps=None)


def check_times(t_span: Tensor) -> None:
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


def check_steps(penalties: Sequence[Any], method: Method) -> None:
    """Refuse penalties on accepted steps that the method cannot give, and name what works."""
    for penalty in penalties:
        if penalty.local:
            continue
        has = {"error": method.adaptive, "pair": method.pair is not None}
        for use in penalty.uses:
            if not has[use]:
                what, good = _WITHOUT[use]
                raise ConfigError(
                    f"{penalty.name!r} cannot be computed: the method {method.name!r} {what}; use {good}, or "
                    f"'local_error' or 'local_stiffness', which take a separate step with any method."
                )


def _with_path_penalties(
    solution: Solution,
    dynamics: BoundDynamics,
    path: PathPenalties,
    solver: Solver,
    times: Tensor,
    inner: Sequence[Tensor],
) -> Solution:
    """The solution with trajectory penalties at ``inner`` places of ``times``, and local ones along its steps."""
    extra, stats, checks = {}, solution.stats, solution.health
    for i, places in enumerate(inner):
        found = places.tolist()
        if len(solution.t) != len(times):  # a gradient with more outputs; rounding may have moved these
            found = [int((solution.t.detach() - float(times[k].detach())).abs().argmin()) for k in found]
        # the times that the solve was given carry the graph of t_span: the outputs of a continuous adjoint do not
        mine, states = times[places].to(solution.t.device), [solution.z[k] for k in found]
        name, value = path.of_trajectory(i, mine, states, solution.penalties)
        extra[name] = value
    if path.local:
        assert solution.steps is not None
        local, nfe = _local_penalties(dynamics, solver, solution.steps)
        extra |= local
        stats = replace(stats, nfe=stats.nfe + nfe)
    penalties = {name: x for name, x in (solution.penalties | extra).items() if name not in path.hidden}
    if extra:

        def fail(_: int) -> NoReturn:
            fail_integrals(solution.z[-1], None, penalties, float(solution.t[-1].detach()), stats.steps, stats.nfe)

        check = HealthCheck(torch.stack([health(value) for value in extra.values()]), fail)
        checks = (*checks, check)
    return replace(solution, penalties=penalties, stats=stats, health=checks)


def _local_penalties(dynamics: BoundDynamics, solver: Solver, steps: Steps) -> tuple[dict[str, Tensor], int]:
    """The local penalties of one step of tsit5 from a uniformly random time, and the evaluations that it took.

    The step starts, detached, on the cubic interpolant of the accepted states, and is as long as the accepted step
    there, or as what is left of the solve.
    """
    knots = steps.t.detach()
    start, end = knots[0], knots[-1]
    # drawn on the CPU, so that one seed gives the same time on every device
    s = start + (end - start) * torch.rand((), dtype=torch.float64).to(knots)
    backward = bool(end < start)
    passed = (knots >= s) if backward else (knots <= s)
    k = min(max(int(passed.sum()) - 1, 0), len(knots) - 2)
    (t0, t1), (z0, z1) = knots[k : k + 2], steps.z[k : k + 2].detach()
    with torch.no_grad():
        v0, v1 = (dynamics.evaluate(t, z, VELOCITY).dz for t, z in ((t0, z0), (t1, z1)))
        z = hermite(t0, z0, v0, t1, z1, v1, s)
    h = torch.minimum((t1 - t0).abs(), (end - s).abs())
    take = stepper(dynamics, replace(solver, method="tsit5"), local=True)
    step = take(z, s, -h if backward else h, None, {})  # no stage makes products
    return {name: value for name, (_, value) in step.path.items()}, step.nfe + 2
