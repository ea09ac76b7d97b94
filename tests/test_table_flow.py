"""The flow of a table: against closed forms, dense Jacobians, and the same field by automatic differentiation."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from diagnosed_models import Linear
from problems import Plain
from torch import Tensor, nn

from rnode_plugin import Solver
from rnode_plugin.core.objective import output_log_prob
from rnode_plugin.core.trace_estimators import HutchPlusPlus, TraceEstimator
from rnode_plugin.errors import ConfigError
from rnode_plugin.fields.potential import PotentialField
from rnode_plugin.fields.stack import AtContext
from rnode_plugin.flows.table import TableFlow

TIGHT = Solver(method="dopri5", atol=1e-10, rtol=1e-10)


def active_flow(**options: Any) -> TableFlow:
    """A flow in double precision whose field is not zero, with a standardisation of its own."""
    torch.manual_seed(0)
    flow = TableFlow(3, **{"hidden": 6, "solver": TIGHT, "trace_noise": "exact", **options}).double()
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.4)
    flow.standardize(torch.randn(50, 3 + flow.context).double() * torch.tensor([0.1, 1.0, 20.0, 3.0, 5.0])[
        : 3 + flow.context
    ] + 2)  # fmt: skip
    return flow


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_a_linear_field_has_a_gaussian_density() -> None:
    flow = TableFlow(3, solver=TIGHT).double()
    a = 0.5 * rows(3, 3)
    flow.fields = nn.ModuleList([Linear(a)])
    data = rows(40, 3) @ rows(3, 3) * torch.tensor([0.01, 1.0, 300.0]) + torch.tensor([5.0, 0.0, -200.0])
    flow.standardize(data)
    # x = mean + scale * exp(-A) z with a standard normal z
    back = torch.diag(flow.scale) @ torch.linalg.matrix_exp(-a)
    expected = torch.distributions.MultivariateNormal(flow.mean, back @ back.T).log_prob(data)
    torch.testing.assert_close(flow.log_prob(data), expected, rtol=0, atol=1e-7)


def test_another_unit_moves_the_log_density_by_its_logarithm() -> None:
    flow, x = active_flow(), 3 * rows(7, 3) + 2
    before = flow.log_prob(x)
    factor = torch.tensor([1000.0, 1.0, 0.01], dtype=torch.float64)
    flow.mean.mul_(factor)
    flow.scale.mul_(factor)
    torch.testing.assert_close(flow.log_prob(x * factor), before - factor.log().sum(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("field", ["mlp", "potential"])
def test_the_log_determinant_is_that_of_the_map(field: str, context: int) -> None:
    solver = Solver("dopri5", atol=1e-9, rtol=1e-9)
    flow = active_flow(field=field, context=context, blocks=2, solver=solver)
    x = 2 + rows(4, 3)
    given: dict[str, Any] = {"context": 2 + rows(4, 2)} if context else {}
    output = flow(x, **given)

    def latent(x: Tensor) -> Tensor:
        return flow(x, **given, penalties=False).z.sum(0)

    jacobian: Any = torch.autograd.functional.jacobian(latent, x)  # (D, B, D): rows do not mix
    torch.testing.assert_close(
        output.logdet, torch.linalg.slogdet(jacobian.transpose(0, 1))[1], rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(flow.inverse(output.z, **given), x, rtol=1e-6, atol=1e-6)
    back = flow.decode(output.z, **given, penalties=True)  # state, log-determinant and penalties from one solve
    torch.testing.assert_close(back.z, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(back.logdet, -output.logdet, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(back.regularization, output.regularization, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        flow.inverse_and_log_prob(output.z, **given)[1], flow.log_prob(x, **given), rtol=1e-6, atol=1e-6
    )


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


@pytest.mark.parametrize("field", ["mlp", "potential"])
def test_one_context_for_all_rows_is_that_of_each(field: str) -> None:
    flow, x, context = active_flow(field=field, context=2), rows(5, 3), rows(2)
    one, each = flow.log_prob(x, context=context), flow.log_prob(x, context=context.expand(5, 2))
    assert torch.equal(one, each)
    other = flow.log_prob(x, context=context + 1)
    assert not torch.allclose(one, other)


# signs could be equal in both columns: rounding would then choose the second direction
@pytest.mark.parametrize("trace", ["exact", "rademacher", "gaussian:3", HutchPlusPlus(2, noise="gaussian")])
def test_the_products_at_a_context_are_those_of_automatic_differentiation(
    trace: str | TraceEstimator, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = active_flow(context=2, trace_noise=trace, regularizers=["kinetic", "jacfrob", "total_derivative"],
                       solver=Solver(method="rk4", step=0.5))  # fmt: skip
    x, context = rows(4, 3), rows(4, 2)
    found = []
    for plain in (False, True):
        if plain:
            hide = "rnode_plugin.flows.table.AtContext"
            monkeypatch.setattr(hide, lambda field, given: Plain(AtContext(field, given)))
        flow.zero_grad()
        output = flow(x, context=context, generator=torch.Generator().manual_seed(3))
        loss = output_log_prob(output).sum() + sum(value.sum() for value in output.regularization.values())
        loss.backward()
        found.append([output.logdet, *output.regularization.values(), *(p.grad for p in flow.parameters())])
    for own, differentiated in zip(*found, strict=True):
        torch.testing.assert_close(own, differentiated, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda flow: pickle.loads(pickle.dumps(flow))])
def test_a_copy_has_the_same_products(copied: Any) -> None:
    flow, x, context = active_flow(context=2), rows(4, 3), rows(4, 2)
    other = copied(flow)
    assert torch.equal(other.log_prob(x, context=context), flow.log_prob(x, context=context))
    fields: list[Any] = [other.fields[0], flow.fields[0]]
    one, same = (type(field.prepare(rows(4, 5))) for field in fields)
    assert one is same


@pytest.mark.parametrize("field", ["mlp", "potential"])
@pytest.mark.parametrize(("gradient", "close"), [("checkpointed", 1e-10), ("adjoint", 1e-5)])
def test_gradient_modes_agree_at_a_context(field: str, gradient: str, close: float) -> None:
    gradients = []
    for mode in ("autograd", gradient):
        solver = Solver(method="rk4", step=1 / 32, gradient=mode)
        flow = active_flow(field=field, context=2, solver=solver)
        flow(rows(4, 3), context=rows(4, 2)).logdet.sum().backward()
        gradients.append([p.grad if p.grad is not None else torch.zeros_like(p) for p in flow.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=close, atol=close)


def test_an_exact_trace_up_to_16_columns_and_for_the_potential() -> None:
    exact = [repr(TableFlow(16).estimator), repr(TableFlow(40, field="potential").estimator)]
    assert exact == ["Exact()", "Exact()"]
    assert repr(TableFlow(17).estimator) == "Hutchinson('rademacher')"


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: TableFlow(0), "columns must be a whole number of at least 1, not 0"),
        (lambda: TableFlow(2, blocks=0), "blocks must be a whole number of at least 1"),
        (lambda: TableFlow(2, field="mpl"), "unknown field 'mpl'; did you mean 'mlp'"),
        (lambda: TableFlow(2)(torch.zeros(3, 3)), r"rows must be of shape \(B, 2\).*not \(3, 3\)"),
        (lambda: TableFlow(2)(torch.zeros(3, 2).double()), "torch.float32 on cpu, not"),
        (lambda: TableFlow(2).log_prob(torch.zeros(3, 2), context=torch.zeros(1)), "takes no context"),
        (lambda: TableFlow(2, context=1).log_prob(torch.zeros(3, 2)), r"density is conditional"),
        (lambda: TableFlow(2, context=2).sample(3, context=torch.zeros(4, 2)), r"has shape \(4, 2\)|not \(4, 2\)"),
        (lambda: TableFlow(2).standardize(torch.zeros(4, 2)), "a column is constant"),
        (lambda: TableFlow(2).standardize(torch.zeros(4, 3)), r"takes rows \(N, 2\)"),
        (lambda: TableFlow(2)(torch.zeros(3, 2), noise=[torch.zeros(3, 2)]), "exact trace takes none"),
        (lambda: TableFlow(2, regularizers={"kinetic": 5.0}), "a flow applies no lambda"),
        (lambda: TableFlow(2, regularizers=["hjb"])(torch.zeros(3, 2)), "offers no 'potential_rate'"),
        (lambda: PotentialField(2, context=1)(torch.zeros(()), torch.zeros(3, 2)), r"of shape \(3, 1\), not none"),
    ],
)  # fmt: skip
def test_refusals(act: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        act()


@pytest.mark.parametrize("gradient", ["adjoint", "interpolated_adjoint"])
def test_a_continuous_adjoint_has_the_gradient_of_the_context(gradient: Any) -> None:
    flow, found = active_flow(context=2), []
    for mode in ("autograd", gradient):
        context = rows(4, 2).requires_grad_()
        solver = Solver("dopri5", atol=1e-9, rtol=1e-9, gradient=mode)
        flow.solved_with(solver=solver).log_prob(rows(4, 3), context=context).sum().backward()
        found.append(context.grad)
    assert found[0].abs().sum() > 0.1
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
