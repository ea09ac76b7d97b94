"""What exists for a device: the same numbers as on a CPU, and nothing of it where there is none."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from rnode_plugin import Adaptive, FixedGrid, MultiscaleFlow, NeuralODE, Solver
from rnode_plugin.core import device, operations
from rnode_plugin.core.operations import Operations
from rnode_plugin.fields import linear_field
from rnode_plugin.fields.layers import ConcatConv2d, ConcatLinear

_ON_A_CPU = """
import sys

import torch
from rnode_plugin import get_recipe, objective

recipe = get_recipe("digits")
flow, solver = recipe.build_flow(), recipe.solver.build()
output = flow(recipe.task.random_inputs(2).x, solver=solver)
objective(flow.log_prob_of(output), output.regularization, lambdas=recipe.lambdas, dims=recipe.dims).loss.backward()
assert "rnode_plugin.core.operations" in sys.modules
assert "rnode_plugin.core.device" not in sys.modules
"""


def test_a_training_step_on_a_cpu_loads_nothing_for_a_device() -> None:
    done = subprocess.run([sys.executable, "-c", _ON_A_CPU], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(autouse=True)
def chains_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains that need no compiler."""
    monkeypatch.setattr(device, "_compiled", lambda function: function)


def _flow_numbers(flow: MultiscaleFlow, x: Tensor, noise: list[Tensor], solver: Solver) -> list[Tensor]:
    torch.manual_seed(0)
    x = x.clone().requires_grad_()
    flow.zero_grad()
    out = flow(x, noise=noise, solver=solver)
    (sum(out.regularization.values()) - flow.log_prob_of(out)).sum().backward()
    assert x.grad is not None
    gradients = [p.grad.clone() for p in flow.parameters() if p.grad is not None]
    return [out.z, out.logdet, *out.regularization.values(), x.grad, *gradients]


@pytest.mark.parametrize("activation", ["softplus", "tanh", "silu"])
@pytest.mark.parametrize(
    "solver",
    [
        FixedGrid("rk4_38", step=0.5),
        FixedGrid("rk4_38", step=0.5, quadrature="sampled"),
        Adaptive("dopri5", atol=1e-3, rtol=1e-3),
    ],
    ids=["fixed", "sampled", "adaptive"],
)
def test_a_flow_has_the_same_numbers(activation: str, solver: Solver, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    flow = MultiscaleFlow((1, 4, 4), hidden=4, layers=3, activation=activation).double()
    for layer in flow.modules():
        if isinstance(layer, ConcatConv2d):  # a fresh flow is zero, and so are its products
            layer.reset_parameters()
    x = torch.rand(3, 1, 4, 4, dtype=torch.float64)
    noise = [torch.randn(len(x), *shape, dtype=torch.float64) for shape in flow.block_shapes]
    plain = _flow_numbers(flow, x, noise, solver)
    monkeypatch.setattr(operations, "PLAIN", device.SingleKernels())
    for one, other in zip(plain, _flow_numbers(flow, x, noise, solver), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "of_device", [device.SingleKernels(), device.OneByOne()], ids=lambda each: type(each).__name__
)
def test_a_neural_ode_has_the_same_numbers(of_device: Operations, monkeypatch: pytest.MonkeyPatch) -> None:
    def numbers() -> list[Tensor]:
        torch.manual_seed(0)
        model.zero_grad()
        states = model(x, t_span)[1]
        (states[-1].square().sum() + model.reg_loss()).backward()
        return [states, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    torch.manual_seed(1)
    field = linear_field(2, hidden=5, layers=3).double()
    for layer in field.modules():
        if isinstance(layer, ConcatLinear):
            layer.reset_parameters()
    model = NeuralODE(field, solver="rk4", regularizers=["kinetic", "jacfrob", "directional"])
    x, t_span = torch.randn(4, 2, dtype=torch.float64), torch.linspace(0, 1, 3, dtype=torch.float64)
    plain = numbers()
    monkeypatch.setattr(operations, "PLAIN", of_device)
    for one, other in zip(plain, numbers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
