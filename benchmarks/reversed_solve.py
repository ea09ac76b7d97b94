"""An autoencoder whose decoder is the reversed solve of its encoder: gradients of torchdyn and of this package.

    python benchmarks/reversed_solve.py

The encoder moves points of an S in space from time 0 to 1 and keeps two of their three coordinates. The decoder
solves from time 1 to 0. The error is that of the first gradient, against steps in float64 at a tolerance of 1e-9.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torchdyn.core
from measure import print_environment, set_up, table
from sklearn.datasets import make_s_curve
from torch import Tensor, nn

import rnode_plugin

STEPS = 200
KEPT = torch.tensor([1.0, 1.0, 0.0])


def reconstruction(model: Any, x: Tensor) -> Tensor:
    """The mean squared distance of the decoded points from the points."""
    z = model(x, torch.tensor([0.0, 1.0]))[1][-1]
    return (model(z * KEPT.to(x), torch.tensor([1.0, 0.0]))[1][-1] - x).square().mean()


def gradient(model: Any, x: Tensor) -> Tensor:
    """The gradient of the reconstruction, as one vector."""
    grads = torch.autograd.grad(reconstruction(model, x), list(model.parameters()))
    return torch.cat([grad.flatten() for grad in grads]).double()


def measured(package: Any, sensitivity: str, seed: int) -> tuple[str, ...]:
    """The error of the first gradient in percent, and the loss before and after the training."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 3))
    x = torch.from_numpy(make_s_curve(256, random_state=seed)[0])
    steps: dict[str, Any] = {"solver": "dopri5", "atol": 1e-9, "rtol": 1e-9}
    exact = gradient(rnode_plugin.NeuralODE(copy.deepcopy(net).double(), **steps), x)
    options: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5, "atol_adjoint": 1e-5, "rtol_adjoint": 1e-5}
    model = package.NeuralODE(net, solver="dopri5", sensitivity=sensitivity, **options)
    error = (gradient(model, x.float()) - exact).norm() / exact.norm()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = reconstruction(model, x.float()).item()
    for _ in range(STEPS):
        optimizer.zero_grad()
        reconstruction(model, x.float()).backward()
        optimizer.step()
    after = reconstruction(model, x.float()).item()
    # "g" of a number that is rounded already writes 29000, not 2.9e+04
    return tuple(f"{float(f'{number:.2g}'):g}" for number in (100 * error, before, after))


if __name__ == "__main__":
    print_environment(set_up("cpu", 1))
    rows = []
    for sensitivity in ("adjoint", "interpolated_adjoint"):
        for name, package in (("torchdyn", torchdyn.core), ("this package", rnode_plugin)):
            columns = zip(*(measured(package, sensitivity, seed) for seed in range(3)), strict=True)
            rows.append((name, sensitivity, *map(", ".join, columns)))
    print(table(("package", "sensitivity", "error, %", "loss before", f"loss after {STEPS} steps"), rows))
