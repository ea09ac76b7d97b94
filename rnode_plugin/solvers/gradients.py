"""How a solve is differentiated: through its steps, with or without their activations kept, or by an adjoint.

``Solver(gradient=)`` takes one of these objects, or its name, which :func:`gradient_of` reads. An object runs the
engine that makes the steps, and refuses what its gradient cannot give. Importing this needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import ConfigError
from .config import check_tolerance

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..core.dynamics import BoundDynamics
    from .config import Solver
    from .solution import Solution
    from .tableaus import Method

    Engine = Callable[..., Solution]


class Gradient:
    """How a solve is differentiated. This base leaves it to automatic differentiation of the engine.

    Attributes:
        through_steps: whether backward goes through the evaluations that the solve made, so that they may share one
            graph of what depends on the parameters alone. Otherwise the backward pass makes other evaluations.
    """

    through_steps: ClassVar[bool] = True

    def solve(
        self, engine: Engine, dynamics: BoundDynamics, z: Tensor, t: Tensor, solver: Solver, **options: Any
    ) -> Solution:
        """The solution of ``engine``, with its gradient.

        Args:
            engine: makes the steps, such as :func:`~rnode_plugin.solvers.fixed.solve_fixed`.
            dynamics, z, t, solver: as for :func:`~rnode_plugin.solvers.solve`.
            options: further arguments of the engine.
        """
        return engine(dynamics, z, t, solver, **options)

    def with_method(self, method: Method) -> Gradient:
        """This gradient with another method of its backward solve, if it has one."""
        return self

    def check_sampling(self) -> None:
        """Refuse a sampled quadrature if this gradient cannot have it."""

    def check_penalties(self, penalties: Sequence[Any]) -> None:
        """Refuse step penalties that this gradient cannot give, and name what works."""

    def check_field(self, field: nn.Module) -> None:
        """Warn if this gradient is wrong for the field."""


@dataclass(frozen=True)
class Autograd(Gradient):
    """Through the steps, with the activations of all evaluations kept."""


@dataclass(frozen=True)
class Checkpointed(Gradient):
    """The same gradient with the activations of one step at a time, for one more pass of evaluations."""

    def solve(
        self, engine: Engine, dynamics: BoundDynamics, z: Tensor, t: Tensor, solver: Solver, **options: Any
    ) -> Solution:
        from .checkpoint import checkpointed
        from .step import stepper

        take = checkpointed(stepper(dynamics, solver), dynamics, z, t[0].to(z.device))
        return engine(dynamics, z, t, solver, take=take, **options)


@dataclass(frozen=True)
class Adjoint(Gradient):
    """The continuous adjoint, solved backward in time (the paper's).

    Its gradient differs from the gradient of the discrete loss by the discretization error.

    Args:
        atol, rtol: tolerances of an adaptive backward solve; None: the solver's.
        interpolated: whether the backward solve reads the states from the cubic through the accepted ones, and does
            not solve for them again.
        method: of the backward solve, a name or a :class:`~rnode_plugin.solvers.Method`; None: the solver's.
    """

    atol: Any = None
    rtol: Any = None
    interpolated: bool = False
    method: Any = None
    through_steps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("atol", "rtol"):
            if getattr(self, name) is not None:
                check_tolerance(getattr(self, name), f"{name} of the adjoint")

    def solve(
        self, engine: Engine, dynamics: BoundDynamics, z: Tensor, t: Tensor, solver: Solver, **options: Any
    ) -> Solution:
        import torch

        from ..core.modes import transforms_active
        from .adjoint import AdjointCall, solve_adjoint
        from .tableaus import get_method

        if self.interpolated:
            options = {**options, "save_steps": True}
        forward = partial(engine, dynamics, solver=solver, **options)
        if transforms_active() or not torch.is_grad_enabled():
            solution = forward(z, t)
            times, states = self.outputs(solution)
            return replace(solution, t=times, z=states)
        backward = replace(
            solver,
            method=replace(get_method(self.method or solver.method), interpolate=None),
            gradient="autograd",
            atol=solver.atol if self.atol is None else self.atol,
            rtol=solver.rtol if self.rtol is None else self.rtol,
        )
        return solve_adjoint(
            AdjointCall(dynamics, forward, backward, self.outputs, interpolated=self.interpolated),
            z,
            t.to(z.device),
        )

    def with_method(self, method: Method) -> Adjoint:
        return replace(self, method=method)

    def outputs(self, solution: Solution) -> tuple[Tensor, Tensor]:
        """The times and states of a solve that are its outputs."""
        return solution.t, solution.z

    def check_sampling(self) -> None:
        raise ConfigError(
            "quadrature='sampled' needs the gradient of the steps that were drawn, which a continuous adjoint does "
            "not take: use 'autograd' or 'checkpointed' (sensitivity= of a NeuralODE), or quadrature='full'."
        )

    def check_penalties(self, penalties: Sequence[Any]) -> None:
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


def gradient_of(solver: Solver) -> Gradient:
    """The gradient of a solver.

    Raises:
        ConfigError: for an adjoint with a sampled quadrature.
    """
    gradient = _NAMED[solver.gradient] if isinstance(solver.gradient, str) else solver.gradient
    if solver.quadrature == "sampled":
        gradient.check_sampling()
    return gradient
