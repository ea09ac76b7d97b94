"""Vector fields that are stacks of layers with time as an input, as in FFJORD and RNODE."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..core.derivatives import VELOCITY, AutogradField, Field, Linearization
from ..core.modes import outside_inference
from ..core.modules import has_hooks
from ..errors import ConfigError, check_count
from .activations import get_activation
from .fused import Stack
from .kernels import Dense, LayerMap
from .layers import ConcatConv2d, ConcatLinear


class StackField(nn.Module, Field):
    """A vector field ``f(t, z)`` that consists of layers with an activation between them.

    Velocity and products with the Jacobian come from one pass with a hand-written backward. First-order gradients
    of both with respect to time, state, noise and parameters cost no double backward. Automatic differentiation
    computes an evaluation that also takes derivatives along directions, and gradients with ``create_graph=True``,
    which can be differentiated in turn. A call uses operations that autograd can differentiate.

    Args:
        layers: ``ConcatConv2d`` or ``ConcatLinear``, all of one kind.
        activation: ``"softplus"``, ``"tanh"``, ``"elu"``, ``"silu"`` or ``"gelu"``.

    If the first layer has more inputs than the last layer has outputs, the field depends on ``z`` and a context;
    see :class:`AtContext`.

    The layers keep their weights; :func:`conv_field` and :func:`linear_field` start from f = 0. Under
    ``torch.autocast`` the layers compute in its dtype, and the result has the dtype of the state. If the field or a
    layer has hooks, such as those that ``torch.nn.utils.weight_norm`` registers, automatic differentiation computes
    the products, which is slower.

    Raises:
        ConfigError: for another kind of layer or an unknown activation.
    """

    def __init__(self, layers: Iterable[nn.Module], *, activation: str = "softplus") -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._activation = get_activation(activation)
        kinds: set[type] = {type(layer) for layer in self.layers}
        if kinds not in ({ConcatConv2d}, {ConcatLinear}):
            raise ConfigError("a stack needs ConcatConv2d or ConcatLinear layers, all of one kind.")
        self._kind: type[LayerMap] = kinds.pop().kind

    @property
    def radius(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The number of layers if they are 3x3 convolutions, each of which reads the neighbors of a pixel.

        None for linear layers, and if hooks or a subclass may change the velocity or the products.
        """
        changed = type(self).forward is not StackField.forward or type(self).linearize is not StackField.linearize
        if self._kind is Dense or changed or any(map(has_hooks, (self, *self.layers))):
            return None
        return len(self.layers)

    def prepared(
        self,
        z: Tensor,
        probes: Tensor | None = None,
        *,
        one_graph: bool = True,
        context: Tensor | None = None,
    ) -> Field:
        """Implement :meth:`Field.prepared <rnode_plugin.core.derivatives.Field.prepared>`.

        Everything that depends only on the weights and the ``probes`` of the solve is computed here once, with its
        graph. Do not use the result after the weights have changed. A subclass that overrides :meth:`linearize` is
        not prepared. If it overrides :meth:`forward` alone, automatic differentiation computes the products.
        """
        if not one_graph or type(self).linearize is not StackField.linearize:
            return self if context is None else AtContext(self, context)
        return self._of_one_graph(z, probes, context)

    def linearize(
        self,
        t: Tensor | float,
        z: Tensor,
        probes: Tensor | None = None,
        wants: frozenset[str] = VELOCITY,
        *,
        context: Tensor | None = None,
    ) -> Linearization:
        """Implement :meth:`Field.linearize <rnode_plugin.core.derivatives.Field.linearize>`."""
        t = t if isinstance(t, Tensor) else z.new_tensor(t)
        return self._of_one_graph(z, None, context).linearize(t, z, probes, wants)

    def traceable(self) -> Field:
        """Implement :meth:`Field.traceable <rnode_plugin.core.derivatives.Field.traceable>`.

        A solve that is not differentiated through its steps evaluates the field itself, by automatic
        differentiation.
        """
        return AutogradField(self, captured=True) if type(self).linearize is StackField.linearize else self

    def layout(self, x: Tensor) -> Tensor:
        """``x (B, *event)`` in the memory layout in which this field is fast and returns its velocity."""
        return self._kind.layout(x)

    def forward(self, t: Tensor | float, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Velocity ``(B, *event)`` at time ``t``, a scalar, and state ``z (B, *event)``."""
        if not any(map(has_hooks, self.layers)):
            return self._stack(z, context=context)(t, z)
        x = z if context is None else torch.cat([z, context.to(z.dtype)], 1)
        *layers, last = self.layers
        for layer in layers:
            x = self._activation.value(layer(t, x))
        return last(t, x).to(z.dtype)

    def extra_repr(self) -> str:
        return f"activation={self._activation.name!r}"

    def _of_one_graph(self, z: Tensor, noise: Tensor | None, context: Tensor | None) -> Field:
        if type(self).forward is not StackField.forward or any(map(has_hooks, (self, *self.layers))):
            return AutogradField(lambda t, z: self(t, z, context))
        # a penalty may differentiate with respect to the state, through tensors that are made here
        with outside_inference():
            return self._stack(z, noise=noise, context=context)

    def _stack(self, z: Tensor, **options: Any) -> Stack:
        layers: list[Any] = list(self.layers)
        parameters = [(*self._kind.split(layer.weight), layer.bias) for layer in layers]
        return Stack(self._kind, self._activation, parameters, z, **options)


class AtContext(nn.Module, Field):
    """A stack field ``f(t, z, context)`` on flat states ``(B, D)``, with its ``context (B, C)`` fixed."""

    def __init__(self, field: StackField, context: Tensor) -> None:
        super().__init__()
        self.field, self._context = field, context

    def inputs(self) -> Sequence[Tensor]:
        """The context, if it requires a gradient."""
        return (self._context,) if self._context.requires_grad else ()

    def prepared(self, z: Tensor, probes: Tensor | None = None, *, one_graph: bool = True) -> Field:
        """Call :meth:`StackField.prepared` with the context."""
        return self.field.prepared(z, probes, one_graph=one_graph, context=self._context)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """Velocity ``(B, D)``."""
        return self.field(t, z, self._context)

    def traceable(self) -> Field:
        """As :meth:`StackField.traceable`."""
        return AutogradField(self, captured=True) if type(self.field).linearize is StackField.linearize else self

    def linearize(
        self,
        t: Tensor | float,
        z: Tensor,
        probes: Tensor | None = None,
        wants: frozenset[str] = VELOCITY,
    ) -> Linearization:
        """Implement :meth:`~rnode_plugin.core.derivatives.Field.linearize`, with respect to ``z``."""
        return self.field.linearize(t, z, probes, wants, context=self._context)


def conv_field(channels: int, *, hidden: int = 64, layers: int = 4, activation: str = "softplus") -> StackField:
    """Make the paper's field for images ``(B, channels, H, W)``: 3x3 convolutions that also take time (section 6).

    The weight and the bias of the last layer are zero, so f = 0.

    Args:
        channels: number of channels of the image.
        hidden: number of channels between the layers.
        layers: number of layers.
        activation: as for :class:`StackField`.

    Raises:
        ConfigError: for a number below 1 or an unknown activation.
    """
    return _build(ConcatConv2d, channels, hidden, layers, activation)


def linear_field(
    features: int,
    *,
    hidden: int = 64,
    layers: int = 3,
    activation: str = "softplus",
    context: int = 0,
) -> StackField:
    """Make a multilayer perceptron as a field on flat states ``(B, features)``. Each layer also takes the time.

    The weight and the bias of the last layer are zero, so f = 0.

    Args:
        features: number of dimensions D of one sample.
        hidden: width of the hidden layers.
        layers: number of linear layers, the last one included.
        activation: the function between the layers, such as ``"softplus"`` or ``"tanh"``.
        context: number of further inputs of the first layer; see :class:`AtContext`.

    Raises:
        ConfigError: for a size below 1 or an unknown activation.
    """
    return _build(ConcatLinear, features, hidden, layers, activation, context)


def _build(
    layer: type[ConcatConv2d] | type[ConcatLinear],
    size: int,
    hidden: int,
    layers: int,
    activation: str,
    context: int = 0,
) -> StackField:
    for name, value in (("size", size), ("hidden", hidden), ("layers", layers)):
        check_count(value, f"a field's {name}")
    sizes = [size + context, *[hidden] * (layers - 1), size]
    stack = [layer(i, o) for i, o in pairwise(sizes)]
    # f = 0, so that a fresh flow is the identity and costs a solver nothing (the paper's section 6)
    nn.init.zeros_(stack[-1].weight)
    nn.init.zeros_(stack[-1].bias)
    return StackField(stack, activation=activation)
