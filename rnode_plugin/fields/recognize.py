"""recognize: turns a user's multilayer perceptron into a stack with fast products.

Such a perceptron has linear layers, with or without time as the last input, and one kind of activation between
them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ..core.modules import has_hooks
from .activations import get_activation
from .fused import Stack
from .kernels import Dense

_SETTINGS = {
    nn.Tanh: ("tanh", {}),
    nn.Softplus: ("softplus", {"beta": 1.0}),
    nn.ELU: ("elu", {"alpha": 1.0}),
    nn.SiLU: ("silu", {}),
    nn.GELU: ("gelu", {"approximate": "none"}),
}

_Layer = tuple[str, Any]
"""``"L"`` with a linear layer, ``"a"`` with an activation, ``"t"`` for time as one more input of the next layer."""

_UNKNOWN: _Layer = ("?", None)


def recognize(
    module: object, z: Tensor, *, adds_time: Callable[[nn.Module], bool] = lambda module: False
) -> Stack | None:
    """``module`` as the field of one solve from a state like ``z``; None if it is not a stack for such states.

    A stack is a linear layer, or nested ``nn.Sequential`` of linear layers and one kind of activation. A module
    with hooks is left alone, because the effect of its hooks is unknown. ``adds_time`` finds the modules
    that append the time to their input as the last column.
    """
    layers = list(_layers(module, adds_time))
    kinds = "".join(kind for kind, _ in layers)
    activations = {activation for kind, activation in layers if kind == "a"}
    if len(activations) > 1 or not re.fullmatch("(t?La)*t?L", kinds):
        return None
    timed = [kind == "tL" for kind in re.findall("t?L", kinds)]
    linear = [layer for kind, layer in layers if kind == "L"]
    inputs, outputs = linear[0].weight.shape[1] - timed[0], linear[-1].weight.shape[0]
    if z.ndim != 2 or not z.shape[1] == inputs == outputs or any(each.weight.dtype != z.dtype for each in linear):
        return None
    parameters = [(*_split(each.weight, last), each.bias) for each, last in zip(linear, timed, strict=True)]
    activation = activations.pop() if activations else get_activation("tanh")
    return Stack(Dense, activation, parameters, z)


def _split(weight: Tensor, timed: bool) -> tuple[Tensor | None, Tensor]:
    """The weights of time, with an input of size 1, and of the state."""
    if not timed:
        return None, weight
    state, time = weight.split([weight.shape[1] - 1, 1], dim=1)
    return time, state


def _layers(module: object, adds_time: Callable[[nn.Module], bool]) -> Iterator[_Layer]:
    """The layers of nested ``nn.Sequential`` in a row."""
    if not isinstance(module, nn.Module) or has_hooks(module):
        yield _UNKNOWN
    elif type(module) is nn.Sequential:
        for child in module:
            yield from _layers(child, adds_time)
    elif type(module) in _SETTINGS:
        name, wanted = _SETTINGS[type(module)]
        known = all(getattr(module, key) == value for key, value in wanted.items())
        # our softplus has no threshold that matters, and a user's from 20 on changes values by at most 2e-9
        known = known and not (isinstance(module, nn.Softplus) and module.threshold < 20)
        yield ("a", get_activation(name)) if known else _UNKNOWN
    elif type(module) is nn.Linear:
        yield "L", module
    else:
        yield ("t", None) if adds_time(module) else _UNKNOWN
