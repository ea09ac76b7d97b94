"""Importance sampling: weights and log Z in closed form, without the noise of a trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from density_models import TIGHT, linear
from torch import Tensor
from torch.distributions import Independent, Normal

from rnode_plugin import Exact, FixedGrid, Hutchinson, MultiscaleFlow, RegularizedCNF, importance_sample
from rnode_plugin.analysis.importance_sampling import ImportanceSample
from rnode_plugin.core.trace_estimators import Difference
from rnode_plugin.errors import ConfigError

DIMS = 66  # above 64, where a random trace is refused
STEPS = torch.linspace(0, 1, 3)


def test_weights_of_a_known_ratio() -> None:
    """The density is N(0, e^-2a) and the target 3 N(0, s^2): each weight and log Z = log 3 are known."""
    a = torch.diag(torch.tensor([0.2, -0.3], dtype=torch.float64))
    model = RegularizedCNF(linear(a), event_shape=2, trace_estimator="exact", solver=TIGHT).double()
    own = Independent(Normal(torch.zeros(2).double(), torch.exp(-a.diagonal())), 1)
    target = Independent(Normal(torch.zeros(2).double(), 0.8), 1)
    torch.manual_seed(0)
    found = importance_sample(model, lambda x: target.log_prob(x) + math.log(3), 4000)
    assert model.nfe > 0  # of this solve
    expected = target.log_prob(found.x) + math.log(3) - own.log_prob(found.x)
    torch.testing.assert_close(found.log_weights, expected, rtol=1e-6, atol=1e-6)
    w = expected.exp()
    torch.testing.assert_close(found.ess, w.sum() ** 2 / w.square().sum())
    torch.testing.assert_close(found.log_z_error, w.std() / (w.mean() * 4000**0.5), rtol=1e-3, atol=0)
    assert abs(float(found.log_z) - math.log(3)) < 4 * float(found.log_z_error)
    second = (found.weights[:, None] * found.x.square()).sum(0)
    torch.testing.assert_close(second, torch.full((2,), 0.64).double(), rtol=0.1, atol=0)
    alone = importance_sample(model, target.log_prob, 1)
    assert (alone.ess, alone.log_z_error, alone.log_z) == (1, math.inf, alone.log_weights[0])


def test_the_error_of_log_z_is_that_of_a_mean_of_three_weights() -> None:
    """Weights 1, 2 and 3 have the mean 2 and the standard deviation 1."""
    found = ImportanceSample(torch.zeros(3, 2), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).log())
    assert float(found.log_z) == pytest.approx(math.log(2))
    assert float(found.log_z_error) == pytest.approx(1 / (2 * 3**0.5))


# --- the noise of a trace ---


A = 0.03 * torch.randn(DIMS, DIMS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def density(a: Tensor, estimator: Any) -> tuple[RegularizedCNF, Callable[[Tensor], Tensor]]:
    """The density of ``f(z) = A z`` in two steps of the midpoint rule, and its log-density in closed form.

    The trace is the same at all states, so the exact log-density of a sample of z is ``log N(z) + tr A``.
    """
    model = RegularizedCNF(
        linear(a), event_shape=len(a), trace_estimator=estimator, solver="midpoint", t_span=STEPS, regularizers=()
    ).double()
    half = torch.eye(len(a)).double() - a / 2 + a @ a / 8  # a step of -A
    back = torch.linalg.inv(half @ half)
    return model, lambda x: model.base.log_prob(x @ back.T) + a.trace()


@pytest.mark.parametrize(("dims", "estimator"), [(3, Hutchinson()), (64, Difference()), (DIMS, Exact())], ids=repr)
def test_log_densities_have_no_noise(dims: int, estimator: Any) -> None:
    model, exact = density(A[:dims, :dims], estimator)
    found = importance_sample(model, exact, 5)
    torch.testing.assert_close(found.log_weights, torch.zeros(5).double(), rtol=0, atol=1e-9)
    assert model.estimator is estimator
    assert model.nfe == 4


@pytest.mark.parametrize("estimator", [Hutchinson(), Hutchinson(count=DIMS), Difference()], ids=repr)
def test_a_noisy_trace_of_many_dimensions_is_refused(estimator: Any) -> None:
    model, exact = density(A, estimator)
    with pytest.raises(ConfigError, match=r"without noise.*of 66 dimensions.*'exact'.*jacobian='map'"):
        importance_sample(model, exact, 5)
    importance_sample(model, exact, 5, jacobian="map")


def test_images_have_weights_without_noise() -> None:
    """The blocks of two convolutions and 96 dimensions take at most 36 products."""
    torch.manual_seed(0)
    flow = MultiscaleFlow((1, 12, 8), hidden=3, layers=2, alpha=0.05, solver=FixedGrid("midpoint", step=0.5))
    flow.double()
    for p in flow.parameters():
        torch.nn.init.normal_(p, std=0.2)
    assert (flow.dims, flow.exact_products) == (96, 36)
    rows = flow.solved_with(trace_estimator=Exact(frobenius=True))  # another spacing
    torch.manual_seed(1)
    found = importance_sample(flow, lambda x: x.new_zeros(3), 3)
    torch.manual_seed(1)
    with torch.no_grad():
        x, log_prob = rows.inverse_and_log_prob(flow.base.sample(torch.Size([3])))
    torch.testing.assert_close(found.x, x, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.log_weights, -log_prob, rtol=1e-12, atol=0)
    net = RegularizedCNF(flow.fields[0], event_shape=(1, 12, 8))
    assert net.exact_products == 9


def test_a_target_that_is_zero_in_places() -> None:
    model, exact = density(A[:3, :3], "gaussian")
    half = importance_sample(model, lambda x: torch.where(x[:, 0] > 0, exact(x), -math.inf), 400)
    assert abs(float(half.log_z) - math.log(0.5)) < 4 * float(half.log_z_error)
