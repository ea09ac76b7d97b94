"""Densities in closed form for the checks of a diagnosis, and the same ones broken on purpose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from rnode_plugin import RegularizedCNF
from rnode_plugin.core.derivatives import VELOCITY, AutogradField, Field, Linearization
from rnode_plugin.core.objective import FlowOutput

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


class WrongProduct(Linear, Field):
    """A field whose own product with the Jacobian is too large."""

    def linearize(
        self, t: Tensor, z: Tensor, probes: Any = None, wants: frozenset[str] = VELOCITY, *, peek: Any = None
    ) -> Linearization:
        found = AutogradField(self.forward).linearize(t, z, probes, wants, peek=peek)
        products, trace = (None if x is None else 1.2 * x for x in (found.products, found.trace))
        return found._replace(products=products, trace=trace)


class WrongInverse(RegularizedCNF):
    """A density whose inverse leads to other places."""

    def inverse(self, z: Tensor, **options: Any) -> Tensor:
        return super().inverse(z, **options) + 0.05


class WrongLogdet(RegularizedCNF):
    """A density whose log-determinant has a term too many."""

    extra = 1.0

    def encode(self, x: Tensor, **options: Any) -> FlowOutput:
        output = super().encode(x, **options)
        return replace(output, logdet=output.logdet + self.extra)


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
