"""solve_block: one block of the flow, a neural ODE over a unit of time with the fast products of its field."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..core.augmented import Dynamics
from ..fields import StackField
from ..fields.conditional import StackAt
from ..solvers import Solver, solve
from ..solvers.health import HealthCheck
from ..solvers.steps.step_memory import StepMemory
from ..types import Solution

__all__ = ["solve_block"]


def solve_block(
    field: nn.Module,
    z: Tensor,
    times: Tensor,
    solver: Solver,
    checks: list[HealthCheck],
    noise: Tensor | None = None,
    memory: StepMemory | None = None,
    **options: Any,
) -> Solution:
    """Integrate one block from the state ``z (B, *event)`` through ``times (2,)``.

    Args:
        field: of the block; a stack of layers is prepared for this solve.
        z, times, solver: as :func:`~rnode_plugin.solvers.solve` takes them.
        checks: a list that receives the health checks of a fixed grid.
        noise: probe vectors of the divergence; None if it is exact or not followed.
        memory: the steps of an adaptive solver, carried from batch to batch.
        options: of :class:`~rnode_plugin.core.augmented.Dynamics`.

    Raises:
        SolverError: the integration could not go on.
    """
    # a continuous adjoint differentiates again at times of its own, with respect to the parameters themselves
    if isinstance(field, (StackField, StackAt)) and not solver.gradient.endswith("adjoint"):
        z = field.layout(z)
        prepared = None
        if noise is not None and noise.shape == z.shape:  # not that of several probes
            noise = prepared = field.layout(noise)
        dynamics = Dynamics(field.prepare(z, prepared), **options)
    else:
        dynamics = Dynamics(field, **options)
    return solve(dynamics.bind(noise), z, times, solver, checks=checks, memory=memory)
