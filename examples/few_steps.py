"""Flow matching for few steps of Euler: a penalty on the acceleration, by a product and by a finite difference.

The error is the distance between the end of 2, 4 or 8 Euler steps and the end of an accurate solve of the same
velocity from the same noise, as a root mean square. The energy distance compares the samples of 4 steps with data.
"""

import argparse
import math
import time

import matplotlib.pyplot as plt
import torch
from torch import nn

from rnode_plugin import RegularizedCNF, penalties_at
from rnode_plugin.regularizers import Rate


def difference_in_time(evaluation):
    """The squared acceleration by a second evaluation, which has no gradient."""
    with torch.no_grad():
        later = evaluation.velocity(evaluation.t + 0.1, evaluation.z + 0.1 * evaluation.dz)
    return (evaluation.dz - later.detach()).square().sum(1) / 0.1**2


PENALTIES = {  # with lambda and the color of the lines
    "none": (0.0, "gray"),
    "total_derivative": (0.1, "C0"),
    "difference": (0.01, "C1"),
}
RATES = {
    "total_derivative": "total_derivative",
    "difference": Rate("difference", difference_in_time, needs={"field"}),
}
STEPS = (2, 4, 8)


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


def train(penalty, strength, steps):
    velocity = Velocity()
    optimizer = torch.optim.Adam(velocity.parameters(), lr=3e-3)
    start = time.process_time()
    for _ in range(steps):
        x0, x1, t = torch.randn(256, 2), ring(256), torch.rand(256)
        x_t = x0 + t[:, None] * (x1 - x0)
        v = velocity(x_t, t)
        loss = (v - (x1 - x0)).square().mean()
        if strength:
            rates = penalties_at(velocity, t, x_t, [RATES[penalty]], velocity=v)
            loss = loss + strength * rates[penalty].mean() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return velocity, 1000 * (time.process_time() - start) / steps


def energy_distance(x, y):
    """Squared, of two samples; 0 for equal distributions."""
    inner = [torch.cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y)]
    return (2 * torch.cdist(x, y).mean() - sum(inner)).item()


@torch.no_grad()
def samples(velocity, noise, **options):
    return RegularizedCNF.from_velocity(velocity, event_shape=2, **options).inverse(noise)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="the first of three")
    parser.add_argument("--output", default="few_steps.png", help="file of the plot")
    options = parser.parse_args()
    plt.style.use("rnode_plugin.plots")
    figure, axes = plt.subplots(figsize=(5, 3.4))
    print(f"{'penalty':<22} {'seed':>4} {'2 steps':>8} {'4 steps':>8} {'8 steps':>8} {'energy':>7} {'ms/step':>8}")
    for penalty, (strength, color) in PENALTIES.items():
        for seed in range(options.seed, options.seed + 3):
            torch.manual_seed(seed)
            velocity, pace = train(penalty, strength, options.steps)
            torch.manual_seed(1000 + seed)  # the same points for all
            noise, data = torch.randn(2000, 2), ring(2000)
            exact = samples(velocity, noise)
            coarse = {n: samples(velocity, noise, solver="euler", steps=n) for n in STEPS}
            errors = [(each - exact).square().sum(1).mean().sqrt().item() for each in coarse.values()]
            cells = "".join(f" {error:>8.3f}" for error in errors)
            distance = energy_distance(coarse[4], data)
            print(f"{penalty:<22} {seed:>4}{cells} {distance:>7.4f} {pace:>8.2f}", flush=True)
            axes.loglog(STEPS, errors, "o-", color=color, label=penalty if seed == options.seed else None)
    axes.set(xlabel="steps of Euler", ylabel="error of a sample", xticks=STEPS, xticklabels=STEPS)
    axes.minorticks_off()
    axes.legend(title="penalty")
    figure.savefig(options.output, dpi=150)


if __name__ == "__main__":
    main()
