"""Regularizers that a script defines: a function of (t, z, dz), and one that reads the Jacobian.

The map to learn turns and squeezes the plane and keeps areas. The second penalty uses that: it is the squared
divergence. To offer a penalty to others by name, make it a package: examples/third_party_regularizer is one.
"""

import argparse

import matplotlib.pyplot as plt
import torch

from rnode_plugin import NeuralODE
from rnode_plugin.fields import linear_field
from rnode_plugin.regularizers import Rate


def slow(t, z, dz):
    """A rate per sample, (B,): how far the speed is above 2, squared. Its integral is what the loss gets."""
    speed = torch.linalg.vector_norm(dz.flatten(1), dim=1)
    return (speed - 2).relu().square()


# one that reads the Jacobian declares it, and the solver makes each product once for all regularizers
incompressible = Rate("incompressible", lambda e: e.divergence().square(), needs={"vjp"})

CONFIGURATIONS = {"none": {}, "slow": {slow: 0.1}, "incompressible": {incompressible: 0.1}}
MAP = torch.tensor([[0.0, 2.0], [-0.5, 0.0]])  # of determinant 1
T_SPAN = torch.linspace(0, 1, 2)


def train(regularizers, x, y, *, steps, seed):
    torch.manual_seed(seed)
    field = linear_field(2, activation="tanh")
    model = NeuralODE(field, solver="dopri5", regularizers=regularizers, trace_estimator="exact")
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        _, path = model(x, T_SPAN)
        loss = (path[-1] - y).square().mean() + model.reg_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return field


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="own_regularizer.png", help="file of the plot")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    x, new = torch.randn(20, 2), torch.randn(1000, 2)
    y = x @ MAP.T + 0.1 * torch.randn(20, 2)  # few points, with noise
    plt.style.use("rnode_plugin.plots")
    figure, panels = plt.subplots(3, 1, figsize=(7, 7.5), sharex=True, sharey=True)
    angle = torch.linspace(0, 2 * torch.pi, 200)
    circles = torch.tensor([0.75, 1.5, 2.25])[:, None, None] * torch.stack([angle.cos(), angle.sin()], 1)
    print(f"{'regularizer':<14} {'NFE':>4} {'error':>7} {'slow':>7} {'incompressible':>15}   on 1000 new points")
    for (name, regularizers), axes in zip(CONFIGURATIONS.items(), panels, strict=True):
        field = train(regularizers, x, y, steps=options.steps, seed=options.seed)
        # the same field, with both integrals followed
        model = NeuralODE(field, solver="dopri5", regularizers=[slow, incompressible], trace_estimator="exact")
        with torch.no_grad():
            _, path = model(new, T_SPAN, penalties=True)
        error = (path[-1] - new @ MAP.T).square().sum(1).mean().sqrt()
        means = {key: integral.mean() for key, integral in model.regularization.items()}
        integrals = f"{means['slow']:>7.3f} {means['incompressible']:>15.3f}"
        print(f"{name:<14} {model.vf.nfe:>4.0f} {error:>7.3f} {integrals}")
        drawn = model.trajectory(circles.flatten(0, 1), T_SPAN)[-1].detach().reshape(circles.shape)
        axes.plot(*(circles @ MAP.T).permute(2, 1, 0), color="0.5", linewidth=3, alpha=0.5)
        axes.plot(*drawn.permute(2, 1, 0), color="C1")
        axes.set(title=f"regularizer: {name}, error {error:.3f}", ylabel="$x_2$", aspect="equal")
    panels[-1].set_xlabel("$x_1$")
    lines, labels = panels[-1].lines, ["three circles by the map itself", "by the learned map"]
    figure.legend([lines[0], lines[-1]], labels, loc="outside lower center", ncols=2)
    figure.savefig(options.output, dpi=150)


if __name__ == "__main__":
    main()
