"""Transport with growth: a penalty in one line, weighted by a column of the state, against its closed form.

The state of a particle is its position and the logarithm of its mass w. The action, the integral of
w (|v|^2 + a g^2) for a velocity v and a growth rate g, is least on a geodesic of Hellinger and Kantorovich, whose
action is known: a particle moves while it is light.
"""

import argparse
import math

import matplotlib.pyplot as plt
import torch

from rnode_plugin import NeuralODE
from rnode_plugin.fields import linear_field

A = 0.25  # the price of growth
SHIFT = torch.tensor([2.0, 0.0])
T_SPAN = torch.linspace(0, 1, 6)


def growth(t, z, dz):
    """w (|v|^2 + a g^2), a rate per sample, (B,), for a state (x, y, log w)."""
    return z[:, 2].exp() * (dz[:, :2].square().sum(1) + A * dz[:, 2].square())


PENALTIES = {"none": {}, "kinetic": {"kinetic": 0.1}, "growth": {growth: 0.1}}


def least(mass):
    """The least action that moves a unit mass by SHIFT and changes it to ``mass``."""
    angle = SHIFT.norm() / (2 * math.sqrt(A))
    return 4 * A * (1 + mass - 2 * mass.sqrt() * angle.cos())


def steady(mass):
    """The action of a constant velocity and a constant growth rate."""
    rate = mass.log()
    return (SHIFT.square().sum() + A * rate.square()) * torch.expm1(rate) / rate


def particles(count):
    """Unit masses on a vertical line, and their ends: those above have grown, those below have shrunk."""
    height = 2 * torch.rand(count) - 1
    start = torch.stack([torch.zeros(count), height, torch.zeros(count)], 1)
    end = start + torch.cat([SHIFT, torch.zeros(1)]) + math.log(3) * height[:, None] * torch.tensor([0.0, 0.0, 1.0])
    return start, end


def train(regularizers, *, steps, seed):
    torch.manual_seed(seed)
    field = linear_field(3, activation="tanh")
    model = NeuralODE(field, solver="rk4_38", regularizers=regularizers)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(steps):
        start, end = particles(128)
        _, path = model(start, T_SPAN)
        loss = 10 * (path[-1] - end).square().mean() + model.reg_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return field


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="unbalanced_transport.png", help="file of the plot")
    options = parser.parse_args()
    torch.manual_seed(options.seed + 1)
    start, end = particles(1000)
    mass = end[:, 2].exp()
    print(f"least action: {least(mass).mean():.3f}, with a constant velocity and growth: {steady(mass).mean():.3f}")
    plt.style.use("rnode_plugin.plots")
    figure, panels = plt.subplots(1, len(PENALTIES), figsize=(11, 3.6), sharex=True, sharey=True)
    print(f"{'penalty':<8} {'action':>7} {'error of the end':>17}")
    for (name, regularizers), axes in zip(PENALTIES.items(), panels, strict=True):
        field = train(regularizers, steps=options.steps, seed=options.seed)
        model = NeuralODE(field, solver="dopri5", regularizers=[growth])  # the same field, its action followed
        with torch.no_grad():
            _, path = model(start, torch.linspace(0, 1, 21), penalties=True)
        error = (path[-1] - end).square().sum(1).mean().sqrt()
        action = model.regularization["growth"].mean()
        print(f"{name:<8} {action:>7.3f} {error:>17.3f}", flush=True)
        shown = path[:, start[:, 1].argsort()[::50]]
        for each in shown.unbind(1):
            axes.scatter(*each[:, :2].T, s=20 * each[:, 2].exp(), alpha=0.5, linewidth=0)
        axes.set(title=f"penalty: {name}, action {action:.2f}", xlabel="$x_1$")
    panels[0].set_ylabel("$x_2$")
    figure.savefig(options.output, dpi=120)


if __name__ == "__main__":
    main()
