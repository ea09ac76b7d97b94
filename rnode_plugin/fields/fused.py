"""A stack of layers prepared for one solve: its velocity and Jacobian products, with a hand-written backward pass.

The layers are ``a_k = W_k u_{k-1} + b_k + t r_k`` with activations ``u_k = s(a_k)``, ``u_0 = z`` and ``f = a_L``.
The product ``e^T df/dz`` runs backward through the stack: ``g_{L-1} = W_L^T e``, which is the same in a whole
solve, then ``v_k = s'(a_k) g_k`` and ``g_{k-1} = W_k^T v_k``. It ends as ``g_0``. Several noise vectors at once,
for the whole Jacobian, form a dimension in front of the batch.

Given cotangents D of the velocity and P of the product, two sweeps compute the gradients. The upward sweep is the
transpose of the product: ``h_0 = P``, ``p_k = W_k h_{k-1}``, ``h_k = s'(a_k) p_k``. It gives ``s''(a_k) g_k p_k``,
which the product adds to the cotangent of ``a_k``, and ``h_{L-1}``, the cotangent of ``g_{L-1}``. The downward
sweep is ordinary backpropagation from D, which picks these up.

An evaluation keeps one tensor per activation (:class:`~.activations.Activation`), and with a product one more for
each activation except the last. The velocity and its gradient take three times the convolutions of a forward pass,
and each product takes as many more, without a double backward. Gradients that are to be differentiated again, and
derivatives along a direction, are computed by automatic differentiation.

All parameters of a stack lie in one row, ``theta``, so that the evaluations of a solve accumulate a single
gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.derivatives import VELOCITY, Ask, AutogradField, Checked, Linearization, trace_of_rows, unit_vectors
from ..core.modes import autocasts, traced
from ..errors import CompilerError, ConfigError
from .activations import Activation
from .kernels import Dense, LayerMap


class Stack:
    """A stack as the field of one solve, for states of one shape, with the current weights.

    It is a :class:`~rnode_plugin.core.derivatives.Field`. Work that depends only on the weights is done once here
    and reused by every evaluation. It is part of the autograd graph. A ``Stack`` belongs to one solve; make a new
    one after each optimizer step. Products with any other noise vector work but are slower. Automatic
    differentiation computes all of an evaluation that takes derivatives along directions. Products and derivatives
    are taken with respect to ``z`` alone, not to the context.

    Args:
        kind: the class of the layers.
        activation: the function between the layers.
        layers: each layer's weight of time, weight of the state, and bias; None if it has none.
        z: a state. The layers compute in autocast's dtype if it is float32, else in its dtype.
        noise: the probe vectors of the solve, whose part that does not depend on the state is computed here.
        context: ``(B, C)``, for layers that take it after the state.
        fast: whether evaluations use the hand-written backward pass.
        compiled: whether evaluations go through torch.compile, which derives their backward pass.
    """

    def __init__(
        self,
        kind: type[LayerMap],
        activation: Activation,
        layers: Sequence[tuple[Tensor | None, Tensor, Tensor | None]],
        z: Tensor,
        *,
        noise: Tensor | None = None,
        context: Tensor | None = None,
        fast: bool = False,
        compiled: bool = False,
    ) -> None:
        self.kind, self.activation, self.event = kind, activation, tuple(z.shape[2:])
        if len(self.event) != (0 if kind is Dense else 2):
            takes = "linear layers takes (B, D)" if kind is Dense else "convolutions takes (B, C, H, W)"
            raise ConfigError(f"a field of {takes} as a state, not {tuple(z.shape)}.")
        self._context, self._compiled = context, compiled
        self.dtype = z.dtype
        if z.dtype is torch.float32 and autocasts(z):
            self.dtype = torch.get_autocast_dtype(z.device.type)
        self._timed = any(time is not None for time, _, _ in layers)
        rows = list[Tensor]()
        with _without_autocast(z):
            for time, weight, bias in layers:
                time = weight.new_zeros(weight.shape[0], 1, *weight.shape[2:]) if time is None else time
                bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
                rows.append(kind.shift_rows(time, bias, self.event))
        # one row for all layers, so that one addcmul adds t times the response of all of them
        both = torch.cat(rows, 1)
        flat = [kind.flat(weight) for _, weight, _ in layers]
        self.theta = torch.cat([(both if self._timed else both[0]).reshape(-1), *flat])
        self.shapes = [weight.shape for _, weight, _ in layers]
        self.hidden = len(layers) - 1  # the number of activations
        self.start = both.shape[1] * (1 + self._timed)  # where the weights begin in theta, after bias and response
        self._sizes = [both.shape[1]] * (1 + self._timed) + [each.numel() for each in flat]
        self._last = kind.unflat(flat[-1], self.shapes[-1])
        self._plain = self.layers_of(self.theta) if compiled else None
        self.fast: Layers | None = None
        if fast:
            # detached: the hand-written nodes take theta as an input and return its gradient themselves
            bias, response, weights = self._pieces(self.theta.detach())
            maps = [kind.prepared(weight.to(self.dtype)) for weight in weights]
            self.fast = Layers(maps, bias, response)
        # several noises of convolutions are evaluated as one larger batch, see _several
        several = noise is not None and noise.ndim > 2 + len(self.event)
        self._noise = None if several and kind is not Dense else noise
        self._pulled = None if self._noise is None else self._pull(self._noise)

    @property
    def plain(self) -> Layers:
        """The layers, in operations that record a graph."""
        if self._plain is None:  # not cached_property, whose lock torch.compile cannot trace
            layers = self.layers_of(self.theta)
            if self.theta.requires_grad and not torch.is_grad_enabled():
                return layers  # without a graph to theta, which a later call may need
            self._plain = layers
        return self._plain

    def layers_of(self, theta: Tensor) -> Layers:
        """The layers with parameters ``theta``, in operations that autograd and torch.func can differentiate."""
        bias, response, weights = self._pieces(theta)
        maps = [_PlainMap(self.kind, weight.to(self.dtype)) for weight in weights]
        return Layers(maps, bias, response)

    def maps_of(self, row: Tensor) -> list[Tensor]:
        """Cut a row into what it adds to the pre-activations of each layer, ``(1, out, ...)``, as views."""
        pixels = torch.Size(self.event).numel()
        outputs = [shape[0] for shape in self.shapes]
        rows = row.to(self.dtype).split([n * pixels for n in outputs])
        return [self.kind.as_map(r, n, self.event) for r, n in zip(rows, outputs, strict=True)]

    def enter(self, x: Tensor) -> Tensor:
        """``x (B, *event)`` in the dtype and the memory layout in which the layers compute."""
        return self.kind.layout(x.to(self.dtype))

    def __call__(self, t: Tensor | float, z: Tensor) -> Tensor:
        """The velocity ``(B, *event)``, differentiable any number of times."""
        z = self._with_context(z)
        return _plain(self, _as_time(t, z), z, None)[0]

    def linearize(
        self, t: Tensor | float, z: Tensor, noise: Tensor | None = None, *, ask: Ask = VELOCITY
    ) -> Linearization:
        """Implement :meth:`Field.linearize <rnode_plugin.core.derivatives.Field.linearize>`."""
        t = _as_time(t, z)
        if ask.jvp:
            # samples stay apart in these layers, and torch can differentiate them three times
            checked = Checked(samples_are_apart=True, twice_differentiable=True, third_derivative="")
            return AutogradField(self, checked=checked).linearize(t, z, noise, ask=ask)
        if ask.products == "noise" and ask.divergence:  # one pass for the products, one for the rows
            products = self.linearize(t, z, noise, ask=Ask("noise")).products
            return self.linearize(t, z, ask=ask._replace(products=""))._replace(products=products)
        flat, rows = self.kind is Dense, ask.products == "rows" or ask.divergence
        if rows and not flat:
            noise = unit_vectors(z).expand(-1, *z.shape)
        if not flat and noise is not None and noise.ndim > z.ndim:
            return self._several(t, z, noise, ask)
        pulled = None
        if rows:  # W_L^T e for the unit vectors e: the rows of W_L, the same for all samples
            pulled = self._last.unsqueeze(1)
        elif ask.products:
            assert noise is not None
            pulled = self._pulled if noise is self._noise and self._pulled is not None else self._pull(noise)
        dz, products = self._pass(t, self._with_context(z), pulled)
        if self._context is not None and products is not None:
            products = products[..., : z.shape[1]]  # the layers see the context as more columns of the state
        divergence = trace_of_rows(products) if ask.divergence and products is not None else None
        return Linearization(dz, products, None, divergence)

    def _several(self, t: Tensor, z: Tensor, vectors: Tensor, ask: Ask) -> Linearization:
        """Several products of convolutions, computed as one batch, since a convolution has one batch dimension."""
        count, batch = len(vectors), z.shape[0]
        repeated = z.unsqueeze(0).expand(count, *z.shape).flatten(0, 1)
        dz, products = self._pass(t, repeated, self._pull(vectors.flatten(0, 1)))
        assert products is not None
        rows = products.unflatten(0, (count, batch))
        return Linearization(dz[:batch], rows, None, trace_of_rows(rows) if ask.divergence else None)

    def _pass(self, t: Tensor, z: Tensor, pulled: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The velocity and its products with noise, whose first-order gradients cost no double backward.

        ``pulled`` is what :meth:`_pull` gives for the noise. With ``(K, B, ...)`` or ``(K, 1, ...)`` for linear
        layers there are K products, ``(K, B, ...)``.
        """
        # the product of a single layer does not depend on the state, so the hand-written pass has nothing to do
        if self.fast is None or (pulled is not None and not self.hidden) or traced():
            return _plain(self, t, z, pulled)
        if self._compiled:
            return _run_compiled(self, t, z, pulled)
        outputs: Any = _Evaluation.apply(self, t, z, pulled, self.theta)
        return outputs

    def _pull(self, noise: Tensor) -> Tensor:
        """``W_L^T noise``, from which products start. It is the same at all times of a solve.

        It has the dtype of the noise, not of the layers, because the gradients of many evaluations accumulate in
        it.
        """
        with _without_autocast(noise):
            pulled = self.kind.transposed(self.enter(noise), self._last.to(self.dtype))
            return self.kind.layout(pulled).to(noise.dtype)

    def _with_context(self, z: Tensor) -> Tensor:
        return z if self._context is None else torch.cat([z, self._context.to(z.dtype)], 1)

    def _pieces(self, theta: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Biases of all layers, what a unit of time adds to them (None without time), and weights, as views."""
        bias, *rest = theta.split(self._sizes)
        response = rest.pop(0) if self._timed else None
        return bias, response, [self.kind.unflat(row, shape) for row, shape in zip(rest, self.shapes, strict=True)]


@dataclass(frozen=True)
class _PlainMap:
    """A layer in operations that record a graph."""

    kind: type[LayerMap]
    weight: Tensor

    def apply(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        y = self.kind.product(x, self.weight)
        return y if shift is None else y + shift

    def transpose(self, v: Tensor) -> Tensor:
        return self.kind.transposed(v, self.weight)


class Layers(NamedTuple):
    """The linear maps of a stack, and what is added to their outputs.

    Attributes:
        maps: the maps.
        bias: the biases of all layers, concatenated to one row.
        response: how much a unit of time adds to each bias, as a row of the same kind; None if no layer takes time.
    """

    maps: Sequence[Any]
    bias: Tensor
    response: Tensor | None


def _without_autocast(z: Tensor) -> AbstractContextManager[object]:
    """Context without autocast on the device of ``z``, for code that chooses its dtypes itself."""
    return torch.autocast(z.device.type, enabled=False) if autocasts(z) else nullcontext()


def _as_time(t: Tensor | float, z: Tensor) -> Tensor:
    if not isinstance(t, Tensor):
        return z.new_tensor(t)
    if t.numel() != 1:  # one time per sample would be broadcast along the units of the layers
        raise ConfigError(f"this field takes one time for all samples, not times of shape {tuple(t.shape)}.")
    return t


def _plain(stack: Stack, t: Tensor, z: Tensor, pulled: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Velocity and product, in operations that autograd and torch.func can differentiate."""
    with _without_autocast(z):
        a, kept = _velocity(stack, stack.plain, t, z)
        if pulled is None:
            return a.to(z.dtype), None
        product = _product(stack, stack.plain, kept, pulled)[0].to(z.dtype)
        return a.to(z.dtype), product.expand(*pulled.shape[: pulled.dim() - z.dim()], *z.shape)


def _run_compiled(stack: Stack, t: Tensor, z: Tensor, pulled: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """:func:`_plain`, compiled once for each shape."""
    from torch._dynamo.config import patch
    from torch._dynamo.exc import TorchDynamoException

    try:
        with patch(cache_size_limit=64):  # one entry for each shape and kind of evaluation
            return _compiler()(stack, t, z, pulled)
    except TorchDynamoException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if "Error" in line or "ompiler" in line), type(error).__name__)
        raise CompilerError(f"torch.compile does not work here: {reason.rstrip('.')}. Train without it.") from error


@cache
def _compiler() -> Callable[..., Any]:
    return torch.compile(_plain, dynamic=False, fullgraph=True)


# the two sweeps forward -----------------------------------------------------------------------------------------


def _velocity(
    stack: Stack, layers: Layers, t: Tensor, z: Tensor, pre: list[Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The velocity and what is kept of each activation. If ``pre`` is given, pre-activations are appended to it."""
    (maps, bias, response), activation = layers, stack.activation
    row = bias if response is None else torch.addcmul(bias, response, t.to(bias.dtype))
    u, shifts = stack.enter(z), stack.maps_of(row)
    kept: list[Tensor] = []  # torch.compile cannot trace list[Tensor]()
    for layer, shift in zip(maps[:-1], shifts[:-1], strict=True):
        a = layer.apply(u, shift)
        u = activation.value(a)
        kept.append(u if activation.keeps_output else a)
        if pre is not None:
            pre.append(a)
    return maps[-1].apply(u, shifts[-1]), kept


def _product(
    stack: Stack, layers: Layers, kept: Sequence[Tensor], pulled: Tensor, pre: list[Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The product with the Jacobian, and the cotangents ``g_k`` of all activations except the last, ``pulled``.

    Without a graph it may be given the pre-activations ``pre``, whose memory it overwrites.
    """
    activation, g, cotangents = stack.activation, pulled.to(stack.dtype), []
    for layer, c in zip(layers.maps[-2::-1], kept[::-1], strict=True):
        cotangents.append(g)
        v = activation.times_slope_at(g, pre.pop(), c) if pre else activation.times_slope(g, c)
        g = layer.transpose(v)
    return g, cotangents[:0:-1]


# their graph node -----------------------------------------------------------------------------------------------


class _Evaluation(torch.autograd.Function):
    """Velocity, and the product (None without noise)."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor | None]:
        stack, t, z, pulled, _ = ctx.stack, *tensors = args
        with _without_autocast(z):
            pre = None if pulled is None else list[Tensor]()
            a, kept = _velocity(stack, stack.fast, t, z, pre)
            product, inner = None, list[Tensor]()
            if pulled is not None:
                product, inner = _product(stack, stack.fast, kept, pulled, pre)
                product = product.to(z.dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *kept, *inner)
        return a.to(z.dtype), product

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        stack: Stack = ctx.stack
        if all(each is None for each in grad_outputs):
            return (None,) * 5
        saved = ctx.saved_tensors  # read once, because torch's checkpoint unpacks saved tensors only once
        inputs, rest = saved[:4], saved[4:]
        with _without_autocast(inputs[1]):
            if torch.is_grad_enabled():  # create_graph=True: compute again in operations that autograd records
                t, z, pulled, theta = inputs = _ends(inputs)
                layers = stack.layers_of(theta)
                a, kept = _velocity(stack, layers, t, z)
                product = None if pulled is None else _product(stack, layers, kept, pulled)[0].to(z.dtype)
                return None, *_by_autograd((a.to(z.dtype), product), grad_outputs, inputs)
            kept, inner = rest[: stack.hidden], rest[stack.hidden :]
            return None, *_pull_back(stack, inputs, ctx.needs_input_grad[1:], grad_outputs, kept, inner)


def _ends(inputs: Sequence[Tensor | None]) -> list[Any]:
    """The inputs of a node as new tensors, at which the derivatives of this node end.

    The state depends on the weights through earlier evaluations. The nodes of those add that part themselves.
    """
    # not view_as, which changes the strides of dimensions of size 1 and so the layout that a convolution sees
    return [None if x is None else x[...] for x in inputs]


def _by_autograd(
    outputs: Sequence[Tensor | None], cotangents: Sequence[Tensor | None], arguments: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Compute the gradients by automatic differentiation, for ``create_graph=True``. It is slower, with a graph."""
    pairs = zip(outputs, cotangents, strict=True)
    given = [(x, c) for x, c in pairs if x is not None and c is not None and x.requires_grad]
    inputs = [x for x in arguments if x is not None and x.requires_grad]
    if not given:  # only the time requires a gradient, and no layer takes the time
        return [None] * len(arguments)
    ends, seeds = zip(*given, strict=True)
    found = iter(torch.autograd.grad(ends, inputs, seeds, create_graph=True, allow_unused=True))
    return [None if x is None or not x.requires_grad else next(found) for x in arguments]


# the sweeps backward, without a graph ---------------------------------------------------------------------------


class _Upward(NamedTuple):
    """What the upward sweep computes at each hidden layer, and the cotangent of ``g_{L-1}`` at its end."""

    added: list[Tensor]  # s'' g p
    slopes: list[Tensor]
    gradients: list[Tensor]  # by the weights, as rows
    end: Tensor


def _pull_back(
    stack: Stack,
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    cotangents: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    inner: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """Gradients by the inputs of an evaluation, from the cotangents of velocity and product."""
    pulled, product = inputs[2], cotangents[1]
    needs_pulled, needs_theta = needs[2:]
    up = pulled_grad = None
    if product is not None:
        up = _upward(stack, stack.enter(product), kept, [*inner, pulled.to(stack.dtype)], needs_theta)
        pulled_grad = up.end.sum_to_size(pulled.shape).to(pulled.dtype) if needs_pulled else None
    t_grad, z_grad, theta_grad = _downward(stack, inputs, needs, cotangents[0], kept, up)
    # the last weight has no gradient from the product here: it enters through `pulled`, whose graph leads to it
    if theta_grad is not None and up is not None and up.gradients:
        more = torch.cat(up.gradients)
        theta_grad[stack.start :][: len(more)].add_(more)
    return t_grad, z_grad, pulled_grad, theta_grad


def _upward(
    stack: Stack, h: Tensor, kept: Sequence[Tensor], cotangents: Sequence[Tensor], weights: bool
) -> _Upward:
    """The transpose of the product, from its cotangent ``h``; ``cotangents`` are the ``g_k`` of the product."""
    assert stack.fast is not None
    activation = stack.activation
    added, slopes, gradients = list[Tensor](), list[Tensor](), list[Tensor]()
    for layer, c, g in zip(stack.fast.maps, kept, cotangents, strict=False):
        slope = activation.slope(c)
        v = slope * g
        if weights:
            gradients.append(stack.kind.flat(layer.gradient(h, v)))
        # if the output is kept, s'' is the derivative of s' by the output, times s', which v = s' g already has
        p = layer.apply(h)
        x = torch.mul(v if activation.keeps_output else g, p, out=v)
        x = x.sum(0) if x.dim() > c.dim() else x
        added.append(x.mul_(activation.slope_derivative(c, slope)))
        slopes.append(slope)
        h = p.mul_(slope)
    return _Upward(added, slopes, gradients, h)


def _downward(
    stack: Stack,
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    dz: Tensor | None,
    kept: Sequence[Tensor],
    up: _Upward | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Backpropagation from ``dz``, the cotangent of the velocity: gradients by time, state and ``theta``."""
    assert stack.fast is not None
    (t, z, *_), (needs_t, needs_z, _, needs_theta) = inputs, needs
    (maps, bias, response), activation = stack.fast, stack.activation
    q = stack.enter(z.new_zeros(len(z), stack.shapes[-1][0], *stack.event) if dz is None else dz)
    sums, gradients = list[Tensor](), list[Tensor]()
    z_grad: Tensor | None = None
    for k in range(stack.hidden, -1, -1):
        layer = maps[k]
        if needs_t or needs_theta:
            sums.append(stack.kind.sum_batch(q))
        if needs_theta:
            u = activation.output(kept[k - 1]) if k else stack.enter(z)
            gradients.append(stack.kind.flat(layer.gradient(u, q)))
        if k:
            g, c = layer.transpose(q), kept[k - 1]
            q = activation.times_slope(g, c) if up is None else up.added[k - 1].addcmul_(g, up.slopes[k - 1])
        elif needs_z:
            z_grad = layer.transpose(q).to(z.dtype)
    if not sums:
        return None, z_grad, None
    # The gradient by the response is t times the gradient by the bias. Reserve its place in the row, to be filled
    # below, since a second concatenation would copy everything.
    room = [] if response is None or not needs_theta else [response]
    grad = torch.cat([*sums[::-1], *room, *gradients[::-1]]).to(stack.theta.dtype)
    row = grad[: len(bias)]
    if room:
        torch.mul(row, t.to(row.dtype).reshape(()), out=grad[len(bias) :][: len(bias)])
    t_grad = None
    if needs_t and response is not None:
        t_grad = (row * response).sum().to(t.dtype).reshape(t.shape)
    return t_grad, z_grad, grad if needs_theta else None
