"""Vector fields that are stacks of layers with time as an input, as in FFJORD and RNODE."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import cast

from torch import Tensor, nn

from ..core.tensors.exporting import exporting
from ..errors import ConfigError
from ..types import Linearization
from .activations import get_activation
from .autocast import compute_dtype, without_autocast
from .layers import LINEAR, ConcatConv2d, ConcatLinear, Products
from .passes.fused import linearize, pull_noise, run_fused, run_velocity
from .prepared import Stack, run_stack

__all__ = ["FusedStackField", "StackField", "compile_fields", "conv_field", "linear_field"]


class StackField(nn.Module):
    """``f(t, z)``: layers with an activation between them; a plain module for automatic differentiation.

    Args:
        layers: ``ConcatConv2d`` or ``ConcatLinear``, all of one kind, the last one's outputs as many as the first
            one's inputs.
        activation: ``"softplus"``, ``"tanh"``, ``"elu"``, ``"silu"`` or ``"gelu"``.
        context: inputs of the first layer behind those of the state; such a field is one of ``z`` and a context,
            see :mod:`~rnode_plugin.fields.conditional`.

    The layers keep the weights that they come with; :func:`conv_field` and :func:`linear_field` start from f = 0.
    Under ``torch.autocast`` the layers compute in its dtype; the result has the state's.

    Raises:
        ConfigError: for another kind of layer, sizes that do not fit or an unknown activation.
    """

    def __init__(self, layers: Iterable[nn.Module], *, activation: str = "softplus", context: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._activation = get_activation(activation)
        self._products = _one_kind(self.layers, context)

    def prepare(self, z: Tensor, noise: Tensor | None = None) -> PreparedStack:
        """This field for the evaluations of one solve, from a state like ``z (B, *event)``.

        What depends on the weights and the ``noise`` of the solve alone is computed here, once, with its graph; do
        not keep the result for longer than the weights.
        """
        return PreparedStack(self._stack(z))

    def layout(self, x: Tensor) -> Tensor:
        """``x (B, *event)`` in the memory layout in which this field is fast, and in which its velocity comes."""
        return self._products.layout(x)

    def forward(self, t: Tensor | float, z: Tensor) -> Tensor:
        """Velocity ``(B, *event)`` at time ``t``, a scalar, and state ``z (B, *event)``."""
        return self.prepare(z)(t, z)

    def extra_repr(self) -> str:
        return f"activation={self._activation.name!r}"

    def _stack(self, z: Tensor, **options: bool) -> Stack:
        layers = cast("list[ConcatConv2d]", list(self.layers))
        dtype = compute_dtype(z)
        with without_autocast(z):
            parameters = [(*self._products.split(layer.weight), layer.bias) for layer in layers]
            return Stack.make(self._products, self._activation, dtype, parameters, z, **options)


class FusedStackField(StackField):
    """A :class:`StackField` that brings its own product with the Jacobian; same parameters, same numbers."""

    compiled = False
    """Whether evaluations in training mode go through torch.compile."""

    def prepare(self, z: Tensor, noise: Tensor | None = None) -> FusedPreparedStack:
        # not where shapes come and go, as in validation and sampling: each would be compiled again
        kind = FlatPreparedStack if self._products is LINEAR else FusedPreparedStack
        fast = not exporting()  # a program has no backward pass
        return kind(self._stack(z, fast=fast, compiled=self.compiled and self.training), noise)

    def forward(self, t: Tensor | float, z: Tensor) -> Tensor:
        # not the one with a backward by hand: somebody may transform this with torch.func
        return PreparedStack(self._stack(z))(t, z)

    def forward_and_vjp(self, t: Tensor | float, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """``(f(t, z), noise^T df/dz)``, both ``(B, *event)``, from one pass with a backward by hand.

        First-order gradients of both with respect to time, state, noise and parameters cost no double backward.
        With ``create_graph=True`` they are computed again by automatic differentiation, so that they can be
        differentiated in turn.
        """
        return self.prepare(z).forward_and_vjp(t, z, noise)

    def forward_and_jvp(
        self, t: Tensor | float, z: Tensor, v: Tensor, dt: Tensor | float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """``(f(t, z), df/dz v + df/dt dt)``, both ``(B, *event)``, from one pass.

        Args:
            t, z: as for :meth:`forward`.
            v: direction, of the shape of ``z``.
            dt: tangent of time, a scalar.
        """
        return self.prepare(z).forward_and_jvp(t, z, v, dt)

    def linearize(self, t: Tensor | float, z: Tensor, noise: Tensor | None = None) -> Linearization:
        """The velocity, ``noise^T df/dz``, and any number of products along directions, from one pass.

        First-order gradients of all of them cost no double backward, also where a direction is the velocity itself.
        """
        return self.prepare(z).linearize(t, z, noise)


class PreparedStack:
    """A :class:`StackField` with the weights of the moment; see :meth:`StackField.prepare`."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack

    def __call__(self, t: Tensor | float, z: Tensor) -> Tensor:
        """Velocity ``(B, *event)``."""
        with without_autocast(z):
            return run_stack(self._stack, t, z)


class FusedPreparedStack(PreparedStack):
    """A :class:`FusedStackField` with the weights of the moment, and ready for the products with one ``noise``."""

    def __init__(self, stack: Stack, noise: Tensor | None = None) -> None:
        super().__init__(stack)
        self._noise = noise
        self._pulled = None if noise is None else self._pull(noise)

    def __call__(self, t: Tensor | float, z: Tensor) -> Tensor:
        return run_velocity(self._stack, t, z)

    @property
    def plain_path(self) -> PreparedStack:
        """The same field in operations that autograd knows, as often differentiable as one likes."""
        return PreparedStack(self._stack)

    def forward_and_vjp(self, t: Tensor | float, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`FusedStackField.forward_and_vjp`; another noise than the one prepared for takes longer."""
        return run_fused(self._stack, t, z, self._pulled_for(noise))

    def forward_and_jvp(
        self, t: Tensor | float, z: Tensor, v: Tensor, dt: Tensor | float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`FusedStackField.forward_and_jvp`."""
        found = linearize(self._stack, t, z)
        return found.dz, found.jvp(v, dt)  # pyright: ignore[reportArgumentType]

    def linearize(self, t: Tensor | float, z: Tensor, noise: Tensor | None = None) -> Linearization:
        """As :meth:`FusedStackField.linearize`; another noise than the one prepared for takes longer."""
        return linearize(self._stack, t, z, None if noise is None else self._pulled_for(noise))

    def _pulled_for(self, noise: Tensor) -> Tensor:
        return self._pulled if noise is self._noise and self._pulled is not None else self._pull(noise)

    def _pull(self, noise: Tensor) -> Tensor:
        with without_autocast(noise):
            return pull_noise(self._stack, noise)


class FlatPreparedStack(FusedPreparedStack):
    """The same for flat states ``z (B, D)``, with the whole Jacobian."""

    def forward_and_jacobian(self, t: Tensor | float, z: Tensor) -> tuple[Tensor, Tensor]:
        """``f(t, z)`` and all rows of ``df/dz``, ``(D, B, D)``, from one pass."""
        return run_fused(self._stack, t, z, self._stack.last_weight.unsqueeze(1))

    def linearize_with_jacobian(self, t: Tensor | float, z: Tensor) -> Linearization:
        """As :meth:`linearize`, with all rows of ``df/dz``, ``(D, B, D)``, as its products."""
        return linearize(self._stack, t, z, self._stack.last_weight.unsqueeze(1))


def conv_field(
    channels: int, *, hidden: int = 64, layers: int = 4, activation: str = "softplus", fused: bool = True
) -> StackField:
    """The paper's field for images ``(B, channels, H, W)``: 3x3 convolutions, ``hidden`` channels between them.

    The weight and the bias of the last layer are zero, so f = 0.

    Args:
        channels: channels of the image.
        hidden: channels between the layers.
        layers: number of layers.
        activation: as for :class:`StackField`.
        fused: whether the field brings its own product (fast) or leaves it to automatic differentiation.
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
    """A multilayer perceptron as the field of flat states ``(B, features)``; arguments as for the images'.

    With a ``context`` the first layer takes so many numbers more; see :mod:`~rnode_plugin.fields.conditional`.
    """
    return _build(ConcatLinear, features, hidden, layers, activation, fused, context)


def compile_fields(model: nn.Module) -> int:
    """Send the evaluations of all fused fields of a model through torch.compile, as long as it is in training mode.

    Where torch.compile fails, one line says so and all goes on as before.

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
        if value < 1:
            raise ConfigError(f"a field's {name} must be at least 1, got {value}.")
    sizes = [size + context, *[hidden] * (layers - 1), size]
    stack = [layer(i, o) for i, o in pairwise(sizes)]
    # f = 0, so that a fresh flow is the identity and costs a solver nothing (the paper's section 6)
    nn.init.zeros_(stack[-1].weight)
    nn.init.zeros_(stack[-1].bias)
    return (FusedStackField if fused else StackField)(stack, activation=activation, context=context)


def _one_kind(layers: nn.ModuleList, context: int) -> Products:
    kinds = {type(layer) for layer in layers}
    if len(kinds) != 1 or not issubclass(kinds.copy().pop(), (ConcatConv2d, ConcatLinear)):
        found = ", ".join(sorted(kind.__name__ for kind in kinds)) or "none"
        raise ConfigError(f"a stack needs ConcatConv2d or ConcatLinear layers, all of one kind; got {found}.")
    stack = cast("list[ConcatConv2d]", list(layers))
    for k, layer in enumerate(stack):
        follows = stack[(k + 1) % len(stack)]
        behind = context if follows is stack[0] else 0
        if layer.weight.shape[0] + behind != follows.weight.shape[1] - 1:
            raise ConfigError(
                f"layer {k} of the stack has {layer.weight.shape[0]} outputs, but layer {(k + 1) % len(stack)} "
                f"takes {follows.weight.shape[1] - 1} inputs besides time."
            )
    return stack[0].products
