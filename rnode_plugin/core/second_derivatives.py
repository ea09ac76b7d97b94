"""Checks whether the products of a field with its Jacobian can be differentiated.

A ``torch.autograd.Function`` whose backward is a kernel, or which runs under ``no_grad``, gives correct products.
But their dependence on the state and the parameters is lost without an error, and with it the gradient of
``jacfrob`` and of a log-determinant. So the second derivative of a field that contains such a function is compared
with a difference quotient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction  # torch has no public name for it
from torch.autograd.graph import Node

from ..errors import ConfigError
from .modes import autocasts, exporting, outside_checkpoints
from .modules import module_of

_right: WeakKeyDictionary[nn.Module, set[type]] = WeakKeyDictionary()  # functions that passed, by net

_WAYS = (
    "Use trace_noise='difference' (trace_estimator= of a density), which needs no product, the penalty "
    "'finite_difference', or the layer without its kernel or checkpoint. Values under torch.no_grad() are right."
)


FUSED_ATTENTION = (
    "torch's fused attention has no second derivative, which the gradient of a product with the Jacobian and a "
    "derivative along a direction need. Run the forward pass, and also the backward pass of 'checkpointed' and of "
    f"an adjoint, inside `with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):`. {_WAYS}"
)


def wrong_third_derivative(dz: Tensor, z: Tensor, start: int) -> str:
    """Return a message that names a layer whose third derivative torch computes wrongly; ``""`` if there is none.

    The layers are those between ``z`` and ``dz``. A derivative along a direction takes two derivatives, and its
    gradient takes the third. torch differentiates the double backward of ``layer_norm``, and of ``batch_norm`` on
    the statistics of the batch, as if a part of it were constant. The newest releases refuse that for
    ``batch_norm``.

    Args:
        dz, z, start: as in :func:`check_second_derivative`.
    """
    if dz.grad_fn is None or z.is_meta or exporting() or torch.compiler.is_compiling():
        return ""
    pending, seen = [dz.grad_fn], {dz.grad_fn}
    while pending:
        node = pending.pop()
        name = node.name()
        for layer, remedy in _NORMS.items():
            # batch norm in evaluation mode is an affine map
            if layer in name and getattr(node, "_saved_training", True):
                return (
                    f"torch computes a wrong third derivative of {name.partition('Backward')[0]}. The gradient of "
                    "total_derivative, directional, taylor, curl and strain takes that derivative. "
                    f"{remedy} The penalty 'finite_difference' takes the place of total_derivative, and "
                    "values without a gradient are right."
                )
        for below, _ in node.next_functions:
            if below is not None and below not in seen and below._sequence_nr() >= start:
                seen.add(below)
                pending.append(below)
    return ""


_NORMS = {
    "LayerNorm": "For states (B, D) torch.nn.GroupNorm(1, D) computes the same as LayerNorm(D).",
    "BatchNorm": "Put batch norm into evaluation mode, or use torch.nn.GroupNorm, also in place of instance norm.",
}


class WithoutGradient(torch.autograd.Function):
    """The identity, whose backward pass raises a ConfigError with the given text."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, why: str) -> Tensor:
        ctx.why = why
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise ConfigError(ctx.why)


def check_second_derivative(
    dz: Tensor,
    z: Tensor,
    start: int,
    elsewhere: Callable[[Tensor, Tensor], Tensor],
    t: Tensor,
    *,
    field: object,
    jvp: bool,
) -> bool:
    """Refuse a field whose products lose their dependence on the state.

    With ``v^T f`` as the function, the derivative of the product ``v^T J`` along ``w`` is a Hessian times ``w``,
    which is symmetric. So reverse mode and a difference of products give the same tensor, entry by entry.

    Args:
        dz: the velocity at ``z``, with its graph.
        z: the state, a variable of that graph.
        start: nodes with a lower number are not part of that graph.
        elsewhere: evaluates the same field at another time and state.
        t: the time.
        field: the function of the field. Each custom function is compared once for the net that it calls.
        jvp: whether derivatives along directions are asked for, whose values take a second derivative.

    Returns:
        True if the check was conclusive. It is not where a comparison shows nothing, as for a velocity of zero.

    Raises:
        ConfigError: if the comparison fails, and for an attention kernel without a second derivative.
    """
    if dz.grad_fn is None or z.is_meta or exporting() or torch.compiler.is_compiling():
        return dz.grad_fn is not None
    foreign, depends = _functions(dz, z, start)
    # without parameters and with a state that is a leaf, no gradient of a product is ever taken
    if not foreign or not (jvp or depends or z.grad_fn is not None):
        return True
    for name in foreign.values():
        if name.startswith("ScaledDotProduct"):
            raise ConfigError(FUSED_ATTENTION)
    net = module_of(field)
    known = set[type]() if net is None else _right.setdefault(net, set())
    # differences of a velocity in half precision are mostly rounding, so nothing can be compared
    half = dz.dtype.itemsize < 4 or autocasts(dz)
    new = {function for function in foreign if function not in known}
    if not new or half:
        return True
    with outside_checkpoints():
        found = _compare(dz, z, elsewhere, t)
    if found is False:
        names = " and ".join(sorted({foreign[each] for each in new}))
        raise ConfigError(
            f"the backward pass of {names} cannot be differentiated: a derivative that autograd takes through it "
            "differs from a difference quotient, so that the gradient of jacfrob or of a log-density, or the value "
            f"of a derivative along a direction, would be wrong. {_WAYS}"
        )
    if found:
        known |= new
    return bool(found)


def _functions(dz: Tensor, z: Tensor, start: int) -> tuple[dict[type | str, str], bool]:
    """Custom functions and fused attention between ``z`` and ``dz`` by name, and whether parameters are read.

    Nodes older than ``start`` belong to other computations and cannot lead to ``z``.
    """
    end = z.grad_fn
    parents: dict[Node, list[Node]] = {}  # from an input of a node to the node
    assert dz.grad_fn is not None
    # a walk from the velocity down to the state, which notes the readers of each node's output
    pending: list[Node] = [dz.grad_fn]
    seen, suspects, ends = {dz.grad_fn}, dict[Node, tuple[type | str, str]](), list[Node]()
    depends = False
    while pending:
        node = pending.pop()
        variable = getattr(node, "variable", None)
        if node is end or variable is z:  # the state, as the output of a node or as a leaf
            ends.append(node)
            continue
        if variable is not None:  # another leaf, a parameter
            depends = True
            continue
        if node._sequence_nr() < start:
            depends = True
            continue
        if isinstance(node, BackwardCFunction):
            function = getattr(type(node), "_forward_cls", type(node))
            # our own functions have tested double backwards
            if not function.__module__.startswith("rnode_plugin."):
                suspects[node] = function, function.__name__
        elif node.name().startswith("ScaledDotProduct") and "Math" not in node.name():
            suspects[node] = node.name(), node.name()
        for parent, _ in node.next_functions:
            if parent is not None:
                parents.setdefault(parent, []).append(node)
                if parent not in seen:
                    seen.add(parent)
                    pending.append(parent)
    if not suspects:
        return {}, depends
    # a function that z does not reach, such as one on the time or the weights alone, is not to blame
    between = set[Node]()
    while ends:
        for node in parents.get(ends.pop(), ()):
            if node not in between:
                between.add(node)
                ends.append(node)
    return {function: name for node, (function, name) in suspects.items() if node in between}, depends


def _compare(dz: Tensor, z: Tensor, elsewhere: Callable[[Tensor, Tensor], Tensor], t: Tensor) -> bool | None:
    """Whether autograd's second derivative is right; None where differences cannot tell, such as at kinks."""
    generator = torch.Generator().manual_seed(0)
    v, w = (torch.randint(2, dz.shape, generator=generator).to(dz) * 2 - 1 for _ in range(2))
    point, w, t = z.detach(), w.to(z.dtype), t.detach()
    # one percent of the state: large against rounding in float32, small against the scale of the field
    size = 0.01 * point.square().mean().sqrt().clamp(min=0.1)

    def product(state: Tensor, *, again: bool = False) -> Tensor | None:
        # a separate evaluation, because some backward passes run only once
        velocity = elsewhere(t, state)
        return torch.autograd.grad(velocity, state, v, create_graph=again, allow_unused=True)[0]

    def difference(step: Tensor) -> Tensor:
        ends = (product((point + shift * w).requires_grad_()) for shift in (step, -step))
        later, before = (torch.zeros_like(point) if end is None else end for end in ends)
        return (later - before) / (2 * step)

    # A central difference has an error of order step^2, so that its change with the step shows how far to trust it.
    fine, coarse = difference(size), difference(2 * size)
    expected, doubt = float(fine.norm()), float((fine - coarse).norm())
    if not expected > 0 or not doubt < 0.1 * expected:
        return None
    # the Hessian of v^T f is symmetric: the gradient of (product . w) is the derivative of the product along w
    state = point.requires_grad_()
    found, exact = product(state, again=True), None
    if found is not None and found.requires_grad:
        try:
            exact = torch.autograd.grad(found, state, w, allow_unused=True)[0]
        except RuntimeError:  # torch marks some backward passes as not differentiable
            return False
    exact = torch.zeros_like(point) if exact is None else exact
    return float((exact - fine).norm()) <= 0.02 * expected + 3 * doubt
