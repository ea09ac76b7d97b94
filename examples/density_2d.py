"""The density of 2-D data with RegularizedCNF: exact and Hutchinson traces, with and without the penalties."""

import argparse
import math
import time

import matplotlib.pyplot as plt
import torch

from rnode_plugin import RegularizedCNF
from rnode_plugin.fields import linear_field

CONFIGURATIONS = [("exact", {}), ("exact", {"kinetic": 0.01, "jacfrob": 0.01})]
CONFIGURATIONS += [(noise, {"kinetic": 0.01, "jacfrob": 0.01}) for noise in ("gaussian", "rademacher")]


def ring(count, seed):
    """Eight Gaussians on a circle."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.randint(8, (count,), generator=generator) * math.pi / 4
    return 2 * torch.stack([angle.cos(), angle.sin()], 1) + 0.15 * torch.randn(count, 2, generator=generator)


def train(trace, regularizers, data, *, steps, seed):
    torch.manual_seed(seed)
    field = linear_field(2, hidden=64)  # any module net(t, z) or net(z) will do; this one starts at f = 0
    times = torch.linspace(0, 1, 5)  # four steps of 0.25
    model = RegularizedCNF(
        field, event_shape=2, trace_estimator=trace, regularizers=regularizers, solver="rk4_38", t_span=times
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(steps):
        x = data[torch.randint(len(data), (256,))]
        loss = -model.log_prob(x).mean() / model.dims + model.reg_loss()  # eq. 17, in nats/dim
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return field


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="density_2d.png", help="file of the plot")
    options = parser.parse_args()
    data, held_out = ring(4000, options.seed), ring(1000, options.seed + 1)
    plt.style.use("rnode_plugin.plots")
    figure, panels = plt.subplots(1, len(CONFIGURATIONS), figsize=(14, 3.8), sharex=True, sharey=True)
    axis = torch.linspace(-3, 3, 100)
    grid = torch.cartesian_prod(axis, axis)
    print(f"{'trace':<10} {'penalties':<16} {'NLL':>6} {'NFE':>4} {'kinetic':>8} {'jacfrob':>8} {'ms/step':>7}")
    for (trace, regularizers), axes in zip(CONFIGURATIONS, panels, strict=True):
        start = time.perf_counter()
        field = train(trace, regularizers, data, steps=options.steps, seed=options.seed)
        pace = 1000 * (time.perf_counter() - start) / options.steps
        # the trained field as a density with the exact trace and an adaptive solver
        model = RegularizedCNF(field, event_shape=2, trace_estimator="exact", solver="dopri5")
        with torch.no_grad():
            found = model.encode(held_out, penalties=True)
            nll = -model.log_prob_of(found).mean()
            kinetic, jacfrob = (found.regularization[name].mean() for name in ("kinetic", "jacfrob"))
            density = model.log_prob(grid).exp().reshape(100, 100).T
        name = ", ".join(regularizers) or "none"
        print(f"{trace:<10} {name:<16} {nll:>6.3f} {found.nfe:>4} {kinetic:>8.2f} {jacfrob:>8.2f} {pace:>7.1f}")
        axes.grid(False)
        axes.pcolormesh(axis.numpy(), axis.numpy(), density.numpy(), shading="auto")
        axes.scatter(*model.sample(300).T, s=2, color="white")
        axes.set(
            title=f"{trace} trace\npenalties: {name}", xlabel="$x_1$", xlim=(-3, 3), ylim=(-3, 3), aspect="equal"
        )
    panels[0].set_ylabel("$x_2$")
    figure.savefig(options.output, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
