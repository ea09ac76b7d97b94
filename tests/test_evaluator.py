"""What happens around an evaluation: draws, buffers, layers' attributes, times, second derivatives, grad modes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from regularizer_table import diagonal, difference_in_time
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rnode_plugin import NeuralODE, RegularizedCNF, penalties_at
from rnode_plugin.core.derivatives import AutogradField
from rnode_plugin.core.evaluator import Evaluator
from rnode_plugin.core.trace_estimators import Difference, Exact
from rnode_plugin.errors import ConfigError
from rnode_plugin.fields import linear_field
from rnode_plugin.regularizers import Rate

SPAN = torch.tensor([0.0, 1.0])


later = Rate("later", lambda at: at.velocity(at.t + 0.1, at.z).square().sum(1), needs={"field"})


class Net(nn.Module):
    """``tanh(W z + sin 2t)`` with a layer in the middle."""

    def __init__(self, middle: Callable[[Tensor], Tensor] | None = None, dims: int = 2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = nn.Parameter(0.7 * torch.randn(dims, 6, generator=generator))
        self.second = nn.Parameter(0.7 * torch.randn(6, dims, generator=generator))
        self.middle = middle or nn.Identity()

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.middle(z @ self.first) + torch.sin(2 * t)) @ self.second


def states(n: int = 16, dims: int = 2) -> Tensor:
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(0))


def gradient(loss: Tensor, net: nn.Module) -> Tensor:
    parameters = list(net.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    return torch.cat([g.flatten() for g in filled])


@pytest.mark.parametrize("sensitivity", ["autograd", "checkpointed"])
@pytest.mark.parametrize(
    ("regularizer", "estimator"),
    [("taylor:3", "exact"), (later, "exact"), (diagonal, "rademacher"), ("jacfrob", "difference")],
)
def test_a_field_that_draws_is_not_evaluated_again(regularizer: Any, estimator: str, sensitivity: str) -> None:
    net = Net(nn.Dropout(0.5))
    model = NeuralODE(net, "rk4", sensitivity=sensitivity, regularizers=[regularizer], trace_estimator=estimator)
    with pytest.raises(ConfigError, match=r"dropout.*eval\(\)"):
        model(states(), SPAN)
    net.eval()
    model(states(), SPAN)
    model.reg_loss().backward()


@pytest.mark.parametrize("name", ["directional_vjp", "total_derivative", diagonal], ids=["vjp", "jvp", "rows"])
def test_a_penalty_leaves_the_random_numbers_of_the_solve(name: Any) -> None:
    net = Net(nn.Dropout(0.3))

    def after(names: list[Any] | None) -> tuple[Tensor, Tensor]:
        torch.manual_seed(5)
        model = NeuralODE(net, solver="rk4", regularizers=names, trace_estimator="exact")
        return model(states(), torch.linspace(0, 1, 3))[1], torch.rand(3)

    for found, expected in zip(after([name]), after(None), strict=True):
        assert torch.equal(found, expected)


class Kernel(torch.autograd.Function):
    """SiLU whose backward pass is a kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            s = x.sigmoid()
            return g * (s + x * s * (1 - s))


class Once(Kernel):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Kernel.backward(ctx, g)


# the estimator by differences -----------------------------------------------------------------------------------


def test_the_length_of_a_difference_has_no_gradient() -> None:
    """The divergence of a linear field is a constant: its gradient with respect to the state is 0 to the bit."""
    net, z, estimator = torch.nn.Linear(3, 3), states(4, 3).float().requires_grad_(), Difference()
    noise = estimator.draw(z)
    products = estimator.linearize(
        Evaluator(AutogradField(lambda t, z: net(z)), net), torch.tensor(0.2), z, noise
    ).products
    assert products is not None
    estimator.divergence(products, noise).sum().backward()
    assert z.grad is not None
    assert not z.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_differences_over_all_signs_give_trace_and_norm(dtype: torch.dtype) -> None:
    """The mean over all sign vectors is exact for every field up to the truncation of the difference."""
    net, z = Net(torch.sin, dims=3).to(dtype), states(4, 3).to(dtype)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=dtype)
    estimator, evaluator = Difference(count=8), Evaluator(AutogradField(net), net)
    noise = signs[:, None].expand(8, 4, 3)
    t = torch.tensor(0.2, dtype=dtype)
    products = estimator.linearize(evaluator, t, z, noise).products
    rows = Exact().linearize(evaluator, t, z).rows
    assert products is not None
    assert rows is not None
    bound = {torch.float32: 2e-3, torch.float64: 1e-8}[dtype]  # of order s^2, with s about 0.01 and 1e-5
    traces = estimator.divergence(products, noise), Exact().divergence(rows, None)
    norms = estimator.squared_frobenius(products, noise), Exact().squared_frobenius(rows, None)
    for pair in (traces, norms):
        assert torch.allclose(*pair, rtol=bound, atol=bound)


@pytest.mark.parametrize("kernel", [Kernel, Once])
def test_differences_train_through_a_kernel(kernel: Any) -> None:
    def loss(net: nn.Module) -> Tensor:
        torch.manual_seed(0)
        model = RegularizedCNF(
            net,
            event_shape=2,
            trace_estimator="difference:2",
            solver="rk4",
            t_span=(0.0, 1.0),
            regularizers=["jacfrob"],
        )
        nll = -model.log_prob(states()).mean()
        return nll + model.reg_loss()

    found, expected = (gradient(loss(net), net) for net in (Net(kernel.apply), Net(nn.functional.silu)))
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_differences_refuse_half_precision_and_transposes() -> None:
    z = states().bfloat16()
    with pytest.raises(ConfigError, match="float32"):
        penalties_at(Net().bfloat16(), 0.0, z, ["jacfrob"], trace_estimator="difference")
    # the layers of this field are rounded to 8 bits, and its velocity has the dtype of the state
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ConfigError, match="autocast"):
        penalties_at(linear_field(2), 0.0, states().float(), ["jacfrob"], trace_estimator="difference")
    with torch.autocast("cpu", torch.bfloat16):  # autocast leaves float64 alone
        penalties_at(Net().double(), 0.0, states().double(), ["jacfrob"], trace_estimator="difference")
    with pytest.raises(ConfigError, match="'strain'"):
        penalties_at(Net(), 0.0, states(), ["curl"], trace_estimator="difference")


def test_a_part_of_the_state_keeps_its_velocity() -> None:
    """The second evaluation, at another state, must not become the velocity of the solve."""
    net, x = Net(dims=3), states(dims=3)
    plain = NeuralODE(net, "rk4_38")(x, SPAN)[1]
    model = NeuralODE(net, "rk4_38", regularizers=[difference_in_time], penalized=slice(1, None))
    torch.testing.assert_close(model(x, SPAN)[1], plain)


def test_a_velocity_of_the_caller_is_not_evaluated_again() -> None:
    net, calls, x = Net().double(), [], states().double()

    def counted(t: Tensor, z: Tensor) -> Tensor:
        calls.append(z)
        return net(t, z)

    penalties: list[Any] = ["kinetic", difference_in_time]
    expected = penalties_at(net, 0.3, x, penalties)
    velocity = net(torch.tensor(0.3, dtype=torch.float64), x)
    found = penalties_at(counted, 0.3, x, penalties, velocity=velocity)
    assert len(calls) == 1
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values)
        of_found, of_values = (
            torch.autograd.grad(y.sum(), net.first, retain_graph=True) for y in (found[name], values)
        )
        torch.testing.assert_close(of_found, of_values)
