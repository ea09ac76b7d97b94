"""Strengths of penalties: numbers, and tensors that train."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rnode_plugin import NeuralODE, RegularizedCNF, objective, penalties_along
from rnode_plugin.core.schedules import checked_lambda
from rnode_plugin.errors import ConfigError, check_number


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_multiplier_of_lagrange_gets_the_mean_penalty_as_its_gradient(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    lam = torch.full(shape, 0.3, dtype=torch.float64, requires_grad=True)
    net = nn.Linear(2, 2)
    model = NeuralODE(net, solver="rk4", regularizers={"kinetic": lam})
    model(torch.randn(5, 2), torch.linspace(0, 1, 3))
    density = RegularizedCNF(net, event_shape=2, regularizers=["kinetic"])
    density.log_prob(torch.randn(5, 2))
    times = torch.linspace(0, 1, 5)
    along = penalties_along(net, times, torch.randn(5, 4, 2, requires_grad=True), {"kinetic": lam})
    integrals = along["kinetic"]
    for loss, value in (
        (model.reg_loss(), model.regularization["kinetic"]),
        (model.reg_loss(kinetic=2 * lam), 2 * model.regularization["kinetic"]),
        (density.reg_loss(kinetic=lam), density.regularization["kinetic"]),
        (along.loss(), integrals),
        (objective(torch.zeros(4), {"kinetic": integrals}, lambdas={"kinetic": lam}, dims=2).loss, integrals),
    ):
        assert (loss.shape, loss.dtype) == ((), torch.float32)
        (gradient,) = torch.autograd.grad(loss, lam, retain_graph=True)
        torch.testing.assert_close(gradient, (value.mean() / 2).detach().double().expand(shape), rtol=1e-6, atol=0)
        torch.testing.assert_close(loss.detach(), (0.3 * value.mean() / 2).detach())
    for wrong in (-lam, lam / 0, lam.expand(2)):
        with pytest.raises(ConfigError, match="lambda of 'kinetic'"):
            model.reg_loss(kinetic=wrong)


@pytest.mark.parametrize("value", [0.25, 1, torch.tensor([2.0]), torch.tensor(3)])
def test_a_number_without_a_graph_is_a_float(value: object) -> None:
    strength = checked_lambda("kinetic", value)
    assert type(strength) is float
    assert strength == value


@pytest.mark.parametrize("value", [True, "1", None, [1.0], float("nan"), float("inf"), torch.ones(2), 1j])
def test_what_is_no_finite_number_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^width must be a finite number, not "):
        check_number(value, "width")


def test_a_number_outside_of_its_range_is_refused() -> None:
    assert check_number(0, "width", least=0, below=1) == 0
    for limits, text in (
        ({"above": 0}, r"> 0, not 0"), ({"least": 1}, r">= 1, not 0"), ({"below": 0}, r"< 0, not 0"),
        ({"above": 0, "below": 0.5}, r"> 0 and < 0\.5, not 0"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=text):
            check_number(0, "width", **limits)
