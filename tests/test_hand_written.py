"""The factors of lambda on the page of hand-written penalties, against the formulas of the projects it names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rnode_plugin import penalties_at
from rnode_plugin.torchdiffeq import odeint

PAGE = Path(__file__).parents[1] / "docs" / "start" / "hand_written.md"
D, C = 3, 0.37
SPAN = torch.tensor([0.0, 1.0], dtype=torch.float64)


def from_the_page() -> dict[str, Any]:
    """The functions that the page defines."""
    (code,) = re.findall(r"<!-- run -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {"__name__": "page"}
    exec(code, names)
    names["u"] = torch.sin  # which `relative` reads
    return names


Formula = Callable[[Tensor, Tensor, Tensor], Tensor]
# rate of a sample by the state, the velocity and the Jacobian (B, D, D), and our regularizers with their lambda
ROWS: dict[str, tuple[Formula, Callable[[dict[str, Any]], Mapping[Any, float]]]] = {
    "l1int": (lambda z, f, j: f.abs().mean(1), lambda page: {"l1": C}),
    "l2int": (lambda z, f, j: f.norm(dim=1) / D**0.5, lambda page: {page["rms"]: C * D}),
    "sl2int": (lambda z, f, j: f.norm(dim=1) ** 2, lambda page: {"kinetic": C * D}),
    "dl2int": (
        lambda z, f, j: torch.einsum("bij,bi->bj", j, f).norm(dim=1) / D**0.5,
        lambda page: {page["rms_directional"]: C * D},
    ),
    "JFrobint": (lambda z, f, j: j.flatten(1).norm(dim=1) / D, lambda page: {page["rms_jacobian"]: C * D}),
    "torchcfm, two": (
        lambda z, f, j: (f.norm(dim=1) ** 2 + j.flatten(1).norm(dim=1) / D) / 2,
        lambda page: {"kinetic": C * D / 2, page["rms_jacobian"]: C * D / 2},
    ),
    "curly": (lambda z, f, j: (f - z.sin()).norm(dim=1) ** 2, lambda page: {page["relative"]: C * D}),
    "tfep": (
        lambda z, f, j: f.norm(dim=1) ** 2 + j.flatten(1).norm(dim=1) ** 2,
        lambda page: {"kinetic": C * D, "jacfrob": C * D},
    ),
    "ffjord-rnode, kinetic_energy": (lambda z, f, j: (f**2).mean(1) / 2, lambda page: {"kinetic": C / 2}),
    "ffjord-rnode, jacobian_norm2": (  # its mean over the noise
        lambda z, f, j: j.norm(dim=(1, 2)) ** 2 / D,
        lambda page: {"jacfrob": C},
    ),
    "ffjord-rnode, directional_penalty": (
        lambda z, f, j: (torch.einsum("bij,bi->bj", j, f) ** 2).mean(1) / 2,
        lambda page: {"directional_vjp": C / 2},
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_terms_of_the_loss_are_equal(name: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, D)).double()
    z = torch.randn(6, D, dtype=torch.float64)
    formula, ours = ROWS[name]
    jacobian = torch.func.vmap(torch.func.jacrev(net))(z)
    theirs = C * formula(z, net(z), jacobian).mean()
    # one step of Euler over [0, 1] integrates the rate at its start
    _, found = odeint(
        lambda t, y: net(y), z, SPAN, method="euler", regularizers=ours(from_the_page()), trace_estimator="exact"
    )
    weights = list(net.parameters())
    torch.testing.assert_close(found.loss(), theirs)
    ours_by_weight, theirs_by_weight = (
        torch.autograd.grad(each, weights, allow_unused=True, materialize_grads=True)
        for each in (found.loss(), theirs)
    )
    torch.testing.assert_close(ours_by_weight, theirs_by_weight)


def test_the_jacobian_norm_is_that_of_the_papers_code() -> None:
    net = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, D)).double()
    z = torch.randn(6, D, dtype=torch.float64)
    torch.manual_seed(1)
    noise, state = torch.randn_like(z), z.clone().requires_grad_()
    (product,) = torch.autograd.grad(net(state), state, noise)
    torch.manual_seed(1)
    _, found = odeint(
        lambda t, y: net(y), z, SPAN, method="euler", regularizers={"jacfrob": C}, trace_estimator="gaussian"
    )
    torch.testing.assert_close(found.loss().detach(), C * product.pow(2).mean())


def test_the_kinetic_energy_of_a_graph_is_grands() -> None:
    """GRAND sums the diagonal of the Jacobian over the features, for the sum over the nodes of the velocity."""
    links, weight = torch.rand(6, 6, dtype=torch.float64), torch.randn(D, D, dtype=torch.float64)
    z = torch.randn(6, D, dtype=torch.float64).requires_grad_()
    f = links @ z @ weight
    divergence = sum(torch.autograd.grad(f[:, i].sum(), z, retain_graph=True)[0][:, i] for i in range(D))
    assert isinstance(divergence, Tensor)
    torch.testing.assert_close(divergence, links.sum(0) * weight.trace())
    _, found = odeint(
        lambda t, y: links @ y @ weight, z, SPAN, method="euler", trace_estimator="exact", batch_dim=None,
        regularizers={"kinetic": C / 2, "jacfrob": 0.0},
    )  # fmt: skip
    torch.testing.assert_close(found.loss(), C * (0.5 * f.pow(2).mean(1)).mean())
    torch.testing.assert_close(found["jacfrob"], (links.norm() * weight.norm()).square()[None])


def test_the_transport_cost_along_the_path_is_tigons_formula() -> None:
    """T times the mean of its integral from 0 to T, for a velocity and a growth that are constant."""
    end, n = 2.1, 6
    x, log_weight = torch.randn(n, D, dtype=torch.float64), torch.zeros(n, 1, dtype=torch.float64)
    velocity, growth = torch.randn(n, D, dtype=torch.float64), torch.full((n, 1), 0.7, dtype=torch.float64)
    weights = (growth * end).exp().sub(1) / growth  # the integral of w
    theirs = end * C * ((velocity.norm(dim=1) ** 2 + growth.norm(dim=1) ** 2)[:, None] * weights).mean()
    _, found = odeint(
        lambda t, y: (velocity, growth), (x, log_weight), end * SPAN, method="rk4", options={"step_size": 0.02},
        regularizers={from_the_page()["wfr"]: end * C * (D + 1)}, penalized=(0, 1),
    )  # fmt: skip
    torch.testing.assert_close(found.loss(), theirs)


def test_the_action_with_growth_is_cytobridges() -> None:
    x, log_weight = torch.randn(6, D, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
    velocity, growth = torch.sin(x), torch.cos(x[:, :1])
    theirs = C * ((velocity.square().sum(1, keepdim=True) / 2 + growth**2) * log_weight.exp()).mean()
    _, found = odeint(
        lambda t, y: (torch.sin(y[0]), torch.cos(y[0][:, :1])), (x, log_weight), torch.tensor([0.0, 1.0]),
        method="euler", regularizers={from_the_page()["action"]: C * (D + 1)}, penalized=(0, 1),
    )  # fmt: skip
    torch.testing.assert_close(found.loss(), theirs)


def test_the_mean_over_a_time_grid_is_mioflows() -> None:
    x, times = torch.randn(6, D, dtype=torch.float64), torch.linspace(0.5, 2.5, 2001, dtype=torch.float64)
    rate = -0.3
    on_the_grid = (rate * x * torch.exp(rate * (times[:, None, None] - 0.5))).square().sum(2)
    _, found = odeint(lambda t, y: rate * y, x, times[[0, -1]], regularizers={"kinetic": C * D / 2})
    torch.testing.assert_close(found.loss(), C * on_the_grid.mean(), rtol=1e-3, atol=0)


def test_penalties_at_points_take_the_mean_over_the_samples() -> None:
    z = torch.randn(6, D, dtype=torch.float64)
    rates = penalties_at(lambda t, x: torch.sin(x), 0.5, z, ["kinetic"])
    torch.testing.assert_close(rates["kinetic"].mean(), z.sin().norm(dim=1).square().mean())
