"""Recognized stacks: NeuralODE and CNF give the values and gradients of the generic path, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from problems import counted_products
from torch import Tensor, nn
from torchdyn.nn import DepthCat

from rnode_plugin import CNF, NeuralODE
from rnode_plugin.fields.recognize import recognize
from rnode_plugin.torchdyn.field import adds_time

pytestmark = pytest.mark.unit


def softplus() -> nn.Softplus:
    """Without torch's kink of 2e-9 at its threshold of 20, which the stacks do not have."""
    return nn.Softplus(threshold=40)


PENALTIES = ["kinetic", "jacfrob", "directional_vjp"]
ACTIVATIONS = [nn.Tanh, softplus, nn.ELU, nn.SiLU, nn.GELU]


def perceptron(
    activation: Callable[[], nn.Module] = nn.Tanh, *, timed: bool = False, dims: int = 3
) -> nn.Sequential:
    torch.manual_seed(0)
    first = [DepthCat(1), nn.Linear(dims + 1, 5)] if timed else [nn.Linear(dims, 5)]
    middle = [DepthCat(1), nn.Linear(6, 4, bias=False)] if timed else [nn.Linear(5, 4, bias=False)]
    net = nn.Sequential(*first, activation(), nn.Sequential(*middle, activation()), nn.Linear(4, dims)).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.7)
    return net


def results(net: nn.Module, *, cnf: str | None, noise: str, sensitivity: str, solver: str = "rk4",
            penalties: Sequence[str] = PENALTIES) -> list[Tensor]:  # fmt: skip
    """Solution, penalties, NFE and the gradients with respect to state and parameters."""
    torch.manual_seed(1)
    x = torch.randn(6, 3, dtype=torch.float64)
    field: Any = net if cnf is None else CNF(net, trace_estimator=cnf)
    if cnf is not None:
        x = torch.cat([torch.zeros_like(x[:, :1]), x], 1)
    x.requires_grad_()
    tolerances: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-6} if solver == "dopri5" else {}
    ode = NeuralODE(
        field, solver, sensitivity=sensitivity, regularizers=penalties, trace_estimator=noise,
        return_t_eval=False, **tolerances,
    )  # fmt: skip
    end = ode(x, torch.linspace(0, 1, 4, dtype=torch.float64))[-1]
    loss = end.square().sum() + end[:, 0].sum() + sum(v.sum() for v in ode.regularization.values())
    found = torch.autograd.grad(loss, [x, *net.parameters()])
    return [end, *ode.regularization.values(), torch.tensor(float(ode.vf.nfe)), *found]


class Opaque(nn.Module):
    """The same field, not recognized."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def products_of(net: nn.Module, **options: Any) -> tuple[list[Tensor], int]:
    """The results, and how many products of autograd they took, without their one backward pass."""
    with counted_products() as calls:
        return results(net, **options), len(calls) - 1


def both_ways(net: nn.Module, **options: Any) -> None:
    fast, products = products_of(net, **options)
    assert products == 0 or options["sensitivity"] == "checkpointed"
    generic, products = products_of(Opaque(net), **options)
    assert products > 0
    # an error estimate of 1e-6 has its last digits from rounding, and the steps with it
    tolerance = 1e-8 if options.get("solver") == "dopri5" else 1e-11
    for a, b in zip(fast, generic, strict=True):
        assert (a - b).norm() <= tolerance * (1 + b.norm())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("timed", [False, True])
def test_exact_penalties_of_a_recognized_field(activation: Callable[[], nn.Module], timed: bool) -> None:
    net = perceptron(activation, timed=timed)
    both_ways(net, cnf=None, noise="exact", sensitivity="autograd")


@pytest.mark.parametrize("sensitivity", ["autograd", "checkpointed"])
@pytest.mark.parametrize(("cnf", "solver"), [("exact", "rk4"), ("exact", "dopri5"), (None, "dopri5")])
def test_densities_and_adaptive_steps_of_a_recognized_field(cnf: str | None, solver: str, sensitivity: str) -> None:
    both_ways(perceptron(timed=True), cnf=cnf, noise="exact", sensitivity=sensitivity, solver=solver)


@pytest.mark.parametrize("cnf", [None, "exact"])
def test_derivatives_along_directions_are_the_modules(cnf: str | None) -> None:
    options: dict[str, Any] = {"cnf": cnf, "noise": "exact", "sensitivity": "autograd"}
    options["penalties"] = [*PENALTIES, "total_derivative", "directional", "curl"]
    net = perceptron(timed=True)
    found, expected = (products_of(each, **options) for each in (net, Opaque(net)))
    assert found[1] == expected[1] > 0
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)


def test_a_field_without_time_has_no_second_time_derivative() -> None:
    net, x = perceptron().requires_grad_(False), torch.ones(4, 3, dtype=torch.float64)
    t, stack = torch.zeros((), dtype=torch.float64, requires_grad=True), recognize(net, x)
    assert stack is not None
    (slope,) = torch.autograd.grad(stack.linearize(t, x).dz.sum(), t, create_graph=True, allow_unused=True)
    assert slope is None


def test_a_module_with_hooks_is_left_alone() -> None:
    net, x = perceptron(timed=True), torch.zeros(4, 3, dtype=torch.float64)
    assert recognize(net, x, adds_time=adds_time) is not None
    net[0].register_forward_hook(lambda *args: None)
    assert recognize(net, x, adds_time=adds_time) is None


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)),
        nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3), nn.ELU(), nn.Linear(3, 2)),
        nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)),
        nn.Sequential(nn.Linear(2, 2), nn.Tanh()),
        nn.Sequential(nn.Linear(2, 3), nn.GELU("tanh"), nn.Linear(3, 2)),
        nn.Sequential(nn.Linear(2, 3), nn.Softplus(beta=2), nn.Linear(3, 2)),
        nn.Sequential(nn.Linear(2, 3), nn.Softplus(threshold=5), nn.Linear(3, 2)),
        nn.Sequential(nn.Linear(2, 2), DepthCat(1)),
        nn.Sequential(DepthCat(0), nn.Linear(2, 2)),
        nn.Sequential(),
        nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
        lambda t, z: z,
    ],
)
def test_what_is_no_such_stack_is_left_alone(module: Any) -> None:
    assert recognize(module, torch.zeros(4, 2), adds_time=adds_time) is None


def test_a_recognized_stack_fits_the_state() -> None:
    net, x = perceptron(), torch.randn(4, 3, dtype=torch.float64)
    assert recognize(net, x) is not None
    assert recognize(net, x[:, :2]) is None
    assert recognize(net, x.float()) is None
