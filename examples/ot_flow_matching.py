"""OT flow matching in the plane, with penalties at the points of each batch: NFE against energy distance."""

import argparse
import math

import matplotlib.pyplot as plt
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from rnode_plugin import RegularizedCNF, penalties_at

PENALTIES = {  # with the color of the points
    "none": ({}, "gray"),
    "kinetic": ({"kinetic": 0.1}, "C0"),
    "jacfrob": ({"jacfrob": 0.01}, "C1"),
    "both": ({"kinetic": 0.1, "jacfrob": 0.01}, "C2"),
}


class Velocity(nn.Module):
    def __init__(self):
        super().__init__()
        layers = [nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)]
        self.net = nn.Sequential(*layers)

    def forward(self, x, t):
        return self.net(torch.cat([x, t.expand(len(x)).unsqueeze(1)], 1))


def ring(count):
    """Eight Gaussians on a circle."""
    angle = torch.randint(8, (count,)) * math.pi / 4
    return 2 * torch.stack([angle.cos(), angle.sin()], 1) + 0.15 * torch.randn(count, 2)


def train(regularizers, steps):
    velocity = Velocity()
    optimizer = torch.optim.Adam(velocity.parameters(), lr=3e-3)
    for _ in range(steps):
        x0, x1 = torch.randn(256, 2), ring(256)
        rows, columns = linear_sum_assignment(torch.cdist(x0, x1).square().numpy())  # optimal transport
        x0, x1, t = x0[rows], x1[columns], torch.rand(256)
        x_t = x0 + t[:, None] * (x1 - x0)
        loss = (velocity(x_t, t) - (x1 - x0)).square().mean()
        if regularizers:
            rates = penalties_at(velocity, t, x_t, list(regularizers), trace_estimator="gaussian")
            loss = loss + sum(strength * rates[name].mean() / 2 for name, strength in regularizers.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return velocity


def energy_distance(x, y):
    """Squared, of two samples; 0 for equal distributions."""
    inner = [torch.cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y)]
    return (2 * torch.cdist(x, y).mean() - sum(inner)).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="the first of three")
    parser.add_argument("--output", default="ot_flow_matching.png", help="file of the plot")
    options = parser.parse_args()
    plt.style.use("rnode_plugin.plots")
    figure, axes = plt.subplots(figsize=(5, 3.4))
    print(f"{'penalties':<9} {'seed':>4} {'NFE':>4} {'energy distance':>16}")
    for name, (regularizers, color) in PENALTIES.items():
        found = []
        for seed in range(options.seed, options.seed + 3):
            torch.manual_seed(seed)
            velocity = train(regularizers, options.steps)
            torch.manual_seed(1000 + seed)  # the same points for all
            noise, data = torch.randn(5000, 2), ring(5000)
            model = RegularizedCNF.from_velocity(velocity, event_shape=2)
            with torch.no_grad():
                samples = model.inverse(noise)
            found.append((model.nfe, energy_distance(samples, data)))
            print("{:<9} {:>4} {:>4} {:>16.4f}".format(name, seed, *found[-1]), flush=True)
        axes.scatter(*zip(*found, strict=True), color=color, label=name)
    axes.set(xlabel="NFE of sampling, dopri5 at 1e-5", ylabel="energy distance", ylim=(0, None))
    axes.legend(title="penalties")
    figure.savefig(options.output, dpi=150)


if __name__ == "__main__":
    main()
