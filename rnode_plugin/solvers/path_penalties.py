"""Penalties beyond single evaluations: integrals of rates that are finished at the end, and local penalties."""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor

from ..core.health import HealthCheck, health
from ..core.system import RightHandSide
from .solution import Solution, Steps
from .step import Problem, Stepper, Tolerance, fail_integrals
from .tableaus import get_method, hermite


def with_path_penalties(
    solution: Solution, problem: Problem, tolerances: tuple[Tolerance, Tolerance] | None
) -> Solution:
    """Finish the integrals of rates, and add local penalties.

    Args:
        solution: of the whole solve, with its accepted steps if there are local penalties.
        problem: the problem that was solved.
        tolerances: absolute and relative tolerance of the solver, which local penalties read; None for a fixed
            grid.
    """
    extra, stats, checks = dict[str, Tensor](), solution.stats, solution.health
    regularizers, z_of = problem.rhs.regularizers, problem.rhs.z_of
    if regularizers.finished:
        z0, z1 = z_of(solution.z[0]), z_of(solution.z[-1])
        # the times of the problem have the graph of t_span, which the output times of a continuous adjoint lack
        extra = regularizers.finish(solution.penalties, z0, z1, problem.t_span)
    if regularizers.adds_evaluations:
        assert solution.steps is not None
        local, nfe = _local_penalties(problem.rhs, tolerances, solution.steps)
        extra |= local
        stats = replace(stats, nfe=stats.nfe + nfe)
    penalties = solution.penalties | extra
    if extra:

        def fail(_: int) -> NoReturn:
            fail_integrals(solution.z[-1], None, penalties, float(solution.t[-1].detach()), stats.steps, stats.nfe)

        check = HealthCheck(torch.stack([health(value) for value in extra.values()]), fail)
        checks = (*checks, check)
    return replace(solution, penalties=penalties, stats=stats, health=checks)


def _local_penalties(
    rhs: RightHandSide, tolerances: tuple[Tolerance, Tolerance] | None, steps: Steps
) -> tuple[dict[str, Tensor], int]:
    """The local penalties of one step of tsit5 from a uniformly random time, and the number of its evaluations.

    The step starts, detached, on the cubic interpolant of the accepted states, and has the length of the accepted
    step there, or less if the solve ends earlier.
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
        # two evaluations, counted below: a solve with saved steps does not save velocities
        v0, v1 = (rhs(t, z, products=False).dz for t, z in ((t0, z0), (t1, z1)))
        z = hermite(t0, z0, v0, t1, z1, v1, s)
    torch.clear_autocast_cache()  # older releases hand a weight that was cast without a graph on
    h = torch.minimum((t1 - t0).abs(), (end - s).abs())
    take = Stepper(rhs, get_method("tsit5"), tolerances, local=True)
    step = take(z, s, -h if backward else h, None, {})  # an empty draw: no stage computes products
    return {name: value for name, (_, value) in step.path.items()}, step.nfe + 2
