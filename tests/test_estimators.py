"""Evaluations of the augmented system: which products they make, what they refuse; the objective in closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import Linear, Wave, counted_products
from torch import Tensor, nn

from rnode_plugin.core.derivatives import VELOCITY, Ask, Linearization
from rnode_plugin.core.dynamics import Dynamics
from rnode_plugin.core.field_evaluation import FieldEvaluation
from rnode_plugin.core.objective import bits_per_dim, objective, standard_normal_log_prob
from rnode_plugin.core.regularizers import FunctionRegularizer, jacfrob, kinetic
from rnode_plugin.core.trace_estimators import Hutchinson
from rnode_plugin.errors import ConfigError
from rnode_plugin.plugins.registry import resolve_regularizers


class OwnProduct(nn.Module):
    """A linear field that brings its own product, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = Linear(3)
        self.calls = 0

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        raise AssertionError("the field's own product must be used")

    def linearize(self, t: Tensor, z: Tensor, noise: Any = None, *, ask: Ask = VELOCITY) -> Linearization:
        self.calls += 1
        if ask.products == "rows":
            noise = torch.eye(3).double().unsqueeze(1).expand(-1, *z.shape)
        return Linearization(z @ self.linear.a.T, noise @ self.linear.a if ask.products else None)


def test_rademacher_noise_is_signs() -> None:
    eps = Hutchinson("rademacher").draw(torch.zeros(50, 20))
    assert set(eps.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(eps.mean())) < 4 / 1000**0.5


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("estimator", ["gaussian", "exact"])
def test_products_without_gradient_contexts(context: type, estimator: str) -> None:
    field, t = Wave(), torch.tensor(0.3, dtype=torch.float64)
    z, eps = torch.ones(2, 3, dtype=torch.float64), torch.full((2, 3), 0.5, dtype=torch.float64)
    dynamics = Dynamics(field, regularizers=[kinetic, jacfrob], estimator=estimator)
    expected = dynamics.evaluate(t, z, eps)
    with context():
        got = dynamics.evaluate(t + 0, z + 0, eps + 0)
    assert not got.dz.requires_grad
    torch.testing.assert_close(got.dz, expected.dz.detach())
    torch.testing.assert_close(got.dlogdet, expected.dlogdet.detach())  # pyright: ignore[reportOptionalMemberAccess]
    for name, value in expected.penalties.items():
        torch.testing.assert_close(got.penalties[name], value.detach())


def test_one_product_serves_all_and_kinetic_alone_needs_none() -> None:
    field, t, z = OwnProduct(), torch.tensor(0.0), torch.ones(2, 3, dtype=torch.float64)
    rates = Dynamics(field, regularizers=[kinetic, jacfrob]).evaluate(t, z, torch.ones_like(z))
    assert field.calls == 1
    assert set(rates.penalties) == {"kinetic", "jacfrob"}
    assert rates.dlogdet is not None

    with counted_products() as calls:
        Dynamics(Wave(), regularizers=[kinetic], divergence=False).evaluate(t, z, None)
        assert len(calls) == 0
        Dynamics(Wave(), regularizers=[kinetic, jacfrob]).evaluate(t, z, torch.ones_like(z))
        assert len(calls) == 1


def test_exact_with_a_field_that_brings_its_own_product() -> None:
    field, z = OwnProduct(), torch.randn(2, 3, dtype=torch.float64)
    rates = Dynamics(field, regularizers=[jacfrob], estimator="exact").evaluate(torch.tensor(0.0), z, None)
    a = field.linear.a
    torch.testing.assert_close(rates.dlogdet, a.trace().expand(2))
    torch.testing.assert_close(rates.penalties["jacfrob"], a.square().sum().expand(2))


def test_field_that_ignores_its_state() -> None:
    z = torch.ones(2, 3)
    rates = Dynamics(lambda t, z: torch.full_like(z, 2.0), regularizers=[kinetic, jacfrob]).evaluate(
        torch.tensor(0.0), z, torch.ones_like(z)
    )
    assert rates.dlogdet is not None
    assert rates.dlogdet.tolist() == [0.0, 0.0]
    assert rates.penalties["kinetic"].tolist() == [12.0, 12.0]
    assert rates.penalties["jacfrob"].tolist() == [0.0, 0.0]


def test_resolving_regularizers() -> None:
    def speed(t: Tensor, z: Tensor, dz: Tensor) -> Tensor:
        return dz.abs().sum(1)

    own = FunctionRegularizer("own", lambda e: e.z.sum(1))
    resolved = resolve_regularizers({"kinetic": 0.1, speed: 2, own: 0})
    assert [(n, w.strength) for n, w in resolved.items()] == [("kinetic", 0.1), ("speed", 2.0), ("own", 0.0)]
    evaluation = FieldEvaluation(torch.tensor(0.0), torch.ones(2, 3), torch.full((2, 3), -2.0))
    assert resolved["speed"].regularizer(evaluation).tolist() == [6.0, 6.0]
    assert resolve_regularizers("kinetic")["kinetic"].strength == 0.01
    assert resolve_regularizers(["kinetic", jacfrob])["jacfrob"].regularizer is jacfrob
    assert resolve_regularizers(None) == {}


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
