"""A stack of layers prepared for one solve: its velocity and Jacobian products, with a hand-written backward pass.

The layers are ``a_k = W_k u_{k-1} + b_k + t r_k`` with activations ``u_k = s(a_k)``, ``u_0 = z`` and ``f = a_L``.
The product ``e^T df/dz`` runs backward through the stack: ``g_{L-1} = W_L^T e``, which is the same in a whole
solve, then ``v_k = s'(a_k) g_k`` and ``g_{k-1} = W_k^T v_k``. It ends as ``g_0``. Several noise vectors at once,
for the whole Jacobian, form a dimension in front of the batch. A product along a direction of state and time,
``df/dz v + df/dt dt``, runs forward: ``x_0 = v``, ``y_k = W_k x_{k-1} + dt r_k``, ``x_k = s'(a_k) y_k``. It ends as
``y_L``.

Given cotangents D of the velocity and P of the product, two sweeps compute the gradients. The upward sweep is the
transpose of the product: ``h_0 = P``, ``p_k = W_k h_{k-1}``, ``h_k = s'(a_k) p_k``. It gives ``s''(a_k) g_k p_k``,
which the product adds to the cotangent of ``a_k``, and ``h_{L-1}``, the cotangent of ``g_{L-1}``. The downward
sweep is ordinary backpropagation from D, which picks these up. The gradient of a product along a direction, with
cotangent
``q_L``, takes one downward sweep: ``p_k = W_{k+1}^T q_{k+1}``, ``q_k = s'(a_k) p_k``, and ``s''(a_k) y_k p_k`` for
``a_k``. This last gradient flows to the activations that the evaluation kept, which are outputs of its graph node.

An evaluation keeps one tensor per activation (:class:`~.activations.Activation`), and with a product
one more for each activation except the last. A product along a direction keeps one. The velocity and its gradient
take three times the convolutions of a forward pass, and each product takes as many more, without a double backward.
Gradients that are to be differentiated again are computed by automatic differentiation.

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

from ..core.derivatives import VELOCITY, Ask, Linearization, trace_of_rows, unit_vectors
from ..core.modes import autocasts, traced
from ..errors import CompilerError, ConfigError
from .activations import Activation
from .kernels import Dense, LayerMap


class Stack:
    """A stack as the field of one solve, for states of one shape, with the current weights.

    It is a :class:`~rnode_plugin.core.derivatives.Field`. Work that depends only on the weights is done once here
    and reused by every evaluation. It is part of the autograd graph. A ``Stack`` belongs to one solve; make a new
    one after each optimizer step. Products with any other noise vector work but are slower. Products and
    derivatives are taken with respect to ``z`` alone, not to the context.

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
        dz, products, jvp = self._pass(t, self._with_context(z), pulled)
        if self._context is not None:  # the layers see the context as more columns of the state; leave these out
            products = None if products is None else products[..., : z.shape[1]]
            still, whole = torch.zeros_like(self._context), jvp
            jvp = lambda v, dt=0.0: whole(torch.cat([v, still.to(v.dtype)], 1), dt)  # noqa: E731
        divergence = trace_of_rows(products) if ask.divergence and products is not None else None
        return Linearization(dz, products, jvp, divergence)

    def _several(self, t: Tensor | float, z: Tensor, vectors: Tensor, ask: Ask) -> Linearization:
        """Several products of convolutions, computed as one batch, since a convolution has one batch dimension."""
        count, batch = len(vectors), z.shape[0]
        repeated = z.unsqueeze(0).expand(count, *z.shape).flatten(0, 1)
        dz, products, _ = self._pass(t, repeated, self._pull(vectors.flatten(0, 1)))
        assert products is not None
        rows = products.unflatten(0, (count, batch))
        jvp = self._pass(t, z, None)[2] if ask.jvp else None
        return Linearization(dz[:batch], rows, jvp, trace_of_rows(rows) if ask.divergence else None)

    def _pass(
        self, t: Tensor | float, z: Tensor, pulled: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Callable[..., Tensor]]:
        """The velocity, its products with noise, and a function for products along directions, from one pass.

        First-order gradients cost no double backward, even if a direction is the velocity itself. ``pulled`` is
        what :meth:`_pull` gives for the noise. With ``(K, B, ...)`` or ``(K, 1, ...)`` for linear layers there are
        K products, ``(K, B, ...)``.
        """
        t = _as_time(t, z)
        # the product of a single layer does not depend on the state, so the hand-written pass has nothing to do
        if self.fast is None or (pulled is not None and not self.hidden) or traced():
            dz, product, kept = _plain(self, t, z, pulled)
        elif self._compiled:
            dz, product, kept = _run_compiled(self, t, z, pulled)
        else:
            outputs: Any = _Evaluation.apply(self, t, z, pulled, self.theta)
            dz, product, kept = *outputs[:2], outputs[2 : 2 + self.hidden]
        return dz, product, lambda v, dt=0.0: self._along(kept, v, dt)

    def _along(self, kept: Sequence[Tensor], v: Tensor, dt: Tensor | float) -> Tensor:
        """``df/dz v + df/dt dt``, like ``v``, at the state of the evaluation that ``kept`` its activations."""
        turn = dt if isinstance(dt, Tensor) else v.new_tensor(dt) if dt else None
        turn = turn if self._timed else None  # without a time input, df/dt is zero
        if self.fast is None or traced():
            with _without_autocast(v):
                return _direction(self, self.plain, kept, v, turn)[0].to(v.dtype)
        outputs: Any = _Direction.apply(self, turn, v, self.theta, *kept)
        return outputs[0]

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


def _plain(
    stack: Stack, t: Tensor, z: Tensor, pulled: Tensor | None
) -> tuple[Tensor, Tensor | None, Sequence[Tensor]]:
    """Velocity, product and kept activations, in operations that autograd and torch.func can differentiate."""
    with _without_autocast(z):
        a, kept = _velocity(stack, stack.plain, t, z)
        if pulled is None:
            return a.to(z.dtype), None, kept
        product = _product(stack, stack.plain, kept, pulled)[0].to(z.dtype)
        return a.to(z.dtype), product.expand(*pulled.shape[: pulled.dim() - z.dim()], *z.shape), kept


def _run_compiled(
    stack: Stack, t: Tensor, z: Tensor, pulled: Tensor | None
) -> tuple[Tensor, Tensor | None, Sequence[Tensor]]:
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


# the three sweeps forward ---------------------------------------------------------------------------------------


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


def _direction(
    stack: Stack, layers: Layers, kept: Sequence[Tensor], v: Tensor, dt: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """The product along a direction, and the ``y_k`` before each activation."""
    maps, _, response = layers
    x, shifts = stack.enter(v), [None] * len(maps)
    inner: list[Tensor] = []
    if dt is not None and response is not None:
        shifts = stack.maps_of(response * dt.to(response.dtype))
    for layer, shift, c in zip(maps[:-1], shifts[:-1], kept, strict=True):
        inner.append(layer.apply(x, shift))
        x = stack.activation.times_slope(inner[-1], c)
    return maps[-1].apply(x, shifts[-1]), inner


# their graph nodes ----------------------------------------------------------------------------------------------


class _Evaluation(torch.autograd.Function):
    """Velocity, product (None without noise), and what is kept of the activations and of the product."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        stack, t, z, pulled, _ = ctx.stack, *tensors = args
        with _without_autocast(z):
            pre = None if pulled is None else list[Tensor]()
            a, kept = _velocity(stack, stack.fast, t, z, pre)
            product, inner = None, list[Tensor]()
            if pulled is not None:
                product, inner = _product(stack, stack.fast, kept, pulled, pre)
                product = product.to(z.dtype)
        # What is kept is an output too, since _Direction sends gradients to it. The cotangents g_k are outputs only
        # because save_for_backward takes inputs and outputs.
        ctx.mark_non_differentiable(*inner)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *kept, *inner)
        return a.to(z.dtype), product, *kept, *inner

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        stack: Stack = ctx.stack
        cotangents = grad_outputs[: 2 + stack.hidden]
        if all(each is None for each in cotangents):
            return (None,) * 5
        saved = ctx.saved_tensors  # read once, because torch's checkpoint unpacks saved tensors only once
        inputs, rest = saved[:4], saved[4:]
        with _without_autocast(inputs[1]):
            if torch.is_grad_enabled():  # create_graph=True: compute again in operations that autograd records
                t, z, pulled, theta = inputs = _ends(inputs)
                layers = stack.layers_of(theta)
                a, kept = _velocity(stack, layers, t, z)
                product = None if pulled is None else _product(stack, layers, kept, pulled)[0].to(z.dtype)
                return None, *_by_autograd((a.to(z.dtype), product, *kept), cotangents, inputs)
            kept, inner = rest[: stack.hidden], rest[stack.hidden :]
            t, z, pulled, _ = inputs
            return None, *_pull_back(stack, t, z, pulled, ctx.needs_input_grad[1:], cotangents, kept, inner)


class _Direction(torch.autograd.Function):
    """Product along a direction, and the ``y_k`` before each activation."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        stack, dt, v, _, *kept = ctx.stack, *tensors = args
        with _without_autocast(v):
            y, inner = _direction(stack, stack.fast, kept, v, dt)
        ctx.mark_non_differentiable(*inner)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *inner)
        return y.to(v.dtype), *inner

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        stack: Stack = ctx.stack
        q, needs = grad_outputs[0], ctx.needs_input_grad[1:]
        if q is None:
            return (None,) * (1 + len(needs))
        saved = ctx.saved_tensors
        inputs, inner = saved[: len(needs)], saved[len(needs) :]
        with _without_autocast(inputs[1]):
            if torch.is_grad_enabled():
                dt, v, theta, *kept = inputs = _ends(inputs)
                y = _direction(stack, stack.layers_of(theta), kept, v, dt)[0].to(v.dtype)
                return None, *_by_autograd((y,), (q,), inputs)
            dt, v, _, *kept = inputs
            return None, *_pull_back_direction(stack, dt, v, kept, needs, q, inner)


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
    t: Tensor,
    z: Tensor,
    pulled: Tensor | None,
    needs: Sequence[bool],
    cotangents: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    inner: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """Gradients by the inputs of an evaluation, from the cotangents of velocity, product and what was kept."""
    assert stack.fast is not None
    dz, product, *turned = cotangents
    activation = stack.activation
    needs_t, needs_z, needs_pulled, needs_theta = needs
    up = pulled_grad = None
    if product is not None and pulled is not None:
        up = _upward(stack, stack.enter(product), kept, [*inner, pulled.to(stack.dtype)], needs_theta)
        pulled_grad = up.end.sum_to_size(pulled.shape).to(pulled.dtype) if needs_pulled else None

    def entry(k: int) -> Tensor:
        return activation.output(kept[k - 1]) if k else stack.enter(z)

    def through(k: int, below: Tensor) -> Tensor:
        # a product along a direction sends a cotangent to what was kept: the output, or else the pre-activation
        more = turned[k]
        if more is not None and activation.keeps_output:
            below = below.add_(more)
        a = activation.times_slope(below, kept[k]) if up is None else up.added[k].addcmul_(below, up.slopes[k])
        return a if more is None or activation.keeps_output else a.add_(more)

    dz = z.new_zeros(len(z), stack.shapes[-1][0], *stack.event) if dz is None else dz
    t_grad, z_grad, theta_grad = _downward(
        stack, stack.enter(dz), entry, through, t, (needs_t, needs_z, needs_theta)
    )
    # the last weight has no gradient from the product here: it enters through `pulled`, whose graph leads to it
    if theta_grad is not None and up is not None and up.gradients:
        more = torch.cat(up.gradients)
        theta_grad[stack.start :][: len(more)].add_(more)
    return t_grad, None if z_grad is None else z_grad.to(z.dtype), pulled_grad, theta_grad


def _pull_back_direction(
    stack: Stack,
    dt: Tensor | None,
    v: Tensor,
    kept: Sequence[Tensor],
    needs: Sequence[bool],
    q: Tensor,
    inner: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """Gradients by the inputs of a product along a direction, from its cotangent."""
    assert stack.fast is not None
    activation, turned = stack.activation, list[Tensor]()

    def entry(k: int) -> Tensor:
        return activation.times_slope(inner[k - 1], kept[k - 1]) if k else stack.enter(v)

    def through(k: int, p: Tensor) -> Tensor:
        bent, q = _bend(activation, p, activation.slope(kept[k]), kept[k], inner[k])
        turned.append(bent)
        return q

    dt_grad, v_grad, theta_grad = _downward(stack, stack.enter(q), entry, through, dt, needs[:3])
    if theta_grad is not None:  # a direction adds no bias; its sums served the response only
        theta_grad[: len(stack.fast.bias)].zero_()
    return dt_grad, None if v_grad is None else v_grad.to(v.dtype), theta_grad, *turned[::-1]


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
        x = v if activation.keeps_output else g
        bent, h = _bend(activation, layer.apply(h), slope, c, x, scratch=v)
        added.append(bent)
        slopes.append(slope)
    return _Upward(added, slopes, gradients, h)


def _bend(
    activation: Activation, p: Tensor, slope: Tensor, kept: Tensor, x: Tensor, *, scratch: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``x p s''`` summed over the noise vectors, and ``slope p``; overwrites ``p``.

    ``s''`` stands for :meth:`Activation.slope_derivative`.
    """
    x = torch.mul(x, p, out=scratch)
    x = x.sum(0) if x.dim() > kept.dim() else x
    return x.mul_(activation.slope_derivative(kept, slope)), p.mul_(slope)


def _downward(
    stack: Stack,
    q: Tensor,
    entry: Callable[[int], Tensor],
    through: Callable[[int, Tensor], Tensor],
    t: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Backpropagation from ``q``, the cotangent of the last layer, through all layers.

    ``entry`` gives the input of a layer. ``through`` maps the cotangent of a layer's input to the cotangent of the
    output of the layer below. The result holds the gradients by the time, by the first layer's input and by
    ``theta``.
    """
    assert stack.fast is not None
    needs_t, needs_z, needs_theta = needs
    bias, response = stack.fast.bias, stack.fast.response
    sums, gradients = list[Tensor](), list[Tensor]()
    below: Tensor | None = None
    for k in range(stack.hidden, -1, -1):
        layer = stack.fast.maps[k]
        if needs_t or needs_theta:
            sums.append(stack.kind.sum_batch(q))
        if needs_theta:
            gradients.append(stack.kind.flat(layer.gradient(entry(k), q)))
        below = layer.transpose(q) if k or needs_z else None
        if k and below is not None:
            q = through(k - 1, below)
    if not sums:
        return None, below, None
    # The gradient by the response is t times the gradient by the bias. Reserve its place in the row, to be filled
    # below, since a second concatenation would copy everything.
    room = [] if response is None or not needs_theta else [response]
    grad = torch.cat([*sums[::-1], *room, *gradients[::-1]]).to(stack.theta.dtype)
    row, of_response = grad[: len(bias)], grad[len(bias) :][: len(bias)]
    if room and t is not None:
        torch.mul(row, t.to(row.dtype).reshape(()), out=of_response)
    elif room:
        of_response.zero_()
    t_grad = None
    if needs_t and t is not None and response is not None:
        t_grad = (row * response).sum().to(t.dtype).reshape(t.shape)
    return t_grad, below, grad if needs_theta else None
