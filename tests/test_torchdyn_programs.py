"""What people write with torchdyn, with one import changed and under install() and uninstall()."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torchdyn.core
import torchdyn.models
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torchdyn.core import NeuralODE
from torchdyn.core.neuralde import NeuralODE as Theirs
from torchdyn.datasets import ToyDataset
from torchdyn.models import CNF as TorchdynCNF  # noqa: N811
from torchdyn.models.cnf import hutch_trace
from torchdyn.nn import Augmenter

import rnode_plugin
import rnode_plugin.torchdiffeq
from rnode_plugin import SolverError


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


def test_quickstart(model_class: type, moons: tuple[Tensor, Tensor]) -> None:
    x, y = moons
    field = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
    model = model_class(
        field, sensitivity="adjoint", solver="rk4", solver_adjoint="dopri5", atol_adjoint=1e-4, rtol_adjoint=1e-4,
        regularizers={"kinetic": 0.01, "jacfrob": 0.01},
    )  # fmt: skip

    def loss() -> Tensor:
        _, sol = model(x, torch.linspace(0, 1, 5))
        return nn.functional.cross_entropy(sol[-1], y) + model.reg_loss()

    first, last = train(loss, model.parameters())
    assert last < first - 0.1
    assert model.trajectory(x, torch.linspace(0, 1, 20)).shape == (20, 128, 2)
    assert model.vf(0, x).shape == (128, 2)
    assert "NFE" in repr(model)


def test_continuous_normalizing_flow(model_class: type, moons: tuple[Tensor, Tensor]) -> None:
    x, _ = moons
    prior = MultivariateNormal(torch.zeros(2), torch.eye(2))
    net = nn.Sequential(nn.Linear(2, 16), nn.Softplus(), nn.Linear(16, 2))
    cnf = TorchdynCNF(net, trace_estimator=hutch_trace, noise_dist=prior)
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


class Hamiltonian(nn.Module):
    """The field of the tutorials: dq/dt = dH/dp, dp/dt = -dH/dq."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(2, 16), nn.Softplus(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.requires_grad_()
            (slope,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        return torch.cat([slope[:, 1:], -slope[:, :1]], 1)


def test_tutorials_of_mechanical_fields_read_defunc(model_class: type) -> None:
    """torchdyn 1.0.6 has no ``defunc``, by which these tutorials evaluate the field (torchdyn #172)."""
    torch.manual_seed(0)
    model, x = model_class(Hamiltonian(), solver="rk4"), torch.randn(64, 2)
    velocity = torch.stack([x[:, 1], -x[:, 0]], 1)
    first, last = train(lambda: (model.defunc(0, x) - velocity).square().mean(), model.parameters(), steps=40)
    assert last < first / 2
    torch.testing.assert_close(model.defunc(0, x), model.vf(0, x))


ImportedBefore: Any = NeuralODE  # install() gives it arguments and methods that no type checker sees
PRISTINE = dict(vars(Theirs))


class Subclass(ImportedBefore):
    def __init__(self, **options: Any) -> None:
        super().__init__(nn.Linear(2, 2), "rk4", **options)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[1][-1]


@pytest.fixture(autouse=True)
def uninstalled():
    yield
    rnode_plugin.uninstall()


@pytest.fixture
def installed(uninstalled: None) -> None:
    rnode_plugin.install()


def test_torchdyns_own_class_takes_regularizers(installed: None) -> None:
    x = torch.randn(3, 2)
    plain = ImportedBefore(nn.Linear(2, 2), "rk4", regularizers={"kinetic": 0.5}, max_nfe=100)
    assert type(plain) is Theirs is torchdyn.core.NeuralODE is torchdyn.core.NeuralDE is torchdyn.models.NeuralODE
    models: list[Any] = [plain, Subclass(regularizers=["kinetic"])]
    for model in models:
        assert issubclass(type(model), Theirs)
        model(x)
        model.reg_loss().backward()
        assert set(model.regularization) == {"kinetic"}
        copied = pickle.loads(pickle.dumps(model))
        assert type(model) is type(copied)
        copied(x)
        copied.reg_loss()
    assert isinstance(rnode_plugin.NeuralODE(nn.Linear(2, 2)), Theirs)
    with pytest.raises(SolverError):
        ImportedBefore(lambda t, x: x**3 * 100)(torch.ones(1, 1), torch.linspace(0, 9, 3))


def test_idempotent_and_exactly_reversible() -> None:
    rnode_plugin.uninstall()
    assert dict(vars(Theirs)) == PRISTINE
    rnode_plugin.install()
    once = dict(vars(Theirs))
    assert once != PRISTINE
    rnode_plugin.install()
    assert dict(vars(Theirs)) == once
    rnode_plugin.uninstall()
    assert dict(vars(Theirs)) == PRISTINE
    rnode_plugin.uninstall()
    assert dict(vars(Theirs)) == PRISTINE
