"""OT-Flow's field against automatic differentiation, and what reads it; installed or not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from rnode_plugin import NeuralODE, RegularizedCNF, get_recipe, penalties_at
from rnode_plugin.core.derivatives import AutogradField
from rnode_plugin.core.signature import time_first
from rnode_plugin.errors import ConfigError
from rnode_plugin.plugins import registry
from rnode_plugin.torchdiffeq import odeint

sys.path.insert(0, str(Path(__file__).parents[1]))
import rnode_otflow
from rnode_otflow.flow import OTFlow
from rnode_otflow.penalty import hjb
from rnode_otflow.potential import PotentialField

SPAN = torch.tensor([0.0, 1.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    installed = any(each.name == "otflow" for each in registry.report())  # by `pip install .`
    if not installed:
        registry.register(rnode_otflow, name="otflow")
    torch.manual_seed(0)
    yield
    if not installed:
        registry.unregister("otflow")


def states(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_velocity_and_rate_are_the_derivatives_of_the_potential() -> None:
    field = PotentialField(4, hidden=6, layers=3, rank=3).double()
    t, z = torch.tensor(0.3, dtype=torch.float64), states(3, 2, 2)
    for sample, velocity, rate in zip(z, field(t, z), field.potential_rate(t, z), strict=True):
        by_t, by_z = torch.func.grad(lambda t, z: field.potential(t, z[None])[0], argnums=(0, 1))(t, sample)
        torch.testing.assert_close(velocity, -by_z)
        torch.testing.assert_close(rate, by_t)


class Damped(PotentialField):
    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return super().forward(t, z) - 3 * z


def hooked(field: PotentialField) -> PotentialField:
    def twice(module: nn.Module, given: object, found: Tensor) -> Tensor:
        return 2 * found

    field.register_forward_hook(twice)
    return field


@pytest.mark.parametrize("field", [
    *(PotentialField(4, hidden=6, layers=k, rank=3) for k in (1, 2, 3)), Damped(4), hooked(PotentialField(4)),
])  # fmt: skip
def test_products_are_those_of_automatic_differentiation(field: PotentialField) -> None:
    """In closed form, and where a hook or a subclass changes the field; with their gradients."""
    field, t, z = field.double(), torch.tensor(0.3, dtype=torch.float64), states(3, 2, 2).requires_grad_()
    noise, v = states(2, 3, 2, 2), states(3, 2, 2)
    found: list[list[Tensor]] = []
    for each in (field, AutogradField(lambda t, z: field(t, z))):
        products: list[Any] = []
        for wants, given in (({"rows", "trace"}, None), ({"products", "jvp"}, noise)):
            made: Any = each.linearize(t, z, given, frozenset(wants))
            products += [
                made.dz,
                *([made.rows, made.trace] if given is None else [made.products, made.jvp(v, 0.5)]),
            ]
        loss = torch.stack([x.square().sum() for x in products]).sum()
        found.append([*products, *torch.autograd.grad(loss, [z, field.w, field.a])])
    torch.testing.assert_close(*found)


def test_second_derivatives_where_all_activations_are_zero() -> None:
    """At the origin and time 0 of a fresh field, where no bias has moved yet."""
    field = PotentialField(3, hidden=6).double()
    t, z = SPAN[0], torch.zeros(1, 3, dtype=torch.float64)
    hessian = torch.func.hessian(lambda z: field.potential(t, z[None])[0])(z[0])
    rows = field.linearize(t, z, None, frozenset({"rows"})).rows
    assert rows is not None
    torch.testing.assert_close(hessian, -rows[:, 0])
    far = torch.tensor([[-1e3, 0.0, 1e3]], dtype=torch.float64)
    assert bool(field.potential(t, far).isfinite().all())


def test_the_exact_trace_of_a_density_needs_no_jacobian(monkeypatch: pytest.MonkeyPatch) -> None:
    field, x = PotentialField(2, hidden=8), torch.randn(4, 2)
    options: Any = {"event_shape": 2, "solver": "rk4_38", "t_span": [0.0, 0.5, 1.0], "trace_estimator": "exact"}
    without_products: Any = lambda t, z: field(t, z)  # noqa: E731
    plain = RegularizedCNF(without_products, regularizers=["kinetic"], **options).log_prob(x)
    model, calls, grad = RegularizedCNF(field, regularizers=["kinetic", "hjb"], **options), [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **more: calls.append(1) or grad(*args, **more))
    found = model.log_prob(x)
    assert not calls
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    (model.reg_loss() - found.mean()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in field.parameters())


class Solution(nn.Module):
    """Phi = ||z||^2 / (2 (2 - t)), a solution of the HJB equation: straight lines into the origin at t = 2."""

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return -z / (2 - t)

    def potential_rate(self, t: Tensor, z: Tensor) -> Tensor:
        return z.square().sum(1) / (2 * (2 - t) ** 2)


def test_hjb_is_zero_for_a_solution_or_its_closed_form() -> None:
    z, t = states(3, 2), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    model = NeuralODE(Solution(), "dopri5", atol=1e-9, rtol=1e-9, regularizers=["hjb", "straightness"])
    model(z, SPAN)
    assert all(value.abs().max() < 1e-7 for value in model.regularization.values())
    field = PotentialField(2).double()
    found = penalties_at(field, t, z, ["hjb", "curl"])
    torch.testing.assert_close(found["hjb"], (field.potential_rate(t, z) - field(t, z).square().sum(1) / 2).abs())
    assert found["curl"].abs().max() < 1e-20  # a gradient field
    by_both = t, z.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t, z: penalties_at(field, t, z, [hjb])["hjb"], by_both)
    model = NeuralODE(field, "rk4_38", regularizers={"hjb": 1.0})
    model(z)
    torch.testing.assert_close(model.reg_loss(), model.regularization["hjb"].mean())  # not divided by D


def test_every_interface_and_gradient_has_the_same_penalty() -> None:
    """On one grid, to rounding; a continuous adjoint's gradient to its error, since the rate has kinks."""
    field, z, grid = PotentialField(2, hidden=5).double(), states(3, 2), torch.linspace(0, 1, 21).double()
    found: list[Tensor] = []
    for module, sensitivity in ((field, "autograd"), (AveragedModel(field), "autograd"), (field, "adjoint")):
        model = NeuralODE(module, "rk4_38", sensitivity=sensitivity, regularizers=["hjb"])
        model(z, grid)
        found.append(model.regularization["hjb"])
    found.append(odeint(field, z, grid, method="rk4", regularizers=["hjb"])[1]["hjb"])
    cnf = RegularizedCNF(
        field, event_shape=2, trace_estimator="exact", regularizers=["hjb"], solver="rk4_38", t_span=grid
    )
    cnf.log_prob(z)
    found.append(cnf.regularization["hjb"])
    for each in found[1:]:
        torch.testing.assert_close(each, found[0])
    by_steps, by_adjoint, of_odeint, of_density = (
        torch.autograd.grad(found[k].sum(), field.a)[0] for k in (0, 2, 3, 4)
    )
    torch.testing.assert_close(of_odeint, by_steps)
    torch.testing.assert_close(of_density, by_steps)
    torch.testing.assert_close(by_adjoint, by_steps, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("alph", [(1.0, 100.0, 5.0), (2.0, 50.0, 3.0)])
def test_the_loss_of_ot_flow_is_ours_times_its_weight(alph: tuple[float, float, float]) -> None:
    field, x = PotentialField(3, hidden=8).double(), states(6, 3)
    model = RegularizedCNF(
        field, event_shape=3, trace_estimator="exact", solver="euler", t_span=(0.0, 1.0),
        regularizers={"kinetic": alph[0] / (2 * alph[1]), "hjb": alph[0] * alph[2] / (alph[1] * 3)},
    )  # fmt: skip
    nll = -model.log_prob(x)
    ours = nll.mean() / 3 + model.reg_loss()
    # one step of Euler integrates the rates at its start; their potential is a0 times the field's
    scaled = torch.func.grad(lambda t, z: alph[0] * field.potential(t, z[None])[0])
    rate = torch.func.vmap(scaled, in_dims=(None, 0))(SPAN[0], x)
    cost = field(SPAN[0], x).square().sum(1) / 2
    residual = (-rate + alph[0] * cost).abs()
    theirs = (alph[0] * cost + alph[1] * nll + alph[2] * residual).mean()
    torch.testing.assert_close(ours * alph[1] * 3, theirs)


class Half(nn.Module):
    """Half the gradient of a potential at z / 2, which is another field than the potential's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = PotentialField(2).double()

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.inner(t, z / 2) / 2


def test_the_rate_is_of_the_field_and_not_of_a_module_inside() -> None:
    inner, z = PotentialField(2).double(), states(3, 2)
    fields: list[tuple[Any, str]] = [
        (Half(), "not Half"),
        (time_first(inner, call=lambda net, t, x: net(t, x / 2) / 2), "not _TimeFirst"),
        (lambda t, x: -inner(t, x), "is not a module that takes just the state"),
    ]
    for field, words in fields:
        with pytest.raises(ConfigError, match=words):
            NeuralODE(field, "rk4", regularizers=["hjb"])(z)
        with pytest.raises(ConfigError, match=words):
            RegularizedCNF(field, event_shape=2, regularizers=["hjb"]).log_prob(z)
        with pytest.raises(ConfigError, match=words):
            odeint(field, z, SPAN, regularizers=["hjb"])
    with pytest.raises(ConfigError, match="takes just the state that the penalties measure"):
        NeuralODE(inner, "rk4", regularizers=["hjb"], penalized=slice(0, 1))(z)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="layers must be a whole number"):
        PotentialField(2, layers=0)
    with pytest.raises(ConfigError, match=r"takes states of 3 dimensions, not of shape \("):
        PotentialField(3)(torch.tensor(0.0), states(2, 2))
    with pytest.raises(ConfigError, match="no conditional densities"):
        OTFlow(2, context=1)


def test_a_recipe_trains_the_flow_with_the_penalty() -> None:
    recipe = get_recipe("table").override(["model.name=otflow", "model.hidden=8", "regularizers.hjb=0.1"])
    flow = recipe.build_flow()
    assert isinstance(flow, OTFlow)
    output = flow(torch.randn(5, flow.dims))
    assert set(output.regularization) == {"kinetic", "jacfrob", "hjb"}
    sum(value.sum() for value in output.regularization.values()).backward()  # pyright: ignore
    assert all(bool(p.grad.isfinite().all()) for p in flow.parameters() if p.grad is not None)
