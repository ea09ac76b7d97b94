"""Noisy pendulums fitted by a latent ODE, plain and with kinetic penalties: NFE, and error against the truth."""

import argparse

import matplotlib.pyplot as plt
import torch
from torch import nn

from rnode_plugin import NeuralODE
from rnode_plugin.fields import linear_field

TIMES = torch.linspace(0, 4, 21)
SEEN, NOISE = 6, 0.05  # the first 6 angles are the input; standard deviation of the noise in radians
CONFIGURATIONS = {  # with the color of the curve
    "plain": ({"kinetic": 0}, "gray"),
    "['kinetic']": (["kinetic"], "C0"),
    "{'kinetic': 1}": ({"kinetic": 1}, "C1"),
}


def pendulums(count):
    """Angles (count, times) of damped pendulums from random starts, without noise."""

    def motion(t, x):
        return torch.stack([x[:, 1], -0.1 * x[:, 1] - 4 * torch.sin(x[:, 0])], 1)

    ode = NeuralODE(motion, solver="dopri5", atol=1e-6, rtol=1e-6)
    return ode.trajectory(torch.empty(count, 2).uniform_(-2, 2), TIMES)[..., 0].T


class LatentODE(nn.Module):
    """The first angles become a state of size 8 that moves by an ODE; its first entry is the angle."""

    def __init__(self, regularizers):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(SEEN, 32), nn.Tanh(), nn.Linear(32, 8))
        # output times are interpolated: the solver takes no more steps than the dynamics need
        options = {"solver": "dopri5", "interpolator": "4th", "atol": 1e-4, "rtol": 1e-4, "return_t_eval": False}
        self.ode = NeuralODE(linear_field(8, layers=2, activation="tanh"), regularizers=regularizers, **options)

    def forward(self, angles):
        return self.ode(self.encode(angles[:, :SEEN]), TIMES)[..., 0].T


def train(model, angles, *, steps):
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(steps):
        loss = (model(angles) - angles).square().mean() / NOISE**2 + model.ode.reg_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="time_series.png", help="file of the plot")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    truth, held_out = pendulums(128), pendulums(256)
    angles, given = (x + NOISE * torch.randn_like(x) for x in (truth, held_out))
    plt.style.use("rnode_plugin.plots")
    figure, axes = plt.subplots(figsize=(8, 4))
    axes.plot(TIMES, held_out[0], color="C2", linewidth=5, alpha=0.5, label="truth")
    axes.plot(TIMES[:SEEN], given[0, :SEEN], ".", color="C4", label="seen")
    print(f"{'regularizers':<16} {'NFE':>4} {'error, rad':>11}   on 256 held-out series, without noise")
    for name, (regularizers, color) in CONFIGURATIONS.items():
        torch.manual_seed(options.seed)
        model = train(LatentODE(regularizers), angles, steps=options.steps)
        model.ode.vf.nfe = 0
        with torch.no_grad():
            predicted = model(given)
        print(f"{name:<16} {model.ode.vf.nfe:>4.0f} {(predicted - held_out).square().mean().sqrt():>11.4f}")
        axes.plot(TIMES, predicted[0], color=color, label=name)
    axes.set(xlabel="time, s", ylabel="angle, rad")
    axes.legend()
    figure.savefig(options.output, dpi=150)


if __name__ == "__main__":
    main()
