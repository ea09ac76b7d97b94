"""One of each kind of density model, small and in double precision, for the tests of their contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from problems import Wave
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, StudentT
from written_model import LaplaceFlow

from rnode_plugin import Adaptive, DensityModel, Exact, MultiscaleFlow, RegularizedCNF, Solver, TableFlow

ACCURATE = Adaptive("dopri5", atol=1e-8, rtol=1e-8)
TIGHT = Adaptive("dopri5", atol=1e-10, rtol=1e-10)


def linear(matrix: Tensor) -> nn.Module:
    net = nn.Linear(len(matrix), len(matrix), bias=False).double()
    with torch.no_grad():
        net.weight.copy_(matrix)
    return net


class Conditional(nn.Module):
    """A nonlinear field of two dimensions that is given two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.wave = Wave(2)

    def forward(self, t: Tensor, z: Tensor, context: Tensor) -> Tensor:
        return self.wave(t, z + context.sin())


def cnf(net: nn.Module, shape: Any, **options: Any) -> RegularizedCNF:
    return RegularizedCNF(net, event_shape=shape, trace_estimator="exact", **options)


class HeavyTails(TableFlow):
    """A flow of ours with another base."""

    @property
    def base(self) -> Distribution:
        place = torch.zeros_like(self.mean[: self.dims])
        return Independent(StudentT(4.0, place, place + 1), 1)


MODELS: dict[str, Callable[[], DensityModel]] = {
    "cnf": lambda: cnf(Wave(2), 2),
    "cnf with contexts": lambda: cnf(Conditional(), 2, context_shape=2),
    "cnf of images": lambda: cnf(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Tanh()), (1, 2, 2)),
    "image flow": lambda: MultiscaleFlow(
        (1, 4, 4), hidden=3, layers=2, alpha=0.05, trace_estimator=Exact(frobenius=True)
    ),
    "image flow by colors": lambda: MultiscaleFlow(
        (1, 6, 6), hidden=3, layers=2, alpha=0.05, trace_estimator=Exact(frobenius=True)
    ),
    "table flow": lambda: TableFlow(2, hidden=5, blocks=2),
    "table flow with contexts": lambda: TableFlow(2, hidden=5, context=2),
    "table flow with another base": lambda: HeavyTails(2, hidden=5, blocks=2),
    "model of a third party": lambda: LaplaceFlow(2, hidden=16),
    "table flow of a user's field": lambda: TableFlow(2, field=lambda: Wave(2), blocks=2),
}


def make(name: str, solver: Solver = ACCURATE) -> tuple[DensityModel, Tensor, dict[str, Any]]:
    """A model in double precision that is not the identity, three samples, and a context for each."""
    torch.manual_seed(0)
    model = MODELS[name]().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2 if name.startswith("image flow") else 0.4)
    model.solver = solver
    x = torch.rand(3, *model.event_shape, dtype=torch.float64)
    return model, x, {} if model.context_shape is None else {"context": torch.randn(3, 2, dtype=torch.float64)}
