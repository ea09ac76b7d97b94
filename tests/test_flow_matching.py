"""Penalties and scores at points, and densities of velocities, against independent references."""

from __future__ import annotations

import math
from importlib.metadata import version
from typing import Any

import pytest
import torch
from dense_rates import dense_rates
from problems import slope
from regularizer_table import difference_in_time
from torch import Tensor, nn

from rnode_plugin import Adaptive, RegularizedCNF, penalties_at
from rnode_plugin.errors import ConfigError
from rnode_plugin.flow_matching import score

SCALES = torch.tensor([0.5, -0.3, 1.0], dtype=torch.float64)


class Velocity(nn.Module):
    """In the order of flow_matching's models, with an extra."""

    def __init__(self, dims: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(dims + 1, 16), nn.Tanh(), nn.Linear(16, dims)).double()

    def forward(self, x: Tensor, t: Tensor, scale: float = 1.0) -> Tensor:
        flat = x.flatten(1)
        time = t.to(flat).reshape(-1, 1).expand(len(flat), 1)
        return scale * self.net(torch.cat([flat, time], 1)).view_as(x)


def linear(x: Tensor, t: Tensor) -> Tensor:
    """``f = a x``: samples at t = 1 are ``exp(a)`` times the source."""
    return x * SCALES.to(x)


def points(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def normal(x: Tensor) -> Tensor:
    return -0.5 * (x.flatten(1).square() + math.log(2 * math.pi)).sum(1)


def exact_log_prob(x: Tensor) -> Tensor:
    return normal(x * torch.exp(-SCALES)) - SCALES.sum()


def test_penalties_at_points_with_times_are_dense_derivatives() -> None:
    """At one time for all they are in ``test_regularizers``."""
    field, z, times = Velocity(), points(5, 3), torch.linspace(0, 1, 5, dtype=torch.float64)
    names: list[Any] = ["kinetic", "jacfrob", "total_derivative", "curl"]
    found = penalties_at(field, times, z, names, trace_estimator="exact")
    dense = [
        dense_rates(lambda t, z: field(z[None], t)[0], *each, highest=2) for each in zip(times, z, strict=True)
    ]
    for name in names:
        expected = torch.stack([each[name] for each in dense])
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-12)
    sum(value.mean() for value in found.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert all(p.grad is not None for p in field.parameters())


def test_times_at_points_may_have_the_networks_shape() -> None:
    field, z, t = Velocity(), points(5, 3), torch.linspace(0, 1, 5, dtype=torch.float64)
    names: list[Any] = ["kinetic", "jacfrob", "total_derivative", difference_in_time]
    found = penalties_at(lambda t, x: field(x, t.squeeze(1)), t[:, None], z, names, trace_estimator="exact")
    torch.testing.assert_close(found, penalties_at(field, t, z, names, trace_estimator="exact"))


def from_velocity(velocity: Any, **options: Any) -> RegularizedCNF:
    return RegularizedCNF.from_velocity(velocity, event_shape=3, trace_estimator="exact", **options).double()


@pytest.mark.parametrize(("theirs", "ours"), [("euler", "euler"), ("midpoint", "midpoint"), ("rk4", "rk4_38")])
def test_samples_are_flow_matchings(theirs: str, ours: str) -> None:
    solver = pytest.importorskip("flow_matching.solver")
    velocity, x, grid = Velocity(), points(4, 3), torch.linspace(0, 1, 5).double()
    expected = solver.ODESolver(velocity).sample(x, step_size=None, method=theirs, time_grid=grid)
    found = from_velocity(velocity, solver=ours, steps=4).inverse(x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_likelihoods_are_flow_matchings_and_have_gradients() -> None:
    """Those of flow_matching 1.0.10 have none."""
    solver = pytest.importorskip("flow_matching.solver")
    velocity, x = Velocity(), points(4, 3)
    arguments: dict[str, Any] = {"step_size": 0.05, "method": "midpoint", "exact_divergence": True}
    _, expected = solver.ODESolver(velocity).compute_likelihood(x, normal, **arguments, enable_grad=True)
    found = from_velocity(velocity, solver="midpoint", steps=20).log_prob(x)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)
    assert found.requires_grad
    if version("flow_matching") == "1.0.10":
        with pytest.raises(RuntimeError, match="does not require grad"):
            expected.sum().backward()


def test_states_of_a_likelihood_are_at_the_times_of_the_grid() -> None:
    x, grid = points(6, 3), torch.tensor([1.0, 0.3, 0.0])
    path = from_velocity(linear, solver="rk4_38", steps=20).trajectory(x, grid)
    expected = torch.stack([x * torch.exp(SCALES * (t - 1)) for t in grid.tolist()])
    torch.testing.assert_close(path, expected, rtol=1e-6, atol=1e-6)


class Estimator(nn.Module):
    """With the interface of sbi's flow-matching estimator, whose data is at time 0: exp(scale) times the noise."""

    def ode_fn(self, theta: Tensor, condition: Tensor, times: Tensor) -> Tensor:
        return -theta * condition.expand_as(theta) + 0 * times.expand(theta.shape[:-1])[..., None]


def test_a_posterior_of_sbi_is_a_density_by_one_call() -> None:
    model = RegularizedCNF.from_velocity(
        Estimator(), data_time=0, event_shape=3, context_shape=3, trace_estimator="exact",
        solver=Adaptive(atol=1e-8, rtol=1e-8), call=lambda net, t, x, context: net.ode_fn(x, context, t),
    )  # fmt: skip
    x = points(6, 3)
    torch.testing.assert_close(model.log_prob(x, context=SCALES), exact_log_prob(x), rtol=1e-6, atol=1e-6)


def test_a_velocity_without_time() -> None:
    z = points(4, 3)
    found = penalties_at(lambda x: 2 * x, 0.5, z, ["kinetic"])["kinetic"]
    torch.testing.assert_close(found, 4 * z.square().sum(1))


def mixture_on_straight_paths(noise: Tensor) -> torch.distributions.Distribution:
    """The distribution of ``(1 - noise) data + noise * normal`` for data from two Gaussians in the plane."""
    means = torch.tensor([[2.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    width = ((0.5 * (1 - noise)) ** 2 + noise**2).sqrt()
    normals = torch.distributions.Normal((1 - noise) * means, width.expand(2, 2))
    return torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.tensor([0.7, 0.3], dtype=torch.float64)),
        torch.distributions.Independent(normals, 1),
    )


def velocity_on_straight_paths(x: Tensor, noise: Tensor) -> Tensor:
    """The mean of normal - data at a state, by Bayes' rule over the two Gaussians, without a score."""
    components: Any = mixture_on_straight_paths(noise)
    inner = components.component_distribution
    logits = inner.log_prob(x[:, None]) + components.mixture_distribution.logits
    shift = x[:, None] - inner.base_dist.loc
    variance = inner.base_dist.variance
    normal = noise / variance * shift
    data = inner.base_dist.loc / (1 - noise) + 0.25 * (1 - noise) / variance * shift
    return (logits.softmax(1)[..., None] * (normal - data)).sum(1)


@pytest.mark.parametrize("noise_time", [0, 1])
@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_the_score_is_the_gradient_of_the_log_density(t: float, noise_time: int) -> None:
    x = points(6, 2).requires_grad_()
    sign = 1 if noise_time else -1

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        noise = t if noise_time else 1 - t
        return sign * velocity_on_straight_paths(x, noise)

    noise = torch.tensor(t if noise_time else 1 - t, dtype=torch.float64)
    (expected,) = torch.autograd.grad(mixture_on_straight_paths(noise).log_prob(x).sum(), x)
    torch.testing.assert_close(score(velocity, t, x, noise_time=noise_time), expected)


def test_a_score_at_one_time_per_sample() -> None:
    x = points(4, 3, 2, 2)
    t = torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return x * (1 + t.reshape(-1, 1, 1, 1))

    found = score(velocity, t, x, noise_time=1)
    each = torch.cat([score(velocity, float(s), x[i : i + 1], noise_time=1) for i, s in enumerate(t)])
    torch.testing.assert_close(found, each)
    torch.testing.assert_close(score(velocity, t[:, None], x, noise_time=1), each)


def test_a_score_where_there_is_none_is_refused() -> None:
    """It is singular at the data, and no velocity is trained beyond the noise, as at the label 500 of 1000."""
    wrong = ((0.0, 1.0), (1.0, 0.0), (torch.tensor([0.5, 0.0]), 1.0), (500.0, 1.0), (-0.1, 0.0), (math.nan, 1.0))
    for t, noise_time in wrong:
        with pytest.raises(ConfigError, match="singular"):
            score(lambda t, x: x, t, torch.randn(2, 2), noise_time=noise_time)
    with pytest.raises(TypeError, match="noise_time"):  # either default would be wrong for somebody, in silence
        score(lambda t, x: x, 0.5, torch.randn(2, 2))  # pyright: ignore[reportCallIssue]
    with pytest.raises(ConfigError, match="noise_time"):
        score(lambda t, x: x, 0.5, torch.randn(2, 2), noise_time=0.999)


# a transformer, whose attention has no second derivative --------------------------------------------------------


class ModesByAttention(nn.Module):
    """The velocity of flow matching to three Gaussians, whose responsibilities are the softmax of an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.modes = nn.Parameter(torch.tensor([[2.0, 0.0], [0.0, 2.0], [-2.0, 0.0]], dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        variance = (t * 0.5) ** 2 + (1 - t) ** 2
        query, keys = (t / variance * x)[:, None, None], self.modes.expand(len(x), 1, 3, 2)
        mode = nn.functional.scaled_dot_product_attention(query, keys, keys, scale=1.0)[:, 0, 0]
        slope = (0.25 * t - (1 - t)) / variance
        return slope * x + (1 - slope * t) * mode


def log_mean_of_modes(x: Tensor, modes: Tensor) -> Tensor:
    parts = torch.distributions.Independent(torch.distributions.Normal(modes, 0.5), 1).log_prob(x[:, None])
    return parts.logsumexp(1) - math.log(3)


def density_of_attention(estimator: str) -> tuple[ModesByAttention, RegularizedCNF]:
    velocity = ModesByAttention()
    return velocity, RegularizedCNF.from_velocity(
        velocity, event_shape=2, trace_estimator=estimator, regularizers=[], solver=Adaptive(atol=1e-8, rtol=1e-8)
    )


def test_the_likelihood_of_an_attention_is_exact() -> None:
    velocity, model = density_of_attention("exact")
    x = 2 * points(7, 2)
    with torch.no_grad():
        torch.testing.assert_close(model.log_prob(x), log_mean_of_modes(x, velocity.modes), rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match="trace_estimator='difference'"):
        model.log_prob(x)


def test_an_attention_trains_by_its_likelihood() -> None:
    """Over all signs of two dimensions the estimate is the trace. The gradient is along a rotation of the modes."""
    velocity, model = density_of_attention("difference:4")
    x = 2 * points(7, 2)
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=x.dtype)[:, None].expand(4, 7, 2)
    found, exact = model.log_prob(x, noise=[signs]), log_mean_of_modes(x, velocity.modes)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)
    rotated = velocity.modes.detach().flip(1) * torch.tensor([-1.0, 1.0])  # the modes keep their length
    slopes = [slope(each.mean(), [velocity.modes], [rotated]) for each in (found, exact)]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-6)
