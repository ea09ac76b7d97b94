"""The map between two Gaussians learned with the kinetic penalty, and the optimal one (Bures-Wasserstein)."""

import argparse

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from rnode_plugin import RegularizedCNF

P = MultivariateNormal(torch.tensor([-2.0, 0.0]), torch.tensor([[2.0, 0.9], [0.9, 0.6]]))
Q = MultivariateNormal(torch.tensor([2.0, 1.0]), torch.tensor([[0.4, -0.3], [-0.3, 1.5]]))


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))

    def forward(self, t, z):
        return self.net(torch.cat([z, t.expand(len(z), 1)], 1))


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.sqrt().diag() @ vectors.T


def optimal(x):
    """The map that carries P to Q at the least mean of ||T(x) - x||^2, and that mean, the squared distance W2^2."""
    s = root(P.covariance_matrix)
    middle, inverse = root(s @ Q.covariance_matrix @ s), torch.linalg.inv(s)
    bures = torch.trace(P.covariance_matrix + Q.covariance_matrix - 2 * middle)
    return Q.mean + (x - P.mean) @ (inverse @ middle @ inverse), (P.mean - Q.mean).square().sum() + bures


def train(strength, *, steps, seed):
    """Equation 22 of the paper: the likelihood makes P arrive at Q, the penalty makes it travel little."""
    torch.manual_seed(seed)
    options = {"trace_estimator": "exact", "solver": "rk4_38", "t_span": torch.linspace(0, 1, 5)}
    model = RegularizedCNF(Field(), Q, regularizers={"kinetic": strength}, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(steps):
        optimizer.zero_grad()
        (-model.log_prob(P.sample((256,))).mean() / model.dims + model.reg_loss()).backward()
        optimizer.step()
        schedule.step()
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="optimal_transport.png", help="file of the plot")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    x = P.sample((2000,))
    goal, cost = optimal(x)
    print(f"least cost of any map, W2^2: {cost:.3f}")
    print(f"{'lambda':>6} {'kinetic energy':>15} {'error of the map':>17} {'KL(P || model), nats':>21}")
    plt.style.use("rnode_plugin.plots")
    figure, panels = plt.subplots(1, 3, figsize=(9, 5.5), sharex=True, sharey=True)
    for strength, axes in zip((0.0, 0.01, 0.1), panels, strict=True):
        model = train(strength, steps=options.steps, seed=options.seed)
        with torch.no_grad():
            divergence = (P.log_prob(x) - model.log_prob(x, penalties=True)).mean()
            energy = model.regularization["kinetic"].mean()
            arrived = model.encode(x).z
        error = (arrived - goal).square().sum(1).mean().sqrt()  # root mean square distance
        print(f"{strength:>6} {energy:>15.3f} {error:>17.3f} {divergence:>21.4f}")
        axes.plot(*torch.stack([goal[:80], arrived[:80]]).permute(2, 0, 1), color="C1", linewidth=1.2)
        axes.scatter(*goal[:80].T, s=10, color="0.5", zorder=2, label="optimal map")
        axes.scatter(*arrived[:80].T, s=10, color="C1", zorder=3, label="learned map, and its difference")
        axes.set(title=f"λ = {strength}, error {error:.3f}", xlabel="$x_1$", aspect="equal")
    panels[0].set_ylabel("$x_2$")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(options.output, dpi=150)


if __name__ == "__main__":
    main()
