"""A density trained to an energy and used to weigh samples: effective sample size, log Z and NFE.

The energy has four wells of different depth in the plane. A CNF learns its Boltzmann density by the reverse KL
divergence, which needs no data. Importance sampling then corrects what the CNF has not learned. Finally, samplers
of four steps draw for equal time, with weights by the integrated trace and by the Jacobian of their discrete map.
"""

import argparse
import math
import time

import matplotlib.pyplot as plt
import torch

from rnode_plugin import Adaptive, FixedGrid, RegularizedCNF, map_log_prob
from rnode_plugin.fields import linear_field

PENALTIES = {"none": {}, "kinetic": {"kinetic": 0.01}, "both": {"kinetic": 0.01, "jacfrob": 0.01}}
SAMPLERS = {
    "dopri5": Adaptive("dopri5"),
    "midpoint, 4 steps": FixedGrid("midpoint", step=0.25),
    "euler, 4 steps": FixedGrid("euler", step=0.25),
}
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


@torch.no_grad()
def draw(model, n, jacobian):
    """Samples, and the logarithms of their weights, target over density. A noisy trace would bias the weights."""
    z = model.base.sample((n,))
    x, log_prob = map_log_prob(model, z) if jacobian == "map" else model.inverse_and_log_prob(z)
    return x, (log_target(x) - log_prob).double()


def estimate(log_weights):
    """Effective sample size (Kish), log Z of the target, and its standard error."""
    n, ess = len(log_weights), float(1 / log_weights.softmax(0).square().sum())
    if ess < max(10, n / 100):
        print(f"The samples hardly meet the target (ESS {ess:.1f} of {n}): log Z is a lower guess.")
    return ess, float(log_weights.logsumexp(0)) - math.log(n), math.sqrt(max(n / ess - 1, 0) / (n - 1))


def draw_for(seconds, model, jacobian):
    """The logarithms of the weights of all samples that a model draws in so many seconds of processor time."""
    end, parts = time.process_time() + seconds, []
    while not parts or time.process_time() < end:
        parts.append(draw(model, 1000, jacobian)[1])
    return torch.cat(parts)


def compare(density, true, axes, *, seconds, seed):
    print(f"the density of both penalties, {seconds:g} s of processor time for each sampler:")
    print(f"{'sampler':<18} {'log q by':<8} {'NFE':>4} {'samples':>8} {'ESS':>7} {'difference':>11} its error")
    labels = []
    for name, solver in SAMPLERS.items():
        model = density.solved_with(solver=solver)
        for jacobian in ["trace"] if solver.adaptive else ["trace", "map"]:
            torch.manual_seed(seed + 2)
            log_weights = draw_for(seconds, model, jacobian)
            ess, log_z, error = estimate(log_weights)
            gap, n = log_z - true, len(log_weights)
            print(
                f"{name:<18} {jacobian:<8} {model.nfe:>4} {n:>8} {ess:>7.0f} {gap:>+11.4f} {error:>9.4f}",
                flush=True,
            )
            color = "C0" if jacobian == "map" else "C1"
            axes.errorbar(gap, -len(labels), xerr=2 * error, fmt="o", color=color)
            labels.append(f"{name}, {jacobian}")
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.set(title="log Z minus its value", yticks=range(0, -len(labels), -1), yticklabels=labels)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=4.0, help="processor time of each last sampler")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="importance_sampling.png", help="file of the plot")
    options = parser.parse_args()
    grid = torch.cartesian_prod(AXIS, AXIS)
    energy = log_target(grid).double()
    area = (AXIS[1] - AXIS[0]).double() ** 2
    true = float(energy.logsumexp(0) + area.log())
    plt.style.use("rnode_plugin.plots")
    figure, panels = plt.subplots(2, 3, figsize=(9.5, 6.2))
    panels = panels.ravel()
    density = (energy - true).exp().reshape(401, 401).T
    panels[0].pcolormesh(AXIS.numpy(), AXIS.numpy(), density.numpy(), shading="auto")
    panels[0].set(title="target", xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
    print(f"log Z by a sum over a grid: {true:.4f}")
    print(f"{'penalties':<10} {'NFE':>4} {'ESS of 4000':>12} {'log Z':>8} {'its error':>10} {'difference':>11}")
    densities = {}
    rows = {"untrained": ({}, 0), **{name: (each, options.steps) for name, each in PENALTIES.items()}}
    for axes, (name, (regularizers, steps)) in zip(panels[1:-1], rows.items(), strict=True):
        model = densities[name] = train(regularizers, steps=steps, seed=options.seed)
        torch.manual_seed(options.seed + 1)  # the same latents for all
        x, log_weights = draw(model, 4000, "trace")
        ess, log_z, error = estimate(log_weights)
        nfe = model.nfe if steps else 0  # the density of the base needs no solve
        print(
            f"{name:<10} {nfe:>4} {ess:>12.0f} {log_z:>8.4f} {error:>10.4f} {log_z - true:>+11.4f}",
            flush=True,
        )
        axes.scatter(*x.T, s=4000 * log_weights.softmax(0), linewidth=0, alpha=0.5)
        axes.set(title=f"{name}, ESS {ess:.0f}", xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
    compare(densities["both"], true, panels[-1], seconds=options.seconds, seed=options.seed)
    figure.savefig(options.output, dpi=120)


if __name__ == "__main__":
    main()
