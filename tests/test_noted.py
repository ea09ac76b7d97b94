"""What a backward pass that evaluates again reads: as it was in the solve, from every place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdyn_fields import mlp

from rnode_plugin import FixedGrid, NeuralODE
from rnode_plugin.core.noted import Noted
from rnode_plugin.core.system import System
from rnode_plugin.errors import ConfigError
from rnode_plugin.regularizers import Rate, kinetic

MODES = ["checkpointed", "adjoint", "interpolated_adjoint"]
SPAN = torch.linspace(0, 1, 33, dtype=torch.float64)


class Scale(nn.Module):
    """Multiplies by a weight, and by a buffer that a caller sets before a solve, perhaps with a graph."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.7, -0.4], dtype=torch.float64))
        self.register_buffer("scale", torch.ones(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.weight * self.scale * x)


class Scaled(nn.Module):
    """A field that calls a module of its own, or one in its argument."""

    def __init__(self, own: Scale | None = None) -> None:
        super().__init__()
        self.own = own

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        scale: Any = args["scales"][0] if self.own is None else self.own
        return scale(x) + 0.1 * t * x


def _node(module: Any, mode: str, **options: Any) -> NeuralODE:
    return NeuralODE(module, "rk4_38", sensitivity=mode, trace_estimator="exact", **options)


def _of_function(scale: Scale) -> Callable[..., Tensor]:
    return lambda t, x: scale(x) + 0.1 * t * x


class Cost(nn.Module):
    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.scale(x).square().sum(1)


def _rate(of: Any) -> Rate:
    return Rate("scaled", of)


class Speed(nn.Module):
    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, evaluation: Any) -> Tensor:
        return self.scale(evaluation.dz).square().sum(1)


PLACES: dict[str, Callable[[Scale, str], NeuralODE]] = {
    "the field": lambda scale, mode: _node(Scaled(scale), mode, regularizers=["jacfrob"]),
    "a function": lambda scale, mode: _node(_of_function(scale), mode, regularizers=["jacfrob"]),
    "args": lambda scale, mode: _node(Scaled(), mode),
    "a cost": lambda scale, mode: _node(mlp(2, 5, 2).double(), mode, integral_loss=Cost(scale)),
    "a penalty": lambda scale, mode: _node(mlp(2, 5, 2).double(), mode, regularizers=[_rate(Speed(scale))]),
    "the function of a penalty": lambda scale, mode: _node(
        mlp(2, 5, 2).double(), mode, regularizers=[_rate(lambda e: scale(e.dz).square().sum(1))]
    ),
}


def _gradients(place: str, mode: str) -> list[Tensor]:
    """Gradients of two solves between which the buffer is replaced, and after which it is replaced and written."""
    torch.manual_seed(0)
    scale = Scale()
    node = PLACES[place](scale, mode)
    first = torch.tensor([1.5, 0.5], dtype=torch.float64, requires_grad=True)
    second = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    loss = torch.zeros((), dtype=torch.float64)
    for buffer in (2 * first, second):
        scale.scale = buffer
        x = torch.tensor([[0.3, -0.8], [1.1, 0.4]], dtype=torch.float64, requires_grad=True)
        columns = int(place == "a cost" and "adjoint" not in mode)  # an adjoint adds the cost to the gradient
        state = torch.cat([torch.zeros(2, columns, dtype=torch.float64), x], 1)
        _, states = node(state, SPAN, args={"scales": [scale]}) if place == "args" else node(state, SPAN)
        loss = loss + states[-1, :, :columns].sum() + states[-1, :, columns:].square().sum() + 100 * node.reg_loss()
    scale.scale = torch.zeros_like(second)
    if mode != "autograd":
        second.zero_()
    loss.backward()
    assert scale.weight.grad is not None
    assert first.grad is not None
    of_net = [p.grad for p in node.vf.parameters() if p.grad is not None and p is not scale.weight and p.grad.any()]
    return [scale.weight.grad, first.grad, *of_net]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", PLACES)
def test_a_backward_pass_reads_what_the_solve_read(place: str, mode: str) -> None:
    exact = mode == "checkpointed"
    for gradient, expected in zip(_gradients(place, mode), _gradients(place, "autograd"), strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(gradient, expected, rtol=1e-11 if exact else 1e-4, atol=0 if exact else 1e-5)


def test_tensors_in_args_have_their_gradients() -> None:
    """Also of tensors in a nest one of which is computed from another, and with hooks, which run once."""

    def gradient(mode: str) -> Tensor:
        source = torch.tensor([0.5, -0.3], dtype=torch.float64, requires_grad=True)
        scaled = source.exp()
        scaled.register_hook(lambda g: 3 * g)

        def field(t: Tensor, x: Tensor, args: Any = None) -> Tensor:
            return torch.tanh(args[0]["a"] * x) * args[1]

        node = NeuralODE(field, "rk4_38", sensitivity=mode, regularizers=["kinetic"])
        _, states = node(torch.ones(3, 2, dtype=torch.float64), SPAN, args=({"a": source}, scaled))
        return torch.autograd.grad(states[-1].square().sum() + node.reg_loss(), source)[0]

    expected = gradient("autograd")
    for mode in MODES:
        exact = mode == "checkpointed"
        torch.testing.assert_close(gradient(mode), expected, rtol=1e-12 if exact else 1e-5, atol=0)


def _solve(field: Any, mode: str, *, x: Tensor | None = None) -> Tensor:
    x = torch.ones(3, 4, requires_grad=True) if x is None else x
    rhs = System([kinetic]).start(field, x, density=False)
    return FixedGrid("rk4", gradient=mode).solve(rhs, x, (0.0, 1.0)).z[-1].sum()


@pytest.mark.parametrize("mode", MODES)
def test_a_leaf_that_nothing_holds_is_refused(mode: str) -> None:
    weight = torch.ones(4, requires_grad=True)
    with pytest.raises(ConfigError, match=r"shape \(4,\)"):
        _solve(lambda t, z: weight * z, mode).backward()


@pytest.mark.parametrize("mode", MODES)
def test_second_derivatives_are_refused(mode: str) -> None:
    net, x = nn.Linear(4, 4), torch.ones(3, 4, requires_grad=True)
    with pytest.raises(ConfigError, match="create_graph=True"):
        torch.autograd.grad(_solve(lambda t, z: net(z), mode, x=x), x, create_graph=True)


@pytest.mark.parametrize("mode", MODES[1:])
def test_an_adjoint_refuses_dropout(mode: str) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    with pytest.raises(ConfigError, match="dropout"):
        _solve(lambda t, z: net(z), mode)
    net.eval()
    _solve(lambda t, z: net(z), mode).backward()


def test_tied_weights_and_writes() -> None:
    """A weight with two names has one variable; what a repetition writes reaches no module."""
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    two.weight = one.weight
    norm = nn.BatchNorm1d(3)
    noted = Noted([nn.Sequential(one, two, norm), two])
    assert len(noted.inputs) == 5  # a weight, two biases, and two parameters of the norm
    variables = noted.variables(noted.inputs)
    before = {name: x.clone() for name, x in norm.named_buffers()}
    output = noted.run(variables, lambda: norm(two(one(torch.randn(5, 3)))))
    gradients = torch.autograd.grad(output.square().mean() + output[0, 0], variables)
    assert all(x.grad is None for x in noted.inputs)
    assert gradients[0].abs().max() > 0
    assert all(torch.equal(x, before[name]) for name, x in norm.named_buffers())
    assert isinstance(two.weight, nn.Parameter)
    assert two.weight is one.weight
