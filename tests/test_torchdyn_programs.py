"""What people write with torchdyn, in reduced form: with one import line changed, and under install()."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torchdyn.core
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torchdyn.datasets import ToyDataset
from torchdyn.models import CNF as TorchdynCNF  # noqa: N811
from torchdyn.models.cnf import hutch_trace
from torchdyn.nn import Augmenter

import rnode_plugin


@pytest.fixture(params=["one import changed", "installed"])
def model_class(request: pytest.FixtureRequest):
    if request.param == "one import changed":
        yield rnode_plugin.NeuralODE
        return
    rnode_plugin.install()
    yield torchdyn.core.NeuralODE
    rnode_plugin.uninstall()


@pytest.fixture
def moons() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = ToyDataset().generate(n_samples=128, noise=1e-1, dataset_type="moons")
    return x.float(), y.long()


def train(
    loss: Callable[[], Tensor], parameters: Iterable[nn.Parameter], steps: int = 12, rate: float = 0.02
) -> tuple[float, float]:
    optimizer = torch.optim.Adam(parameters, rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(float(value))
    return losses[0], losses[-1]


@pytest.mark.parametrize("regularizers", [None, {"kinetic": 0.01, "jacfrob": 0.01}])
def test_quickstart(model_class: type, moons: tuple[Tensor, Tensor], regularizers: object) -> None:
    x, y = moons
    field = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
    model = model_class(
        field, sensitivity="adjoint", solver="rk4", solver_adjoint="dopri5", atol_adjoint=1e-4, rtol_adjoint=1e-4,
        regularizers=regularizers,
    )  # fmt: skip

    def loss() -> Tensor:
        _, sol = model(x, torch.linspace(0, 1, 5))
        return nn.functional.cross_entropy(sol[-1], y) + model.reg_loss()

    first, last = train(loss, model.parameters())
    assert last < first - 0.1
    assert model.trajectory(x, torch.linspace(0, 1, 20)).shape == (20, 128, 2)
    assert model.vf(0, x).shape == (128, 2)
    assert "NFE" in repr(model)


@pytest.mark.parametrize("estimator", [None, hutch_trace])
def test_continuous_normalizing_flow(model_class: type, moons: tuple[Tensor, Tensor], estimator: Any) -> None:
    x, _ = moons
    prior = MultivariateNormal(torch.zeros(2), torch.eye(2))
    net = nn.Sequential(nn.Linear(2, 16), nn.Softplus(), nn.Linear(16, 2))
    cnf = TorchdynCNF(net, trace_estimator=estimator, noise_dist=prior if estimator else None)
    node = model_class(cnf, solver="dopri5", sensitivity="adjoint", atol=1e-4, rtol=1e-4, regularizers=["jacfrob"])
    model = nn.Sequential(Augmenter(augment_idx=1, augment_dims=1), node)

    def loss() -> Tensor:
        _, out = model(x)
        return -(prior.log_prob(out[1, :, 1:]) - out[1, :, 0]).mean() + node.reg_loss()

    first, last = train(loss, model.parameters())
    assert last < first
    node.t_span = torch.linspace(1, 0, 2)
    assert model(prior.sample((16,)))[1][-1].shape == (16, 3)
    assert node.trajectory(Augmenter(1, 1)(prior.sample((16,))), torch.linspace(1, 0, 9)).shape == (9, 16, 3)


def test_generalized_adjoint(model_class: type) -> None:
    """The tutorial switches the sensitivity for a look at the integral loss, and back."""
    torch.manual_seed(0)
    cost = lambda t, x: (x - 1).square().sum(1, keepdim=True)  # noqa: E731
    field = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
    model = model_class(field, solver="rk4", sensitivity="interpolated_adjoint", solver_adjoint="dopri5",
                        integral_loss=cost)  # fmt: skip
    span = torch.linspace(0, 1, 20)

    def look(x: Tensor) -> float:
        with torch.no_grad():
            model.sensitivity = model.vf.sensitivity = "autograd"
            _, sol = model(torch.cat([torch.zeros(len(x), 1), x], 1), span)
            model.sensitivity = model.vf.sensitivity = "interpolated_adjoint"
        return float(sol[-1, :, 0].mean())

    x = torch.zeros(8, 2)
    before = look(x)
    train(lambda: 0.0 * model(x, span)[1][-1].sum(), model.parameters())
    assert look(x) < before


@pytest.mark.parametrize("solver", ["euler", "dopri5"])
def test_flow_matching_sampler(model_class: type, solver: str) -> None:
    class Wrapper(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, t: Tensor, x: Tensor, *args: object, **kwargs: object) -> Tensor:
            return self.model(torch.cat([x, t.reshape(-1)[0] * torch.ones_like(x[:, :1])], 1))

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))
    copied = copy.deepcopy(net)
    node = model_class(Wrapper(copied), solver=solver, sensitivity="adjoint", atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        trajectory = node.trajectory(torch.randn(4, 3, 16, 16), t_span=torch.linspace(0, 1, 2))
    assert trajectory.shape == (2, 4, 3, 16, 16)
    assert bool(torch.isfinite(trajectory).all())
    copy.deepcopy(node)
