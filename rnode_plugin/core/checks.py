"""check_field: whether the derivatives of a vector field by autograd are what a solve takes them for.

They are compared with difference quotients, so nothing is read of the graph of the field. A solve checks a field
before it starts, once for each net and use, see :func:`once`.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError, first_line, is_out_of_memory
from .modules import module_of
from .part import check_real

_WAYS = (
    "Use trace_estimator='difference', which needs no product, or the layer without its kernel or checkpoint. "
    "Values under torch.no_grad() are right."
)

_WITHOUT_GRAPH = (
    "the vector field runs without a graph (no_grad, detach or numpy inside it), so its Jacobian would count as "
    "zero in jacfrob and in a trace. Let the field run with gradients, or use penalties that need no Jacobian, "
    "such as kinetic."
)

_CUT = (
    "a product of autograd with the Jacobian of the vector field differs from a difference quotient: a part of the "
    "field runs without a graph (no_grad, detach or numpy inside it), or a backward pass or hook in it is not the "
    "derivative. Let all of the field run with gradients, or use penalties that need no Jacobian, such as kinetic."
)

_NOT_TWICE = (
    "a backward pass in the vector field cannot be differentiated: a second derivative by autograd differs from a "
    "difference quotient, so that the gradient of jacfrob or of a log-density, or the value of a derivative along "
    f"a direction, would be wrong. {_WAYS}"
)

_NOT_THREE_TIMES = (
    "torch computes a wrong third derivative of the vector field, as of LayerNorm and of batch norm in training. "
    "The gradient of total_derivative, directional, taylor, curl and strain takes that derivative. For states "
    "(B, D) torch.nn.GroupNorm(1, D) computes the same as LayerNorm(D); put batch norm into evaluation mode. "
    "Values without a gradient are right."
)

FUSED_ATTENTION = (
    "torch's fused attention has no second derivative, which the gradient of a product with the Jacobian and a "
    "derivative along a direction need. Run the forward pass, and also the backward pass of 'checkpointed' and of "
    f"an adjoint, inside `with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):`. {_WAYS}"
)

_CHECKS = 3  # of a use without a conclusive one
_passed: WeakKeyDictionary[Any, dict[Hashable, int]] = WeakKeyDictionary()  # number of checks that are left


def once(owner: object, use: Hashable, check: Callable[[], bool]) -> None:
    """Run ``check`` unless it was conclusive for this owner and use before, or ran three times.

    Args:
        owner: the net or the function that is checked, to which the result belongs.
        use: all that the result depends on, such as the kinds of products, the dtype and the training flag.
        check: returns whether it was conclusive.
    """
    try:
        left = _passed.setdefault(owner, {})
    except TypeError:  # an owner without weak references keeps no result
        check()
        return
    if left.setdefault(use, _CHECKS):
        left[use] = 0 if check() else left[use] - 1


def check_field(
    field: Callable[[Tensor, Tensor], Tensor],
    t: Tensor,
    z: Tensor,
    *,
    net: nn.Module | None = None,
    gradients: bool = True,
    along: bool = False,
    apart: bool = False,
    radius: int | None = None,
) -> bool:
    """Compare the derivatives that autograd takes of a vector field with difference quotients.

    A solve with products or derivatives calls it before it starts, once for each net and use. Call it after a
    change of the net that was solved before, such as another layer. It evaluates the field 5 times, or 9 times
    where the first step lengths cannot tell, without effects on random generators and buffers.

    Args:
        field: the vector field ``f(t, z)``.
        t: the time, a scalar. The derivatives of a field that is zero there cannot be compared.
        z: the state ``(B, *event)``, of real numbers.
        net: the module that the field calls; None: the one that is found in ``field``.
        gradients: whether the products ``v^T df/dz`` and derivatives are differentiated, as by a loss.
        along: whether derivatives along directions, ``df/dz v``, are taken, as of ``total_derivative``.
        apart: whether the velocity of one sample must not depend on other samples, as for an exact trace.
        radius: the number of pixels beyond which the velocity ``(B, C, *space)`` at a pixel must not depend on the
            state, as for an exact trace by colors; None: it may depend on all.

    Returns:
        bool: whether the check was conclusive. It is not where derivatives are zero, at kinks, in low precision,
        for one sample with ``apart``, and where values cannot be read.

    Raises:
        ConfigError: names what differs, and what to do.

    Example:
        >>> import torch
        >>> import rnode_plugin
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> rnode_plugin.check_field(lambda t, z: t * net(z), torch.tensor(0.5), torch.randn(4, 2))
        True
    """
    check_real(z)
    if z.is_meta or not z.numel() or torch.compiler.is_compiling():
        return False
    net = module_of(field) if net is None else net
    same = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)  # a checkpoint around sees no tensor
    with torch.inference_mode(False), torch.enable_grad(), same, _precision(net, z):
        evaluation = _Evaluation(_without_effects(field, net), t.detach().clone(), z.detach().clone())
        conclusive = _check_derivatives(evaluation, gradients, along)
        if apart:
            conclusive &= _refuse_mixed_samples(evaluation)
        if radius is not None:
            conclusive &= _refuse_wider(evaluation, radius)
    return conclusive


def warn_of_batch_norm(net: nn.Module | None) -> None:
    """Say that a product ``v^T J`` of batch norm in training mode is one of the whole batch."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    if net is not None and any(isinstance(each, kinds) and each.training for each in net.modules()):
        warnings.warn(
            "batch norm in training mode makes the velocity of one sample depend on the others, so a penalty that "
            "takes a product with the Jacobian, as jacfrob does, is one of the whole batch: use group norm, or "
            "evaluation mode for that layer, or batch_dim=None, which makes the whole state one sample.",
            stacklevel=2,
        )


def _precision(net: nn.Module | None, z: Tensor) -> AbstractContextManager[object]:
    """Context without autocast, whose precision hides differences, unless the weights need its casts."""
    if net is not None and any(x.is_floating_point() and x.dtype is not z.dtype for x in net.parameters()):
        return nullcontext()
    return torch.autocast(z.device.type, enabled=False)


class _Call(nn.Module):
    """Calls a function that calls ``net``, for ``torch.func.functional_call``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, function: Callable[[], Tensor]) -> Tensor:
        return function()


def _without_effects(
    field: Callable[[Tensor, Tensor], Tensor], net: nn.Module | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """The field, which draws the same random numbers at each call and writes into copies of its net's buffers."""
    buffers = {} if net is None or not net.training else dict(net.named_buffers(prefix="net"))

    def evaluate(t: Tensor, z: Tensor) -> Tensor:
        with torch.random.fork_rng([z.device] if z.is_cuda else []):
            if net is None or not buffers:
                return field(t, z)
            # a buffer that a net computed keeps its graph
            copies = {name: x.clone() for name, x in buffers.items() if not x.requires_grad}
            return torch.func.functional_call(_Call(net), copies, (lambda: field(t, z),), tie_weights=False)

    return evaluate


class _Evaluation:
    """One evaluation of a field with its graph.

    Attributes:
        z, dz: the state as a variable, and the velocity ``(B, *event)`` in its dtype.
        signs: random vectors ``v`` and ``w`` of -1 and 1, of the shape of ``z``.
        eps: the rounding of the velocity.
    """

    def __init__(self, field: Callable[[Tensor, Tensor], Tensor], t: Tensor, z: Tensor) -> None:
        self.field, self.t, self.z = field, t, z.requires_grad_()
        draws = np.random.default_rng(0).integers(2, size=(2, *z.shape)) * 2 - 1
        self.signs = torch.from_numpy(draws).to(z.device, z.dtype)
        velocity = field(t, self.z)
        if velocity.shape != z.shape:
            raise ConfigError(
                f"the vector field returned shape {tuple(velocity.shape)} for a state of shape {tuple(z.shape)}; "
                "f(t, z) must have the shape of z."
            )
        self.eps = max(torch.finfo(x.dtype).eps for x in (velocity, z))
        self.dz = velocity.to(z.dtype)

    def at(self, z: Tensor) -> _Evaluation:
        """The evaluation at another state."""
        return _Evaluation(self.field, self.t, z.detach())

    def pull(self, v: Tensor, *, graph: bool = False) -> Tensor:
        """``v^T df/dz`` for ``v (B, *event)``; zero where the graph does not reach the state."""
        return _gradient(self.dz, self.z, v, graph=graph)


def _gradient(y: Tensor, x: Tensor, v: Tensor, *, graph: bool = False) -> Tensor:
    """``v^T dy/dx``; zero where the graph does not reach ``x``."""
    if not y.requires_grad:
        return torch.zeros_like(x)
    (product,) = torch.autograd.grad(y, x, v, retain_graph=True, create_graph=graph, allow_unused=True)
    return torch.zeros_like(x) if product is None else product


def _check_derivatives(here: _Evaluation, gradients: bool, along: bool) -> bool:
    """Compare products with the Jacobian, and their derivatives, with difference quotients along ``w``.

    With ``p = v^T J``, reverse mode through p gives ``J w``, and the derivative of p along w, since the Hessian of
    ``v^T f`` is symmetric; reverse mode through ``J w`` gives that derivative again, as a third derivative.
    """
    v, w = here.signs
    w = w * (here.z.detach().abs() + 0.1)
    again = gradients or along  # a derivative along a direction takes two derivatives
    u = v.clone().requires_grad_()
    product = here.pull(u, graph=True)
    slope = second = third = torch.zeros_like(w)
    try:
        slope = _gradient(product, u, w, graph=True)
        second = _gradient(product, here.z, w) if again else second
    except RuntimeError as error:
        if again or is_out_of_memory(error):
            _refuse(FUSED_ATTENTION if "scaled_dot_product" in str(error) else _NOT_TWICE, error)
    try:
        third = _gradient(slope, here.z, v) if gradients and along else second
    except RuntimeError as error:
        _refuse(_NOT_THREE_TIMES, error)

    # a product times w has the unit of the velocity, and about its rounding
    product, slope, second, third, v, scale = map(_host, (product, slope, second, third, v, w))
    rounding = 4 * here.eps * _host(here.dz).norm()
    velocity = _Quotient(_host(here.dz), rounding)
    gradient = _Quotient(product * scale, rounding)
    quotients = [velocity, gradient] if again else [velocity]
    step = here.eps ** (1 / 3)
    for _ in range(2):
        ends = [here.at(here.z + k * step * w) for k in (-2, -1, 1, 2)]
        velocity.set([_host(end.dz) for end in ends], step)
        if again:
            gradient.set([_host(end.pull(here.signs[0])) * scale for end in ends], step)
        unclear = [quotient for quotient in quotients if not quotient.clear]
        if not unclear:
            break
        step *= 30 if unclear[0].rounds else 1 / 30

    total, size = (product * scale).sum(), (product * scale).norm() + slope.norm()
    if (total - (v * slope).sum()).abs() <= 100 * here.eps * size:  # J w is the one of these products
        wrong = velocity.differs(slope)
    else:
        wrong = velocity.differs(total, v)
    if wrong:
        _refuse(_CUT if product.any() else _WITHOUT_GRAPH)
    if again and (velocity.differs(slope) or gradient.differs(second * scale)):
        _refuse(_NOT_TWICE)
    if gradient.differs(third * scale):
        _refuse(_NOT_THREE_TIMES)
    return all(quotient.clear for quotient in quotients)


class _Quotient:
    """The central difference quotient of a function along a direction, with a bound of its error.

    The bound takes the change between two step lengths, which shows what is not smooth and rounding that varies,
    the difference between both sides, which shows a kink, and rounding.

    Attributes:
        clear: whether the bound is far below the quotient.
        rounds: whether the bound falls with a longer step.
    """

    def __init__(self, center: Tensor, rounding: Tensor) -> None:
        self.center, self.rounding, self.clear, self.rounds = center, rounding, False, False

    def set(self, ends: Sequence[Tensor], step: float) -> None:
        """Set the values at -2, -1, 1 and 2 steps, unless the quotient is clear already."""
        if self.clear:
            return
        far_before, before, after, far_after = ends
        self.value = (after - before) / (2 * step)
        coarse = (far_after - far_before) / (4 * step)
        bend, far_bend = (
            (after + before - 2 * self.center) / step,
            (far_after + far_before - 2 * self.center) / step,
        )
        size = self.value.norm()
        self.bound = 1e-3 * size + 3 * (self.value - coarse).norm() + bend.norm() + self.rounding / step
        self.clear = bool(self.bound < 0.3 * size)
        self.rounds = bool(far_bend.norm() < 2 * bend.norm())

    def differs(self, exact: Tensor, v: Tensor | None = None) -> bool:
        """Whether a derivative by autograd differs from the quotient, or from its inner product with ``v``."""
        if not self.clear:
            return False
        # errors of random signs add up to their norm, or a few times as much
        value, bound = (self.value, self.bound) if v is None else ((self.value * v).sum(), 3 * self.bound)
        difference = (exact - value).norm()
        return bool(difference.isfinite() and difference > bound)  # a derivative overflows before its velocity


def _host(x: Tensor) -> Tensor:
    """``x`` on the host in double precision, without its graph."""
    return x.detach().cpu().double()


def _refuse(text: str, error: RuntimeError | None = None) -> NoReturn:
    """Raise a ConfigError with this text, and with the words of an ``error`` of torch."""
    if error is not None and is_out_of_memory(error):
        raise error
    words = "" if error is None else f" torch says: {first_line(error)}"
    raise ConfigError(text + words) from error


def _refuse_mixed_samples(here: _Evaluation) -> bool:
    """Refuse a field whose velocity at one sample depends on other samples, since one product would mix their rows.

    If samples are independent, scaling a vector by one number per sample scales the product by the same numbers.
    They are powers of two, so that low precision rounds both in the same way.

    Returns:
        bool: whether the check was conclusive. It is not for one sample, nor for a Jacobian of zero.

    Raises:
        ConfigError: for samples that depend on each other.
    """
    z = here.z
    powers = np.random.default_rng(0).integers(8, size=len(z))
    powers[:8] = np.arange(8)[: len(z)]  # samples of a small batch all differ
    scale = torch.from_numpy(2**powers).to(z.device, z.dtype).reshape(-1, *(1 for _ in z.shape[1:]))
    plain = here.pull(torch.ones_like(z))
    # sqrt(eps) is far above rounding, which is of order eps
    bound = here.eps**0.5 * (scale * plain).abs().amax()
    if ((here.pull(scale.expand(z.shape)) - scale * plain).abs() > bound).any():
        raise ConfigError(
            "the velocity of one sample depends on other samples, as in a graph or under batch norm, so the exact "
            "Jacobian of one sample does not exist. Give batch_dim=None, which makes the whole state one sample, "
            "to NeuralODE, odeint, regularize or penalties_at, or estimate by a random trace estimator."
        )
    return len(z) > 1 and bool(plain.any())


def _refuse_wider(here: _Evaluation, radius: int) -> bool:
    """Refuse a field whose velocity at a pixel depends on pixels beyond ``radius``, which colors would add up.

    The products of some pixels, with random signs on all channels, must be exactly zero outside of their radius: a
    tolerance would let too small a radius pass, whose trace is wrong by a fraction of a percent.

    Returns:
        bool: whether the check was conclusive. It is not for a Jacobian of zero, which a fresh net may have.

    Raises:
        ConfigError: for a field with a larger radius.
    """
    z, conclusive = here.z, list[bool]()
    space = z.shape[2:]
    signs = here.signs[0][(..., *(slice(1) for _ in space))]
    for pixels in _pixels_to_check(space, radius):
        at = torch.ones(space, dtype=torch.bool, device=z.device)
        far = ~at
        for dim, (places, size) in enumerate(zip(pixels, space, strict=True)):
            distances = torch.arange(size)[:, None] - torch.tensor(places)
            nearest = distances.abs().amin(1).reshape(-1, *(1 for _ in space[dim + 1 :])).to(z.device)
            at, far = at & (nearest == 0), far | (nearest > radius)
        # torch's own convolutions give exact zeros, the fast ones of cuDNN rounding errors
        with torch.backends.cudnn.flags(enabled=False):
            product = here.pull(signs * at)
        if ((product != 0) & far).any():
            raise ConfigError(
                f"the velocity at a pixel depends on pixels more than {radius} rows or columns away, so the "
                f"radius {radius} of this exact trace is too small. Each convolution adds dilation * (kernel_size "
                "// 2) to it, times all strides before it. A normalization over the image, attention or circular "
                "padding has no radius: take Exact() with a product for each dimension, or a random estimator."
            )
        conclusive.append(bool(product.any()))
    return all(conclusive)


def _pixels_to_check(space: Sequence[int], radius: int) -> Iterator[list[Sequence[int]]]:
    """The pixels of each product that checks a ``radius``, by their places along each dimension of ``space``."""
    corners = itertools.product(*({0, size - 1} for size in space))  # circular padding shows there alone
    middle = tuple(size // 2 for size in space)
    for pixel in [*corners, middle]:
        yield [[place] for place in pixel]
    # With strides the reach of a pixel depends on its place. So check pixels in all rows and columns, many at once,
    # with two pixels between their surroundings, at which wider ones show.
    apart = 2 * radius + 3
    for first in range(min(apart, max(space))):
        yield [range(first % min(size, apart), size, apart) for size in space]
