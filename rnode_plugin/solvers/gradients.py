"""Gradients of a solve: through its steps, with or without keeping activations, or by an adjoint.

A solver has one of these objects, which runs the solver's steps. Importing this needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import check_name
from .tableaus import get_method

if TYPE_CHECKING:
    from torch import Tensor

    from .solution import Solution
    from .solver import Solver
    from .step import Problem


class Gradient:
    """The way to differentiate a solve. This base class lets autograd differentiate the steps.

    Attributes:
        through_steps: True if backpropagation goes through the forward evaluations. They may then share one graph
            of quantities that depend only on the parameters, such as prepared weights. Otherwise the backward pass
            evaluates the field again, a quadrature cannot be sampled, and there is no gradient of penalties on
            accepted steps.
    """

    through_steps: ClassVar[bool] = True

    def solve(self, solver: Solver, problem: Problem) -> Solution:
        """Solve ``problem`` by the steps of ``solver``, and attach this gradient to the solution."""
        return solver.march(problem)


@dataclass(frozen=True)
class Autograd(Gradient):
    """Differentiates through the steps and keeps the activations of all evaluations."""


@dataclass(frozen=True)
class Checkpointed(Gradient):
    """Gives the same gradient with the activations of one step at a time, and evaluates each step once more."""

    def solve(self, solver: Solver, problem: Problem) -> Solution:
        from .checkpoint import checkpointed

        plain = problem.stepper(get_method(solver.method), solver.tolerances)
        return solver.march(problem, take=checkpointed(plain, problem.rhs))


@dataclass(frozen=True)
class Adjoint(Gradient):
    """Solves the continuous adjoint backward in time, as the paper does.

    Its gradient differs from the gradient of the discrete loss by the discretization error.

    Args:
        backward: the solver of the backward pass, such as ``Adaptive("dopri5", atol=1e-6)``; None: the solver of
            the forward pass. The ``gradient`` of this solver is ignored.
        restarted: whether the backward pass, which solves for the states again, stops at each step that the forward
            pass accepted and restarts there from the stored state, so that its states stay close to the forward
            pass's.
    """

    backward: Solver | None = None
    restarted: bool = False
    through_steps: ClassVar[bool] = False

    def solve(self, solver: Solver, problem: Problem) -> Solution:
        import torch

        from .adjoint import AdjointCall, solve_adjoint
        from .step import Problem

        rhs, z, t = problem.rhs, problem.z, problem.t_span
        save_steps, safe_step, compiled = problem.save_steps or self.restarted, problem.safe_step, problem.compiled

        def forward(z: Tensor, t: Tensor) -> Solution:
            # the graph keeps this function, which must not refer to the state of the problem above
            again = Problem(
                rhs=rhs, z=z, t_span=t, save_steps=save_steps, safe_step=safe_step, compiled=compiled
            )  # fmt: skip
            return self.outputs(solver.march(again), adaptive=solver.adaptive)

        if not torch.is_grad_enabled():
            return forward(z, t)
        noted = rhs.noted()
        if not any(x.requires_grad for x in (z, t, *noted.inputs)):
            return forward(z, t)
        backward = (self.backward or solver).without_interpolation()
        call = AdjointCall(
            rhs, noted, forward, backward, self.restarted, problem.adjoint_safe_step, problem.keep_adjoint_step
        )
        return solve_adjoint(call, z, t.to(z.device) if t.requires_grad else t)

    def outputs(self, solution: Solution, *, adaptive: bool) -> Solution:
        """The solution of an adaptive solver or a fixed grid with the outputs that the loss may depend on."""
        return solution


_NAMED: dict[str, Gradient] = {
    "autograd": Autograd(),
    "checkpointed": Checkpointed(),
    "adjoint": Adjoint(),
    "interpolated_adjoint": Adjoint(restarted=True),
}
GRADIENTS = tuple(_NAMED)


def get_gradient(gradient: str | Gradient) -> Gradient:
    """Look up a gradient by its name; a gradient is returned unchanged.

    Raises:
        ConfigError: for an unknown name.
    """
    if isinstance(gradient, Gradient):
        return gradient
    check_name(gradient, GRADIENTS, "gradient mode")
    return _NAMED[gradient]
