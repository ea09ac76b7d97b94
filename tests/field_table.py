"""One of each kind of vector field, small and in double precision, for the tests of their contract."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from problems import Linear, Plain, Wave
from torch import Tensor, nn
from torchdyn.nn import Augmenter, DataControl, DepthCat

from rnode_plugin import NeuralODE
from rnode_plugin.core.derivatives import Field, as_field
from rnode_plugin.core.signature import time_first
from rnode_plugin.core.system import System
from rnode_plugin.fields import StackField, conv_field, linear_field
from rnode_plugin.fields.activations import ACTIVATIONS
from rnode_plugin.fields.recognize import recognize
from rnode_plugin.fields.stack import AtContext
from rnode_plugin.regularizers import curl
from rnode_plugin.torchdyn.field import adds_time, start_net, start_torchdyn

SHAPES = {"conv": (3, 2, 5, 4), "linear": (3, 4)}


def make_field(kind: str, activation: str = "softplus", *, dtype: torch.dtype = torch.float64) -> StackField:
    torch.manual_seed(0)
    build = conv_field if kind == "conv" else linear_field
    field = build(SHAPES[kind][1], hidden=6, layers=4, activation=activation)
    for p in field.parameters():
        nn.init.normal_(p, std=0.5)
    return field.to(dtype)


def active(field: nn.Module) -> Any:
    """In double precision, with weights that are not zero."""
    torch.manual_seed(0)
    for parameter in field.parameters():
        nn.init.normal_(parameter, std=0.5)
    return field.double()


# how a solve finds the field -------------------------------------------------------------------------------------


def own(module: Any, z: Tensor) -> Field:
    """A field of this package for one solve, or a plain function."""
    return as_field(module).prepared(z)


def in_a_stack(module: Any, z: Tensor) -> Field:
    """A perceptron of the user's whose products are made by hand."""
    found = recognize(module, z, adds_time=adds_time)
    assert found is not None
    return found


def in_neural_ode(module: Any, z: Tensor, *, order: int = 1) -> Field:
    """The field of one solve of a NeuralODE whose penalties read all that there is."""
    model = NeuralODE(module, order=order)
    return start_torchdyn(System([curl]), model.vf, z, one_graph=True).field


def in_second_order(module: Any, z: Tensor) -> Field:
    return in_neural_ode(module, z, order=2)


def in_density(module: Any, z: Tensor) -> Field:
    return start_net(System(trace_estimator="exact"), module, z, None, density=True, one_graph=True).field


def state_first(module: Any, z: Tensor) -> Field:
    return as_field(time_first(module, with_context=False))


def with_time_per_sample(module: Any, z: Tensor) -> Field:
    return as_field(time_first(module, time_shape="(B,)", with_context=False))


# fields ----------------------------------------------------------------------------------------------------------


def at_context(field: nn.Module) -> nn.Module:
    context = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2).requires_grad_()
    return AtContext(active(field), context)


def perceptron(*layers: nn.Module) -> nn.Module:
    return active(nn.Sequential(*layers))


def hooked(field: Any, module: nn.Module | None = None) -> Any:
    """The field with a hook on it, or on a module in it, that changes what is returned."""
    (field if module is None else module).register_forward_hook(lambda module, given, result: 1.5 * result)
    return field


def with_weight_norm() -> Any:
    field = make_field("linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(field.layers[1])
    return field


class Damped(StackField):
    """A stack with another forward pass, which its products would miss."""

    def forward(self, t: Tensor | float, z: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(t, z, context) - 3 * z


class StateFirst(nn.Module):
    """In the order of flow_matching's models."""

    def __init__(self) -> None:
        super().__init__()
        self.wave = Wave(4)

    def forward(self, x: Tensor, t: Tensor, scale: float = 0.7) -> Tensor:
        return scale * self.wave(t.reshape(-1, 1) if t.ndim else t, x)


class Energy(nn.Module):
    """A velocity that is itself a gradient, and that marks its state for that."""

    def __init__(self) -> None:
        super().__init__()
        self.net = perceptron(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        with torch.enable_grad():
            z = z.requires_grad_()
            return torch.autograd.grad(self.net(z).sum(), z, create_graph=True)[0] * torch.cos(t)


class OwnTanh(torch.autograd.Function):
    """A user's own Function with a forward-mode rule: nested, torch takes its second derivative for 0."""

    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        ctx.save_for_forward(y)
        return y

    @staticmethod
    def backward(ctx, gradient):  # pyright: ignore[reportIncompatibleMethodOverride]
        (y,) = ctx.saved_tensors
        return gradient * (1 - y * y)

    @staticmethod
    def jvp(ctx, tangent):  # pyright: ignore[reportIncompatibleMethodOverride]
        (y,) = ctx.saved_tensors
        return tangent * (1 - y * y)


class Bent(Linear):
    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return OwnTanh.apply(super().forward(t, z)) * (1 + t)  # pyright: ignore[reportOptionalOperand]


class Joined(nn.Module):
    """A net of the state with the time in front of it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = perceptron(*layers)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.net(torch.cat([t.expand(len(z), 1), z], 1))


def normed(*, training: bool) -> nn.Module:
    return Joined(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4)).train(training)


def positions_over_velocities(t: Tensor, z: Tensor) -> Tensor:
    position, velocity = z.chunk(2)
    return torch.cat([velocity, -position])


class Mean(nn.Module):
    """Each sample is drawn to the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Linear(4).a

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(z.mean(0) - z @ self.a) * t


# the velocity as its author would compute it --------------------------------------------------------------------

Velocity = Callable[[Tensor, Tensor], Tensor]


def called(module: Any, start: Tensor) -> Velocity:
    return module


def called_state_first(module: Any, start: Tensor) -> Velocity:
    return lambda t, z: module(z, t)


def of_the_state(module: Any, start: Tensor) -> Velocity:
    return lambda t, z: module(z)


def by_its_layers(module: Any, start: Tensor) -> Velocity:
    """Torchdyn's layers with the time and the first state in their attributes."""

    def velocity(t: Tensor, z: Tensor) -> Tensor:
        for layer in module.modules():
            if isinstance(layer, DepthCat):
                vars(layer)["t"] = t
            elif isinstance(layer, DataControl):
                vars(layer)["_control"] = start.detach()
        return module(z)

    return velocity


def accelerated(module: Any, start: Tensor) -> Velocity:
    return lambda t, z: torch.cat([z[:, 2:], module(z)], 1)


@dataclass(frozen=True)
class Case:
    """A user's field.

    Attributes:
        make: the module or the function.
        solved: what a solve makes of it for a state.
        plain: its velocity without this package, in a solve from a state.
        shape: of the state.
        mixes: whether the velocity of a sample depends on others.
        draws: whether an evaluation draws random numbers.
        differentiates: whether its velocity is a gradient.
        twice: why a derivative along a direction cannot be differentiated; empty if it can.
    """

    make: Callable[[], Any]
    solved: Callable[[Any, Tensor], Field] = own
    plain: Callable[[Any, Tensor], Velocity] = called
    shape: tuple[int, ...] = (3, 4)
    mixes: bool = False
    draws: bool = False
    differentiates: bool = False
    twice: str = ""


def conv(make: Callable[[], Any]) -> Case:
    return Case(make, shape=(3, 2, 3, 2))


def control() -> nn.Module:
    return perceptron(DataControl(), nn.Linear(8, 6), nn.Tanh(), DepthCat(1), nn.Linear(7, 4))


FIELDS: dict[str, Case] = {
    "conv": conv(lambda: make_field("conv")),
    **{f"linear {name}": Case(lambda name=name: make_field("linear", name)) for name in ACTIVATIONS},
    "conv of one layer": conv(lambda: active(conv_field(2, layers=1))),
    "linear of one layer": Case(lambda: active(linear_field(4, layers=1))),
    "conv by autograd": conv(lambda: Plain(make_field("conv"))),
    "linear at a context": Case(lambda: at_context(linear_field(4, hidden=6, activation="tanh", context=2))),
    "recognized": Case(
        lambda: perceptron(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4, bias=False)), in_a_stack, of_the_state
    ),
    "recognized with time": Case(
        lambda: perceptron(DepthCat(1), nn.Linear(5, 6), nn.SiLU(), nn.Linear(6, 4)), in_a_stack, by_its_layers
    ),
    "linear with a hook": Case(lambda: hooked(make_field("linear"))),
    "conv with a hook on a layer": conv(lambda: hooked(field := make_field("conv"), field.layers[1])),
    "linear with weight norm": Case(with_weight_norm),
    "linear with another forward": Case(lambda: Damped(make_field("linear").layers)),
    "linear with a hook at a context": Case(lambda: at_context(hooked(linear_field(4, hidden=6, context=2)))),
    "module": Case(lambda: Wave(4)),
    "function": Case(lambda: lambda t, z: torch.sin(3 * t) * z - z**3 * t),
    "function of the state": Case(
        lambda: lambda x: torch.sin(x) * x.square().sum(1, keepdim=True), in_neural_ode, of_the_state
    ),
    "state first": Case(StateFirst, state_first, called_state_first),
    "one time per sample": Case(StateFirst, with_time_per_sample, called_state_first),
    "torchdyn's layers": Case(control, in_neural_ode, by_its_layers),
    "torchdyn's layers in a density": Case(
        lambda: perceptron(nn.Linear(4, 6), nn.Tanh(), DepthCat(1), nn.Linear(7, 4)), in_density, by_its_layers
    ),
    "torchdyn's augmenter": Case(
        lambda: perceptron(Augmenter(1, 2), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)),
        in_neural_ode,
        of_the_state,
    ),
    "second order": Case(
        lambda: perceptron(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), in_second_order, accelerated
    ),
    "compiled": Case(lambda: torch.compile(Wave(4), backend="eager"), in_neural_ode),
    "gradient of an energy": Case(Energy, differentiates=True),
    "Function of the user's": Case(lambda: Bent(4)),
    "batch norm in evaluation": Case(lambda: normed(training=False)),
    "batch norm in training": Case(
        lambda: normed(training=True),
        mixes=True,
        twice="wrong third derivative of the vector field",
    ),
    "layer norm": Case(
        lambda: Joined(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 4)),
        twice="wrong third derivative of the vector field",
    ),
    "group norm": Case(lambda: Joined(nn.Linear(5, 6), nn.GroupNorm(1, 6), nn.Tanh(), nn.Linear(6, 4))),
    "samples that mix": Case(Mean, mixes=True),
    "positions over velocities": Case(lambda: positions_over_velocities, shape=(4, 2), mixes=True),
    "dropout": Case(lambda: Joined(nn.Linear(5, 20), nn.Tanh(), nn.Dropout(0.3), nn.Linear(20, 4)), draws=True),
}
