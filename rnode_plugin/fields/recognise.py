"""recognise: a user's own multilayer perceptron as a stack with fast products.

A stack is linear layers with one kind of activation between them. Other rooms add the layers that they know to
:data:`PARTS`: a function from a module of that type to its part, or None if this one cannot be taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..core.ops import exporting
from .activations import Activation, get_activation
from .fused import Stack
from .layers import LINEAR
from .stack import PreparedStack


@dataclass(frozen=True)
class Affine:
    """A linear layer, whose ``weight`` and ``bias`` are read at each solve."""

    module: Any


@dataclass(frozen=True)
class Pointwise:
    """An activation."""

    activation: Activation


@dataclass(frozen=True)
class AppendTime:
    """Time as one more input, the last one, of the linear layer that follows."""


Part = Affine | Pointwise | AppendTime


def _pointwise(name: str, **wanted: Any) -> Callable[[nn.Module], Part | None]:
    """A module's activation, if its settings are the ones wanted."""

    def part(module: nn.Module) -> Part | None:
        if any(getattr(module, key) != value for key, value in wanted.items()):
            return None
        return Pointwise(get_activation(name))

    return part


PARTS: dict[type[nn.Module], Callable[[Any], Part | None]] = {
    nn.Linear: Affine,
    nn.Tanh: _pointwise("tanh"),
    nn.Softplus: _pointwise("softplus", beta=1.0),  # without the kink at its threshold: 2e-9 at 20
    nn.ELU: _pointwise("elu", alpha=1.0),
    nn.SiLU: _pointwise("silu"),
    nn.GELU: _pointwise("gelu", approximate="none"),
}


@dataclass(frozen=True)
class Layer:
    """A linear layer of a stack, with time as its last input if it is ``timed``."""

    module: Any
    timed: bool

    def parameters(self) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """The weights of time, with an input of size 1, and of the state, and the bias."""
        weight, bias = self.module.weight, self.module.bias
        if not self.timed:
            return None, weight, bias
        state, time = weight.split([weight.shape[1] - 1, 1], dim=1)
        return time, state, bias


class RecognisedStack:
    """The layers of a module that is a stack, and the activation between them.

    It reads the parameters when it is prepared.
    """

    def __init__(self, layers: Sequence[Layer], activation: Activation) -> None:
        self.layers, self.activation = layers, activation

    def fits(self, z: Tensor) -> bool:
        """Whether ``z`` is a batch of states that these layers take and give, of their dtype."""
        weights = [layer.module.weight for layer in self.layers]
        return (
            z.ndim == 2
            and z.shape[1] == weights[0].shape[1] - self.layers[0].timed == weights[-1].shape[0]
            and all(weight.dtype == z.dtype for weight in weights)
        )

    def prepare(self, z: Tensor) -> PreparedStack:
        """The field for the evaluations of one solve, from a state like ``z (B, D)``."""
        parameters = [layer.parameters() for layer in self.layers]
        fast = not exporting()  # a program has no backward pass
        return PreparedStack(Stack.make(LINEAR, self.activation, parameters, z, fast=fast))


def recognise(module: Any) -> RecognisedStack | None:
    """``module`` as a stack, or None: nested ``nn.Sequential`` of linear layers and one kind of activation.

    A module with hooks is left alone: what they do is not known.
    """
    parts = _parts(module)
    if parts is None:
        return None
    layers: list[Layer] = []
    activations: list[Activation] = []
    timed = False
    for part in parts:
        if isinstance(part, AppendTime):
            if timed or len(layers) > len(activations):
                return None
            timed = True
        elif isinstance(part, Affine):
            if len(layers) > len(activations):
                return None
            layers.append(Layer(part.module, timed))
            timed = False
        else:
            if timed or len(activations) == len(layers):
                return None
            activations.append(part.activation)
    if timed or not layers or len(activations) != len(layers) - 1:
        return None
    if any(each is not activations[0] for each in activations):
        return None
    return RecognisedStack(layers, activations[0] if activations else get_activation("tanh"))


def _parts(module: Any) -> list[Part] | None:
    if not isinstance(module, nn.Module) or _has_hooks(module):
        return None
    if type(module) is nn.Sequential:
        found: list[Part] = []
        for child in module:
            parts = _parts(child)
            if parts is None:
                return None
            found += parts
        return found
    make = PARTS.get(type(module))
    part = None if make is None else make(module)
    return None if part is None else [part]


def _has_hooks(module: nn.Module) -> bool:
    own = vars(module)
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(own.get(name) for name in names) or "forward" in own
