"""The objective and its units in closed form; the signs of Rademacher noise."""

from __future__ import annotations

import pytest
import torch

from rnode_plugin.core.objective import bits_per_dim, objective, standard_normal_log_prob
from rnode_plugin.core.trace_estimators import Hutchinson
from rnode_plugin.errors import ConfigError


def test_rademacher_noise_is_signs() -> None:
    eps = Hutchinson("rademacher").draw(torch.zeros(50, 20))
    assert set(eps.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(eps.mean())) < 4 / 1000**0.5


def test_objective_is_equation_17() -> None:
    log_prob = torch.tensor([-10.0, -30.0])
    penalties = {"kinetic": torch.tensor([1.0, 3.0]), "jacfrob": torch.tensor([4.0, 8.0])}
    parts = objective(log_prob, penalties, lambdas={"kinetic": 0.1, "jacfrob": 0.01}, dims=4)
    assert float(parts.nll) == 5.0
    assert float(parts.loss) == pytest.approx(5.0 + 0.1 * 2 / 4 + 0.01 * 6 / 4)
    assert {k: float(v) for k, v in parts.penalties.items()} == pytest.approx({"kinetic": 0.05, "jacfrob": 0.015})
    with pytest.raises(ConfigError, match="did you mean 'kinetic'"):
        objective(log_prob, penalties, lambdas={"kinetics": 1.0}, dims=4)


def test_bits_per_dim_of_known_densities() -> None:
    # uniform on [0, 1]^d: every one of 256 levels has probability 1/256, that is 8 bits
    assert bits_per_dim(torch.zeros(3), dims=5, levels=256).tolist() == [8.0] * 3
    # log2 of a density that is 2^10 in 5 dimensions
    assert float(bits_per_dim(torch.tensor(10 * 0.6931471805599453).double(), dims=5)) == pytest.approx(-2.0)


def test_standard_normal_log_prob() -> None:
    z = torch.randn(4, 6, dtype=torch.float64)
    expected = torch.distributions.Normal(0, 1).log_prob(z).sum(1)
    torch.testing.assert_close(standard_normal_log_prob(z), expected)
