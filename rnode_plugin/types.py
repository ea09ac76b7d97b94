"""The shapes that the modules agree on: what a field is, what an evaluation returns, what a solve returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

__all__ = [
    "BoundDynamics",
    "FieldWithAux",
    "FieldWithDivergence",
    "FieldWithJVP",
    "FieldWithJacobian",
    "FieldWithLinearization",
    "FieldWithVJP",
    "FlatFieldWithLinearization",
    "FlowOutput",
    "Linearization",
    "Rates",
    "Solution",
    "SolveStats",
    "StepRecord",
    "Trajectory",
    "VectorField",
]


class VectorField(Protocol):
    """A vector field ``f(t, z)``: time, a scalar tensor, and state ``(B, *event)`` to velocity ``(B, *event)``."""

    def __call__(self, t: Tensor, z: Tensor, /) -> Tensor: ...


@runtime_checkable
class FieldWithVJP(Protocol):
    """A field that brings its own product, faster than automatic differentiation would make it."""

    def __call__(self, t: Tensor, z: Tensor, /) -> Tensor: ...

    def forward_and_vjp(self, t: Tensor, z: Tensor, noise: Tensor, /) -> tuple[Tensor, Tensor]:
        """``(f(t, z), noise^T df/dz)``, both ``(B, *event)``, from one pass."""
        ...


@runtime_checkable
class FieldWithJacobian(Protocol):
    """A field of flat states that brings its whole Jacobian, faster than one product per dimension."""

    def forward_and_jacobian(self, t: Tensor, z: Tensor, /) -> tuple[Tensor, Tensor]:
        """``f(t, z) (B, D)`` and the rows of ``df/dz``, ``(D, B, D)``, from one pass."""
        ...


@runtime_checkable
class FieldWithJVP(Protocol):
    """A field that brings its own product along a direction of state and time."""

    def forward_and_jvp(self, t: Tensor, z: Tensor, v: Tensor, dt: float, /) -> tuple[Tensor, Tensor]:
        """``(f(t, z), df/dz v + dt df/dt)``, both ``(B, *event)``, from one pass."""
        ...


class Linearization(NamedTuple):
    """One pass over a field: its velocity, its products with noise, and its products along directions to come.

    Attributes:
        dz: velocity ``f(t, z)``, ``(B, *event)``.
        products: ``noise^T df/dz``, or all rows of ``df/dz``; None if none were asked for.
        jvp: ``(v, dt)`` to ``df/dz v + df/dt dt``, both of shape ``(B, *event)``, without another pass.
    """

    dz: Tensor
    products: Tensor | None
    jvp: Callable[[Tensor, float], Tensor]


@runtime_checkable
class FieldWithLinearization(Protocol):
    """A field whose products along directions share the pass that gave its velocity."""

    def linearize(self, t: Tensor, z: Tensor, noise: Tensor | None, /) -> Linearization:
        """The pass at one point, with products for a ``noise (B, *event)`` unless it is None."""
        ...


@runtime_checkable
class FlatFieldWithLinearization(FieldWithLinearization, Protocol):
    """The same for flat states, with the whole Jacobian."""

    def linearize_with_jacobian(self, t: Tensor, z: Tensor, /) -> Linearization:
        """The pass at one point, with all rows of ``df/dz``, ``(D, B, D)``, as its products."""
        ...


@runtime_checkable
class FieldWithDivergence(Protocol):
    """A field that knows its exact divergence in closed form."""

    def forward_and_divergence(self, t: Tensor, z: Tensor, /) -> tuple[Tensor, Tensor]:
        """``(f(t, z), div f)``, ``(B, *event)`` and ``(B,)``, from one pass."""
        ...


@runtime_checkable
class FieldWithAux(Protocol):
    """A field that knows more than its velocity, such as a potential that knows its rate of change."""

    def aux(self, t: Tensor, z: Tensor, /) -> Mapping[str, Tensor]:
        """Values by name at one time; ``hjb`` reads ``"potential_rate"``, the ``(B,)`` of a potential's d/dt."""
        ...


class Rates(NamedTuple):
    """The right-hand side of the augmented system (RNODE) at one time.

    Attributes:
        dz: velocity, of the state's shape.
        dlogdet: divergence ``(B,)`` in nats per unit of time; None where no density is followed.
        penalties: rate of each penalty by name, usually ``(B,)``.
    """

    dz: Tensor
    dlogdet: Tensor | None
    penalties: dict[str, Tensor]


class BoundDynamics(Protocol):
    """What the integrator integrates: an augmented system whose noise is fixed for one solve.

    With ``products=False`` whatever needs a product with the Jacobian is left out of the result. An attribute
    ``path``, if there is one, holds the penalties of steps and trajectories
    (:class:`~rnode_plugin.core.path_penalties.PathPenalties`).
    """

    def __call__(self, t: Tensor, z: Tensor, *, products: bool = True) -> Rates: ...


@dataclass(frozen=True)
class StepRecord:
    """One step of a solve, as a step penalty sees it.

    Attributes:
        t: time at its start, a tensor of one entry.
        h: its length, positive, a tensor of one entry.
        z0, z1: states ``(B, *event)`` at its two ends.
        times, states, velocities: of each stage, in the order of their evaluation.
        error: the embedded estimate of the error of ``z1``, ``(B, *event)``; None if the method has none.
        pair: indices of two stages at the same time; None if the method has no two.
        atol, rtol: the solve's tolerances; a fixed grid does not use them.
    """

    t: Tensor
    h: Tensor
    z0: Tensor
    z1: Tensor
    times: Sequence[Tensor]
    states: Sequence[Tensor]
    velocities: Sequence[Tensor]
    error: Tensor | None
    pair: tuple[int, int] | None
    atol: float
    rtol: float


@dataclass(frozen=True)
class Trajectory:
    """States along one solve, as a trajectory penalty sees them.

    Attributes:
        t: times ``(T,)`` in the order of the solve: both ends, and between them those that the penalty asked for.
        z: states at them, ``(T, B, *event)``.
        integrals: integral along the path of each rate that the penalty asked for by name, ``(B,)``.
    """

    t: Tensor
    z: Tensor
    integrals: Mapping[str, Tensor]


@dataclass(frozen=True)
class SolveStats:
    """What a solve cost.

    Attributes:
        nfe: evaluations of the vector field, those of rejected steps and of the first step's guess included.
        steps: accepted steps.
        rejected: rejected steps.
    """

    nfe: int
    steps: int
    rejected: int = 0


@dataclass(frozen=True)
class Solution:
    """The result of one solve.

    Attributes:
        t: output times ``(T,)``.
        z: states at them ``(T, B, *event)``.
        logdet: log-determinant of the flow's Jacobian from the first time to each output time, ``(T, B)`` in
            nats (eq. 4); None where the dynamics follow no density.
        penalties: each penalty of the whole trajectory by name, ``(B,)``; the integral of a rate that is never
            negative is not negative either, whichever way time runs.
        stats: evaluations and steps.

    Example:
        >>> import torch
        >>> from rnode_plugin import Dynamics, Solver
        >>> from rnode_plugin.core.regularizers import kinetic
        >>> from rnode_plugin.solvers import solve
        >>> dynamics = Dynamics(lambda t, z: -z, regularizers=[kinetic], estimator="exact")
        >>> z0, times = torch.ones(1, 2), torch.linspace(0, 1, 2)
        >>> solution = solve(dynamics.bind(None), z0, times, Solver(method="dopri5"))
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


@dataclass(frozen=True)
class FlowOutput:
    """The result of pushing data through a flow.

    Attributes:
        z: latent ``(B, D)``: factored-out parts flattened in the order in which they leave, the last scale last.
        logdet: ``(B,)`` in nats, the logit transform included.
        regularization: raw integral of each penalty over all blocks by name, ``(B,)``, not divided by D.
        nfe: evaluations of the vector fields, summed over blocks.

    Example:
        >>> import torch
        >>> from rnode_plugin import MultiscaleFlow
        >>> out = MultiscaleFlow((1, 8, 8), hidden=8)(torch.rand(2, 1, 8, 8))
        >>> tuple(out.z.shape), tuple(out.logdet.shape), sorted(out.regularization)
        ((2, 64), (2,), ['jacfrob', 'kinetic'])
    """

    z: Tensor
    logdet: Tensor
    regularization: dict[str, Tensor]
    nfe: int
