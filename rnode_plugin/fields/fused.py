"""A stack of layers prepared for one solve: its velocity and Jacobian products, with a hand-written backward pass.

The layers k = 1 ... L have weights ``W_k``, biases ``b_k`` and responses ``r_k`` to the time. The activation
between them is ``s``. The velocity f of a state z is::

    u_0 = z,   a_k = W_k u_{k-1} + b_k + t r_k,   u_k = s(a_k),   f = a_L                                 (1)

The product of a vector e with the Jacobian runs backward through the stack. It starts from a ``g_{L-1}`` that is
the same in a whole solve::

    g_{L-1} = W_L^T e                                                                                     (2)
    d_k = s'(a_k),   v_k = d_k g_k,   g_{k-1} = W_k^T v_k   for k = L-1 ... 1,   e^T df/dz = g_0          (3)

Several vectors e at once, for the whole Jacobian, form a dimension in front of the batch.

Two sweeps compute the gradients of a loss, from its derivatives ``q_L`` with respect to f and ``h_0`` with respect
to the product. The upward sweep is the transpose of (3). It passes the derivatives ``p_k`` with respect to ``v_k``
and ``h_k`` with respect to ``g_k``, and computes ``c_k``, the derivative with respect to ``a_k`` through ``d_k``::

    p_k = W_k h_{k-1},   h_k = d_k p_k,   c_k = s''(a_k) g_k p_k   for k = 1 ... L-1                      (4)

The downward sweep is ordinary backpropagation through (1), to which ``c_k`` is added. Its ``q_k`` is the whole
derivative with respect to ``a_k``::

    q_k = d_k W_{k+1}^T q_{k+1} + c_k   for k = L-1 ... 1                                                 (5)

The gradients are, with sums over the samples for the parameters and the time::

    W_k: q_k u_{k-1}^T + v_k h_{k-1}^T,   b_k: q_k,   r_k: t q_k,   t: sum_k r_k q_k,   z: W_1^T q_1      (6)

The product adds nothing to the gradient of ``W_L`` in (6). Its gradient with respect to ``g_{L-1}`` is ``h_{L-1}``,
from which autograd computes the rest through (2).

An evaluation keeps one tensor ``y_k`` per activation, which is ``u_k`` or ``a_k``
(:class:`~.activations.Activation`), and with a product also ``g_1 ... g_{L-2}``. The velocity and its gradient
take three times the convolutions of a forward pass, and each product takes as many more, without a double
backward. Gradients that are to be differentiated again, and derivatives along a direction, are computed by
automatic differentiation.

All parameters of a stack lie in one row, ``theta``, so that the evaluations of a solve accumulate a single
gradient: the biases of all layers, their responses, and the weights.

In the code, a list ``y`` holds ``y_1, y_2, ...`` in this order, and likewise for the other symbols.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.derivatives import (
    VELOCITY,
    AutogradField,
    Field,
    Linearization,
    trace_of_rows,
    unit_vectors,
)
from ..core.modes import autocasts
from ..errors import ConfigError
from .activations import Activation
from .kernels import Dense, LayerMap

_PIXELS_AT_ONCE = {"cpu": 3200}
"""Pixels of one color, or of several colors together, from which on a larger batch is not faster (measured)."""


class Stack(Field):
    """A stack as the field of one solve, for states of one shape, with the current weights.

    Work that depends only on the weights is done once here and reused by every evaluation. It is part of the
    autograd graph. A ``Stack`` belongs to one solve; make a new one after each optimizer step. Products with any
    other noise vector work but are slower. An evaluation with derivatives along directions is computed by automatic
    differentiation as a whole. Products and derivatives are with respect to ``z`` alone, not to the context.

    Args:
        kind: the class of the layers.
        activation: the function between the layers.
        layers: each layer's weight of time, weight of the state, and bias; None if it has none.
        z: a state. The layers compute in autocast's dtype if it is float32, else in its dtype.
        noise: the probe vectors of the solve, for which equation (2) is computed here.
        context: ``(B, C)``, for layers that take it after the state.
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
    ) -> None:
        self.kind, self.activation, self.event = kind, activation, tuple(z.shape[2:])
        if len(self.event) != (0 if kind is Dense else 2):
            takes = "linear layers takes (B, D)" if kind is Dense else "convolutions takes (B, C, H, W)"
            raise ConfigError(f"a field of {takes} as a state, not {tuple(z.shape)}.")
        self.radius = None if kind is Dense else len(layers)  # 3x3 convolutions
        self._context = context
        self.dtype = z.dtype
        if z.dtype is torch.float32 and autocasts(z):
            self.dtype = torch.get_autocast_dtype(z.device.type)
        self._timed = False
        self.shapes: list[torch.Size] = []
        self.bias_sizes: list[int] = []  # number of entries of each layer's bias
        rows: list[Tensor] = []  # torch.compile cannot trace list[Tensor]()
        flat: list[Tensor] = []
        sizes: list[int] = []
        with _without_autocast(z):
            for time, weight, bias in layers:
                self._timed = self._timed or time is not None
                time = weight.new_zeros(weight.shape[0], 1, *weight.shape[2:]) if time is None else time
                bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
                rows.append(kind.bias_rows(time, bias, self.event))
                self.bias_sizes.append(rows[-1].shape[1])
                flat.append(kind.flat(weight))
                self.shapes.append(weight.shape)
                sizes.append(weight.numel())
        # one row for all layers, so that one addcmul adds t times the response of all of them
        b_and_r = torch.cat(rows, 1)
        self.theta = torch.cat([(b_and_r if self._timed else b_and_r[0]).reshape(-1), *flat])
        self.activations = len(layers) - 1  # their number, L - 1
        self.start = b_and_r.shape[1] * (1 + self._timed)  # index of the first weight in theta
        self._sizes = [b_and_r.shape[1]] * (1 + self._timed) + sizes
        self._W_L = kind.unflat(flat[-1], self.shapes[-1])
        self._plain: Layers | None = None
        self._captured = False
        # detached: the hand-written nodes take theta as an input and return its gradient themselves
        b, r, weights = self._pieces(self.theta.detach())
        self.fast: Layers | None = Layers(list(map(kind, weights)), b, r)  # None in a traceable stack
        # several noises of convolutions are evaluated as one larger batch, see _several
        several = noise is not None and noise.ndim > 2 + len(self.event)
        self._noise = None if several and kind is not Dense else noise
        self._g = None if self._noise is None else self._g_of(self._noise)
        self._W_L = self._W_L[...]  # a view, from which g is not computed, see `inputs`

    def inputs(self) -> Sequence[Tensor]:
        """What evaluations read of the parameters, the noise and the context."""
        tensors = self.theta, self._W_L, self._g, self._context
        return [x for x in tensors if x is not None and x.requires_grad]

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
        """The layers with parameters ``theta``, in operations that autograd can differentiate."""
        b, r, weights = self._pieces(theta)
        return Layers([_PlainMap(self.kind, W_k) for W_k in weights], b, r)

    def traceable(self) -> Stack:
        stack = copy.copy(self)
        stack.fast, stack._captured = None, True
        stack._plain = self.layers_of(self.theta)  # here, so that all steps share it
        return stack

    def cast(self, x: Tensor) -> Tensor:
        """``x (B, *event)`` in the dtype and the memory layout in which the layers compute."""
        return self.kind.layout(x.to(self.dtype))

    def __call__(self, t: Tensor | float, z: Tensor, /) -> Tensor:
        """The velocity ``(B, *event)``, differentiable any number of times."""
        return _plain(self, _as_time(t, z), self._with_context(z), None)[0]

    def linearize(
        self,
        t: Tensor | float,
        z: Tensor,
        probes: Tensor | None = None,
        wants: frozenset[str] = VELOCITY,
    ) -> Linearization:
        """Implement :meth:`Field.linearize <rnode_plugin.core.derivatives.Field.linearize>`."""
        t = _as_time(t, z)
        if "jvp" in wants:
            return AutogradField(self, captured=self._captured).linearize(t, z, probes, wants)
        if "rows" in wants or "trace" in wants:
            linearization = self._with_rows(t, z, wants)
            # one more pass for the products
            return (
                linearization._replace(products=self._products(t, z, probes)[1])
                if "products" in wants
                else linearization
            )
        dz, products = self._products(t, z, probes if "products" in wants else None)
        return Linearization(dz, products)

    def _products(self, t: Tensor, z: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The velocity, and the products with the probe vectors; None without vectors."""
        if probes is not None and probes.ndim > z.ndim and self.kind is not Dense:
            return self._several(t, z, probes)
        g = None
        if probes is not None:
            g = self._g if probes is self._noise and self._g is not None else self._g_of(probes)
        return self._pass(t, z, g)

    def _with_rows(self, t: Tensor, z: Tensor, wants: frozenset[str]) -> Linearization:
        """The velocity, the rows of the Jacobian and, if it is wanted, its trace."""
        if self.kind is Dense:
            # equation (2) for the unit vectors e: the rows of W_L, the same for all samples
            dz, rows = self._pass(t, z, self._W_L.unsqueeze(1))
        else:
            dz, rows = self._several(t, z, unit_vectors(z).expand(-1, *z.shape))
        assert rows is not None
        return Linearization(dz, rows=rows, trace=trace_of_rows(rows) if "trace" in wants else None)

    def _several(self, t: Tensor, z: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Several products of convolutions, computed as one batch, since a convolution has one batch dimension."""
        graph = torch.is_grad_enabled() and any(x.requires_grad for x in (t, z, vectors, self.theta))
        if self.fast is not None and not graph:
            with _without_autocast(z):
                return _colors(self, self.fast, t, z, vectors)
        count, batch = len(vectors), z.shape[0]
        repeated = z.unsqueeze(0).expand(count, *z.shape).flatten(0, 1)
        dz, products = self._pass(t, repeated, self._g_of(vectors.flatten(0, 1)))
        assert products is not None
        return dz[:batch], products.unflatten(0, (count, batch))

    def _pass(self, t: Tensor, z: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The velocity and its products with noise, whose first-order gradients cost no double backward.

        ``g`` is the ``g_{L-1}`` of the noise. With ``(K, B, ...)`` or ``(K, 1, ...)`` for linear layers there are K
        products, ``(K, B, ...)``.
        """
        x = self._with_context(z)
        outputs: Any
        # the product of a single layer does not depend on the state, so the hand-written pass has nothing to do
        if self.fast is None or (g is not None and not self.activations):
            outputs = _plain(self, t, x, g)
        else:
            outputs = _Evaluation.apply(self, t, x, g, self.theta)
        dz, products = outputs
        return dz, products if self._context is None or products is None else products[..., : z.shape[1]]

    def _g_of(self, e: Tensor) -> Tensor:
        """Equation (2): ``g_{L-1}`` of the noise ``e``. It is the same at all times of a solve.

        It has the dtype of the noise, not of the layers, because the gradients of many evaluations accumulate in
        it.
        """
        with _without_autocast(e):
            g = self.kind.transposed(self.cast(e), self._W_L.to(self.dtype))
            return self.kind.layout(g).to(e.dtype)

    def _with_context(self, z: Tensor) -> Tensor:
        """The input of the layers, for which the context is more columns of the state."""
        return z if self._context is None else torch.cat([z, self._context.to(z.dtype)], 1)

    def _pieces(self, theta: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Biases and responses (None without time) of all layers, and the weight that each computes with."""
        b, *rest = theta.split(self._sizes)
        r = rest.pop(0) if self._timed else None
        weights = zip(rest, self.shapes, strict=True)
        return b, r, [self.kind.unflat(row, shape).to(self.dtype) for row, shape in weights]


@dataclass(frozen=True)
class _PlainMap:
    """A layer in operations that record a graph."""

    kind: type[LayerMap]
    weight: Tensor

    def apply(self, x: Tensor, b: Tensor | None = None) -> Tensor:
        y = self.kind.product(x, self.weight)
        return y if b is None else y + b

    def transpose(self, v: Tensor) -> Tensor:
        return self.kind.transposed(v, self.weight)


class Layers(NamedTuple):
    """The parameters of equation (1).

    Attributes:
        W: the linear map of each layer.
        b: the biases of all layers, concatenated to one row.
        r: their responses, the change of each bias per unit of time, as such a row; None if no layer takes time.
    """

    W: Sequence[Any]
    b: Tensor
    r: Tensor | None


def _without_autocast(z: Tensor) -> AbstractContextManager[object]:
    """Context without autocast on the device of ``z``, for code that chooses its dtypes itself."""
    return torch.autocast(z.device.type, enabled=False) if autocasts(z) else nullcontext()


def _as_time(t: Tensor | float, z: Tensor) -> Tensor:
    if not isinstance(t, Tensor):
        return z.new_tensor(t)
    if t.numel() != 1:  # one time per sample would be broadcast along the units of the layers
        raise ConfigError(f"this field takes one time for all samples, not times of shape {tuple(t.shape)}.")
    return t


def _plain(stack: Stack, t: Tensor, z: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Velocity and product, in operations that autograd can differentiate."""
    with _without_autocast(z):
        f, y = _velocity(stack, stack.plain, t, z)
        if g is None:
            return f.to(z.dtype), None
        product = _product(stack, stack.plain, y, g)[0].to(z.dtype)
        return f.to(z.dtype), product.expand(*g.shape[: g.dim() - z.dim()], *z.shape)


# equations (1) and (3) ------------------------------------------------------------------------------------------


def _velocity(
    stack: Stack, layers: Layers, t: Tensor, z: Tensor, a: list[Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Equation (1): the velocity ``f`` and the list ``y``. A given list ``a`` receives ``a_1 ... a_{L-1}``."""
    (W, b, r), s, (*hidden, last) = layers, stack.activation, stack.shapes
    b_and_t_r = b if r is None else torch.addcmul(b, r, t.to(b.dtype))
    rows = b_and_t_r.to(stack.dtype).split(stack.bias_sizes)  # the bias of each layer
    u = stack.cast(z)
    y: list[Tensor] = []  # torch.compile cannot trace list[Tensor]()
    for W_k, row, shape in zip(W, rows, hidden, strict=False):  # W_L remains
        a_k = W_k.apply(u, stack.kind.unflat_bias(row, shape[0], stack.event))
        u = s.value(a_k)
        y.append(u if s.keeps_output else a_k)
        if a is not None:
            a.append(a_k)
    return W[-1].apply(u, stack.kind.unflat_bias(rows[-1], last[0], stack.event)), y


def _product(
    stack: Stack, layers: Layers, y: Sequence[Tensor], g: Tensor, a: list[Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Equation (3): from ``g = g_{L-1}``, the product ``g_0`` and the list ``g_1 ... g_{L-2}``.

    Without a graph it may be given the list ``a``. It empties the list and overwrites the tensors, because on a CPU
    ``v_k`` is faster to compute from ``a_k`` and in its memory than from ``y_k`` and in fresh memory.
    """
    s, g_k, passed = stack.activation, g.to(stack.dtype), []
    for W_k, y_k in zip(layers.W[-2::-1], y[::-1], strict=True):
        passed.append(g_k)
        v_k = s.backward_over(g_k, a.pop(), y_k) if a else s.backward(g_k, y_k)
        g_k = W_k.transpose(v_k)
    return g_k, passed[:0:-1]  # without g_{L-1}, which the graph's node has as an input


def _colors(stack: Stack, layers: Layers, t: Tensor, z: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Velocity and products with ``vectors (K, *z.shape)``, as of the colors of an exact trace, without a graph.

    Equation (1) runs once, and the slopes ``d_k`` in (3) serve all products.
    """
    f, y = _velocity(stack, layers, t, z)
    d, batch, products = list(map(stack.activation.slope, y)), len(z), list[Tensor]()
    pixels = max(batch * torch.Size(stack.event).numel(), 1)
    # a larger batch fills a GPU, whose memory still bounds it
    for some in vectors.split(max(1, _PIXELS_AT_ONCE.get(z.device.type, 200_000) // pixels)):
        g_k = layers.W[-1].transpose(stack.cast(some.flatten(0, 1)))
        for W_k, d_k in zip(layers.W[-2::-1], d[::-1], strict=True):
            v_k = g_k.unflatten(0, (len(some), batch)).mul_(d_k)
            g_k = W_k.transpose(v_k.flatten(0, 1))
        products.append(g_k.unflatten(0, (len(some), batch)).to(z.dtype))
    return f.to(z.dtype), torch.cat(products)


# their graph node -----------------------------------------------------------------------------------------------


class _Evaluation(torch.autograd.Function):
    """Velocity, and the product (None without noise)."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor | None]:
        stack, t, z, g_last, _ = ctx.stack, *tensors = args
        with _without_autocast(z):
            a = None if g_last is None else list[Tensor]()
            f, y = _velocity(stack, stack.fast, t, z, a)
            product, g = None, list[Tensor]()
            if g_last is not None:
                product, g = _product(stack, stack.fast, y, g_last, a)
                product = product.to(z.dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *y, *g)
        return f.to(z.dtype), product

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        stack: Stack = ctx.stack
        of_velocity, of_product = grad_outputs
        if of_velocity is None and of_product is None:
            return (None,) * 5
        saved = ctx.saved_tensors  # read once, because torch's checkpoint unpacks saved tensors only once
        inputs, rest = saved[:4], saved[4:]
        with _without_autocast(inputs[1]):
            if torch.is_grad_enabled():  # create_graph=True: compute again in operations that autograd records
                t, z, g_last, theta = inputs = _aliases(inputs)
                layers = stack.layers_of(theta)
                f, y = _velocity(stack, layers, t, z)
                product = None if g_last is None else _product(stack, layers, y, g_last)[0].to(z.dtype)
                return None, *_by_autograd((f.to(z.dtype), product), grad_outputs, inputs)
            y, g = rest[: stack.activations], rest[stack.activations :]
            return None, *_gradients(stack, inputs, ctx.needs_input_grad[1:], grad_outputs, y, g)


def _aliases(inputs: Sequence[Tensor | None]) -> list[Any]:
    """Aliases of a node's inputs, so that ``autograd.grad`` stops there and does not enter earlier evaluations.

    The state depends on the weights through earlier evaluations. The nodes of those add that part themselves.
    """
    # not view_as, which changes the strides of dimensions of size 1 and so the layout for a convolution
    return [None if x is None else x[...] for x in inputs]


def _by_autograd(
    outputs: Sequence[Tensor | None], cotangents: Sequence[Tensor | None], arguments: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Compute the gradients by autograd, for ``create_graph=True``. This is slower, and they have a graph."""
    pairs = zip(outputs, cotangents, strict=True)
    given = [(x, c) for x, c in pairs if x is not None and c is not None and x.requires_grad]
    inputs = [x for x in arguments if x is not None and x.requires_grad]
    if not given:  # only the time requires a gradient, and no layer takes the time
        return [None] * len(arguments)
    ends, seeds = zip(*given, strict=True)
    gradients = iter(torch.autograd.grad(ends, inputs, seeds, create_graph=True, allow_unused=True))
    return [None if x is None or not x.requires_grad else next(gradients) for x in arguments]


# equations (4) to (6), without a graph ---------------------------------------------------------------------------


def _gradients(
    stack: Stack,
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    cotangents: Sequence[Tensor | None],
    y: Sequence[Tensor],
    g: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """Gradients with respect to the inputs of a node, ``t``, ``z``, ``g_{L-1}`` and ``theta``.

    Args:
        stack: the stack of the node.
        inputs: the inputs.
        needs: which of the inputs need a gradient.
        cotangents: ``q_L`` and ``h_0``; None is zero.
        y: the list ``y`` of equation (1).
        g: ``g_1 ... g_{L-2}`` of equation (3).
    """
    g_last, (q, h) = inputs[2], cotangents
    needs_g, needs_theta = needs[2:]
    c: Sequence[Tensor] | None = None
    d, of_weights = list[Tensor](), list[Tensor]()
    g_grad = None
    if h is not None:
        g = [*g, g_last.to(stack.dtype)]
        c, d, of_weights, h = _upward(stack, stack.cast(h), y, g, needs_theta)
        g_grad = h.sum_to_size(g_last.shape).to(g_last.dtype) if needs_g else None
    t_grad, z_grad, theta_grad = _downward(stack, inputs, needs, q, y, c, d)
    if theta_grad is not None and of_weights:
        more = torch.cat(of_weights)
        theta_grad[stack.start :][: len(more)].add_(more)
    return t_grad, z_grad, g_grad, theta_grad


def _upward(
    stack: Stack, h: Tensor, y: Sequence[Tensor], g: Sequence[Tensor], needs_theta: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Equation (4) from ``h = h_0``: the lists ``c`` and ``d``, ``v_k h_{k-1}^T`` as rows, and ``h_{L-1}``."""
    assert stack.fast is not None
    s = stack.activation
    c, d, of_weights = list[Tensor](), list[Tensor](), list[Tensor]()
    for W_k, y_k, g_k in zip(stack.fast.W, y, g, strict=False):  # W_L remains
        d_k = s.slope(y_k)
        v_k = d_k * g_k
        if needs_theta:
            of_weights.append(stack.kind.flat(W_k.gradient(h, v_k)))
        p_k = W_k.apply(h)
        c.append(s.second_order(y_k, d_k, g_k, v_k, p_k))
        d.append(d_k)
        h = p_k.mul_(d_k)  # in place, because on a CPU fresh memory costs more than the arithmetic
    return c, d, of_weights, h


def _downward(
    stack: Stack,
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    q: Tensor | None,
    y: Sequence[Tensor],
    c: Sequence[Tensor] | None,
    d: Sequence[Tensor],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Equations (5) and (6) from ``q = q_L``: gradients with respect to ``t``, ``z`` and ``theta``.

    The gradient with respect to ``theta`` lacks the terms ``v_k h_{k-1}^T``. If the product has no cotangent, ``c``
    is None, for zero, and ``d`` is not read.
    """
    assert stack.fast is not None
    (t, z, *_), (needs_t, needs_z, _, needs_theta) = inputs, needs
    (W, b, r), s = stack.fast, stack.activation
    q_k = stack.cast(z.new_zeros(len(z), stack.shapes[-1][0], *stack.event) if q is None else q)
    of_biases, of_weights = list[Tensor](), list[Tensor]()  # from layer L to layer 1
    z_grad: Tensor | None = None
    for k in range(stack.activations + 1, 0, -1):
        W_k = W[k - 1]
        if needs_t or needs_theta:
            of_biases.append(stack.kind.sum_batch(q_k))
        if needs_theta:
            u = s.output(y[k - 2]) if k > 1 else stack.cast(z)
            of_weights.append(stack.kind.flat(W_k.gradient(u, q_k)))
        if k > 1:
            below, y_k = W_k.transpose(q_k), y[k - 2]  # of layer k - 1, whose q comes next
            # in place of c, because on a CPU fresh memory costs more than the arithmetic
            q_k = s.backward(below, y_k) if c is None else c[k - 2].addcmul_(below, d[k - 2])
        elif needs_z:
            z_grad = W_k.transpose(q_k).to(z.dtype)
    if not of_biases:
        return None, z_grad, None
    # Reserve the place of the responses in the row, to be filled below, since a second concatenation would copy
    # everything.
    room = [] if r is None or not needs_theta else [r]
    theta_grad = torch.cat([*of_biases[::-1], *room, *of_weights[::-1]]).to(stack.theta.dtype)
    b_grad = theta_grad[: len(b)]
    if room:
        torch.mul(b_grad, t.to(b_grad.dtype).reshape(()), out=theta_grad[len(b) :][: len(b)])
    t_grad = None
    if needs_t and r is not None:
        t_grad = (b_grad * r).sum().to(t.dtype).reshape(t.shape)
    return t_grad, z_grad, theta_grad if needs_theta else None
