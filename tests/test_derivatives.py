"""Derivatives of a field where the caller's tensors carry graphs or tangents: each variable counts once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from regularizer_table import TrainedEnd
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import jacfwd, jvp

from rnode_plugin import NeuralODE, RegularizedCNF, penalties_at
from rnode_plugin.errors import ConfigError
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

NET = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()
SPAN = torch.linspace(0, 1, 5, dtype=DOUBLE)
Outputs = tuple[Tensor, ...]


class Timed(nn.Module):
    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return NET(z) * (1 + t)


class Wide(nn.Module):
    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.cat([NET(z), z[:, :1] * t], 1)[:, :2]


def by_neural_ode(field: nn.Module, name: str, penalized: slice | None = None) -> Callable[[Tensor], Outputs]:
    def outputs(x: Tensor) -> Outputs:
        model = NeuralODE(field, "rk4_38", regularizers=[name], trace_estimator="exact", penalized=penalized)
        end = model(x, SPAN, penalties=True)[1][-1]
        return end, model.regularization[name]

    return outputs


def by_odeint(name: str) -> Callable[[Tensor], Outputs]:
    def outputs(x: Tensor) -> Outputs:
        y, penalties = odeint(Timed(), x, SPAN, method="rk4", regularizers=[name], trace_estimator="exact")
        return y[-1], penalties[name]

    return outputs


def by_density(x: Tensor) -> Outputs:
    model = RegularizedCNF(
        Timed(), event_shape=2, trace_estimator="exact", regularizers=["kinetic"], solver="rk4_38", t_span=SPAN
    )
    return (model.log_prob(x),)


def at_points(name: str) -> Callable[[Tensor], Outputs]:
    return lambda x: (penalties_at(Timed(), 0.3, x, [name], trace_estimator="exact")[name],)


CASES = {
    "neural ode, kinetic": by_neural_ode(Timed(), "kinetic"),
    "neural ode, jacfrob": by_neural_ode(Timed(), "jacfrob"),
    "recognized stack, curl": by_neural_ode(NET, "curl"),
    "penalized, kinetic": by_neural_ode(Wide(), "kinetic", slice(0, 1)),
    "penalized, total_derivative": by_neural_ode(Wide(), "total_derivative", slice(0, 1)),
    "odeint, kinetic": by_odeint("kinetic"),
    "odeint, jacfrob": by_odeint("jacfrob"),
    "density": by_density,
    "points, jacfrob": at_points("jacfrob"),
    "points, taylor:3": at_points("taylor:3"),
}


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_forward_mode_has_central_differences(case: str, graph: bool) -> None:
    outputs, x = CASES[case], torch.linspace(-1, 1, 8, dtype=DOUBLE).reshape(4, 2)
    direction = torch.linspace(1, -0.5, 8, dtype=DOUBLE).reshape(4, 2)
    with torch.no_grad():
        ahead, before = outputs(x + 1e-6 * direction), outputs(x - 1e-6 * direction)
    expected = tuple((a - b) / 2e-6 for a, b in zip(ahead, before, strict=True))
    with forward_ad.dual_level(), pytest.raises(ConfigError, match=r"torch\.func\.jvp"):
        outputs(forward_ad.make_dual(x, direction))
    with torch.set_grad_enabled(graph):
        torch.testing.assert_close(jvp(outputs, (x,), (direction,))[1], expected, rtol=1e-6, atol=1e-8)
    if graph:
        columns = jacfwd(lambda x: outputs(x)[0].sum())(x)
        torch.testing.assert_close((columns * direction).sum(), expected[0].sum(), rtol=1e-6, atol=1e-8)
