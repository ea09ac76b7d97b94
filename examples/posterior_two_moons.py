"""The posterior of a simulator, p(parameters | observation), with a conditional density, and with zuko's CNF."""

import argparse
import importlib.util
import math
import time

import matplotlib.pyplot as plt
import torch
from torch import nn

from rnode_plugin import RegularizedCNF

zuko = importlib.import_module("zuko") if importlib.util.find_spec("zuko") else None  # optional
SHAPES = {"event_shape": 2, "context_shape": 2, "trace_estimator": "exact"}
GRID = torch.linspace(0, 1, 5)  # four steps to train with
CONFIGURATIONS = {"no penalty": {}, "both penalties": {"kinetic": 0.01, "jacfrob": 0.01}}


def simulate(count):
    """Two moons (Greenberg et al. 2019): parameters from their prior, and what the simulator makes of them."""
    theta = 2 * torch.rand(count, 2) - 1
    angle, radius = math.pi * (torch.rand(count) - 0.5), 0.1 + 0.01 * torch.randn(count)
    moon = torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], 1)
    shift = torch.stack([-(theta[:, 0] + theta[:, 1]).abs(), theta[:, 1] - theta[:, 0]], 1) / math.sqrt(2)
    return theta, moon + shift


class Field(nn.Module):
    """f(t, z, context), of the layers and the features of time that zuko's CNF has."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 64), nn.ELU(), nn.Linear(64, 64), nn.ELU(), nn.Linear(64, 2))

    def forward(self, t, z, context):
        phase = (t * math.pi * torch.arange(1, 4)).expand(len(z), 3)
        return self.net(torch.cat([phase.cos(), phase.sin(), z, context], 1))


def fit(model, posterior, penalties, steps):
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    start = time.process_time()
    for _ in range(steps):
        theta, x = simulate(256)
        loss = -posterior(x).log_prob(theta).mean() / 2 + penalties()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.process_time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="posterior_two_moons.png", help="file of the plot")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    (theta, x), rows = simulate(1000), {}
    for name, regularizers in CONFIGURATIONS.items():
        field = Field()
        training = RegularizedCNF(field, regularizers=regularizers, **SHAPES, solver="rk4_38", t_span=GRID)
        seconds = fit(training, training.distribution, training.reg_loss, options.steps)
        rows[name] = field, RegularizedCNF(field, **SHAPES).eval().distribution, seconds  # dopri5 at 1e-5
    if zuko is not None:
        flow = zuko.flows.CNF(2, context=2, hidden_features=(64, 64))
        seconds = fit(flow, flow, lambda: 0.0, options.steps)
        rows["zuko.flows.CNF"] = flow.transform.ode, flow.eval(), seconds
    plt.style.use("rnode_plugin.plots")
    figure, panels = plt.subplots(1, len(rows), figsize=(4 * len(rows), 4), sharex=True, sharey=True, squeeze=False)
    print(f"{'density':<15} {'NLL, nats':>10} {'NFE':>5} {'CPU s':>8}   on 1000 new pairs")
    for (name, (module, posterior, seconds)), axes in zip(rows.items(), panels[0], strict=True):
        with torch.no_grad():
            samples, calls = posterior(torch.zeros(2)).sample((2000,)), []
            module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            nll = -posterior(x).log_prob(theta).mean()
        print(f"{name:<15} {nll:>10.3f} {len(calls):>5} {seconds:>8.1f}")
        axes.scatter(*samples.T, s=1)
        axes.set(title=name, xlabel="$\\theta_1$", ylabel="$\\theta_2$", aspect="equal")
    figure.savefig(options.output, dpi=150)


if __name__ == "__main__":
    main()
