"""PotentialField against automatic differentiation, and the penalty that reads it."""

from __future__ import annotations

import pytest
import torch
from problems import Plain, counted_products
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from rnode_plugin import NeuralODE, RegularizedCNF
from rnode_plugin.core.derivatives import Ask
from rnode_plugin.core.dynamics import Dynamics
from rnode_plugin.core.signature import time_first
from rnode_plugin.errors import ConfigError
from rnode_plugin.fields.potential import PotentialField
from rnode_plugin.regularizers import curl, hjb


def test_velocity_and_rate_are_the_derivatives_of_the_potential() -> None:
    torch.manual_seed(0)
    field = PotentialField(4, hidden=6, layers=3, rank=3, context=2).double()
    t, z = torch.tensor(0.3, dtype=torch.float64), torch.randn(3, 2, 2, dtype=torch.float64)
    context = torch.randn(3, 2, dtype=torch.float64)
    velocity, rate = field(t, z, context), field.aux(t, z, context)["potential_rate"]
    for i, sample in enumerate(z):
        potential = lambda t, z, i=i: field.potential(t, z[None], context[i : i + 1])[0]  # noqa: E731
        by_t, by_z = torch.func.grad(potential, argnums=(0, 1))(t, sample)
        torch.testing.assert_close(velocity[i], -by_z)
        torch.testing.assert_close(rate[i], by_t)


def test_second_derivatives_where_all_activations_are_zero() -> None:
    """At the origin and time 0 of a fresh field, where no bias has moved yet."""
    field = PotentialField(3, hidden=6).double()
    t, z = torch.zeros((), dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    hessian = torch.func.hessian(lambda z: field.potential(t, z[None])[0])(z[0])
    rows = field.linearize(t, z, ask=Ask("rows")).products
    assert rows is not None
    torch.testing.assert_close(hessian, -rows[:, 0])
    far = torch.tensor([[-1e3, 0.0, 1e3]], dtype=torch.float64)
    assert bool(field.potential(t, far).isfinite().all())


def test_the_exact_trace_of_a_density_needs_no_jacobian() -> None:
    torch.manual_seed(0)
    field = PotentialField(2, hidden=8)
    options = {"event_shape": 2, "solver": "rk4_38", "t_span": [0.0, 0.5, 1.0], "trace_estimator": "exact"}
    model = RegularizedCNF(field, regularizers=["kinetic", "hjb"], **options)  # pyright: ignore[reportArgumentType]
    plain = RegularizedCNF(Plain(field), regularizers=["kinetic"], **options)  # pyright: ignore[reportArgumentType]
    x = torch.randn(4, 2)
    with counted_products() as calls:
        found = model.log_prob(x)
    assert not calls
    torch.testing.assert_close(found, plain.log_prob(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.regularization["kinetic"], plain.regularization["kinetic"])
    (model.reg_loss() - found.mean()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in field.parameters())
    # with a penalty that reads the Jacobian the same density comes from it
    both = RegularizedCNF(field, regularizers=["jacfrob"], **options)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(both.log_prob(x), found, rtol=1e-5, atol=1e-5)


class _Damped(PotentialField):
    def forward(self, t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(t, z, context) - 3 * z


def test_a_subclass_is_the_field_of_a_solve_with_products() -> None:
    torch.manual_seed(0)
    field, z = _Damped(2).double(), torch.randn(3, 2, dtype=torch.float64)
    expected = NeuralODE(field, "rk4")(z)[1]
    torch.testing.assert_close(NeuralODE(field, "rk4", regularizers=["jacfrob"])(z)[1], expected)


class _Exact(nn.Module):
    """Phi = ||z||^2 / (2 (2 - t)), a solution of the HJB equation: straight lines into the origin at t = 2."""

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return -z / (2 - t)

    def aux(self, t: Tensor, z: Tensor) -> dict[str, Tensor]:
        return {"potential_rate": z.square().sum(1) / (2 * (2 - t) ** 2)}


def test_hjb_is_zero_for_a_solution_and_its_closed_form_otherwise() -> None:
    z = torch.randn(3, 2, dtype=torch.float64)
    model = NeuralODE(_Exact(), "dopri5", atol=1e-9, rtol=1e-9, regularizers=["hjb", "straightness"])
    model(z, torch.tensor([0.0, 1.0], dtype=torch.float64))
    for name in ("hjb", "straightness"):
        assert model.regularization[name].abs().max() < 1e-7, name
    torch.manual_seed(0)
    field = PotentialField(2).double()
    dynamics = Dynamics(field, regularizers=[hjb, curl], estimator="gaussian")
    t = torch.tensor(0.4, dtype=torch.float64)
    found = dynamics.bind(dynamics.draw(z)).evaluate(t, z).penalties
    wanted = (field.aux(t, z)["potential_rate"] - field(t, z).square().sum(1) / 2).abs()
    torch.testing.assert_close(found["hjb"], wanted)
    assert found["curl"].abs().max() < 1e-20  # a gradient field
    inputs = (t.requires_grad_(), z.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda t, z: dynamics.bind(z.detach()).evaluate(t, z).penalties["hjb"], inputs)
    model = NeuralODE(field, "rk4_38", regularizers={"hjb": 1.0})
    model(z)
    torch.testing.assert_close(model.reg_loss(), model.regularization["hjb"].mean())  # not divided by D


class _Half(nn.Module):
    """Half the gradient of a potential at z / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = PotentialField(2)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.inner(t, z / 2) / 2


def test_the_rate_is_that_of_the_field_and_not_of_a_module_inside() -> None:
    z = torch.randn(3, 2)
    for field in (_Half(), time_first(PotentialField(2), call=lambda net, t, x: net(t, x / 2) / 2)):
        with pytest.raises(ConfigError, match="offers no 'potential_rate'"):
            NeuralODE(field, "rk4", regularizers=["hjb"])(z)
        with pytest.raises(ConfigError, match="offers no 'potential_rate'"):
            RegularizedCNF(field, event_shape=2, regularizers=["hjb"]).log_prob(z)
    field = PotentialField(2)
    found = []
    for each in (field, AveragedModel(field)):
        model = NeuralODE(each, "rk4", regularizers=["hjb"])
        model(z)
        found.append(model.regularization["hjb"])
    torch.testing.assert_close(*found)


def test_what_cannot_work_is_refused() -> None:
    z = torch.randn(3, 2)
    with pytest.raises(ConfigError, match=r"offers no 'potential_rate'.*PotentialField"):
        NeuralODE(nn.Linear(2, 2), "rk4", regularizers=["hjb"])(z)
    with pytest.raises(ConfigError, match="layers must be a whole number"):
        PotentialField(2, layers=0)
    with pytest.raises(ConfigError, match=r"takes states of 3 dimensions, not of shape \("):
        PotentialField(3)(torch.tensor(0.0), z)
