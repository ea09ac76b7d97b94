"""The paper's figure 1: paths with and without the penalties, in one dimension and in the plane."""

import argparse
import math
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torchdyn.datasets import ToyDataset

from rnode_plugin import Adaptive, FixedGrid, System, objective
from rnode_plugin.core.objective import standard_normal_log_prob
from rnode_plugin.experiments.random_streams import Stream, seeded
from rnode_plugin.regularizers import jacfrob, kinetic

MEANS, DEVIATION = torch.tensor([-1.5, 1.5]), 0.35
PLANE = ("moons", "spirals", "gaussians", "gaussians_spiral")
TRAIN, TEST = FixedGrid("rk4", step=1 / 10), Adaptive("dopri5", atol=1e-5, rtol=1e-5)
EXACT = Adaptive("dopri5", atol=1e-6, rtol=1e-6)
SPAN = torch.tensor([0.0, 1.0])
DATA, COLORS = "#e69f00", ("#808080", "#0072b2")


def mixture(count, *, seed=0):
    """Samples ``(count, 1)`` of two equal Gaussians."""
    with seeded(seed, Stream.SAMPLE):
        return MEANS[torch.randint(len(MEANS), (count, 1))] + DEVIATION * torch.randn(count, 1)


def mixture_log_prob(x):
    """Log-density ``(B,)`` in nats of the mixture at ``x (B, 1)``."""
    return torch.distributions.Normal(MEANS, DEVIATION).log_prob(x).logsumexp(1) - math.log(len(MEANS))


def plane_data(name, count, *, seed=0, noise=0.15):
    """Samples ``(count, 2)`` of torchdyn's toy data with noise, each coordinate with mean 0 and deviation 1."""
    state = np.random.get_state()  # torchdyn draws from numpy's global generator
    np.random.seed(seed)
    try:
        with seeded(seed, Stream.SAMPLE):
            points = ToyDataset().generate(count, name)[0].float()
            points = points[torch.randperm(len(points))[:count]]  # they come in the order of the curve
            points = (points - points.mean(0)) / points.std(0) + noise * torch.randn(count, 2)
    finally:
        np.random.set_state(state)
    return (points - points.mean(0)) / points.std(0)


class TimeField(nn.Module):
    """A field ``f(t, z)`` with sines of time, large at first: training by likelihood alone keeps much of it."""

    def __init__(self, dims, *, hidden=64, periods=4, gain=2.0):
        super().__init__()
        self.register_buffer("frequencies", math.pi * torch.arange(1, periods + 1))
        sizes = (dims + 2 * periods, hidden, hidden, dims)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.mul_(gain)  # pyright: ignore[reportCallIssue]

    def forward(self, t, z):
        phases = self.frequencies * t
        h = torch.cat([z, torch.cat([phases.sin(), phases.cos()]).expand(len(z), -1)], 1)
        for layer in self.layers[:-1]:
            h = torch.tanh(layer(h))
        return self.layers[-1](h)


def log_prob(solution):
    return standard_normal_log_prob(solution.z[-1]) + solution.logdet[-1]


def train_field(x, *, lambdas, steps, seed=0, batch_size=256, lr=5e-3):
    """Fit a flow from data to the standard normal (eq. 17); one seed gives the same first weights and batches."""
    with seeded(seed, Stream.WEIGHTS):
        field = TimeField(x.shape[1])
        batches = torch.randint(len(x), (steps, batch_size))
    system = System((kinetic, jacfrob), "exact")
    adam = torch.optim.Adam(field.parameters(), lr=lr)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for batch in batches:
        solution = TRAIN.solve(system.start(field, x[batch]), x[batch], SPAN)
        adam.zero_grad()
        objective(log_prob(solution), solution.penalties, lambdas=lambdas, dims=x.shape[1]).loss.backward()
        adam.step()
        rate.step()
    return field


@torch.no_grad()
def follow(field, x, *, points=201):
    """Paths ``(points, B, D)`` from ``x (B, D)`` at evenly spread times from 0 to 1."""
    return EXACT.solve(System().start(field, x, density=False), x, torch.linspace(0, 1, points)).z


@torch.no_grad()
def measure(field, x, *, points=201):
    """What a flow does to ``x (B, D)``: the rows of the table."""
    system = System((kinetic, jacfrob), "exact")
    solution = TEST.solve(system.start(field, x), x, SPAN)
    path, dims = follow(field, x, points=points), x.shape[1]
    steps = (path[1:] - path[:-1]).norm(dim=2)
    return {
        "negative log-likelihood, nats/dim": -float(log_prob(solution).mean()) / dims,
        "path length / displacement": float(steps.sum() / (path[-1] - path[0]).norm(dim=1).sum()),
        "speed variation": float((steps.std(0, unbiased=False) / steps.mean(0)).mean()),
        "NFE, dopri5 at 1e-5": float(solution.stats.nfe),
        "kinetic energy / dim": float(solution.penalties["kinetic"].mean()) / dims,
        "squared Jacobian norm / dim": float(solution.penalties["jacfrob"].mean()) / dims,
    }


@torch.no_grad()
def log_density(field, x):
    return log_prob(TEST.solve(System(trace_estimator="exact").start(field, x), x, SPAN))


def paint_line(axes, field, x, label, color):
    """Density of data and model, paths, density of the samples that arrive."""
    grid = torch.linspace(-3.2, 3.2, 321)[:, None]
    axes[0].plot(mixture_log_prob(grid).exp(), grid[:, 0], color=DATA, linewidth=4, alpha=0.5)
    axes[0].plot(log_density(field, grid).exp(), grid[:, 0], color=color)
    path = follow(field, x)
    axes[1].plot(torch.linspace(0, 1, len(path)), path[:, :: len(x) // 25, 0], color=color, linewidth=1)
    axes[2].hist(path[-1, :, 0].numpy(), 40, range=(-3.2, 3.2), density=True, orientation="horizontal", color=color)
    axes[1].set_title(label)


def paint_plane(axes, field, x, label, color):
    """Density of the model, paths, vector field at t = 0.5."""
    line = torch.linspace(-2.6, 2.6, 80)
    values = log_density(field, torch.cartesian_prod(line, line)).exp().reshape(80, 80)
    axes[0].contour(line, line, values.T, 8, colors=color, linewidths=0.8)
    path = follow(field, x[:60])
    axes[1].plot(path[:, :, 0], path[:, :, 1], color=color, linewidth=0.8)
    axes[1].scatter(*path[0].T, s=9, color=DATA, zorder=3)
    axes[1].scatter(*path[-1].T, s=9, color=color, zorder=3)
    points = torch.cartesian_prod(torch.linspace(-2.4, 2.4, 15), torch.linspace(-2.4, 2.4, 15))
    axes[2].quiver(*points.T, *field(torch.tensor(0.5), points).detach().T, color=color, width=0.006)
    for each, title in zip(axes, ("density", label, "vector field at t = 0.5"), strict=True):
        each.set(title=title, xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), aspect="equal")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="moons", choices=("mixture", *PLANE))
    parser.add_argument("--strength", type=float, default=0.05, help="lambda of both penalties")
    parser.add_argument("--steps", type=int, default=500, help="of each training")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and batches")
    parser.add_argument("--output", default="figure_1.png")
    args = parser.parse_args()
    torch.set_num_threads(1)  # products this small cost more on several threads
    make = mixture if args.data == "mixture" else lambda count, seed: plane_data(args.data, count, seed=seed)
    x, fresh = make(20_000, seed=args.seed), make(1_000, seed=args.seed + 1)
    flows = {"no penalty": {}, f"lambda {args.strength:g}": dict.fromkeys(("kinetic", "jacfrob"), args.strength)}
    fields = [train_field(x, lambdas=lambdas, steps=args.steps, seed=args.seed) for lambdas in flows.values()]
    found = [measure(field, fresh) for field in fields]
    print(f"{args.data:36}{''.join(f'{label:>14}' for label in flows)}")
    for name in found[0]:
        print(f"{name:36}{''.join(f'{each[name]:14.4g}' for each in found)}")
    plt.style.use(["rnode_plugin.plots", {"axes.titlesize": 8}])
    figure, axes = plt.subplots(2, 3, figsize=(8.6, 5.6))
    paint = paint_line if args.data == "mixture" else paint_plane
    for row, field, numbers, label, color in zip(axes, fields, found, flows, COLORS, strict=True):
        bent = f"path / displacement {numbers['path length / displacement']:.2f}"
        paint(row, field, fresh, f"{label}: {bent}, NFE {numbers['NFE, dopri5 at 1e-5']:.0f}", color)
    figure.savefig(args.output, dpi=160)


if __name__ == "__main__":
    main()
