"""Derivatives of a field where the caller's tensors carry graphs or tangents: each variable counts once."""

from __future__ import annotations

import pytest
import torch
from regularizer_table import TrainedEnd
from torch import Tensor, nn

from rnode_plugin import NeuralODE, penalties_at
from rnode_plugin.regularizers import Regularizer
from rnode_plugin.torchdiffeq import odeint

DOUBLE = torch.float64


def swinging(t: Tensor, z: Tensor) -> Tensor:
    return torch.sin(3 * t) * z - z**3 * t


def acceleration(t: Tensor, z: Tensor) -> Tensor:
    """``d^2 z / dt^2`` along :func:`swinging`, in closed form."""
    return (torch.sin(3 * t) - 3 * z**2 * t) * swinging(t, z) + 3 * torch.cos(3 * t) * z - z**3


class Swinging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=DOUBLE))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.scale * swinging(t, z)


def test_a_state_made_from_the_time_of_its_rate() -> None:
    t = torch.tensor([0.2, 0.5, 0.8], dtype=DOUBLE).requires_grad_()
    z = 1 + t[:, None] * torch.tensor([2.0, 0.5], dtype=DOUBLE)
    rate = penalties_at(lambda t, z: swinging(t[:, None], z), t, z, ["total_derivative", "taylor:3"])
    plain = penalties_at(lambda t, z: swinging(t[:, None], z), t.detach(), z.detach(), ["taylor:3"])
    expected = acceleration(t[:, None], z).square().sum(1)
    torch.testing.assert_close(rate["total_derivative"], expected)
    torch.testing.assert_close(rate["taylor:3"], plain["taylor:3"])
    found = torch.autograd.grad(rate["total_derivative"].sum(), t, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), t))


@pytest.mark.parametrize("method", ["euler", "rk4", "implicit_adams"])
def test_times_with_a_graph_change_no_value_in_odeint(method: str) -> None:
    z, t = torch.tensor([[0.5], [-1.2]], dtype=DOUBLE), torch.linspace(0.2, 1.4, 13, dtype=DOUBLE)

    def values(t: Tensor, *others: str | Regularizer) -> Tensor:
        penalties = odeint(
            swinging, z, t, method=method, regularizers=["total_derivative", "taylor:3", *others]
        )[1]  # fmt: skip
        return torch.stack([penalties["total_derivative"], penalties["taylor:3"]])

    torch.testing.assert_close(values(t.clone().requires_grad_()), values(t))
    torch.testing.assert_close(values(t, TrainedEnd(1.4)), values(t))


@pytest.mark.parametrize("solver", ["rk4_38", "dopri5"])
def test_a_first_state_made_from_the_first_time_in_a_neural_ode(solver: str) -> None:
    model = NeuralODE(Swinging(), solver, regularizers=["total_derivative"])
    z, t = torch.tensor([[0.5], [-1.2]], dtype=DOUBLE), torch.linspace(0.2, 1.4, 13, dtype=DOUBLE)
    model(z, t)
    expected = model.regularization["total_derivative"]
    t = t.requires_grad_()
    model(z * (t[0] / 0.2), t)
    torch.testing.assert_close(model.regularization["total_derivative"], expected)


# --- forward mode ---
