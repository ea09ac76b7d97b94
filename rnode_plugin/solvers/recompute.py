"""Steps that keep their inputs alone and run again in the backward pass.

torch's own checkpoint does this well for a plain field. One that differentiates inside of its evaluation (a
product with the Jacobian by automatic differentiation) makes it run the step again within the forward pass, once a
stage; for these there is :func:`replay`, which runs a step once forward, without a graph, and once backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from ..errors import ConfigError
from ..types import BoundDynamics

__all__ = ["checkpointed", "replay"]


def checkpointed(function: Callable[..., Any], dynamics: BoundDynamics, z: Tensor, t: Tensor) -> Callable[..., Any]:
    """``function`` without its activations kept; values and gradients are the same.

    Args:
        function: of tensors and nested tuples and dictionaries of tensors, to the same; it evaluates ``dynamics``.
        dynamics: with an attribute ``inner_autograd = False`` it promises not to differentiate inside.
        z, t: where to evaluate it once to find the tensors that it depends on.
    """
    leaves = None
    if torch.is_grad_enabled() and getattr(dynamics, "inner_autograd", True):
        leaves = _leaves(dynamics, z, t)
    if leaves is None:
        return lambda *args: checkpoint(function, *args, use_reentrant=False)
    return lambda *args: replay(function, args, leaves)


def _leaves(dynamics: BoundDynamics, z: Tensor, t: Tensor) -> list[Tensor] | None:
    """The leaf tensors that the dynamics depend on; None where they read the result of another computation."""
    # draws nothing from the streams that the solve will draw from
    with torch.enable_grad(), torch.random.fork_rng([z.device] if z.is_cuda else []):
        state = z.detach().requires_grad_()
        start = _age(state)
        rates = dynamics(t.detach(), state)
    found = _walk([x for x in tree_flatten(rates)[0] if isinstance(x, Tensor)], start)
    if found is None:
        return None
    # a module may read some of its parameters at other times only
    known = [p for p in getattr(dynamics, "parameters", tuple)() if p.requires_grad]
    return list({id(x): x for x in [*found, *known] if x is not state}.values())


def _walk(outputs: Sequence[Tensor], start: int) -> list[Tensor] | None:
    """The leaves of a graph made since ``start``; None where it hangs on to an older one.

    An evaluation's graph ends in its leaves. A node in it that is older than the evaluation belongs to the graph
    of somebody else, which a replay would have to run through at each step.
    """
    leaves: dict[int, Any] = {}
    pending = [x.grad_fn for x in outputs if x.grad_fn is not None]
    seen: set[Any] = set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        variable: Tensor | None = getattr(node, "variable", None)
        if variable is not None:
            leaves[id(variable)] = variable
        elif node._sequence_nr() < start:  # pyright: ignore[reportAttributeAccessIssue]
            return None
        pending += [parent for parent, _ in node.next_functions if parent is not None]
    return list(leaves.values())


def _age(x: Tensor) -> int:
    """The number of the next graph node."""
    node = (x * 1).grad_fn
    assert node is not None
    return node._sequence_nr()  # pyright: ignore[reportAttributeAccessIssue]


def replay(function: Callable[..., Any], args: Sequence[Any], leaves: Sequence[Tensor]) -> Any:
    """``function(*args)``, whose graph is made when its gradient is asked for.

    Gradients reach the tensors in ``args`` and ``leaves``; they cannot be differentiated again. Random numbers and
    autocast are in the second run what they were in the first.
    """
    flat, structure = tree_flatten(tuple(args))
    call = _Call(function, structure, flat)
    outputs = _Replay.apply(call, *call.tensors(), *leaves)
    return call.pack(outputs)  # pyright: ignore[reportArgumentType]


class _Call:
    """One call of a function on nested arguments, as a function of flat tensors."""

    def __init__(self, function: Callable[..., Any], structure: Any, flat: list[Any]) -> None:
        self.function, self.structure = function, structure
        self.where = [i for i, x in enumerate(flat) if isinstance(x, Tensor)]
        self.flat: list[Any] = flat
        self.output_structure: Any = None
        self.outputs: list[Any] = []
        self.is_tensor: list[bool] = []

    def tensors(self) -> list[Tensor]:
        return [self.flat[i] for i in self.where]

    def forget(self) -> None:
        """Leave the tensors to autograd, which frees them in time."""
        self.flat = [None if i in self.where else x for i, x in enumerate(self.flat)]

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        flat = list(self.flat)
        for i, x in zip(self.where, tensors, strict=True):
            flat[i] = x
        outputs, self.output_structure = tree_flatten(self.function(*tree_unflatten(flat, self.structure)))
        self.outputs = [None if isinstance(x, Tensor) else x for x in outputs]
        self.is_tensor = [isinstance(x, Tensor) for x in outputs]
        return [x for x in outputs if isinstance(x, Tensor)]

    def pack(self, tensors: Sequence[Tensor]) -> Any:
        rest = iter(tensors)
        flat = [next(rest) if is_tensor else x for is_tensor, x in zip(self.is_tensor, self.outputs, strict=True)]
        return tree_unflatten(flat, self.output_structure)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(call.where)
        kind = tensors[0].device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.random = (torch.get_rng_state(), *get_device_states(*tensors[:count]))
        outputs = call.run(tensors[:count])
        call.forget()
        ctx.call = call
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        # a function may hand an input through, which autograd must see as a new tensor
        inputs = {id(x) for x in tensors}
        return tuple(x.view_as(x) if id(x) in inputs else x for x in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        call, tensors = ctx.call, ctx.saved_tensors
        count = len(call.where)
        needed = ctx.needs_input_grad[1:]
        # all require a gradient, so that nothing inside makes a leaf of its own from one that does not
        inputs = [x.detach().requires_grad_() if x.is_floating_point() else x for x in tensors[:count]]
        with torch.enable_grad(), _as_before(*ctx.random), _autocast(*ctx.autocast):
            start = _age(torch.zeros((), requires_grad=True))
            outputs = call.run(inputs)
        _check_complete(outputs, [*inputs, *tensors[count:]], start)
        pairs = [(x, g) for x, g in zip(outputs, gradients, strict=True) if g is not None and x.requires_grad]
        sources = [x for x, need in zip([*inputs, *tensors[count:]], needed, strict=True) if need]
        found: Sequence[Tensor | None] = [None] * len(sources)
        if pairs and sources:
            found = torch.autograd.grad([x for x, _ in pairs], sources, [g for _, g in pairs], allow_unused=True)
        rest = iter(found)
        return None, *(next(rest) if need else None for need in needed)


def _check_complete(outputs: Sequence[Tensor], known: Sequence[Tensor], start: int) -> None:
    """Refuse to lose a gradient in silence.

    Raises:
        ConfigError: where a step reads a tensor that the first evaluation of its solve did not show.
    """
    leaves, ids = _walk(outputs, start), {id(x) for x in known}
    if leaves is None or any(id(x) not in ids for x in leaves):
        raise ConfigError(
            "a step depends on a tensor that the vector field did not read at the solve's first time, so that its "
            "gradient would be lost: make it a parameter of the field's module, or use gradient='autograd'."
        )


@contextlib.contextmanager
def _as_before(cpu: Tensor, devices: list[int], states: list[Tensor]) -> Iterator[None]:
    with torch.random.fork_rng(devices):
        torch.set_rng_state(cpu)
        set_device_states(devices, states)
        yield


def _autocast(kind: str, dtype: torch.dtype, enabled: bool) -> torch.autocast:
    return torch.autocast(kind, dtype=dtype, enabled=enabled)
