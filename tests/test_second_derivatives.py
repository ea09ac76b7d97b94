"""Gradients of gradients through a solve, by state and parameters, against finite differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rnode_plugin import NeuralODE

SPAN = torch.linspace(0, 1, 3, dtype=torch.float64)


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def assert_gradient_of_a_gradient(loss: Callable[[], Tensor], wanted: list[Tensor]) -> None:
    """The gradient of the squared gradient norm, along random directions."""

    def penalty(*, graph: bool) -> Tensor:
        found = torch.autograd.grad(loss(), wanted, create_graph=graph)
        return torch.stack([gradient.square().sum() for gradient in found]).sum()

    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in wanted]
    sides, step = [], 1e-5
    for sign in (step, -2 * step):
        with torch.no_grad():
            for x, direction in zip(wanted, directions, strict=True):
                x += sign * direction
        sides.append(penalty(graph=False))
    with torch.no_grad():
        for x, direction in zip(wanted, directions, strict=True):
            x += step * direction
    differences = (sides[0] - sides[1]) / (2 * step)
    value = penalty(graph=True)
    torch.testing.assert_close(value, penalty(graph=False), rtol=1e-10, atol=1e-12)
    found = torch.autograd.grad(value, wanted)
    along = torch.stack([(g * v).sum() for g, v in zip(found, directions, strict=True)]).sum()
    torch.testing.assert_close(along, differences, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mode", ["autograd", "checkpointed"])
@pytest.mark.parametrize(
    ("names", "noise", "solver"),
    [([], "exact", "rk4_38"), (["jacfrob"], "exact", "dopri5"), (["jacfrob", "directional"], "gaussian", "rk4")],
)
def test_a_model(mode: str, names: list[str], noise: str, solver: str) -> None:
    field = perceptron()
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    model = NeuralODE(
        field, solver, sensitivity=mode, regularizers=names, trace_estimator=noise, return_t_eval=False,
        max_nfe=1000,
    )  # fmt: skip

    def loss() -> Tensor:
        torch.manual_seed(2)
        end = model(x, SPAN)[-1]
        penalties = model.regularization.values() if names else []
        return (end**3).sum() + sum(penalties, torch.zeros(4)).sum()

    assert_gradient_of_a_gradient(loss, [x, *field.parameters()])
