"""A stack of layers prepared for one solve: its velocity and products with its Jacobian, with a backward by hand.

With layers ``a_k = W_k u_{k-1} + b_k + t r_k``, activations ``u_k = s(a_k)``, ``u_0 = z`` and ``f = a_L``, the
product ``e^T df/dz`` runs backward through the stack: ``g_{L-1} = W_L^T e``, the same in a whole solve,
``v_k = s'(a_k) g_k``, ``g_{k-1} = W_k^T v_k``, and ends as ``g_0``. Several noises at once, for the whole Jacobian,
are a dimension in front of the batch. A product along a direction of state and time, ``df/dz v + df/dt dt``, runs
forward: ``x_0 = v``, ``y_k = W_k x_{k-1} + dt r_k``, ``x_k = s'(a_k) y_k``, and ends as ``y_L``.

Given cotangents D of the velocity and P of the product, their gradients are two sweeps. Upward, the product's own
transpose, ``h_0 = P``, ``p_k = W_k h_{k-1}``, ``h_k = s'(a_k) p_k``, with ``s''(a_k) g_k p_k`` as what the product
adds to the cotangent of ``a_k``, and ``h_{L-1}`` as the cotangent of ``g_{L-1}``. Downward, ordinary
backpropagation from D picks those up. The gradient of a product along a direction, with cotangent ``q_L``, is one
sweep downward: ``p_k = W_{k+1}^T q_{k+1}``, ``q_k = s'(a_k) p_k``, and ``s''(a_k) y_k p_k`` for ``a_k``. It goes to
what the evaluation kept of its activations, which are outputs of its graph node.

An evaluation keeps one tensor of each activation (:class:`~rnode_plugin.fields.activations.Activation`) and with a
product one more, but for the last; a product along a direction keeps one. The velocity and its gradient take three
times the convolutions of a forward pass, each product as many more, without a double backward. Gradients that are
to be differentiated again are computed by automatic differentiation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..core.derivatives import Linearization
from ..core.ops import exporting, transforms_active
from ..errors import ConfigError
from .activations import Activation
from .kernels import LayerMap
from .layers import Products


@dataclass(frozen=True, eq=False)
class Stack:
    """A stack for states of one shape, with the weights of the moment.

    It is made for one solve, with a graph that leads to the parameters: nothing in it can go stale, and what is
    done here is not done again at each evaluation.

    Attributes:
        products: the kind of its layers.
        activation: the function between them.
        dtype: what the layers compute in.
        event: spatial shape of the state, ``(H, W)`` for images, ``()`` for flat states.
        weights: of the state, for each layer.
        bias, response: what is added to the pre-activations of all layers, one behind the other in the order of
            memory, and what a unit of time adds; a response of None: time is not an input of any layer.
        maps: the layers for the passes with a backward by hand, without a graph; None if there are no such passes.
        compiled: whether evaluations go through torch.compile, which makes their backward itself.
    """

    products: Products
    activation: Activation
    dtype: torch.dtype
    event: tuple[int, ...]
    weights: tuple[Tensor, ...]
    bias: Tensor
    response: Tensor | None
    maps: tuple[LayerMap, ...] | None
    compiled: bool = False

    @classmethod
    def make(
        cls,
        products: Products,
        activation: Activation,
        layers: Sequence[tuple[Tensor | None, Tensor, Tensor | None]],
        z: Tensor,
        *,
        fast: bool = False,
        compiled: bool = False,
    ) -> Stack:
        """A stack for states like ``z`` from each layer's weights of time and state, and its bias.

        It computes in autocast's dtype for float32 states, else in the state's own.
        ``fast`` makes it one for the passes with a backward by hand, ``compiled`` one for torch.compile.
        """
        event, device = tuple(z.shape[2:]), z.device.type
        dtype, rows = z.dtype, list[Tensor]()
        if dtype is torch.float32 and _autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        with _without_autocast(z):
            for time, weight, bias in layers:
                time = weight.new_zeros(weight.shape[0], 1, *weight.shape[2:]) if time is None else time
                bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
                rows.append(products.shift_rows(time, bias, event))
        bias, response = torch.cat(rows, 1).unbind()
        timed = any(time is not None for time, _, _ in layers)
        weights = tuple(weight for _, weight, _ in layers)
        maps = tuple(products.prepare(weight.to(dtype)) for weight in weights) if fast else None
        return cls(products, activation, dtype, event, weights, bias, response if timed else None, maps, compiled)

    @property
    def hidden(self) -> int:
        """The number of activations."""
        return len(self.weights) - 1

    def plain_maps(self, weights: Sequence[Tensor] | None = None) -> tuple[_PlainMap, ...]:
        """The layers in operations that autograd and torch.func know."""
        weights = self.weights if weights is None else weights
        return tuple(_PlainMap(self.products, weight.to(self.dtype)) for weight in weights)

    def maps_of(self, row: Tensor) -> list[Tensor]:
        """What a row adds to the pre-activations of each layer, ``(1, out, ...)``; views."""
        outputs = [len(weight) for weight in self.weights]
        pixels = torch.Size(self.event).numel()
        rows = row.to(self.dtype).split([n * pixels for n in outputs])
        return [self.products.as_map(r, n, self.event) for r, n in zip(rows, outputs, strict=True)]

    def enter(self, x: Tensor) -> Tensor:
        """``x (B, *event)`` in the dtype and the layout in which the layers compute."""
        return self.products.layout(x.to(self.dtype))


@dataclass(frozen=True)
class _PlainMap:
    """A layer with a graph."""

    products: Products
    weight: Tensor

    def apply(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        y = self.products.apply(x, self.weight)
        return y if shift is None else y + shift

    def transpose(self, v: Tensor) -> Tensor:
        return self.products.transpose(self.products.layout(v), self.weight)


_Maps = Sequence[LayerMap] | Sequence[_PlainMap]


def run_stack(stack: Stack, t: Tensor | float, z: Tensor) -> Tensor:
    """The velocity ``(B, *event)``, differentiable any number of times."""
    return _plain(stack, _as_time(t, z), z, None)[0]


def pull_noise(stack: Stack, noise: Tensor) -> Tensor:
    """``W_L^T noise``, from which :func:`linearize` starts its products: the same at all times of a solve.

    It has the noise's dtype, not the layers': the gradients of many evaluations add up in it.
    """
    with _without_autocast(noise):
        (last,) = stack.plain_maps(stack.weights[-1:])
        return stack.products.layout(last.transpose(stack.enter(noise))).to(noise.dtype)


def linearize(stack: Stack, t: Tensor | float, z: Tensor, pulled: Tensor | None = None) -> Linearization:
    """The velocity, its products with noises, and its products along any direction to come, from one pass.

    First-order gradients cost no double backward, also where a direction is the velocity itself. ``pulled`` is a
    noise as :func:`pull_noise` made it; for ``(K, B, ...)`` or ``(K, 1, ...)`` of linear layers there are K
    products, ``(K, B, ...)``.
    """
    t = _as_time(t, z)
    # the product of a single layer is constant: nothing to do by hand
    if stack.maps is None or (pulled is not None and not stack.hidden) or _transformed(stack, t, z, pulled):
        dz, product, kept = _plain(stack, t, z, pulled)
    elif stack.compiled:
        dz, product, kept = _compiled(stack, t, z, pulled)
    else:
        parameters = (stack.bias, stack.response, *stack.weights)
        dz, product, *kept = _Evaluation.apply(stack, t, z, pulled, *parameters)
        kept = kept[: stack.hidden]
    return Linearization(dz, product, lambda v, dt=0.0: _along(stack, kept, v, dt))


def _along(stack: Stack, kept: Sequence[Tensor], v: Tensor, dt: Tensor | float) -> Tensor:
    """``df/dz v + df/dt dt`` of the shape and the dtype of ``v``, where an evaluation ``kept`` its activations."""
    turn = dt if isinstance(dt, Tensor) else v.new_tensor(dt) if dt else None
    turn = None if stack.response is None else turn
    if stack.maps is None or _transformed(stack, v, turn, *kept):
        with _without_autocast(v):
            return _direction(stack, stack.plain_maps(), stack.response, kept, v, turn)[0].to(v.dtype)
    return _Direction.apply(stack, turn, v, stack.response, *stack.weights, *kept)[0]


def _autocast_enabled(device: str) -> bool:
    # not available on "meta"
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _without_autocast(z: Tensor) -> AbstractContextManager[object]:
    """No autocast on the device of ``z``: what runs inside chooses its dtypes itself."""
    device = z.device.type
    return torch.autocast(device, enabled=False) if _autocast_enabled(device) else nullcontext()


def _as_time(t: Tensor | float, z: Tensor) -> Tensor:
    if not isinstance(t, Tensor):
        return z.new_tensor(t)
    if t.numel() != 1:  # would go along the units of the layers
        raise ConfigError(f"this field takes one time for all samples, not times of shape {tuple(t.shape)}.")
    return t


def _transformed(stack: Stack, *tensors: Tensor | None) -> bool:
    """Whether a transform of torch.func or an export is active, or a tensor has a tangent of forward mode."""
    given = [x for x in (*tensors, stack.bias, stack.response, *stack.weights) if x is not None]
    return transforms_active() or exporting() or any(forward_ad.unpack_dual(x).tangent is not None for x in given)


def _plain(
    stack: Stack, t: Tensor, z: Tensor, pulled: Tensor | None
) -> tuple[Tensor, Tensor | None, Sequence[Tensor]]:
    """Velocity, product, and what is kept of each activation, in operations that autograd and torch.func know."""
    with _without_autocast(z):
        maps = stack.plain_maps()
        a, kept = _velocity(stack, maps, stack.bias, stack.response, t, z)
        if pulled is None:
            return a.to(z.dtype), None, kept
        product = _product(stack, maps, kept, pulled)[0].to(z.dtype)
        return a.to(z.dtype), product.expand(*pulled.shape[: pulled.dim() - z.dim()], *z.shape), kept


def _compiled(
    stack: Stack, t: Tensor, z: Tensor, pulled: Tensor | None
) -> tuple[Tensor, Tensor | None, Sequence[Tensor]]:
    """The same as one graph of torch.compile for each shape."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        return _compiler()(stack, t, z, pulled)
    except TorchDynamoException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if "Error" in line or "ompiler" in line), type(error).__name__)
        raise ConfigError(f"torch.compile does not work here: {reason.rstrip('.')}. Train without it.") from error


@cache
def _compiler() -> Callable[..., Any]:
    import torch._dynamo.config as settings

    settings.cache_size_limit = max(settings.cache_size_limit, 64)  # shapes, times kinds of evaluations
    return torch.compile(_plain, dynamic=False, fullgraph=True)


# the three sweeps forward, for maps of either kind --------------------------------------------------------------


def _velocity(
    stack: Stack, maps: _Maps, bias: Tensor, response: Tensor | None, t: Tensor, z: Tensor,
    pre: list[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The velocity, and what is kept of each activation; the pre-activations are added to ``pre``."""
    activation, kept = stack.activation, []
    row = bias if response is None else torch.addcmul(bias, response, t.to(bias.dtype))
    u, shifts = stack.enter(z), stack.maps_of(row)
    for layer, shift in zip(maps[:-1], shifts[:-1], strict=True):
        a = layer.apply(u, shift)
        u = activation.value(a)
        kept.append(u if activation.keeps_output else a)
        if pre is not None:
            pre.append(a)
    return maps[-1].apply(u, shifts[-1]), kept


def _product(
    stack: Stack, maps: _Maps, kept: Sequence[Tensor], pulled: Tensor, pre: list[Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The product with the Jacobian, and in it the cotangent of each activation but the last, ``pulled``.

    Without a graph it may take the pre-activations, ``pre``, which it uses up.
    """
    activation, g, cotangents = stack.activation, pulled.to(stack.dtype), []
    for layer, c in zip(maps[-2::-1], kept[::-1], strict=True):
        cotangents.append(g)
        v = activation.times_slope_at(g, pre.pop(), c) if pre else activation.times_slope(g, c)
        g = layer.transpose(v)
    return g, cotangents[:0:-1]


def _direction(
    stack: Stack, maps: _Maps, response: Tensor | None, kept: Sequence[Tensor], v: Tensor, dt: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """The product along a direction, and what comes to each activation in it."""
    x, inner = stack.enter(v), []
    shifts = (
        [None] * len(maps) if dt is None or response is None else stack.maps_of(response * dt.to(response.dtype))
    )
    for layer, shift, c in zip(maps[:-1], shifts[:-1], kept, strict=True):
        inner.append(layer.apply(x, shift))
        x = stack.activation.times_slope(inner[-1], c)
    return maps[-1].apply(x, shifts[-1]), inner


# their graph nodes ----------------------------------------------------------------------------------------------


class _Inputs(NamedTuple):
    """The tensors that an evaluation is a function of; or of each its gradient, or whether it needs one."""

    t: Any
    z: Any
    pulled: Any
    bias: Any
    response: Any
    weights: Sequence[Any]

    @classmethod
    def of(cls, row: Sequence[Any]) -> _Inputs:
        t, z, pulled, bias, response, *weights = row
        return cls(t, z, pulled, bias, response, weights)

    def row(self) -> tuple[Any, ...]:
        return (*self[:5], *self.weights)


class _DirectionInputs(NamedTuple):
    """The same of a product along a direction; ``kept`` is what the evaluation kept of its activations."""

    dt: Any
    v: Any
    response: Any
    weights: Sequence[Any]
    kept: Sequence[Any]

    @classmethod
    def of(cls, row: Sequence[Any], hidden: int) -> _DirectionInputs:
        dt, v, response, *rest = row
        return cls(dt, v, response, rest[: hidden + 1], rest[hidden + 1 :])

    def row(self) -> tuple[Any, ...]:
        return (*self[:3], *self.weights, *self.kept)


class _Evaluation(torch.autograd.Function):
    """Velocity, product (None without a noise), what is kept of each activation and of the product."""

    @staticmethod
    def forward(
        stack: Stack, t: Tensor, z: Tensor, pulled: Tensor | None, bias: Tensor, response: Tensor | None, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        assert stack.maps is not None
        with _without_autocast(z):
            pre = None if pulled is None else list[Tensor]()
            a, kept = _velocity(stack, stack.maps, bias, response, t, z, pre)
            if pulled is None:
                return a.to(z.dtype), None, *kept
            product, cotangents = _product(stack, stack.maps, kept, pulled, pre)
        return a.to(z.dtype), product.to(z.dtype), *kept, *cotangents

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.stack, *tensors = inputs
        ctx.mark_non_differentiable(*output[2 + ctx.stack.hidden :])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[2:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        stack: Stack = ctx.stack
        if all(each is None for each in cotangents):
            return (None,) * len(ctx.needs_input_grad)
        needs, tensors = ctx.needs_input_grad[1:], ctx.saved_tensors  # a checkpoint unpacks them once
        row, outputs = tensors[: len(needs)], tensors[len(needs) :]
        cotangents = cotangents[: 2 + stack.hidden]
        with _without_autocast(_Inputs.of(row).z):
            if torch.is_grad_enabled():  # the gradient is to be differentiated: autograd must see it
                inputs = _Inputs.of(_ends(row))
                maps, z = stack.plain_maps(inputs.weights), inputs.z
                a, kept = _velocity(stack, maps, inputs.bias, inputs.response, inputs.t, z)
                pulled = inputs.pulled
                product = None if pulled is None else _product(stack, maps, kept, pulled)[0].to(z.dtype)
                return None, *_by_autograd((a.to(z.dtype), product, *kept), cotangents, inputs.row())
            kept, inner = outputs[: stack.hidden], outputs[stack.hidden :]
            return None, *_pull_back(stack, _Inputs.of(row), _Inputs.of(needs), cotangents, kept, inner).row()


class _Direction(torch.autograd.Function):
    """Product along a direction, and what comes to each activation in it."""

    @staticmethod
    def forward(
        stack: Stack, dt: Tensor | None, v: Tensor, response: Tensor | None, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        assert stack.maps is not None
        with _without_autocast(v):
            y, inner = _direction(stack, stack.maps, response, rest[stack.hidden + 1 :], v, dt)
        return y.to(v.dtype), *inner

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.stack, *tensors = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        stack: Stack = ctx.stack
        q = cotangents[0]
        if q is None:
            return (None,) * len(ctx.needs_input_grad)
        needs, tensors = ctx.needs_input_grad[1:], ctx.saved_tensors
        row, inner = tensors[: len(needs)], tensors[len(needs) :]
        inputs = _DirectionInputs.of(row, stack.hidden)
        with _without_autocast(inputs.v):
            if torch.is_grad_enabled():
                dt, v, response, weights, kept = inputs = _DirectionInputs.of(_ends(row), stack.hidden)
                y = _direction(stack, stack.plain_maps(weights), response, kept, v, dt)[0].to(v.dtype)
                return None, *_by_autograd((y,), (q,), inputs.row())
            of_needs = _DirectionInputs.of(needs, stack.hidden)
            return None, *_pull_back_direction(stack, inputs, of_needs, q, inner).row()


for each in (_Evaluation, _Direction):  # Function.apply asks for the signature at every call: 40 us
    each.forward.__signature__ = inspect.signature(each.forward)


def _ends(inputs: Sequence[Tensor | None]) -> list[Any]:
    """The inputs of a node as new tensors, at which the derivatives of this node alone end.

    The state was made from the weights by the evaluations before, and their nodes add that part themselves.
    """
    # not view_as, which changes the strides of dimensions of size 1 and so the layout that a convolution sees
    return [None if x is None else x[...] for x in inputs]


def _by_autograd(
    outputs: Sequence[Tensor | None], cotangents: Sequence[Tensor | None], arguments: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients by automatic differentiation, for ``create_graph=True``: slow, but with a graph."""
    pairs = zip(outputs, cotangents, strict=True)
    given = [(x, c) for x, c in pairs if x is not None and c is not None and x.requires_grad]
    inputs = [x for x in arguments if x is not None and x.requires_grad]
    ends, seeds = zip(*given, strict=True)
    found = iter(torch.autograd.grad(ends, inputs, seeds, create_graph=True, allow_unused=True))
    return [None if x is None or not x.requires_grad else next(found) for x in arguments]


# the sweeps backward, without a graph ---------------------------------------------------------------------------


class _Upward(NamedTuple):
    """What the sweep upward finds at each hidden layer, and the cotangent of ``g_{L-1}`` at its end."""

    added: list[Tensor]  # s'' g p
    slopes: list[Tensor]
    gradients: list[Tensor | None]
    end: Tensor


def _pull_back(
    stack: Stack,
    inputs: _Inputs,
    needs: _Inputs,
    cotangents: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    inner: Sequence[Tensor],
) -> _Inputs:
    """Gradients of an evaluation's inputs from the cotangents of velocity, product and what was kept."""
    t, z, pulled, _, response, _ = inputs
    dz, product, *turned = cotangents
    activation, wanted = stack.activation, needs.weights
    up = pulled_grad = None
    if product is not None and pulled is not None:
        up = _upward(stack, stack.enter(product), kept, [*inner, pulled.to(stack.dtype)], wanted)
        pulled_grad = up.end.sum_to_size(pulled.shape).to(pulled.dtype) if needs.pulled else None

    def entry(k: int) -> Tensor:
        return activation.output(kept[k - 1]) if k else stack.enter(z)

    def through(k: int, below: Tensor) -> Tensor:
        more = turned[k]
        if more is not None and activation.keeps_output:
            below = below.add_(more)
        a = activation.times_slope(below, kept[k]) if up is None else up.added[k].addcmul_(below, up.slopes[k])
        return a if more is None or activation.keeps_output else a.add_(more)

    dz = z.new_zeros(len(z), len(stack.weights[-1]), *stack.event) if dz is None else dz
    row, below, gradients = _downward(
        stack, stack.enter(dz), entry, through, shifts=needs.t or needs.bias or needs.response, z=needs.z,
        weights=wanted,
    )  # fmt: skip
    for gradient, more in zip(gradients, [] if up is None else up.gradients, strict=False):
        if gradient is not None and more is not None:
            gradient.add_(more)
    t_grad, response_grad = _time_gradients(row, t, response)
    z_grad = None if below is None else below.to(z.dtype)
    return _Inputs(t_grad, z_grad, pulled_grad, row, response_grad, gradients)


def _pull_back_direction(
    stack: Stack, inputs: _DirectionInputs, needs: _DirectionInputs, q: Tensor, inner: Sequence[Tensor]
) -> _DirectionInputs:
    """Gradients of the inputs of a product along a direction, from its cotangent."""
    dt, v, response, _, kept = inputs
    activation, turned = stack.activation, list[Tensor]()

    def entry(k: int) -> Tensor:
        return activation.times_slope(inner[k - 1], kept[k - 1]) if k else stack.enter(v)

    def through(k: int, p: Tensor) -> Tensor:
        slope = activation.slope(kept[k])
        turned.append(activation.slope_derivative(kept[k], slope).mul_(inner[k]).mul_(p))
        return p.mul_(slope)

    shifts = dt is not None and (needs.dt or needs.response)
    row, below, gradients = _downward(
        stack, stack.enter(q), entry, through, shifts=shifts, z=needs.v, weights=needs.weights
    )
    dt_grad, response_grad = _time_gradients(row, dt, response)
    v_grad = None if below is None else below.to(v.dtype)
    return _DirectionInputs(dt_grad, v_grad, response_grad, gradients, turned[::-1])


def _upward(
    stack: Stack, h: Tensor, kept: Sequence[Tensor], cotangents: Sequence[Tensor], wanted: Sequence[bool]
) -> _Upward:
    """The transpose of the product, from its cotangent ``h``; ``cotangents`` are those of the activations in it."""
    assert stack.maps is not None
    activation = stack.activation
    added, slopes, gradients = list[Tensor](), list[Tensor](), list[Tensor | None]()
    for layer, c, g, wants in zip(stack.maps, kept, cotangents, wanted, strict=False):
        slope = activation.slope(c)
        v = slope * g
        gradients.append(layer.gradient(h, v) if wants else None)
        p = layer.apply(h)
        # s'' is the derivative of s' with respect to the output, times s'
        x = v.mul_(p) if activation.keeps_output else torch.mul(g, p, out=v)
        x = x.sum(0) if x.dim() > c.dim() else x  # of several noises
        added.append(x.mul_(activation.slope_derivative(c, slope)))
        slopes.append(slope)
        h = p.mul_(slope)
    return _Upward(added, slopes, gradients, h)


def _downward(
    stack: Stack,
    q: Tensor,
    entry: Callable[[int], Tensor],
    through: Callable[[int, Tensor], Tensor],
    *,
    shifts: bool,
    z: bool,
    weights: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Backpropagation from ``q``, the cotangent of the last layer, through all layers.

    ``entry`` gives what comes to a layer, ``through`` takes the cotangent of a layer's input to that of the
    output of the layer below. The gradients are of what is added to the layers, of the first layer's input and of
    each weight; None where ``shifts``, ``z`` and ``weights`` do not ask for them.
    """
    assert stack.maps is not None
    sums, gradients = list[Tensor](), list[Tensor | None]()
    below: Tensor | None = None
    for k in range(stack.hidden, -1, -1):
        layer = stack.maps[k]
        if shifts:
            sums.append(stack.products.sum_batch(q))
        gradients.append(layer.gradient(entry(k), q).to(stack.weights[k].dtype) if weights[k] else None)
        below = layer.transpose(q) if k or z else None
        if k and below is not None:
            q = through(k - 1, below)
    row = torch.cat(sums[::-1]).to(stack.bias.dtype) if shifts else None
    return row, below, gradients[::-1]


def _time_gradients(
    row: Tensor | None, t: Tensor | None, response: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``t`` and the response from that of ``t response``."""
    if row is None or t is None or response is None:
        return None, None
    return (row * response).sum().to(t.dtype).reshape(t.shape), row * t.to(row.dtype)
