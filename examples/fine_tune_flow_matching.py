"""A flow-matching model, fine-tuned as a continuous normalizing flow: NFE for a likelihood before and after."""

import argparse
import copy
import math

import matplotlib.pyplot as plt
import torch
from torch import nn

from rnode_plugin import Adaptive, NeuralODE, RegularizedCNF


class Velocity(nn.Module):
    """v(t, x) from noise at t = 0 to data at t = 1, the usual direction of flow matching."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, t, x):
        return self.net(torch.cat([x, t.expand(len(x), 1)], 1))


def ring(count):
    """Eight Gaussians on a circle."""
    angle = torch.randint(8, (count,)) * math.pi / 4
    return 2 * torch.stack([angle.cos(), angle.sin()], 1) + 0.15 * torch.randn(count, 2)


def minimize(loss, model, steps, lr):
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


def matching_loss(velocity):
    """Conditional flow matching with independent pairs: regress v on the velocity of the line between them."""
    x0, x1, t = torch.randn(512, 2), ring(512), torch.rand(512, 1)
    return (velocity(t, t * x1 + (1 - t) * x0) - (x1 - x0)).square().mean()


def density(velocity, regularizers, tolerance=1e-5):
    """The field as a density: a likelihood runs from the data at t = 1 back to the noise at t = 0."""
    options = {"event_shape": 2, "t_span": [1.0, 0.0], "solver": Adaptive(atol=tolerance, rtol=tolerance)}
    return RegularizedCNF(velocity, trace_estimator="exact", regularizers=regularizers, **options)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="of fine-tuning, after 10 times more of matching")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="fine_tune_flow_matching.png", help="file of the plot")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    test, matched = ring(1000), Velocity()
    minimize(matching_loss, matched, 10 * options.steps, 3e-3)
    arms = {"fine-tuned, no penalty": {}, "fine-tuned, both penalties": {"kinetic": 0.03, "jacfrob": 0.03}}
    fields = {"flow matching": matched}
    for name, regularizers in arms.items():
        fields[name] = copy.deepcopy(matched)
        model = density(fields[name], regularizers, 1e-4)
        minimize(lambda m: -m.log_prob(ring(256)).mean() / m.dims + m.reg_loss(), model, options.steps, 1e-3)
    plt.style.use("rnode_plugin.plots")
    figure, panels = plt.subplots(1, 3, figsize=(12, 4), sharex=True, sharey=True)
    print(f"{'field':<27} {'NFE':>4} {'NLL, nats':>10} {'kinetic':>8} {'jacfrob':>8}")
    for (name, velocity), axes in zip(fields.items(), panels, strict=True):
        model = density(velocity, ["kinetic", "jacfrob"])
        with torch.no_grad():
            found = model.encode(test, penalties=True)
            nll = -model.log_prob_of(found).mean()
            nfe, (kinetic, jacfrob) = found.nfe, [cost.mean() for cost in found.regularization.values()]
            paths = NeuralODE(velocity).trajectory(test[:100], torch.linspace(1, 0, 50))
        print(f"{name:<27} {nfe:>4} {nll:>10.3f} {kinetic:>8.2f} {jacfrob:>8.2f}")
        axes.plot(paths[..., 0], paths[..., 1], color="C0", linewidth=0.5)
        axes.scatter(*test[:100].T, s=8, color="C1")
        axes.set(title=f"{name}, NFE {nfe}", xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    figure.savefig(options.output, dpi=150)


if __name__ == "__main__":
    main()
