"""Checks whether the products of a field with its Jacobian can be differentiated.

A ``torch.autograd.Function`` whose backward is a kernel, or which runs under ``no_grad``, gives correct products.
But their dependence on the state and the parameters is lost without an error, and with it the gradient of
``jacfrob`` and of a log-determinant. So the second derivative of a field that contains such a function is compared
with a difference quotient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from ..errors import ConfigError
from .modes import (
    autocasts,
    custom_function,
    number_of,
    outside_checkpoints,
    transforms_active,
    unseen,
    unwrapped,
)
from .modules import module_of

_right: WeakKeyDictionary[nn.Module, set[type]] = WeakKeyDictionary()  # functions that passed, by net

_WAYS = (
    "Use trace_estimator='difference', which needs no product, the penalty "
    "'finite_difference', or the layer without its kernel or checkpoint. Values under torch.no_grad() are right."
)


FUSED_ATTENTION = (
    "torch's fused attention has no second derivative, which the gradient of a product with the Jacobian and a "
    "derivative along a direction need. Run the forward pass, and also the backward pass of 'checkpointed' and of "
    f"an adjoint, inside `with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):`. {_WAYS}"
)


@dataclass(eq=False, slots=True)
class Evaluated:
    """One evaluation of a field with its graph, as a check reads it in any mode.

    Attributes:
        t, z, dz: time, state and velocity ``(B, *event)``.
        root: the node of the graph that makes the velocity; None if it has no graph.
        variable: the state as a variable of that graph.
        start: nodes with a lower number are not part of the graph of this evaluation.
        depends: whether a gradient may pass through the state to something else.
        pull: ``v^T df/dz`` for ``v (B, *event)``, without a graph; None where the graph does not reach the state.
        elsewhere: evaluates the same field at another time and state.
        field: the function of the field. Each custom function is compared once for the net that it calls.
    """

    t: Tensor
    z: Tensor
    dz: Tensor
    root: Node | None
    variable: Tensor
    start: int
    depends: bool
    pull: Callable[[Tensor], Tensor | None]
    elsewhere: Callable[[Tensor, Tensor], Tensor]
    field: object

    @classmethod
    def of_graph(
        cls,
        t: Tensor,
        z: Tensor,
        dz: Tensor,
        start: int,
        elsewhere: Callable[[Tensor, Tensor], Tensor],
        field: object,
    ) -> Self:
        """An evaluation outside of transforms, whose velocity has the graph of autograd."""

        def pull(v: Tensor) -> Tensor | None:
            return torch.autograd.grad(dz, z, v, True, allow_unused=True)[0] if dz.requires_grad else None

        return cls(t, z, dz, dz.grad_fn, z, start, z.grad_fn is not None, pull, elsewhere, field)


def wrong_third_derivative(seen: Evaluated) -> str:
    """Return a message that names a layer whose third derivative torch computes wrongly; ``""`` if there is none.

    The layers are those between ``z`` and ``dz``. A derivative along a direction takes two derivatives, and its
    gradient takes the third. torch differentiates the double backward of ``layer_norm``, and of ``batch_norm`` on
    the statistics of the batch, as if a part of it were constant. The newest releases refuse that for
    ``batch_norm``.

    Args:
        seen: the evaluation.
    """
    if seen.root is None or unseen(seen.z):
        return ""
    pending, visited = [seen.root], {seen.root}
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
            if below is not None and below not in visited and number_of(below) >= seen.start:
                visited.add(below)
                pending.append(below)
    return ""


_NORMS = {
    "LayerNorm": "For states (B, D) torch.nn.GroupNorm(1, D) computes the same as LayerNorm(D).",
    "BatchNorm": "Put batch norm into evaluation mode, or use torch.nn.GroupNorm, also in place of instance norm.",
}


class WithoutGradient(torch.autograd.Function):
    """The identity, whose derivative raises a ConfigError with the given text."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, why: str) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        ctx.why = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise ConfigError(ctx.why)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise ConfigError(ctx.why)


def check_second_derivative(seen: Evaluated, *, jvp: bool) -> bool:
    """Refuse a field whose products lose their dependence on the state.

    With ``v^T f`` as the function, the derivative of the product ``v^T J`` along ``w`` is a Hessian times ``w``,
    which is symmetric. So reverse mode and a difference of products give the same tensor, entry by entry.

    Args:
        seen: the evaluation.
        jvp: whether derivatives along directions are asked for, whose values take a second derivative.

    Returns:
        True if the check was conclusive. It is not where a comparison shows nothing, as for a velocity of zero.

    Raises:
        ConfigError: if the comparison fails, and for an attention kernel without a second derivative.
    """
    if seen.root is None or unseen(seen.z):
        return seen.root is not None
    foreign, depends = _functions(seen, seen.root)
    # without parameters and with a state that is a leaf, no gradient of a product is ever taken
    if not foreign or not (jvp or depends or seen.depends):
        return True
    for name in foreign.values():
        if name.startswith("ScaledDotProduct"):
            raise ConfigError(FUSED_ATTENTION)
    net, dz = module_of(seen.field), seen.dz
    known = set[type]() if net is None else _right.setdefault(net, set())
    # differences of a velocity in half precision are mostly rounding, so nothing can be compared
    half = dz.dtype.itemsize < 4 or autocasts(dz)
    new = {function for function in foreign if function not in known}
    if not new or half:
        return True
    with outside_checkpoints():
        agrees = _compare(seen)
    if agrees is False:
        names = " and ".join(sorted({foreign[each] for each in new}))
        raise ConfigError(
            f"the backward pass of {names} cannot be differentiated: a derivative that autograd takes through it "
            "differs from a difference quotient, so that the gradient of jacfrob or of a log-density, or the value "
            f"of a derivative along a direction, would be wrong. {_WAYS}"
        )
    if agrees:
        known |= new
    return bool(agrees)


def reaches_state(seen: Evaluated) -> bool:
    """Whether the graph of the velocity reaches the state, where that is a leaf, as in ``torch.func.vjp``."""
    pending, visited = [seen.root], {seen.root}
    while pending:
        if (node := pending.pop()) is None:
            continue
        if getattr(node, "variable", None) is seen.variable:
            return True
        new = {below for below, _ in node.next_functions} - visited
        visited |= new
        pending += new
    return False


def _functions(of: Evaluated, root: Node) -> tuple[dict[type | str, str], bool]:
    """Custom functions and fused attention between state and velocity by name, and whether parameters are read.

    Nodes older than ``start`` belong to other computations and cannot lead to the state.
    """
    end = of.variable.grad_fn
    parents: dict[Node, list[Node]] = {}  # from an input of a node to the node
    # a walk from the velocity down to the state, which notes the readers of each node's output
    pending: list[Node] = [root]
    seen, suspects, ends = {root}, dict[Node, tuple[type | str, str]](), list[Node]()
    depends = False
    while pending:
        node = pending.pop()
        variable = getattr(node, "variable", None)
        # the state, as the output of a node or as a leaf
        if (end is not None and node is end) or variable is of.variable:
            ends.append(node)
            continue
        if variable is not None:  # another leaf, a parameter
            depends = True
            continue
        if number_of(node) < of.start:
            depends = True
            continue
        if (function := custom_function(node)) is not None:
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


def _compare(seen: Evaluated) -> bool | None:
    """Whether autograd's second derivative is right; None where differences cannot tell, such as at kinks."""
    dz, elsewhere, inside = seen.dz, seen.elsewhere, transforms_active()
    draws = np.random.default_rng(0).integers(2, size=(2, *dz.shape)) * 2 - 1
    v, w = torch.from_numpy(draws).to(dz.device, dz.dtype)
    point, w, t = seen.z.detach(), w.to(seen.z.dtype), seen.t.detach()
    # one percent of the state: large against rounding in float32, small against the scale of the field
    size = 0.01 * point.square().mean().sqrt().clamp(min=0.1)

    def product(state: Tensor, *, again: bool = False) -> Tensor | None:
        # a separate evaluation, because some backward passes run only once
        if inside:
            return torch.func.vjp(lambda z: elsewhere(t, z), state)[1](v)[0]
        velocity = elsewhere(t, state)
        return torch.autograd.grad(velocity, state, v, create_graph=again, allow_unused=True)[0]

    def difference(step: Tensor) -> Tensor:
        places = (point + shift * w for shift in (step, -step))
        ends = (product(place if inside else place.requires_grad_()) for place in places)
        later, before = (torch.zeros_like(point) if end is None else end for end in ends)
        return (later - before) / (2 * step)

    # A central difference has an error of order step^2, so that its change with the step shows how far to trust it.
    fine, coarse = difference(size), difference(2 * size)
    expected, doubt = _norm(fine), _norm(fine - coarse)
    if not expected > 0 or not doubt < 0.1 * expected:
        return None
    # the Hessian of v^T f is symmetric: the gradient of (product . w) is the derivative of the product along w
    exact = None
    try:  # torch marks some backward passes as not differentiable
        if inside:
            exact = torch.func.vjp(product, point)[1](w)[0]
        else:
            state = point.requires_grad_()
            first = product(state, again=True)
            if first is not None and first.requires_grad:
                exact = torch.autograd.grad(first, state, w, allow_unused=True)[0]
    except RuntimeError:
        return False
    exact = torch.zeros_like(point) if exact is None else exact
    return _norm(exact - fine) <= 0.02 * expected + 3 * doubt


def _norm(x: Tensor) -> float:
    """The norm of all entries, inside ``torch.func.vmap`` those of all samples together."""
    return float(unwrapped(x).norm())
