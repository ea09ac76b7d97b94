"""RegularizedCNF: densities with known answers, samples, shapes, precision, training in three gradient modes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import (
    AffineTransform,
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
)
from torchdyn.nn import DepthCat

from rnode_plugin import RegularizedCNF
from rnode_plugin.core.regularizers import LearnedEndTime, Steer
from rnode_plugin.errors import ConfigError

TIGHT: dict[str, Any] = {"atol": 1e-10, "rtol": 1e-10}


def linear(matrix: Tensor) -> nn.Module:
    net = nn.Linear(len(matrix), len(matrix), bias=False).double()
    with torch.no_grad():
        net.weight.copy_(matrix)
    return net


def image_field() -> nn.Module:
    return nn.Sequential(DepthCat(1), nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 3, padding=1))


@pytest.mark.parametrize("trace_estimator", ["exact", "rademacher"])
def test_density_of_a_linear_flow_is_the_gaussian_that_it_should_be(trace_estimator: str) -> None:
    """z = exp(A) x is standard normal exactly where x has the covariance exp(-A) exp(-A)^T."""
    a = torch.diag(torch.tensor([0.3, -0.7, 0.5], dtype=torch.float64))  # for a diagonal one signs estimate exactly
    model = RegularizedCNF(linear(a), event_shape=3, trace_estimator=trace_estimator, **TIGHT).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    back = torch.linalg.matrix_exp(-a)
    exact = MultivariateNormal(torch.zeros(3, dtype=torch.float64), back @ back.T).log_prob(x)
    torch.testing.assert_close(model.log_prob(x), exact, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(model(x), exact, rtol=1e-8, atol=1e-8)
    z, logdet = model.transform(x)
    torch.testing.assert_close(model.inverse(z), x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(logdet, a.trace().expand(6))


def test_density_integrates_to_one() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
    model = RegularizedCNF(net, event_shape=2, trace_estimator="exact", atol=1e-6, rtol=1e-6).double()
    line = torch.linspace(-9, 9, 121, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    with torch.no_grad():
        total = model.log_prob(grid).exp().sum() * (line[1] - line[0]) ** 2
    assert abs(float(total) - 1) < 1e-4


def test_samples_and_temperature() -> None:
    torch.manual_seed(0)
    a = torch.tensor([[0.3, 0.4], [-0.2, 0.1]], dtype=torch.float64)
    model = RegularizedCNF(linear(a), event_shape=2, **TIGHT).double()
    back = torch.linalg.matrix_exp(-a)
    for temperature in (1.0, 0.5):
        x = model.sample(20000, temperature)
        torch.testing.assert_close(x.T.cov(), temperature**2 * back @ back.T, rtol=0.05, atol=0.02)
        assert not x.requires_grad


def test_temperature_shrinks_to_the_mean_of_the_base() -> None:
    base = Independent(Normal(torch.tensor([5.0, -3.0]), torch.tensor([1.0, 2.0])), 1)
    model = RegularizedCNF(linear(torch.zeros(2, 2)).float(), base)
    x = model.sample(4000, 1e-3)
    torch.testing.assert_close(x.mean(0), torch.tensor([5.0, -3.0]), rtol=0, atol=1e-3)


BASES = {
    "normal": lambda: Independent(Normal(torch.zeros(2), torch.ones(2)), 1),
    "multivariate": lambda: MultivariateNormal(torch.zeros(2), torch.eye(2)),
    "mixture": lambda: MixtureSameFamily(
        Categorical(torch.tensor([0.3, 0.7])), Independent(Normal(torch.randn(2, 2), torch.ones(2, 2)), 1)
    ),
    "transformed": lambda: TransformedDistribution(
        Independent(Normal(torch.zeros(2), torch.ones(2)), 1),
        [AffineTransform(torch.ones(2), torch.ones(2) * 2, 1)],
    ),
}


@pytest.mark.parametrize("name", BASES)
def test_base_follows_the_model(name: str) -> None:
    torch.manual_seed(0)
    base = BASES[name]()
    model = RegularizedCNF(nn.Linear(2, 2), base)
    x = torch.randn(5, 2)
    z = model.transform(x)[0]
    before = base.log_prob(z)
    model.double()
    torch.testing.assert_close(model.base.log_prob(z.double()), before.double(), rtol=1e-5, atol=1e-5)
    assert model.log_prob(x.double()).dtype == torch.float64
    assert model.sample(3).dtype == torch.float64
    assert base.sample().dtype == torch.float32  # the caller's stays


@pytest.mark.parametrize("sensitivity", ["autograd", "checkpointed", "adjoint"])
def test_images_train_in_every_gradient_mode(sensitivity: str) -> None:
    torch.manual_seed(0)
    model = RegularizedCNF(
        image_field(), event_shape=(1, 4, 4), solver="rk4_38", t_span=torch.linspace(0, 1, 3), atol=1e-3, rtol=1e-3,
        sensitivity=sensitivity,
    )  # fmt: skip
    data = 0.3 * torch.randn(64, 1, 4, 4) + 1
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        nll = -model.log_prob(data).mean() / model.dims
        (nll + model.reg_loss()).backward()
        optimizer.step()
        losses.append(float(nll))
    assert losses[-1] < losses[0] - 0.2
    assert set(model.regularization) == {"kinetic", "jacfrob"}
    assert model.sample(3, 0.7).shape == (3, 1, 4, 4)
    model.eval()
    with torch.inference_mode():
        assert model.log_prob(data).shape == (64,)


def test_modes_have_the_same_gradient() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x, gradients = torch.randn(4, 2, dtype=torch.float64), []
    for sensitivity in ("autograd", "checkpointed", "adjoint"):
        model = RegularizedCNF(
            net, event_shape=2, sensitivity=sensitivity, atol_adjoint=1e-10, rtol_adjoint=1e-10, **TIGHT
        ).double()
        torch.manual_seed(3)
        gradients.append(torch.autograd.grad(-model.log_prob(x).mean() + model.reg_loss(), list(net.parameters())))
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-9)


def test_copies_and_state_dict_hold_each_parameter_once() -> None:
    model = RegularizedCNF(nn.Linear(2, 2), event_shape=2)
    assert len(list(model.parameters())) == len(model.state_dict()) == 2
    (-model.log_prob(torch.randn(3, 2)).mean() + model.reg_loss()).backward()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.ode.vf.vf.net.weight.fill_(0.4)
        copied.ode.vf.vf.net.bias.zero_()
    x = torch.randn(3, 2)
    torch.testing.assert_close(copied.inverse(copied.transform(x)[0]), x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("policy", [LearnedEndTime(2.0), Steer(0.5)], ids=["learned", "steer"])
def test_samples_run_through_the_time_that_the_density_runs_through(policy: Any) -> None:
    torch.manual_seed(0)
    model = RegularizedCNF(linear(0.3 * torch.randn(2, 2)), event_shape=2, regularizers=[policy], **TIGHT).double()
    x = torch.randn(3, 2, dtype=torch.float64)
    model.eval()
    z, _ = model.transform(x)
    for training in (False, True):  # a random end is for the penalized solves of training alone
        model.train(training)
        torch.testing.assert_close(model.inverse(z), x, rtol=1e-7, atol=1e-7)
    if isinstance(policy, LearnedEndTime):
        torch.testing.assert_close(copy.deepcopy(model).inverse(z), x, rtol=1e-7, atol=1e-7)
        model.inverse(z).sum().backward()
        assert policy.end.grad is not None


def test_usable_in_a_lightning_module(tmp_path) -> None:
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader

    class Learner(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.flow = RegularizedCNF(nn.Linear(2, 2), event_shape=2)

        def training_step(self, x, batch_idx):
            return -self.flow.log_prob(x).mean() / self.flow.dims + self.flow.reg_loss()

        def validation_step(self, x, batch_idx):
            self.log("val", -self.flow.log_prob(x).mean())

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-2)

    rows: Any = torch.randn(32, 2)  # a tensor serves as a data set
    data = DataLoader(rows, batch_size=16)
    pl.Trainer(
        max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        default_root_dir=tmp_path,
    ).fit(Learner(), data, data)  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RegularizedCNF(nn.Linear(2, 2)), "event_shape="),
        (lambda: RegularizedCNF(nn.Linear(2, 2), Normal(torch.zeros(2), 1.0)), "Independent"),
        (lambda: RegularizedCNF(nn.Linear(2, 2), BASES["normal"](), event_shape=3), "differ"),
        (lambda: RegularizedCNF(nn.Linear(2, 2), event_shape=2, order=2), "order="),
        (lambda: RegularizedCNF(nn.Linear(2, 2), event_shape=2, trace_estimator="hutch"), "trace estimator"),
        (lambda: RegularizedCNF(nn.Linear(2, 2), event_shape=2).log_prob(torch.zeros(4, 3)), "give"),
        (lambda: RegularizedCNF(nn.Linear(2, 2), event_shape=2).sample(2, 0.0), "temperature"),
        (lambda: RegularizedCNF(nn.Linear(2, 2), event_shape=2).reg_loss(), "call the model"),
    ],
)
def test_mistakes(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
