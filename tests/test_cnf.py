"""CNF: the trace against dense Jacobians on any event shape, products shared with jacfrob, torchdyn's contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torchdyn.core import NeuralODE as TorchdynNeuralODE
from torchdyn.models import CNF as TorchdynCNF  # noqa: N811
from torchdyn.models.cnf import autograd_trace, hutch_trace

from rnode_plugin import CNF, Exact, NeuralODE
from rnode_plugin.errors import ConfigError


def mlp(dims: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(dims, 8), nn.Tanh(), nn.Linear(8, dims)).double()


class ConvWithTime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, padding=1).double()

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        time = torch.ones_like(z[:, :1]) * t
        return torch.tanh(self.conv(torch.cat([z, time], 1)))


def dense(field: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """Trace and squared Frobenius norm of the Jacobian, sample by sample."""
    jacobians = [
        torch.autograd.functional.jacobian(lambda s: field(s[None])[0], each).reshape(each.numel(), -1)
        for each in z
    ]
    return torch.stack([j.trace() for j in jacobians]), torch.stack([j.square().sum() for j in jacobians])


@pytest.mark.parametrize("estimator", [None, "exact", autograd_trace, Exact()])
def test_exact_trace_of_flat_and_image_shaped_events(estimator: Any) -> None:
    torch.manual_seed(0)
    t = torch.tensor(0.3, dtype=torch.float64)
    net, conv = mlp(), ConvWithTime()
    flat, images = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 2, 4, 4, dtype=torch.float64)
    for cnf, z, field in (
        (CNF(net, estimator), flat, net),
        (CNF(conv, estimator, event_shape=(2, 4, 4)), images, lambda z: conv(t, z)),
    ):
        out = cnf(t, torch.cat([torch.zeros(2, 1, dtype=torch.float64), z.flatten(1)], 1))
        torch.testing.assert_close(out[:, 0], -dense(field, z)[0])
        torch.testing.assert_close(out[:, 1:], field(z).flatten(1))


@pytest.mark.parametrize("estimator", ["gaussian", "rademacher", hutch_trace])
def test_hutchinson_trace_is_unbiased_on_images(estimator: Any) -> None:
    torch.manual_seed(0)
    many, t, conv = 4000, torch.tensor(0.3, dtype=torch.float64), ConvWithTime()
    z = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    cnf: Any = CNF(conv, estimator, event_shape=(2, 3, 3))
    cnf.noise = cnf.trace_estimator.draw(z.expand(many, -1, -1, -1))
    with torch.no_grad():
        trace = -cnf(t, torch.cat([torch.zeros(many, 1), z.flatten(1).expand(many, -1)], 1))[:, 0]
    exact = dense(lambda z: conv(t, z), z)[0]
    assert abs(float(trace.mean() - exact)) < 4 * float(trace.std()) / many**0.5


@pytest.mark.parametrize("estimator", [None, hutch_trace])
def test_agrees_with_torchdyns_class_in_either_solver(estimator: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
    noise = MultivariateNormal(torch.zeros(3), torch.eye(3)) if estimator else None
    x, span, found = torch.randn(5, 4), torch.linspace(0, 1, 3), []
    for Model in (TorchdynNeuralODE, NeuralODE):
        for Cnf in (TorchdynCNF, CNF):
            torch.manual_seed(4)
            found.append(Model(Cnf(net, estimator, noise), "dopri5", sensitivity="adjoint")(x, span)[1])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)


class WithTime(nn.Module):
    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return t * z


def test_net_that_depends_on_time_gets_it() -> None:
    x = torch.cat([torch.zeros(3, 1), torch.randn(3, 2)], 1).double()
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    sol = NeuralODE(CNF(WithTime()), "dopri5", atol=1e-10, rtol=1e-10)(x, t)[1][-1]
    torch.testing.assert_close(sol[:, 1:], x[:, 1:] * torch.exp(torch.tensor(0.5).double()))
    torch.testing.assert_close(sol[:, 0], -torch.ones(3).double())


def test_second_order_flow() -> None:
    """x'' = -x - v/2 as a flow of (x, v): its divergence is -1/2 everywhere."""
    net = nn.Linear(4, 2, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.cat([-torch.eye(2), -0.5 * torch.eye(2)], 1))
    x = torch.cat([torch.zeros(3, 1), torch.randn(3, 4)], 1).double()
    sol = NeuralODE(CNF(net, order=2), "rk4")(x, torch.linspace(0, 2, 9).double())[1]
    torch.testing.assert_close(sol[-1, :, 0], torch.full((3,), 2.0).double())


class Counter:
    """Counts calls of torch.autograd.grad."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, original = 0, torch.autograd.grad

        def counted(*args, **kwargs):
            self.calls += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(torch.autograd, "grad", counted)
        monkeypatch.setattr("torchdyn.models.cnf.grad", counted)


class Affine(nn.Module):
    """A field of autograd's: a bare nn.Linear would be recognised and bring products of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(z)


NOISE = MultivariateNormal(torch.zeros(3), torch.eye(3))


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@pytest.mark.parametrize("regularizers", [None, ["kinetic"], ["jacfrob"], ["kinetic", "jacfrob"]])
@pytest.mark.parametrize("make", [
    lambda: TorchdynCNF(Affine(), hutch_trace, NOISE),
    lambda: CNF(Affine(), "gaussian"),
    lambda: CNF(Affine(), "rademacher", event_shape=(3,)),
    lambda: CNF(Affine(), hutch_trace, NOISE),
    lambda: nn.Sequential(CNF(Affine(), "gaussian")),
    Affine,
], ids=["torchdyn", "gaussian", "rademacher", "hutch_trace", "sequential", "no_cnf"])  # fmt: skip
def test_exactly_one_product_an_evaluation(
    make: Callable[[], nn.Module], solver: str, regularizers: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = make is not Affine
    model = NeuralODE(make(), solver, regularizers=regularizers)
    counter = Counter(monkeypatch)
    model(torch.randn(4, 3 + traced), torch.linspace(0, 1, 4))
    if traced:
        assert counter.calls == model.vf.nfe
    else:  # the guess of the first step needs no product
        assert counter.calls == (model.vf.nfe - (solver == "dopri5") if "jacfrob" in (regularizers or []) else 0)


class Tutorial(nn.Module):
    """The class of torchdyn's tutorial, whose first column is a trace as well."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.trace_estimator, self.noise_dist, self.noise = net, autograd_trace, None, None

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(True):
            x_in = x[:, 1:].requires_grad_(True)
            x_out = self.net(x_in)
            trace: Any = self.trace_estimator(x_out, x_in, noise=self.noise)
        return torch.cat([-trace[:, None], x_out], 1) + 0 * x


@pytest.mark.parametrize("make", [TorchdynCNF, CNF, Tutorial])
def test_exact_products_give_the_exact_frobenius_norm(make: type) -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 3).double()
    model = NeuralODE(make(net), "dopri5", regularizers=["jacfrob"])
    model(torch.randn(4, 4).double())
    torch.testing.assert_close(model.regularization["jacfrob"], net.weight.square().sum().expand(4))


@pytest.mark.parametrize("make", [TorchdynCNF, CNF], ids=["torchdyn", "ours"])
def test_jacfrob_reads_the_products_of_the_trace(make: type) -> None:
    """With Hutchinson's estimator on a linear field both are functions of one and the same noise vector."""
    torch.manual_seed(0)
    net = nn.Linear(3, 3)
    cnf = make(net, hutch_trace, MultivariateNormal(torch.zeros(3), torch.eye(3)))
    model = NeuralODE(cnf, "euler", regularizers=["jacfrob"])
    _, sol = model(torch.zeros(4, 4))
    products = cnf.noise @ net.weight
    torch.testing.assert_close(model.regularization["jacfrob"], products.square().sum(1))
    torch.testing.assert_close(-sol[-1, :, 0], (products * cnf.noise).sum(1))


def test_estimators_of_a_users_own_stay_theirs() -> None:
    def estimator(x_out: Tensor, x_in: Tensor, noise: Tensor | None = None) -> Tensor:
        trace: Any = autograd_trace(x_out, x_in)
        return 3 * trace

    torch.manual_seed(0)
    net = nn.Linear(2, 2)
    x = torch.randn(5, 3)
    for make in (TorchdynCNF, CNF):
        model = NeuralODE(make(net, estimator), "euler", regularizers=["kinetic", "jacfrob"])
        _, sol = model(x)
        torch.testing.assert_close(sol[-1, :, 0], x[:, 0] - 3 * net.weight.trace())
        assert model.regularization["jacfrob"].shape == (5,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CNF(nn.Linear(2, 2), "hutch"), "trace estimator"),
        (lambda: CNF(nn.Linear(2, 2), order=0), "order"),
        (lambda: CNF(nn.Linear(2, 2), "gaussian")(torch.zeros(()), torch.zeros(4, 3)), "needs noise"),
        (lambda: CNF(WithTime())(torch.zeros(4, 3)), "no time"),
    ],
)
def test_mistakes(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
