"""Conditional densities and those of flow matching: closed forms, one context or many, gradients into encoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, Normal

from rnode_plugin import CNF, NeuralODE, RegularizedCNF
from rnode_plugin.errors import ConfigError

MODES = ["autograd", "checkpointed", "adjoint", "interpolated_adjoint"]
TIGHT: dict[str, Any] = {"atol": 1e-9, "rtol": 1e-9}


class Affine(nn.Module):
    """``f(t, z, c) = s(c) z + m(c)``: its flow is known, and so is the density, a Gaussian for each context."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Linear(3, 2).double()
        self.shift = nn.Linear(3, 2).double()

    def parts(self, context: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.rate(context)), self.shift(context)

    def forward(self, t: Tensor, z: Tensor, context: Tensor) -> Tensor:
        rate, shift = self.parts(context)
        return rate * z + shift

    def exact(self, context: Tensor) -> Independent:
        """``z = e^s x + m (e^s - 1) / s`` is standard normal."""
        rate, shift = self.parts(context)
        return Independent(Normal(-shift * (1 - torch.exp(-rate)) / rate, torch.exp(-rate)), 1)


class Mixing(nn.Module):
    """A field without a closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def forward(self, t: Tensor, z: Tensor, context: Tensor) -> Tensor:
        return self.net(torch.cat([z, context], 1)) * (1 + t)


def model_of(net: nn.Module, **options: object) -> RegularizedCNF:
    merged = {"event_shape": 2, "context_shape": 3, "trace_estimator": "exact", **TIGHT, **options}
    return RegularizedCNF(net, **merged).double()


@pytest.mark.parametrize("sensitivity", MODES)
@pytest.mark.parametrize("trace_estimator", ["exact", "rademacher"])  # both exact: the Jacobian is diagonal
def test_density_and_its_gradients_are_those_of_the_closed_form(trace_estimator: str, sensitivity: str) -> None:
    torch.manual_seed(0)
    net = Affine()
    adjoint = {"atol_adjoint": 1e-9, "rtol_adjoint": 1e-9}
    model = model_of(net, trace_estimator=trace_estimator, sensitivity=sensitivity, **adjoint)
    x, context = torch.randn(6, 2).double(), torch.randn(6, 3).double().requires_grad_()
    found, exact = model.log_prob(x, context=context), net.exact(context).log_prob(x)
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-7)
    weights = torch.linspace(1, 2, 6).double()
    inputs = [context, *net.parameters()]
    for ours, true in zip(
        torch.autograd.grad((weights * found).sum(), inputs),
        torch.autograd.grad((weights * exact).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sensitivity", MODES)
def test_gradients_reach_the_encoder_of_the_context(sensitivity: str) -> None:
    """Of log-density, both penalties and a pushed sample together, against finite differences."""
    torch.manual_seed(0)
    net = Mixing()
    linear = nn.Linear(4, 3)
    encoder = nn.Sequential(linear, nn.Tanh()).double()
    x, seen = torch.randn(5, 2).double(), torch.randn(5, 4).double()
    grid = {"solver": "rk4_38", "t_span": torch.linspace(0, 1, 41 if "adjoint" in sensitivity else 4)}
    model = RegularizedCNF(
        net, event_shape=2, context_shape=3, trace_estimator="exact", sensitivity=sensitivity,
        regularizers={"kinetic": 0.3, "jacfrob": 0.2}, **grid,
    ).double()  # fmt: skip

    def loss() -> Tensor:
        context = encoder(seen)
        value = -model.log_prob(x, context).mean() + model.reg_loss()
        return value + model.inverse(x, context).square().mean()

    weight = linear.weight
    (found,) = torch.autograd.grad(loss(), weight)
    step = 1e-5
    for i, j in ((0, 0), (1, 2), (2, 3)):
        with torch.no_grad():
            values = []
            for sign in (1, -1, 0):
                weight[i, j] += sign * step if sign else 0
                if sign:
                    with torch.enable_grad():
                        values.append(float(loss().detach()))
                    weight[i, j] -= sign * step
        difference = (values[0] - values[1]) / (2 * step)
        assert float(found[i, j]) == pytest.approx(difference, rel=2e-3 if "adjoint" in sensitivity else 1e-6)


@pytest.mark.parametrize("sensitivity", MODES)
def test_tensors_in_args_have_gradients_in_every_mode(sensitivity: str) -> None:
    """x' = k x with k given as an argument of the solve: d/dk of x(1) is x(1)."""
    k = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    model = NeuralODE(
        lambda t, x, args: 2 * args["half"] * x, "dopri5", sensitivity=sensitivity, regularizers=["kinetic"],
        atol_adjoint=1e-9, rtol_adjoint=1e-9, **TIGHT,
    )  # fmt: skip
    end = model(x, torch.tensor([0.0, 1.0]).double(), args={"half": k / 2})[1][-1]
    (found,) = torch.autograd.grad(end.sum(), k)
    torch.testing.assert_close(found, (x * torch.exp(k)).sum().detach(), rtol=1e-6, atol=0)


def test_one_context_for_all_or_one_for_each() -> None:
    torch.manual_seed(0)
    net = Affine()
    model, x = model_of(net), torch.randn(4, 2).double()
    one = torch.randn(3).double()
    each = one.expand(4, 3)
    assert torch.equal(model.log_prob(x, one), model.log_prob(x, each))
    assert torch.equal(model(x, one), model.log_prob(x, context=one))
    assert torch.equal(model.inverse(x, one), model.inverse(x, each))
    z, logdet = model.transform(x, one)
    torch.testing.assert_close(model.inverse(z, one), x)
    back, log_prob = model.inverse_and_log_prob(z, each)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(log_prob, model.base.log_prob(z) + logdet)
    single = torch.cat([model.log_prob(x[i : i + 1], each[i]) for i in range(4)])
    torch.testing.assert_close(single, model.log_prob(x, each))
    assert model.log_prob(x, one.float()).dtype == torch.float64
    with torch.inference_mode():
        torch.testing.assert_close(
            model.log_prob(x, torch.as_tensor(one.tolist()).double()), model.log_prob(x, one)
        )


def test_samples_follow_their_context() -> None:
    torch.manual_seed(0)
    net, one = Affine(), torch.randn(3).double()
    model = model_of(net, atol=1e-6, rtol=1e-6)
    exact = net.exact(one)
    x = model.sample(20000, context=one)
    torch.testing.assert_close(x.mean(0), exact.mean.detach(), rtol=0, atol=0.04)
    torch.testing.assert_close(x.std(0), exact.stddev.detach(), rtol=0.03, atol=0)
    assert not x.requires_grad
    contexts = torch.randn(2, 3).double().repeat_interleave(5000, 0)
    x = model.sample(10000, context=contexts)
    for half in (slice(0, 5000), slice(5000, 10000)):
        torch.testing.assert_close(x[half].mean(0), net.exact(contexts[half][0]).mean.detach(), rtol=0, atol=0.06)


def test_images_with_classes_as_contexts_train() -> None:
    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.conv = nn.Embedding(3, 2), nn.Conv2d(3, 1, 3, padding=1)

        def forward(self, t: Tensor, z: Tensor, context: Tensor) -> Tensor:
            planes = self.embed(context[:, 0])[:, :, None, None].expand(-1, -1, *z.shape[2:])
            return self.conv(torch.cat([z, planes], 1))

    torch.manual_seed(0)
    net = Field()
    model = RegularizedCNF(net, event_shape=(1, 4, 4), context_shape=1, solver="rk4_38")
    classes = torch.randint(0, 3, (8, 1))
    (-model.log_prob(torch.randn(8, 1, 4, 4), classes).mean() + model.reg_loss()).backward()
    assert net.embed.weight.grad is not None
    assert bool(net.embed.weight.grad.any())
    assert model.sample(3, context=torch.tensor([2])).shape == (3, 1, 4, 4)


def test_the_jacobian_of_penalties_is_that_of_the_state_alone() -> None:
    torch.manual_seed(0)
    net, x, context = Affine(), torch.randn(4, 2).double(), torch.randn(4, 3).double()
    model = model_of(net, regularizers=["jacfrob"])
    model.log_prob(x, context)
    exact = net.parts(context)[0].square().sum(1)
    torch.testing.assert_close(model.regularization["jacfrob"], exact)


def conditional() -> RegularizedCNF:
    return RegularizedCNF(Affine(), event_shape=2, context_shape=3).double()


def unconditional() -> RegularizedCNF:
    return RegularizedCNF(nn.Linear(2, 2), event_shape=2)


X = torch.zeros(4, 2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: conditional().log_prob(X), r"conditional: give context="),
        (lambda: conditional().sample(3), r"conditional: give context="),
        (lambda: conditional().inverse(X), r"conditional: give context="),
        (lambda: conditional().distribution(), r"conditional: give context="),
        (lambda: conditional().log_prob(X, torch.zeros(4, 2)), r"must be a tensor of shape \(3,\)"),
        (lambda: conditional().log_prob(X, torch.zeros(2)), r"must be a tensor of shape \(3,\)"),
        (lambda: conditional().log_prob(X, [0.0, 0.0, 0.0]), r"not list"),  # pyright: ignore[reportArgumentType]
        (lambda: conditional().log_prob(X, torch.zeros(5, 3)), r"for 4 samples"),
        (lambda: conditional().log_prob(X, torch.zeros(1, 4, 3)), r"for 4 samples"),
        (lambda: conditional().sample(3, context=torch.zeros(2, 3)), r"for 3 samples"),
        (lambda: unconditional().log_prob(X.float(), torch.zeros(4, 3)), r"takes no context"),
        (lambda: unconditional().distribution(torch.zeros(3)), r"takes no context"),
        (lambda: RegularizedCNF(nn.Linear(2, 2), event_shape=2, context_shape=3), r"net\(t, z, context\)"),
        (lambda: RegularizedCNF(Affine(), event_shape=2, context_shape=0), r"context_shape"),
        (lambda: NeuralODE(CNF(Affine(), conditional=True))(torch.zeros(4, 3)), r"args=context"),
        (lambda: RegularizedCNF.from_velocity(nn.Linear(2, 2), t_span=[0, 1], event_shape=2), r"t_span"),
        (lambda: RegularizedCNF.from_velocity(nn.Linear(2, 2), 0.5, event_shape=2), r"two different"),
        (lambda: RegularizedCNF.from_velocity(nn.Linear(2, 2), float("nan"), event_shape=2), r"two different"),
        (lambda: RegularizedCNF.from_velocity(nn.Linear(2, 2), steps=0, event_shape=2), r"steps"),
    ],
)
def test_mistakes(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


# --- densities of flow-matching models ---

MEAN = torch.tensor([1.0, -0.5], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.2, 0.4], [0.4, 0.5]], dtype=torch.float64)


class GaussianToGaussian(nn.Module):
    """The velocity of flow matching from N(0, I) at t = 0 to N(MEAN, COVARIANCE) at 1 by independent pairs.

    Points on the lines ``(1 - t) x0 + t x1`` are Gaussian at each time, and the velocity is the conditional mean of
    ``x1 - x0``.
    """

    def __init__(self, *, reverse: bool = False) -> None:
        super().__init__()
        self.reverse = reverse

    def forward(self, t: Tensor, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        t = 1 - t if self.reverse else t
        eye = torch.eye(2, dtype=x.dtype)
        spread = (1 - t) ** 2 * eye + t**2 * COVARIANCE
        gain = torch.linalg.solve(spread, t * COVARIANCE - (1 - t) * eye, left=False)
        velocity = MEAN + (x - t * MEAN) @ gain.T
        return -velocity if self.reverse else velocity


@pytest.mark.parametrize("data_time", [1.0, 0.0])
def test_density_of_a_flow_matching_model(data_time: float) -> None:
    torch.manual_seed(0)
    net = GaussianToGaussian(reverse=data_time == 0)
    target = MultivariateNormal(MEAN, COVARIANCE)
    model = RegularizedCNF.from_velocity(
        net, data_time, event_shape=2, trace_estimator="exact", atol=1e-9, rtol=1e-9
    ).double()
    x = target.sample((6,))
    torch.testing.assert_close(model.log_prob(x), target.log_prob(x), rtol=1e-6, atol=1e-6)
    many = model.sample(20000)
    torch.testing.assert_close(many.mean(0), MEAN, rtol=0, atol=0.04)
    torch.testing.assert_close(many.T.cov(), COVARIANCE, rtol=0, atol=0.05)
    # the other direction: the same paths from the noise, with their log-density
    sample, log_prob = model.inverse_and_log_prob(torch.randn(6, 2).double())
    torch.testing.assert_close(log_prob, target.log_prob(sample), rtol=1e-6, atol=1e-6)
    fixed = RegularizedCNF.from_velocity(
        net, data_time, event_shape=2, trace_estimator="exact", solver="rk4_38", steps=40
    ).double()
    torch.testing.assert_close(fixed.log_prob(x), target.log_prob(x), rtol=1e-5, atol=1e-5)
    assert fixed.regularization == {}


@pytest.mark.parametrize("trace_estimator", ["gaussian", "rademacher"])
def test_estimated_density_of_a_flow_matching_model_is_unbiased(trace_estimator: str) -> None:
    torch.manual_seed(0)
    target, many = MultivariateNormal(MEAN, COVARIANCE), 4000
    model = RegularizedCNF.from_velocity(
        GaussianToGaussian(), event_shape=2, trace_estimator=trace_estimator, solver="rk4_38", steps=20
    ).double()
    x = target.sample((1,))
    with torch.no_grad():
        estimates = model.log_prob(x.expand(many, 2))
    assert float(estimates.std()) > 0.01
    assert abs(float(estimates.mean() - target.log_prob(x))) < 4 * float(estimates.std()) / many**0.5
