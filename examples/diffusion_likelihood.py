"""The likelihood of a small diffusion model by its probability-flow ODE, against the truth.

The data are eight Gaussians on a circle with the weights 8, 4, 2 and 1, so their density is known, and so is the
noise that a perfect network predicts. With states ``x_t = alpha(t) x + sigma(t) noise`` of a variance-preserving
schedule, the ODE is ``dx/dt = -beta(t) / 2 (x - noise / sigma(t))`` (Song et al. 2021, arXiv 2011.13456).
"""

import argparse
import math

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from rnode_plugin import RegularizedCNF

LOW, HIGH = 0.1, 20.0  # beta(t) = LOW + t (HIGH - LOW), score_sde's
DATA_TIME = 1e-3  # the velocity is singular at time 0, where sigma is 0
ANGLES = torch.arange(8) * math.pi / 4
MEANS, WIDTH = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1), 0.3
WEIGHTS = torch.tensor([8.0, 4, 2, 1, 8, 4, 2, 1])


def levels(t):
    """alpha and sigma, with alpha^2 + sigma^2 = 1, at times of any shape."""
    log = -(LOW * t + (HIGH - LOW) * t**2 / 2)  # minus the integral of beta
    return (log / 2).exp(), (-torch.expm1(log)).sqrt()


def mixture(alpha=1.0, sigma=0.0):
    """The distribution of ``alpha x + sigma noise``."""
    width = math.sqrt((alpha * WIDTH) ** 2 + sigma**2) * torch.ones(8, 2)
    return MixtureSameFamily(Categorical(WEIGHTS), Independent(Normal(alpha * MEANS, width), 1))


def perfect(x, t):
    """The mean of the noise in states ``x (B, 2)`` at a time ``t``, in closed form."""
    alpha, sigma = levels(t)
    variance = (alpha * WIDTH) ** 2 + sigma**2
    squared = (x.unsqueeze(1) - alpha * MEANS).square().sum(2)
    component = (WEIGHTS.log() - squared / (2 * variance)).softmax(1)
    return sigma * (x - alpha * component @ MEANS) / variance


class Noise(nn.Module):
    """A network that predicts the noise in states ``x (B, 2)`` at times ``t``, ``(B,)`` or a scalar."""

    def __init__(self, width=128):
        super().__init__()
        layers = [nn.Linear(18, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)]
        self.net = nn.Sequential(*layers, nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x, t):
        phase = t.expand(len(x)).unsqueeze(1) * torch.linspace(0, 4, 8).exp()
        return self.net(torch.cat([x, phase.sin(), phase.cos()], 1))


def train(steps, seed):
    torch.manual_seed(seed)
    net, data = Noise(), mixture()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x, noise, t = data.sample((512,)), torch.randn(512, 2), DATA_TIME + (1 - DATA_TIME) * torch.rand(512)
        alpha, sigma = (level.unsqueeze(1) for level in levels(t))
        loss = (net(alpha * x + sigma * noise, t) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net


class ProbabilityFlow(nn.Module):
    """The velocity of the probability-flow ODE from a prediction of the noise, ``noise(x, t)``."""

    def __init__(self, noise):
        super().__init__()
        self.noise = noise

    def forward(self, t, x):
        return -0.5 * (LOW + t * (HIGH - LOW)) * (x - self.noise(x, t) / levels(t)[1])


def density(noise):
    return RegularizedCNF.from_velocity(
        ProbabilityFlow(noise), data_time=DATA_TIME, noise_time=1, event_shape=2, trace_estimator="exact"
    )


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="diffusion_likelihood.png", help="file of the plot")
    options = parser.parse_args()
    with torch.enable_grad():
        net = train(options.steps, options.seed)
    torch.manual_seed(options.seed + 1)
    x = mixture().sample((2000,))
    truth = mixture().log_prob(x)
    print(f"NLL of 2000 held-out points, truth: {-truth.mean():.4f} nats")
    print(f"{'noise':<8} {'NLL':>8} {'too high by':>12} {'NFE':>5}")
    for name, model in (("perfect", density(perfect)), ("trained", density(net))):
        log_prob = model.log_prob(x)
        print(f"{name:<8} {-log_prob.mean():>8.4f} {(truth - log_prob).mean():>12.4f} {model.nfe:>5}")

    plt.style.use("rnode_plugin.plots")
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.6))
    axis = torch.linspace(-4, 4, 81)
    points = torch.cartesian_prod(axis, axis)
    for panel, values, title in (
        (panels[0], mixture().log_prob(points), "truth"),
        (panels[1], model.log_prob(points), "trained diffusion model"),
    ):
        panel.pcolormesh(axis.numpy(), axis.numpy(), values.exp().reshape(81, 81).T.numpy(), shading="auto")
        panel.set(title=title, aspect="equal")
    figure.savefig(options.output, dpi=100, bbox_inches="tight")


if __name__ == "__main__":
    main()
