"""How far the sampled quadrature of dopri5 and tsit5 is from the full one: differences of the means over all draws.

    python benchmarks/sampled_quadrature.py

Some weights of these methods are negative, so a sampled quadrature draws a stage by other weights. The mean over
all draws is the quadrature with those weights on the same steps, which is computed here without a draw. The error
of the full quadrature is against a solve in float64 at tolerances of 1e-9. All are percent: of the mean over the
batch, and the largest of a single sample.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import click
import torch
from measure import print_environment, table
from torch import Tensor, nn
from torchdyn.datasets import ToyDataset

from rnode_plugin import Adaptive, Exact, NeuralODE, Solver, System
from rnode_plugin.regularizers import jacfrob, total_derivative
from rnode_plugin.solvers import ADAPTIVE_METHODS
from rnode_plugin.torchdyn.choice import method_from_torchdyn, resolve_solver

Field = Callable[[Tensor, Tensor], Tensor]
ACCURATE = Adaptive("dopri5", atol=1e-9, rtol=1e-9)


class Perceptron(nn.Module):
    """2-32-2 with tanh; ``gain`` multiplies the initial weights."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(gain)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.layers(x)


class Wave(nn.Module):
    """tanh(2 W z + sin 4t)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 2)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(2 * self.layer(x) + torch.sin(4 * t))


def classifier() -> nn.Module:
    """The perceptron, trained to move two moons apart: 200 steps of Adam on 256 points."""
    field, head = Perceptron(), nn.Linear(2, 2)
    model = NeuralODE(field, "dopri5", atol=1e-5, rtol=1e-5)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], 1e-2)
    x, y = ToyDataset().generate(n_samples=256, noise=0.1, dataset_type="moons")
    for _ in range(200):
        loss = nn.functional.cross_entropy(head(model(x.float())[1][-1]), y.long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return field


def integrals(field: Field, x: Tensor, solver: Solver) -> dict[str, Tensor]:
    system = System([jacfrob, total_derivative], Exact())
    with torch.no_grad():
        return solver.solve(system.start(field, x, density=False), x, x.new_tensor([0.0, 1.0])).penalties


def off(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Of the mean over the batch, and the largest of a sample, both in percent."""
    whole = float(found.double().mean() / expected.double().mean() - 1)
    return 100 * abs(whole), 100 * float((found / expected - 1).abs().max())


@click.command(help=__doc__)
def main() -> None:
    import numpy as np

    print_environment(torch.device("cpu"))
    np.random.seed(0)  # torchdyn's data
    torch.manual_seed(0)
    x = torch.randn(64, 2)
    fields = {
        "initial weights": Perceptron(),
        "trained": classifier(),
        "initial weights x 3": Perceptron(3),
        "initial weights x 6": Perceptron(6),
        "tanh(2Wz + sin 4t)": Wave(),
    }
    rows = []
    for name, field in fields.items():
        exact = integrals(copy.deepcopy(field).double(), x.double(), ACCURATE)
        for tolerance in (1e-3, 1e-5):
            for each in ADAPTIVE_METHODS:
                method = method_from_torchdyn(resolve_solver(each), each)  # the steps of a NeuralODE
                solver = Adaptive(method, atol=tolerance, rtol=tolerance)
                full = integrals(field, x, solver)
                drawn = integrals(field, x, replace(solver, method=replace(method, weights=method.draws)))
                cells = [off(*pair) for key in full for pair in ((drawn[key], full[key]), (full[key], exact[key]))]
                rows.append([name, each, f"{tolerance:g}", *(f"{a:.1f}, {b:.1f}" for a, b in cells)])
    heads = [f"{key}, {what}" for key in ("jacfrob", "total_derivative") for what in ("draws", "full")]
    print(table(["field", "method", "tolerance", *heads], rows))


if __name__ == "__main__":
    main()
