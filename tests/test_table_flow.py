"""The flow of a table: against closed forms, dense Jacobians, and the same field by automatic differentiation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import Linear
from torch import Tensor, nn

from rnode_plugin import Adaptive
from rnode_plugin.flows.table import TableFlow

pytestmark = pytest.mark.unit

TIGHT = Adaptive("dopri5", atol=1e-10, rtol=1e-10)


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_a_linear_field_has_a_gaussian_density() -> None:
    flow = TableFlow(3, solver=TIGHT).double()
    a = 0.5 * rows(3, 3)
    flow.fields = nn.ModuleList([Linear(matrix=a)])
    data = rows(40, 3) @ rows(3, 3) * torch.tensor([0.01, 1.0, 300.0]) + torch.tensor([5.0, 0.0, -200.0])
    flow.standardize(data)
    # x = mean + scale * exp(-A) z with a standard normal z
    back = torch.diag(flow.scale) @ torch.linalg.matrix_exp(-a)
    expected = torch.distributions.MultivariateNormal(flow.mean, back @ back.T).log_prob(data)
    torch.testing.assert_close(flow.log_prob(data), expected, rtol=0, atol=1e-7)


def test_a_shift_by_the_context_has_a_closed_form() -> None:
    torch.manual_seed(0)
    flow = TableFlow(3, context=2, layers=1, solver=TIGHT).double()
    field: Any = flow.fields[0]
    (layer,) = field.layers
    with torch.no_grad():
        layer.weight[:, 4:] = rows(3, 2)  # behind time and the state
    flow.standardize(torch.randn(50, 5).double() * 3 + 1)
    x, context = rows(6, 3), rows(6, 2)
    standard = (context - flow.mean[3:]) / flow.scale[3:]
    mean = flow.mean[:3] - flow.scale[:3] * (standard @ layer.weight[:, 4:].T)
    expected = torch.distributions.Normal(mean, flow.scale[:3]).log_prob(x).sum(1)
    torch.testing.assert_close(flow.log_prob(x, context=context), expected)
    drawn = flow.sample(4000, context=context[0], generator=torch.Generator().manual_seed(2))
    assert ((drawn.mean(0) - mean[0]).abs() < 5 * flow.scale[:3] / 4000**0.5).all()


def test_an_exact_trace_up_to_16_columns() -> None:
    assert repr(TableFlow(16).estimator) == "Exact()"
    assert repr(TableFlow(17).estimator) == "Hutchinson('rademacher')"
