"""The acceleration by a finite difference: its limit, and its gradient against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from problems import Wave
from torch import Tensor, nn

from rnode_plugin import NeuralODE, penalties_at
from rnode_plugin.regularizers import finite_difference
from rnode_plugin.torchdiffeq import odeint, odeint_adjoint

EPS = 0.01
DOUBLE = torch.float64
X = torch.linspace(-1, 1, 6, dtype=DOUBLE).reshape(2, 3)
SPAN = torch.linspace(0, 1, 21, dtype=DOUBLE)


def by_definition(field: nn.Module, t: Tensor, z: Tensor) -> Tensor:
    velocity = field(t, z)
    with torch.no_grad():
        later = field(t + EPS, z + EPS * velocity)
    return (velocity - later).square().flatten(1).sum(1) / EPS**2


def gradients(loss: Tensor, field: nn.Module, *others: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [*field.parameters(), *others], retain_graph=True, allow_unused=True)


def test_the_limit_is_the_exact_acceleration_of_first_order() -> None:
    field = Wave()
    exact = penalties_at(field, 0.3, X, ["total_derivative"])["total_derivative"]
    errors = []
    for eps in (1e-2, 1e-3, 1e-4):
        found = penalties_at(field, 0.3, X, [finite_difference(eps)])["finite_difference"]
        errors.append(float((found - exact).abs().max().detach()))
    assert errors[2] < 1e-3 * float(exact.max().detach())
    orders = [math.log10(errors[i] / errors[i + 1]) for i in (0, 1)]
    assert orders == pytest.approx([1, 1], abs=0.05)


class Augmented(nn.Module):
    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field

    def forward(self, t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.field(t, y[0]), by_definition(self.field, t, y[0])


@pytest.mark.parametrize("interface", ["checkpointed", "adjoint", "penalized", "odeint", "odeint_adjoint"])
def test_the_integral_and_its_gradient_in_every_interface(interface: str) -> None:
    field = Wave()
    if interface.startswith("odeint"):
        solve = odeint_adjoint if interface == "odeint_adjoint" else odeint
        penalties = solve(field, X, SPAN, method="rk4", regularizers=["finite_difference"])[1]
        found = penalties["finite_difference"]
    else:
        penalized = slice(0, 3) if interface == "penalized" else None
        sensitivity = "autograd" if interface == "penalized" else interface
        model = NeuralODE(
            field, "rk4_38", regularizers=["finite_difference"], penalized=penalized, sensitivity=sensitivity
        )
        model(X, SPAN)
        found = model.regularization["finite_difference"]
    expected = odeint(Augmented(field), (X, X.new_zeros(2)), SPAN, method="rk4")[1][-1]
    torch.testing.assert_close(found, expected)
    rtol = 1e-4 if "adjoint" in interface else 1e-7
    torch.testing.assert_close(
        gradients(found.sum(), field), gradients(expected.sum(), field), rtol=rtol, atol=rtol
    )


def test_a_part_of_the_state_keeps_its_velocity() -> None:
    """The second evaluation, at another state, must not become the velocity of the solve."""
    field = Wave()
    plain = NeuralODE(field, "rk4_38")(X, SPAN)[1]
    model = NeuralODE(field, "rk4_38", regularizers=["finite_difference:0.5"], penalized=slice(1, None))
    torch.testing.assert_close(model(X, SPAN)[1], plain)


def test_a_known_velocity_is_not_evaluated_again() -> None:
    field, calls = Wave(), []

    def counted(t: Tensor, z: Tensor) -> Tensor:
        calls.append(z)
        return field(t, z)

    names = ["kinetic", "finite_difference"]
    expected = penalties_at(field, 0.3, X, names)
    velocity = field(torch.tensor(0.3, dtype=DOUBLE), X)
    for batch_dim in (0, None):
        calls.clear()
        found = penalties_at(counted, 0.3, X, names, velocity=velocity, batch_dim=batch_dim)
        assert len(calls) == 1
        for name in names:
            torch.testing.assert_close(found[name].sum(), expected[name].sum())
            torch.testing.assert_close(gradients(found[name].sum(), field), gradients(expected[name].sum(), field))
    exact = penalties_at(field, 0.3, X, ["jacfrob"], trace_estimator="exact")
    again = penalties_at(field, 0.3, X, ["jacfrob"], trace_estimator="exact", velocity=velocity)
    torch.testing.assert_close(again, exact)
