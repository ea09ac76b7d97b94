"""Toy flows in one and two dimensions, and how straight and even their trajectories are (the paper's figure 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..core.augmented import Dynamics
from ..core.objective import objective, standard_normal_log_prob
from ..core.random_streams import Stream, seeded
from ..core.regularizers import jacfrob, kinetic
from ..errors import ConfigError, suggest
from ..solvers import Solver, solve
from ..types import Solution

__all__ = [
    "PLANE_DATA",
    "Measured",
    "TimeField",
    "follow",
    "log_density",
    "measure",
    "mixture",
    "mixture_log_prob",
    "path_lengths",
    "plane_data",
    "speed_variation",
    "train_field",
]

PLANE_DATA = ("moons", "spirals", "gaussians", "gaussians_spiral")
"""torchdyn's data sets in two dimensions that a figure can be made of."""

_MEANS, _DEVIATION = (-1.5, 1.5), 0.35
_TRAIN = Solver(method="rk4", step=1 / 10)
_EXACT = Solver(method="dopri5", atol=1e-6, rtol=1e-6)
_TEST = Solver(method="dopri5", atol=1e-5, rtol=1e-5)


def mixture(count: int, *, seed: int = 0) -> Tensor:
    """Samples ``(count, 1)`` of two equal Gaussians in one dimension."""
    with seeded(seed, Stream.SAMPLE):
        means = torch.tensor(_MEANS)[torch.randint(len(_MEANS), (count, 1))]
        return means + _DEVIATION * torch.randn(count, 1)


def mixture_log_prob(x: Tensor) -> Tensor:
    """Log-density ``(B,)`` in nats of the mixture itself at ``x (B, 1)``."""
    parts = torch.distributions.Normal(torch.tensor(_MEANS), _DEVIATION).log_prob(x)
    return parts.logsumexp(1) - math.log(len(_MEANS))


def plane_data(name: str, count: int, *, seed: int = 0, noise: float = 0.15) -> Tensor:
    """Samples ``(count, 2)`` of one of torchdyn's toy data sets, each coordinate with mean 0 and deviation 1.

    Args:
        name: one of :data:`PLANE_DATA`.
        count: number of samples.
        seed: of the samples.
        noise: standard deviation of what is added to each coordinate, so that the data have a density.

    Raises:
        ConfigError: for another name.
    """
    if name not in PLANE_DATA:
        raise ConfigError(suggest(name, PLANE_DATA, "data set"))
    import numpy as np
    from torchdyn.datasets import ToyDataset

    state = np.random.get_state()  # torchdyn draws from numpy's global generator, which is the caller's
    np.random.seed(seed)
    try:
        with seeded(seed, Stream.SAMPLE):
            points, _ = ToyDataset().generate(count, name)
            # torchdyn's come in the order of the curve, and of some sets in a multiple of count
            points = points.float()[torch.randperm(len(points))[:count]]
            points = (points - points.mean(0)) / points.std(0) + noise * torch.randn(count, 2)
    finally:
        np.random.set_state(state)
    return (points - points.mean(0)) / points.std(0)


class TimeField(nn.Module):
    """A small field ``f(t, z)`` that depends on time through sines up to two full periods.

    It starts from a random field that is far from zero and swings in time. The likelihood does not ask for anything
    else than the right end of the flow, so that a plain fit keeps much of it.
    """

    def __init__(self, dims: int, *, hidden: int = 64, periods: int = 4, gain: float = 2.0) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi * torch.arange(1, periods + 1))
        self.frequencies: Tensor
        sizes = (dims + 2 * periods, hidden, hidden, dims)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        with torch.no_grad():
            for parameter in self.layers.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(gain)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """Velocity ``(B, D)`` at a scalar time and states ``(B, D)``."""
        phases = self.frequencies * t
        waves = torch.cat([phases.sin(), phases.cos()]).expand(len(z), -1)
        h = torch.cat([z, waves], 1)
        for layer in self.layers[:-1]:
            h = torch.tanh(layer(h))
        return self.layers[-1](h)


def train_field(
    x: Tensor,
    *,
    lambdas: Mapping[str, float],
    steps: int = 300,
    batch_size: int = 256,
    lr: float = 5e-3,
    seed: int = 0,
) -> TimeField:
    """Fit a flow from data to the standard normal by maximum likelihood with penalties (eq. 17), traces exact.

    The same seed gives the same first weights and batches whatever the lambdas.

    Args:
        x: data ``(N, D)``.
        lambdas: strength of ``kinetic`` and ``jacfrob``; empty for none.
        steps: of Adam, with a rate that falls to zero along half a cosine.
        batch_size: samples of a step.
        lr: first learning rate.
        seed: of weights and batches.
    """
    with seeded(seed, Stream.WEIGHTS):
        field = TimeField(x.shape[1])
        batches = torch.randint(len(x), (steps, batch_size))
    dynamics = Dynamics(field, regularizers=(kinetic, jacfrob), estimator="exact")
    adam = torch.optim.Adam(field.parameters(), lr=lr)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for batch in batches:
        solution = solve(dynamics.bind(None), x[batch], _times(), _TRAIN)
        goal = objective(_log_prob(solution), solution.penalties, lambdas=lambdas, dims=x.shape[1])
        adam.zero_grad()
        goal.loss.backward()
        adam.step()
        rate.step()
    return field


@dataclass(frozen=True)
class Measured:
    """What the flow of a field does to some samples.

    Attributes:
        nll: mean of ``-log p(x)`` in nats per dimension.
        straightness: length of all paths over their displacements; 1 for straight lines that never turn back.
        speed_variation: mean over samples of the deviation of the speed over time, divided by its mean; 0 for paths
            of constant speed.
        nfe: evaluations of an adaptive solver (dopri5, 1e-5).
        kinetic: mean integral of ``||f||^2`` per dimension.
        jacfrob: mean integral of ``||df/dz||_F^2`` per dimension.
    """

    nll: float
    straightness: float
    speed_variation: float
    nfe: int
    kinetic: float
    jacfrob: float


@torch.no_grad()
def measure(field: nn.Module, x: Tensor, *, points: int = 201) -> Measured:
    """Measure the flow of ``field`` on samples ``x (B, D)``: traces exact, ``points`` times on each path."""
    dynamics = Dynamics(field, regularizers=(kinetic, jacfrob), estimator="exact")
    solution = solve(dynamics.bind(None), x, _times(), _TEST)
    path = follow(field, x, points=points)
    length, displacement = path_lengths(path)
    dims = x.shape[1]
    return Measured(
        nll=-float(_log_prob(solution).mean()) / dims,
        straightness=float(length.sum() / displacement.sum()),
        speed_variation=float(speed_variation(path).mean()),
        nfe=solution.stats.nfe,
        kinetic=float(solution.penalties["kinetic"].mean()) / dims,
        jacfrob=float(solution.penalties["jacfrob"].mean()) / dims,
    )


@torch.no_grad()
def follow(field: nn.Module, x: Tensor, *, points: int = 201) -> Tensor:
    """Paths ``(points, B, D)`` from ``x (B, D)`` at evenly spread times from 0 to 1."""
    dynamics = Dynamics(field, divergence=False)
    return solve(dynamics.bind(None), x, torch.linspace(0, 1, points), _EXACT).z


@torch.no_grad()
def log_density(field: nn.Module, x: Tensor) -> Tensor:
    """``log p(x) (B,)`` in nats under the flow of ``field`` (eq. 4)."""
    dynamics = Dynamics(field, estimator="exact")
    return _log_prob(solve(dynamics.bind(None), x, _times(), _TEST))


def path_lengths(path: Tensor) -> tuple[Tensor, Tensor]:
    """Length of each path ``(T, B, D)`` as a chain of its points, and the distance of its ends, both ``(B,)``."""
    return (path[1:] - path[:-1]).norm(dim=2).sum(0), (path[-1] - path[0]).norm(dim=1)


def speed_variation(path: Tensor) -> Tensor:
    """Deviation of the speed along each path ``(T, B, D)`` of evenly spread times over its mean, ``(B,)``."""
    steps = (path[1:] - path[:-1]).norm(dim=2)
    return steps.std(0, unbiased=False) / steps.mean(0)


def _log_prob(solution: Solution) -> Tensor:
    assert solution.logdet is not None
    return standard_normal_log_prob(solution.z[-1]) + solution.logdet[-1]


def _times() -> Tensor:
    return torch.tensor([0.0, 1.0])
