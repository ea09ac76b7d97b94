"""The likelihood of a small DDPM, against the truth, and the kinetic energy of each sample.

The data are eight Gaussians on a circle with the weights 8, 4, 2 and 1. Their density is known, and so is the noise
that a perfect network predicts. The energy is the integral of the squared velocity of the probability-flow ODE.
"""

import argparse
import math
import time

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from rnode_plugin import RegularizedCNF, velocity_from_noise
from rnode_plugin.diffusion import from_betas

T = 1000
BETAS = torch.linspace(1e-4, 0.02, T)  # DDPM's
KEPT = torch.cumprod(1 - BETAS, 0)  # alpha squared at each step
ANGLES = torch.arange(8) * math.pi / 4
MEANS = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
WEIGHTS = torch.tensor([8.0, 4, 2, 1, 8, 4, 2, 1])


def mixture(alpha=1.0, sigma=0.0):
    """The distribution of ``alpha x + sigma noise``."""
    width = math.sqrt((0.3 * alpha) ** 2 + sigma**2) * torch.ones(8, 2)
    return MixtureSameFamily(Categorical(WEIGHTS), Independent(Normal(alpha * MEANS, width), 1))


class Noise(nn.Module):
    """The noise in ``x (B, 2)`` at the step ``t``, one for each sample or one for all."""

    def __init__(self, width=128):
        super().__init__()
        layers = [nn.Linear(18, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)]
        self.net = nn.Sequential(*layers, nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x, t):
        phase = t.expand(len(x)).unsqueeze(1) / T * torch.linspace(0, 4, 8).exp()
        return self.net(torch.cat([x, phase.sin(), phase.cos()], 1))


def train(steps, seed):
    """DDPM's loss, on whole steps."""
    torch.manual_seed(seed)
    net, data = Noise(), mixture()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(steps):
        x, noise, k = data.sample((512,)), torch.randn(512, 2), torch.randint(T, (512,))
        kept = KEPT[k].unsqueeze(1)
        loss = (net(kept.sqrt() * x + (1 - kept).sqrt() * noise, k) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net


def perfect(schedule):
    """The network that DDPM's loss is least for: the mean of the noise, by the score of the noised mixture."""
    alpha, sigma = schedule

    def noise(x, t):
        share = t / (T - 1)
        with torch.enable_grad():
            z = x if x.requires_grad else x.detach().requires_grad_()
            score = torch.autograd.grad(
                mixture(float(alpha(share)), float(sigma(share))).log_prob(z).sum(), z, create_graph=True
            )[0]
        return -sigma(share) * score

    return noise


def density(net, schedule, data_time):
    return RegularizedCNF.from_velocity(
        velocity_from_noise(net, *schedule), data_time=data_time, noise_time=1, event_shape=2,
        trace_estimator="exact", regularizers=["kinetic"],
    )  # fmt: skip


@torch.no_grad()
def measure(model, x):
    """Log-densities ``(B,)`` in nats and kinetic energies ``(B,)`` per dimension."""
    found = model.encode(x, penalties=True)
    return model.log_prob_of(found), found.regularization["kinetic"] / 2


def draw(model, x, energy, far, far_energy, output):
    plt.style.use("rnode_plugin.plots")
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.6))
    axis = torch.linspace(-4, 4, 81)
    log_prob = measure(model, torch.cartesian_prod(axis, axis))[0]
    panels[0].pcolormesh(axis.numpy(), axis.numpy(), log_prob.exp().reshape(81, 81).T.numpy(), shading="auto")
    panels[0].set(title="density of the trained DDPM", aspect="equal")
    shown = panels[1].scatter(*x.T, c=energy, s=4, vmax=3)
    figure.colorbar(shown, ax=panels[1], label="energy / dim")
    panels[1].set(title="energy of held-out points", xlim=(-4, 4), ylim=(-4, 4), aspect="equal")
    for points, values, label in ((far, far_energy, "uniform points"), (x, energy, "held-out points")):
        panels[2].scatter(mixture().log_prob(points), values, s=4, label=label)
    panels[2].set(title="energy and density", xlabel="true log p, nats", ylabel="energy / dim", yscale="log")
    panels[2].set_xlim(-60, 0)
    panels[2].legend()
    figure.savefig(output, dpi=100, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="diffusion_likelihood.png", help="file of the plot")
    options = parser.parse_args()
    schedule = from_betas(BETAS)
    net = train(options.steps, options.seed)
    torch.manual_seed(options.seed + 1)
    x = mixture().sample((2000,))
    truth = mixture().log_prob(x)
    print(f"NLL of 2000 held-out points, truth: {-truth.mean():.4f} nats")
    print(f"{'noise':<8} {'data_time':>9} {'NLL':>8} {'too high by':>12} {'NFE':>5} {'CPU s':>6}")
    for name, network, data_time in (
        ("perfect", perfect(schedule), 0.0), ("trained", net, 0.0), ("trained", net, 0.02),
    ):  # fmt: skip
        model, start = density(network, schedule, data_time), time.process_time()
        log_prob = measure(model, x)[0]
        gap = (truth - log_prob).mean()
        seconds = time.process_time() - start
        print(f"{name:<8} {data_time:>9} {-log_prob.mean():>8.4f} {gap:>12.4f} {model.nfe:>5} {seconds:>6.1f}")
    model = density(net, schedule, 0.0)
    energy = measure(model, x)[1]
    far = 8 * torch.rand(2000, 2) - 4
    far_energy = measure(model, far)[1]
    mode = (x.unsqueeze(1) - MEANS).square().sum(2).argmin(1)
    print(f"{'points':<28} {'energy / dim':>12} {'middle 80 %':>15}")
    rows = {f"a mode of weight {w:.0f}": energy[WEIGHTS[mode] == w] for w in WEIGHTS[:4]}
    for name, each in {**rows, "uniform in the square": far_energy}.items():
        low, middle, high = each.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        print(f"{name:<28} {middle:>12.2f} {low:>7.2f} to {high:>4.2f}")
    draw(model, x, energy, far, far_energy, options.output)


if __name__ == "__main__":
    main()
