"""A density trained to an energy and used to weigh samples: effective sample size, log Z and NFE.

The energy has four wells of different depth in the plane. A CNF learns its Boltzmann density by the reverse KL
divergence, which needs no data. Importance sampling then corrects what the CNF has not learned.
"""

import argparse

import matplotlib.pyplot as plt
import torch

from rnode_plugin import RegularizedCNF
from rnode_plugin.fields import linear_field

PENALTIES = {"none": {}, "kinetic": {"kinetic": 0.01}, "both": {"kinetic": 0.01, "jacfrob": 0.01}}
AXIS = torch.linspace(-4, 4, 401)


def log_target(x):
    """Minus the energy: wells near (+-1.5, +-1.5), the deepest one at the upper right."""
    return -(x.square() - 2.25).square().sum(1) / 2 + 0.3 * x[:, 0] + 0.2 * x[:, 1]


def train(regularizers, *, steps, seed):
    torch.manual_seed(seed)
    field = linear_field(2, hidden=64)  # starts at f = 0, where the density is the Gaussian of the base
    times = torch.linspace(0, 1, 5)  # four steps of 0.25
    model = RegularizedCNF(
        field, event_shape=2, trace_estimator="exact", regularizers=regularizers, solver="rk4_38", t_span=times
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(steps):
        x, log_prob = model.inverse_and_log_prob(torch.randn(256, 2))
        loss = (log_prob - log_target(x)).mean() / model.dims + model.reg_loss()  # reverse KL, up to log Z
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return RegularizedCNF(field, event_shape=2, trace_estimator="exact", solver="dopri5")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="importance_sampling.png", help="file of the plot")
    options = parser.parse_args()
    grid = torch.cartesian_prod(AXIS, AXIS)
    energy = log_target(grid).double()
    area = (AXIS[1] - AXIS[0]).double() ** 2
    log_z = energy.logsumexp(0) + area.log()
    plt.style.use("rnode_plugin.plots")
    figure, panels = plt.subplots(1, 2 + len(PENALTIES), figsize=(16, 3.6), sharex=True, sharey=True)
    density = (energy - log_z).exp().reshape(401, 401).T
    panels[0].pcolormesh(AXIS.numpy(), AXIS.numpy(), density.numpy(), shading="auto")
    panels[0].set(title="target", xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
    print(f"log Z by a sum over a grid: {log_z:.4f}")
    print(f"{'penalties':<10} {'NFE':>4} {'ESS of 4000':>12} {'log Z':>8} {'its error':>10} {'difference':>11}")
    rows = {"untrained": ({}, 0), **{name: (each, options.steps) for name, each in PENALTIES.items()}}
    for axes, (name, (regularizers, steps)) in zip(panels[1:], rows.items(), strict=True):
        model = train(regularizers, steps=steps, seed=options.seed)
        torch.manual_seed(options.seed + 1)  # the same latents for all
        found = model.importance_sample(log_target, 4000)
        gap = found.log_z - log_z
        nfe = model.nfe if steps else 0  # the density of the base needs no solve
        print(
            f"{name:<10} {nfe:>4} {found.ess:>12.0f} {found.log_z:>8.4f} {found.log_z_error:>10.4f} {gap:>+11.4f}",
            flush=True,
        )
        axes.scatter(*found.x.T, s=4000 * found.weights, linewidth=0, alpha=0.5)
        axes.set(title=f"{name}, ESS {found.ess:.0f}", aspect="equal")
    figure.savefig(options.output, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
