"""Densities in closed form for the checks of a diagnosis, and the same ones broken on purpose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, Normal

from rnode_plugin import Dynamics, RegularizedCNF, Solver
from rnode_plugin.core.derivatives import VELOCITY, Ask, AutogradField, Linearization
from rnode_plugin.core.distribution import DensityModel
from rnode_plugin.core.objective import FlowOutput
from rnode_plugin.core.trace_estimators import Hutchinson
from rnode_plugin.solvers import solve

MATRIX = torch.tensor([[0.5, 0.8], [-0.6, -0.4]])


class Linear(nn.Module):
    """``f(t, z) = A z``."""

    def __init__(self, matrix: Tensor = MATRIX) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return z @ self.matrix.T


def gaussian(matrix: Tensor, n: int, *, seed: int = 0) -> Tensor:
    """Samples of the density of :class:`Linear`: ``x = exp(-A) z`` for a standard normal ``z``."""
    z = torch.randn(n, len(matrix), generator=torch.Generator().manual_seed(seed), dtype=matrix.dtype)
    return z @ torch.linalg.matrix_exp(-matrix).T


def gaussian_log_prob(matrix: Tensor, x: Tensor) -> Tensor:
    """Its log-density, ``(B,)`` in nats."""
    back = torch.linalg.matrix_exp(-matrix)
    return MultivariateNormal(torch.zeros(len(matrix)).to(matrix), back @ back.T).log_prob(x)


def density(net: nn.Module | None = None, **options: Any) -> RegularizedCNF:
    """A density in the plane; the one of :class:`Linear` unless another net is given."""
    return RegularizedCNF(net or Linear(), event_shape=2, regularizers=(), **options)


class WrongProduct(Linear):
    """A field whose own product with the Jacobian is too large."""

    def linearize(self, t: Tensor, z: Tensor, noise: Any = None, *, ask: Ask = VELOCITY) -> Linearization:
        found = AutogradField(self.forward).linearize(t, z, noise, ask=ask)
        products, divergence = (None if x is None else 1.2 * x for x in (found.products, found.divergence))
        return found._replace(products=products, divergence=divergence)


class WrongInverse(RegularizedCNF):
    """A density whose inverse leads to other places."""

    def inverse(self, z: Tensor, *, context: Tensor | None = None) -> Tensor:
        return super().inverse(z, context=context) + 0.05


class Rotation(nn.Module):
    """``f(t, z)`` turns by ``angle`` in one unit of time."""

    def __init__(self, angle: float) -> None:
        super().__init__()
        self.angle = angle

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.angle * torch.stack([-z[:, 1], z[:, 0]], 1)


class Blows(nn.Module):
    """``f(t, z) = 3 z^3``, whose solution ends at a finite time."""

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return 3 * z**3


class Shift(nn.Module):
    """``f(t, z, c) = c1 - log(c2) z``: a normal posterior around a multiple of ``c1`` with the deviation ``c2``."""

    def forward(self, t: Tensor, z: Tensor, context: Tensor) -> Tensor:
        place, spread = context[:, :1], context[:, 1:]
        return place - spread.log() * z


def posterior_pairs(n: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pairs ``(x (n, 2), context (n, 2))`` of :class:`Shift`."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.randn(n, 1, generator=generator)
    spread = 0.5 + 1.5 * torch.rand(n, 1, generator=generator)
    z = torch.randn(n, 2, generator=generator)
    # z = e^r x + place (e^r - 1) / r with r = -log(spread)
    rate = -spread.log()
    mean = -place * (1 - torch.exp(-rate)) / rate
    return mean + spread * z, torch.cat([place, spread], 1)


def posterior() -> RegularizedCNF:
    return RegularizedCNF(Shift(), event_shape=2, context_shape=2, trace_estimator="exact", regularizers=())


class TableFlow(DensityModel):
    """A flow of another class, with standardised columns and, if ``conditional``, a context that shifts them.

    ``off`` shifts its samples alone; ``extra`` is added to its log-determinant alone.
    """

    def __init__(
        self, *, conditional: bool = False, solver: Solver | None = None, off: float = 0.0, extra: float = 0.0
    ) -> None:
        super().__init__()
        self.field, self.off, self.extra = Linear(), off, extra
        self.solver = solver or Solver(method="dopri5")
        self.estimator = Hutchinson("gaussian")
        self.event_shape = torch.Size([2])
        self.context_shape = torch.Size([2]) if conditional else None
        self.base = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
        self.scale = torch.tensor([10.0, 0.1])

    def encode(
        self, x: Tensor, *, context: Tensor | None = None, noise: Any = None, penalties: bool | None = None
    ) -> FlowOutput:
        output = self._solve(x / self.scale - self._shift(context), [0.0, 1.0], noise, penalties)
        return replace(output, logdet=output.logdet - self.scale.log().sum() + self.extra)

    def decode(
        self, z: Tensor, *, context: Tensor | None = None, noise: Any = None, penalties: bool | None = None
    ) -> FlowOutput:
        output = self._solve(z, [1.0, 0.0], noise, penalties)
        x = (output.z + self._shift(context) + self.off) * self.scale
        return replace(output, z=x, logdet=output.logdet + self.scale.log().sum() - self.extra)

    def _solve(self, z: Tensor, times: list[float], noise: Any, penalties: bool | None) -> FlowOutput:
        followed = self.regularizers if penalties else ()
        dynamics = Dynamics(self.field, regularizers=followed, estimator=self.estimator)
        bound = dynamics.bind(dynamics.draw(z) if noise is None else noise[0])
        solution = solve(bound, z, torch.tensor(times), self.solver)
        assert solution.logdet is not None
        return FlowOutput(solution.z[-1], solution.logdet[-1], solution.penalties, solution.stats.nfe)

    def data(self, n: int, context: Tensor | None = None) -> Tensor:
        """Samples of its density in closed form."""
        return (gaussian(MATRIX, n, seed=5) + self._shift(context)) * self.scale

    def _shift(self, context: Tensor | None) -> Tensor | float:
        return 0.0 if context is None else context
