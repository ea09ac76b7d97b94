"""Vector fields that are stacks of layers with time as an input, as in FFJORD and RNODE."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.derivatives import VELOCITY, Ask, AutogradField, Field, Linearization, trace_of_rows, unit_vectors
from ..core.ops import check_count, exporting
from ..errors import ConfigError
from .activations import get_activation
from .fused import Stack, linearize, pull_noise, run_stack
from .layers import LINEAR, ConcatConv2d, ConcatLinear, Products


class StackField(nn.Module):
    """``f(t, z)``: layers with an activation between them; a plain module for automatic differentiation.

    Args:
        layers: ``ConcatConv2d`` or ``ConcatLinear``, all of one kind.
        activation: ``"softplus"``, ``"tanh"``, ``"elu"``, ``"silu"`` or ``"gelu"``.

    If the first layer takes more than the last one gives, the field is one of ``z`` and a context; see
    :class:`AtContext`.

    The layers keep the weights that they come with; :func:`conv_field` and :func:`linear_field` start from f = 0.
    Under ``torch.autocast`` the layers compute in its dtype; the result has the state's.

    Raises:
        ConfigError: for another kind of layer or an unknown activation.
    """

    def __init__(self, layers: Iterable[nn.Module], *, activation: str = "softplus") -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._activation = get_activation(activation)
        kinds: set[Any] = {getattr(layer, "products", None) for layer in self.layers}
        if len(kinds) != 1 or None in kinds:
            raise ConfigError("a stack needs ConcatConv2d or ConcatLinear layers, all of one kind.")
        self._products: Products = kinds.pop()

    def prepare(self, z: Tensor, noise: Tensor | None = None, *, context: Tensor | None = None) -> Field:
        """This field for the evaluations of one solve, from a state like ``z (B, *event)``.

        All that depends only on the weights and the ``noise`` of the solve is computed here, once, with its graph;
        do not keep the result for longer than the weights.
        """
        return AutogradField(PreparedStack(self._stack(z), context=context))

    def layout(self, x: Tensor) -> Tensor:
        """``x (B, *event)`` in the memory layout in which this field is fast, and in which its velocity comes."""
        return self._products.layout(x)

    def forward(self, t: Tensor | float, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Velocity ``(B, *event)`` at time ``t``, a scalar, and state ``z (B, *event)``."""
        # in operations that autograd and torch.func know
        return PreparedStack(self._stack(z), context=context)(t, z)

    def extra_repr(self) -> str:
        return f"activation={self._activation.name!r}"

    def _stack(self, z: Tensor, **options: bool) -> Stack:
        layers = cast("list[ConcatConv2d]", list(self.layers))
        parameters = [(*self._products.split(layer.weight), layer.bias) for layer in layers]
        return Stack.make(self._products, self._activation, parameters, z, **options)


class FusedStackField(StackField):
    """A :class:`StackField` with products and derivatives of its own; same parameters, same numbers.

    It is a :class:`~rnode_plugin.core.derivatives.Field`: the velocity, products with the Jacobian and derivatives
    along directions come from one pass with a backward by hand. First-order gradients of all of them with respect
    to time, state, noise and parameters cost no double backward. With ``create_graph=True`` they are computed again
    by automatic differentiation, so that they can be differentiated in turn.
    """

    compiled = False
    """Whether evaluations in training mode go through torch.compile."""

    def prepare(self, z: Tensor, noise: Tensor | None = None, *, context: Tensor | None = None) -> PreparedStack:
        # not where shapes come and go, as in validation and sampling: each would be compiled again
        fast = not exporting()  # a program has no backward pass
        stack = self._stack(z, fast=fast, compiled=self.compiled and self.training)
        return PreparedStack(stack, noise, context=context)

    def linearize(
        self,
        t: Tensor | float,
        z: Tensor,
        noise: Tensor | None = None,
        *,
        ask: Ask = VELOCITY,
        context: Tensor | None = None,
    ) -> Linearization:
        """As :meth:`Field.linearize <rnode_plugin.core.derivatives.Field.linearize>`."""
        return self.prepare(z, context=context).linearize(t, z, noise, ask=ask)


class PreparedStack:
    """A stack with the weights of the moment, as the field of one solve; see :meth:`StackField.prepare`.

    Another noise than the one given takes longer. ``context (B, C)`` is that of a stack made for one; products and
    derivatives are those by ``z`` alone.
    """

    def __init__(self, stack: Stack, noise: Tensor | None = None, *, context: Tensor | None = None) -> None:
        self._stack, self._context = stack, context
        self._flat = stack.products is LINEAR
        several = noise is not None and noise.ndim > 2 + len(stack.event)
        self._noise = None if several and not self._flat else noise
        self._pulled = None if self._noise is None else self._pull(self._noise)

    def __call__(self, t: Tensor | float, z: Tensor) -> Tensor:
        """Velocity ``(B, *event)``, in operations that autograd and ``torch.func`` know."""
        return run_stack(self._stack, t, self._with_context(z))

    def linearize(
        self, t: Tensor | float, z: Tensor, noise: Tensor | None = None, *, ask: Ask = VELOCITY
    ) -> Linearization:
        """As :meth:`Field.linearize <rnode_plugin.core.derivatives.Field.linearize>`."""
        rows = ask.products == "rows" or ask.divergence
        if rows and not self._flat:
            noise = unit_vectors(z).expand(-1, *z.shape)
        if not self._flat and noise is not None and noise.ndim > z.ndim:
            return self._several(t, z, noise, ask)
        pulled = None
        if rows:
            pulled = self._stack.weights[-1].unsqueeze(1)
        elif ask.products:
            pulled = self._pulled if noise is self._noise and self._pulled is not None else self._pull(noise)
        dz, products, jvp, _, _ = linearize(self._stack, t, self._with_context(z), pulled)
        if self._context is not None:
            products = None if products is None else products[..., : z.shape[1]]
            whole: Any = jvp
            still = torch.zeros_like(self._context)
            jvp = lambda v, dt=0.0: whole(torch.cat([v, still.to(v.dtype)], 1), dt)  # noqa: E731
        divergence = trace_of_rows(products) if ask.divergence and products is not None else None
        return Linearization(dz, products, jvp, divergence, {})

    def _several(self, t: Tensor | float, z: Tensor, vectors: Tensor, ask: Ask) -> Linearization:
        """Several products of convolutions, as one batch."""
        count, batch = len(vectors), z.shape[0]
        repeated = z.unsqueeze(0).expand(count, *z.shape).flatten(0, 1)
        dz, products = linearize(self._stack, t, repeated, self._pull(vectors.flatten(0, 1)))[:2]
        assert products is not None
        rows = products.unflatten(0, (count, batch))
        jvp = linearize(self._stack, t, z).jvp if ask.jvp else None
        return Linearization(dz[:batch], rows, jvp, trace_of_rows(rows) if ask.divergence else None, {})

    def _with_context(self, z: Tensor) -> Tensor:
        return z if self._context is None else torch.cat([z, self._context.to(z.dtype)], 1)

    def _pull(self, noise: Tensor | None) -> Tensor:
        assert noise is not None
        return pull_noise(self._stack, noise)


class AtContext(nn.Module):
    """A field ``f(t, z, context)`` of flat states ``(B, D)`` at one ``context (B, C)`` for each sample.

    The field has ``linearize(..., context=)``.
    """

    def __init__(self, field: nn.Module, context: Tensor) -> None:
        super().__init__()
        self.field: Any = field
        self._context = context

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        """What a continuous adjoint differentiates by: the context too, if it has a graph."""
        yield from super().parameters(recurse)
        if self._context.requires_grad:
            yield self._context

    def prepare(self, z: Tensor, noise: Tensor | None = None) -> Field:
        """As :meth:`StackField.prepare`, for a stack; another field as it is."""
        if isinstance(self.field, StackField):
            return self.field.prepare(z, noise, context=self._context)
        return self

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """Velocity ``(B, D)``."""
        return self.field(t, z, self._context)

    def linearize(self, t: Tensor, z: Tensor, noise: Tensor | None = None, *, ask: Ask = VELOCITY) -> Linearization:
        """As :meth:`~rnode_plugin.core.derivatives.Field.linearize`; products are those by ``z``."""
        return self.field.linearize(t, z, noise, ask=ask, context=self._context)


def conv_field(
    channels: int, *, hidden: int = 64, layers: int = 4, activation: str = "softplus", fused: bool = True
) -> StackField:
    """The paper's field (section 6) of images ``(B, channels, H, W)``: 3x3 convolutions that take the time too.

    The weight and the bias of the last layer are zero, so f = 0.

    Args:
        channels: channels of the image.
        hidden: channels between the layers.
        layers: number of layers.
        activation: as for :class:`StackField`.
        fused: whether the field brings its own product (fast) or leaves it to automatic differentiation.

    Raises:
        ConfigError: for a number below 1 or an unknown activation.
    """
    return _build(ConcatConv2d, channels, hidden, layers, activation, fused)


def linear_field(
    features: int,
    *,
    hidden: int = 64,
    layers: int = 3,
    activation: str = "softplus",
    fused: bool = True,
    context: int = 0,
) -> StackField:
    """A multilayer perceptron as the field of flat states ``(B, features)``; each layer takes the time too.

    Args:
        features: dimensions D of one sample.
        hidden: width of the hidden layers.
        layers: linear layers, the last one included.
        activation: between them, such as ``"softplus"`` or ``"tanh"``.
        fused: whether evaluations and their products take one pass with a backward by hand.
        context: numbers that the first layer takes besides; see :class:`AtContext`.

    Raises:
        ConfigError: for a size below 1 or an unknown activation.
    """
    return _build(ConcatLinear, features, hidden, layers, activation, fused, context)


def compile_fields(model: nn.Module) -> int:
    """Send the evaluations of all fused fields of a model through torch.compile while it is in training mode.

    Returns:
        The number of these fields.
    """
    fields = [each for each in model.modules() if isinstance(each, FusedStackField)]
    for field in fields:
        field.compiled = True
    return len(fields)


def _build(
    layer: type[ConcatConv2d] | type[ConcatLinear],
    size: int,
    hidden: int,
    layers: int,
    activation: str,
    fused: bool,
    context: int = 0,
) -> StackField:
    for name, value in (("size", size), ("hidden", hidden), ("layers", layers)):
        check_count(value, f"a field's {name}")
    sizes = [size + context, *[hidden] * (layers - 1), size]
    stack = [layer(i, o) for i, o in pairwise(sizes)]
    # f = 0, so that a fresh flow is the identity and costs a solver nothing (the paper's section 6)
    nn.init.zeros_(stack[-1].weight)
    nn.init.zeros_(stack[-1].bias)
    return (FusedStackField if fused else StackField)(stack, activation=activation)
