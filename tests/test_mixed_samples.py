"""Fields that mix the rows of their state: refused where a number would be wrong, right as one sample."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from regularizer_table import diagonal
from torch import Tensor, nn

from rnode_plugin import NeuralODE, RegularizedCNF, penalties_at
from rnode_plugin.errors import ConfigError
from rnode_plugin.torchdiffeq import odeint

DOUBLE = torch.float64
X = torch.linspace(-1, 1, 12, dtype=DOUBLE).reshape(4, 3)
SPAN = torch.linspace(0, 0.5, 3, dtype=DOUBLE)
PENALTIES = ["jacfrob", diagonal, "curl", "kinetic", "total_derivative"]


class Graph(nn.Module):
    """``f(t, x) = A x W``, with the rows of ``x`` as the nodes of a graph."""

    def __init__(self) -> None:
        super().__init__()
        ring = torch.eye(4, dtype=DOUBLE) + torch.eye(4, dtype=DOUBLE).roll(1, 0)
        self.ring = ring / 2
        self.weight = nn.Parameter(torch.linspace(-0.4, 0.5, 9, dtype=DOUBLE).reshape(3, 3))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.ring @ x @ self.weight

    def expected(self, x: Tensor) -> dict[str, Tensor]:
        """The rates at ``x``, from the whole Jacobian."""
        jacobian = torch.autograd.functional.jacobian(lambda x: self(SPAN[0], x), x, create_graph=True)
        jacobian, velocity = jacobian.reshape(12, 12), self(SPAN[0], x).flatten()
        return {
            "jacfrob": jacobian.square().sum(), "diagonal": jacobian.diagonal().square().sum(),
            "curl": (jacobian - jacobian.T).square().sum(), "kinetic": velocity.square().sum(),
            "total_derivative": (jacobian @ velocity).square().sum(),
        }  # fmt: skip


def rates(field: nn.Module, penalty: Any, batch_dim: int | None = 0) -> Tensor:
    (values,) = penalties_at(field, 0.0, X, [penalty], trace_estimator="exact", batch_dim=batch_dim).values()
    return values


def by_neural_ode(field: nn.Module) -> dict[str, Tensor]:
    model = NeuralODE(field, "rk4", regularizers=PENALTIES, trace_estimator="exact", batch_dim=None)
    model(X, SPAN)
    return model.regularization


def by_adjoint(field: nn.Module) -> dict[str, Tensor]:
    model = NeuralODE(
        field, "dopri5", regularizers=PENALTIES, trace_estimator="exact", batch_dim=None, sensitivity="adjoint",
        atol=1e-9, rtol=1e-9, atol_adjoint=1e-9, rtol_adjoint=1e-9,
    )  # fmt: skip
    model(X, SPAN)
    return model.regularization


def by_odeint(field: nn.Module) -> dict[str, Tensor]:
    penalties = odeint(field, X, SPAN, regularizers=PENALTIES, trace_estimator="exact", batch_dim=None)[1]
    return dict(penalties)


def by_tuple(field: nn.Module) -> dict[str, Tensor]:
    def func(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        whole = torch.cat([y[0], y[1]], 1)
        return field(t, whole).split([1, 2], 1)  # pyright: ignore[reportReturnType]

    y0 = (X[:, :1], X[:, 1:])
    penalties = odeint(
        func, y0, SPAN, regularizers=PENALTIES, trace_estimator="exact", batch_dim=None, penalized=(0, 1)
    )[1]  # fmt: skip
    return dict(penalties)


@pytest.mark.parametrize("integrals", [by_neural_ode, by_adjoint, by_odeint, by_tuple])
def test_the_whole_state_as_one_sample(integrals: Callable[[nn.Module], dict[str, Tensor]]) -> None:
    field = Graph()
    found = integrals(field)
    assert {value.shape for value in found.values()} == {(1,)}
    sum(value.sum() for value in found.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert field.weight.grad is not None
    gradient, field.weight.grad = field.weight.grad, None

    def augmented(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return field(t, y[0]), torch.stack(list(field.expected(y[0]).values()))

    expected = odeint(augmented, (X, X.new_zeros(5)), SPAN)[1][-1]
    expected.sum().backward()
    for name, value in zip(field.expected(X), expected, strict=True):
        torch.testing.assert_close(found[name][0], value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient, field.weight.grad, rtol=1e-4, atol=1e-6)


def test_rates_at_points_as_one_sample() -> None:
    field = Graph()
    for name, expected in field.expected(X).items():
        torch.testing.assert_close(rates(field, diagonal if name == "diagonal" else name, None), expected[None])


def test_the_loss_divides_by_the_elements_of_the_state() -> None:
    _, penalties = odeint(Graph(), X, SPAN, regularizers={"jacfrob": 2.0}, trace_estimator="exact", batch_dim=None)
    torch.testing.assert_close(penalties.loss(), 2 * penalties["jacfrob"][0] / 12)
    model = NeuralODE(Graph(), "rk4", regularizers={"jacfrob": 2.0}, trace_estimator="exact", batch_dim=None)
    model(X, SPAN)
    torch.testing.assert_close(model.reg_loss(), 2 * model.regularization["jacfrob"][0] / 12)


def test_columns_step_penalties_and_paths_of_one_sample() -> None:
    names = ["jacfrob", "stiffness", "straightness"]
    whole, part = (
        NeuralODE(Graph(), "dopri5", regularizers=names, batch_dim=None, penalized=columns)
        for columns in (None, slice(0, 2))
    )
    whole(X, SPAN)
    part(X, SPAN)
    assert {v.shape for m in (whole, part) for v in m.regularization.values()} == {(1,)}
    torch.testing.assert_close(part.reg_loss(stiffness=0, straightness=0) * 8,
                               0.01 * part.regularization["jacfrob"][0])  # fmt: skip


@pytest.mark.parametrize("columns", [slice(0, 2), [True, False, True]])
def test_columns_of_one_sample_are_the_same_in_both_interfaces(columns: Any) -> None:
    """They are columns of ``(N, D)``, which holds one sample, and not rows."""
    field = Graph()
    model = NeuralODE(field, "rk4_38", regularizers=["kinetic"], batch_dim=None, penalized=columns)
    model(X, SPAN)
    _, penalties = odeint(field, X, SPAN, method="rk4", regularizers=["kinetic"], batch_dim=None, penalized=columns)
    torch.testing.assert_close(penalties["kinetic"], model.regularization["kinetic"])


def test_other_dimensions_are_refused() -> None:
    with pytest.raises(ConfigError, match="batch_dim"):
        NeuralODE(Graph(), "euler", batch_dim=1)
    with pytest.raises(ConfigError, match="batch_dim"):
        penalties_at(Graph(), 0.0, X, ["kinetic"], batch_dim=1)


@pytest.mark.parametrize("compute", [
    lambda net: NeuralODE(net, regularizers=["jacfrob"])(X, SPAN),
    lambda net: odeint(lambda t, x: net(x), X, SPAN, regularizers=["jacfrob"]),
    lambda net: penalties_at(lambda t, x: net(x), 0.0, X, ["jacfrob"]),
    lambda net: RegularizedCNF(net, event_shape=3).log_prob(X),
])  # fmt: skip
def test_batch_norm_in_training_says_once_that_it_mixes_the_samples(compute: Callable[[Any], object]) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 3)).double()
    with pytest.warns(UserWarning, match="batch norm in training mode") as said:
        compute(net)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute(net)
        compute(copy.deepcopy(net).eval())


@pytest.mark.parametrize(
    "options", [{"regularizers": ["kinetic"]}, {"regularizers": ["jacfrob"], "batch_dim": None}]
)
def test_batch_norm_is_silent_without_products_and_as_one_sample(options: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh()).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NeuralODE(net, "rk4", **options)(X, SPAN)
