"""Integrating the augmented system and differentiating through the solve."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .config import ADAPTIVE_METHODS, FIXED_METHODS, GRADIENTS, METHODS, TRACE_QUADRATURES, Solver

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..types import BoundDynamics, Solution
    from .health import HealthCheck
    from .plan import SolvePlan
    from .steps.step_memory import StepMemory

__all__ = ["ADAPTIVE_METHODS", "FIXED_METHODS", "GRADIENTS", "METHODS", "TRACE_QUADRATURES", "Solver", "solve"]


def solve(
    dynamics: BoundDynamics,
    z0: Tensor,
    t_span: Tensor,
    solver: Solver | SolvePlan | None = None,
    *,
    params: Iterable[Tensor] | None = None,
    generator: torch.Generator | None = None,
    checks: list[HealthCheck] | None = None,
    memory: StepMemory | None = None,
) -> Solution:
    """Solve the augmented system (RNODE) from ``t_span[0]`` through all of ``t_span``.

    Args:
        dynamics: the system with its noise fixed: ``Dynamics(...).bind(noise)``, or a function
            ``(t, z, *, products) -> Rates``.
        z0: state ``(B, *event)`` at ``t_span[0]``.
        t_span: times ``(T,)``, increasing or decreasing; on the CPU they are read without waiting for the device.
        solver: method, accuracy and gradient; a :class:`SolvePlan` carries a solver object of torchdyn's. Inside a
            transform of torch.func every gradient mode is that of the steps taken, as with ``autograd``.
        params: tensors that a continuous adjoint differentiates with respect to; None: the parameters of
            ``dynamics``, if it has any. The other gradient modes find them by themselves.
        generator: draws the stages of a sampled quadrature.
        checks: a list that receives, instead of an error, what tells whether a fixed grid stayed finite.
            :func:`~rnode_plugin.solvers.health.check_health` looks at several solves together.
        memory: carries the step of an adaptive solve to the next one; a continuous adjoint does not use it.

    Returns:
        Solution: states at all of ``t_span``, log-determinant (nats), integrals of the penalties, and the cost.

    Raises:
        ConfigError: for times that are not finite and strictly monotonic, for a step penalty that the method or the
            gradient mode cannot have, and for an adaptive method where nothing can be read: inside
            ``torch.func.vmap`` and on the device ``meta``.
        SolverError: non-finite state, step-size underflow, or the budget of evaluations used up.
    """
    from ..core.tensors.transforms_active import transforms_active
    from .adjoint import solve_adjoint
    from .health import check_time
    from .integrate import integrate
    from .observers import notify
    from .path import solve_with_path
    from .plan import SolvePlan

    solver = solver or Solver()
    plan = solver if isinstance(solver, SolvePlan) else SolvePlan.of(solver)
    check_time(t_span)

    def run(t_span: Tensor, plan: SolvePlan, trace: list[tuple[Tensor, Tensor]] | None = None) -> Solution:
        if plan.gradient.endswith("adjoint") and not transforms_active():
            wanted = getattr(dynamics, "parameters", tuple)() if params is None else params
            return solve_adjoint(dynamics, z0, t_span.to(z0.device), plan, tuple(wanted), trace=trace)
        return integrate(dynamics, z0, t_span, plan, generator=generator, trace=trace, checks=checks, memory=memory)

    path = getattr(dynamics, "path", None)
    if path is None:
        solution = run(t_span, plan)
    else:
        solution = solve_with_path(dynamics, path, t_span, plan, run, checks=checks)
    notify(solution, solver)
    return solution
