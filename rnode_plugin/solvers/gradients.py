"""How a solve is differentiated: through its steps, with or without their activations kept, or by an adjoint.

A solver has one of these objects. It runs the solver's steps, and refuses what its gradient cannot give. Importing
this needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from ..errors import ConfigError
from .checks import GRADIENTS, check_name

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..core.regularizer import StepPenalty
    from .solution import Solution
    from .step import Integrator, Problem


class Gradient:
    """How a solve is differentiated. This base leaves it to automatic differentiation of the steps.

    Attributes:
        through_steps: whether backward goes through the evaluations that the solve made, so that they may share one
            graph of what depends on the parameters alone. Otherwise the backward pass makes other evaluations.
    """

    through_steps: ClassVar[bool] = True

    def solve(self, solver: Integrator, problem: Problem) -> Solution:
        """The solution by the steps of ``solver``, with its gradient."""
        return solver.march(problem)

    def check_sampling(self) -> None:
        """Refuse a sampled quadrature if this gradient cannot have it."""

    def check_penalties(self, penalties: Sequence[StepPenalty]) -> None:
        """Refuse step penalties that this gradient cannot give, and name what works."""

    def check_field(self, field: nn.Module) -> None:
        """Warn if this gradient is wrong for the field."""


@dataclass(frozen=True)
class Autograd(Gradient):
    """Through the steps, with the activations of all evaluations kept."""


@dataclass(frozen=True)
class Checkpointed(Gradient):
    """The same gradient with the activations of one step at a time, for one more pass of evaluations."""

    def solve(self, solver: Integrator, problem: Problem) -> Solution:
        from .checkpoint import checkpointed
        from .step import stepper

        dynamics, z, t, *_ = problem
        take = checkpointed(stepper(dynamics, solver.method, solver.tolerances), dynamics, z, t[0].to(z.device))
        return solver.march(problem, take=take)


@dataclass(frozen=True)
class Adjoint(Gradient):
    """The continuous adjoint, solved backward in time (the paper's).

    Its gradient differs from the gradient of the discrete loss by the discretization error.

    Args:
        backward: the solver of the backward pass, such as ``Adaptive("dopri5", atol=1e-6)``; None: the solver of
            the forward pass. Its own gradient has no meaning.
        interpolated: whether the backward solve reads the states from the cubic through the accepted ones, and does
            not solve for them again.
    """

    backward: Integrator | None = None
    interpolated: bool = False
    through_steps: ClassVar[bool] = False

    def solve(self, solver: Integrator, problem: Problem) -> Solution:
        import torch

        from ..core.modes import transforms_active
        from .adjoint import AdjointCall, solve_adjoint
        from .step import Problem

        dynamics, z, t, first_step, save_steps = problem

        def forward(z: Tensor, t: Tensor) -> Solution:
            # not by the problem: what the backward pass keeps would hold its state
            return solver.march(Problem(dynamics, z, t, first_step, save_steps or self.interpolated))

        if transforms_active() or not torch.is_grad_enabled():
            solution = forward(z, t)
            times, states = self.outputs(solution)
            return replace(solution, t=times, z=states)
        call = AdjointCall(
            dynamics, forward, (self.backward or solver).of_adjoint(), self.outputs,
            interpolated=self.interpolated,
        )  # fmt: skip
        return solve_adjoint(call, z, t.to(z.device))

    def outputs(self, solution: Solution) -> tuple[Tensor, Tensor]:
        """The times and states of a solve that are its outputs."""
        return solution.t, solution.z

    def check_sampling(self) -> None:
        raise ConfigError(
            "quadrature='sampled' needs the gradient of the steps that were drawn, which a continuous adjoint does "
            "not take: use 'autograd' or 'checkpointed' (sensitivity= of a NeuralODE), or quadrature='full'."
        )

    def check_penalties(self, penalties: Sequence[StepPenalty]) -> None:
        for penalty in penalties:
            if not penalty.local:
                raise ConfigError(
                    f"{penalty.name!r} is a penalty on the solver's steps, and a continuous adjoint does not go "
                    "through them: use 'autograd' or 'checkpointed', or 'local_error' or 'local_stiffness' instead."
                )

    def check_field(self, field: nn.Module) -> None:
        from .adjoint import warn_of_dropout

        warn_of_dropout(field)


_NAMED: dict[str, Gradient] = {
    "autograd": Autograd(),
    "checkpointed": Checkpointed(),
    "adjoint": Adjoint(),
    "interpolated_adjoint": Adjoint(interpolated=True),
}


def get_gradient(gradient: str | Gradient) -> Gradient:
    """A gradient by its name, or the gradient itself.

    Raises:
        ConfigError: for an unknown name.
    """
    if isinstance(gradient, Gradient):
        return gradient
    check_name(gradient, GRADIENTS, "gradient mode")
    return _NAMED[gradient]
