"""Importance sampling: weights and log Z in closed form, and intervals that hold the truth under a noisy trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from density_models import TIGHT, linear
from torch import Tensor
from torch.distributions import Independent, Normal

from rnode_plugin import FixedGrid, Hutchinson, MultiscaleFlow, RegularizedCNF
from rnode_plugin.core.importance_sampling import weigh
from rnode_plugin.core.trace_estimators import HutchPlusPlus
from rnode_plugin.errors import ConfigError

DIMS = 66  # above 64, where a random trace stays random
STEPS = torch.linspace(0, 1, 3)


def test_weights_of_a_known_ratio() -> None:
    """The density is N(0, e^-2a) and the target 3 N(0, s^2): each weight and log Z = log 3 are known."""
    a = torch.diag(torch.tensor([0.2, -0.3], dtype=torch.float64))
    model = RegularizedCNF(linear(a), event_shape=2, trace_estimator="exact", **TIGHT).double()
    own = Independent(Normal(torch.zeros(2).double(), torch.exp(-a.diagonal())), 1)
    target = Independent(Normal(torch.zeros(2).double(), 0.8), 1)
    torch.manual_seed(0)
    found = model.importance_sample(lambda x: target.log_prob(x) + math.log(3), 4000)
    assert model.nfe > 0  # of this solve
    expected = target.log_prob(found.x) + math.log(3) - own.log_prob(found.x)
    torch.testing.assert_close(found.log_weights, expected, rtol=1e-6, atol=1e-6)
    w = expected.exp()
    torch.testing.assert_close(found.ess, w.sum() ** 2 / w.square().sum())
    torch.testing.assert_close(found.log_z_error, w.std() / (w.mean() * 4000**0.5), rtol=1e-3, atol=0)
    assert abs(float(found.log_z) - math.log(3)) < 4 * float(found.log_z_error)
    second = (found.weights[:, None] * found.x.square()).sum(0)
    torch.testing.assert_close(second, torch.full((2,), 0.64).double(), rtol=0.1, atol=0)


# --- a noisy trace ---


def matrix(variance: float, *, rademacher: bool = False, skewed: bool = False) -> Tensor:
    """A matrix A whose trace has this variance with one probe: ``2 |S|^2``, for signs without S's diagonal.

    S is the symmetric part of A. A positive one has a large third cumulant, ``8 tr(S^3)``.
    """
    random = torch.randn(DIMS, DIMS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    a = random @ random.T if skewed else random
    noisy = (a + a.T) / 2
    if rademacher:
        noisy = noisy - torch.diag(noisy.diagonal())
    return a * (variance / (2 * noisy.square().sum())).sqrt()


def cases(*variances: float) -> Any:
    return pytest.mark.parametrize(
        ("variance", "noise", "skewed"),
        [(v, noise, skewed) for v in variances for noise in ("gaussian", "rademacher") for skewed in (False, True)],
    )


def assert_covered(found: list[tuple[float, float]]) -> None:
    """Of 200 intervals around log Z = 0: counts that a normal error of this standard error leaves once in 1000.

    The largest bias that is allowed, a quarter of the standard error, is taken into account: intervals of two (one)
    standard errors then hold the truth with a probability of 0.948 to 0.954 (0.668 to 0.683).
    """
    z = torch.tensor([log_z / error for log_z, error in found])
    assert len(z) == 200
    assert 180 <= int((z.abs() < 2).sum()) <= 199
    assert 113 <= int((z.abs() < 1).sum()) <= 157
    assert abs(float(z.mean())) < 0.25 + 3.3 / 200**0.5


@cases(0.3, 2.0, 6.0)
def test_intervals_of_log_z_hold_the_truth(variance: float, noise: str, skewed: bool) -> None:
    """The noise of quadratic forms, as a linear field has it; without the noise all weights are one."""
    torch.manual_seed(0)
    a, n = matrix(variance, rademacher=noise == "rademacher", skewed=skewed), 200
    estimator, nothing, found = Hutchinson(noise), torch.zeros(n).double(), []

    def more() -> Tensor:
        probes = estimator.draw(torch.empty(4 * n, DIMS, dtype=torch.float64))
        return ((probes @ a * probes).sum(1) - a.trace()).reshape(n, 4)

    for _ in range(200):
        sample = weigh(nothing, nothing, more(), more, least=1, most=64)
        found.append((float(sample.log_z), float(sample.log_z_error)))
    assert_covered(found)


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


@pytest.mark.slow
@cases(2.0)
def test_intervals_of_log_z_of_a_model_hold_the_truth(variance: float, noise: str, skewed: bool) -> None:
    torch.manual_seed(1)
    model, exact = density(matrix(variance, rademacher=noise == "rademacher", skewed=skewed), noise)
    samples = [model.importance_sample(exact, 200) for _ in range(200)]
    assert_covered([(float(each.log_z), float(each.log_z_error)) for each in samples])


@pytest.mark.parametrize(
    "estimator", [Hutchinson(), Hutchinson("rademacher", probes=8), HutchPlusPlus(2)], ids=repr
)
def test_log_z_is_not_biased_by_the_noise_of_the_probes(estimator: Any) -> None:
    """The target is the density itself, log Z = 0; the mean of ``exp(log p - noisy log p)`` is off."""
    torch.manual_seed(0)
    model, exact = density(matrix(2.0), estimator)
    found = model.importance_sample(exact, 2000)
    assert 0.001 < float(found.log_z_error) < 0.03  # there is noise
    assert abs(float(found.log_z)) < 4 * float(found.log_z_error)
    if estimator.__class__ is Hutchinson and estimator.count == 1:
        x, noisy = model.inverse_and_log_prob(torch.randn(2000, DIMS).double())
        naive = (exact(x) - noisy).logsumexp(0) - math.log(2000)
        assert float(naive.detach()) > 10 * float(found.log_z_error)


@pytest.mark.parametrize(
    ("dims", "estimator"), [(3, Hutchinson()), (64, HutchPlusPlus(2)), (66, Hutchinson(probes=66))], ids=repr
)
def test_the_trace_is_exact_in_few_dimensions_or_where_probes_cost_as_much(dims: int, estimator: Any) -> None:
    model, exact = density(matrix(6.0)[:dims, :dims], estimator)
    found = model.importance_sample(exact, 5)
    torch.testing.assert_close(found.log_weights, torch.zeros(5).double(), rtol=0, atol=1e-9)
    assert model.estimator is estimator


def test_a_trace_that_is_too_noisy_is_refused() -> None:
    model, exact = density(matrix(60.0), "gaussian")
    with pytest.raises(ConfigError, match=r"noise of variance [56]\d.*nats\^2.*probes.*trace_estimator='exact'"):
        model.importance_sample(exact, 500)


def test_a_target_that_is_zero_or_not_a_number_is_shown_and_not_refused() -> None:
    model, exact = density(matrix(0.3), "gaussian")
    half = model.importance_sample(lambda x: torch.where(x[:, 0] > 0, exact(x), -math.inf), 400)
    assert abs(float(half.log_z) - math.log(0.5)) < 4 * float(half.log_z_error)
    assert model.importance_sample(lambda x: exact(x) - math.inf, 20).log_z.item() == -math.inf
    assert math.isnan(model.importance_sample(lambda x: exact(x) * math.nan, 20).log_z)


@pytest.mark.parametrize("dims", [3, DIMS])
def test_evaluations_of_importance_sampling_are_those_of_the_last_solve(dims: int) -> None:
    model, exact = density(matrix(0.3)[:dims, :dims], "gaussian")
    model.importance_sample(exact, 5)
    assert model.nfe == 4
    flow = MultiscaleFlow((1, 4, 4), hidden=2, solver=FixedGrid("euler", step=0.5))
    flow.importance_sample(lambda x: x.flatten(1).sum(1), 2)
    assert flow.nfe == 2 * len(flow.block_shapes)
