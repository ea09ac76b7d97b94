"""The result of one solve, and its cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..core.health import HealthCheck, check_all


@dataclass(frozen=True)
class SolveStats:
    """The cost of a solve.

    Attributes:
        nfe: number of evaluations of the vector field, including rejected steps and the guess of the first step.
        steps: number of accepted steps.
        rejected: number of rejected steps.
    """

    nfe: int
    steps: int
    rejected: int = 0


class Steps(NamedTuple):
    """The steps that a solve accepted.

    Attributes:
        t: times ``(steps + 1,)`` between the steps, the first and last time of the solve included.
        z: states ``(steps + 1, B, *event)`` at these times.
    """

    t: Tensor
    z: Tensor


@dataclass(frozen=True)
class Solution:
    """The result of one solve.

    Attributes:
        t: output times ``(T,)``.
        z: states at the output times, ``(T, B, *event)``.
        logdet: log-determinant of the flow's Jacobian from the first time to each output time, ``(T, B)`` in
            nats (eq. 4); None if it is not integrated.
        penalties: each penalty of the whole trajectory by name, ``(B,)``. Integrals are taken over ``|dt|``, so a
            non-negative rate has a non-negative integral also backward in time.
        stats: numbers of evaluations and steps.
        health: checks, on the device, that the solve stayed finite. :meth:`check` reads them, and
            :func:`~rnode_plugin.solvers.check_all` reads several solves together.
        longest_safe_step: the longest step whose error would have been accepted everywhere in an adaptive solve;
            None for a fixed grid and an empty batch. A solve of the same field with this ``safe_step`` needs no
            evaluation to guess a first step, and its first step is not rejected.
        steps: the accepted steps of a solve with ``save_steps``, else None. They have a graph in the gradient modes
            that differentiate through the steps.

    Example:
        >>> import torch
        >>> from rnode_plugin import Adaptive, System
        >>> from rnode_plugin.regularizers import kinetic
        >>> system = System([kinetic], "exact")
        >>> z0, times = torch.ones(1, 2), torch.linspace(0, 1, 2)
        >>> solution = Adaptive("dopri5").solve(system.start(lambda t, z: -z, z0), z0, times)
        >>> [round(value, 4) for value in solution.z[-1, 0].tolist()]  # exp(-1)
        [0.3679, 0.3679]
        >>> round(solution.logdet[-1].item(), 3), round(solution.penalties["kinetic"].item(), 3)  # -2, 1 - exp(-2)
        (-2.0, 0.865)
    """

    t: Tensor
    z: Tensor
    logdet: Tensor | None
    penalties: dict[str, Tensor]
    stats: SolveStats
    health: tuple[HealthCheck, ...] = ()
    longest_safe_step: float | None = None
    steps: Steps | None = None

    def check(self) -> Solution:
        """Wait for the device, and return this solution if it is finite.

        Raises:
            SolverError: for the first step that was not finite.
        """
        check_all(self.health)
        return self
