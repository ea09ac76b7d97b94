"""Steps that keep their inputs alone and run again in the backward pass.

torch's own checkpoint does this well for a plain field. If the field differentiates inside its evaluation (a
product with the Jacobian by automatic differentiation), it runs the step again within the forward pass, once per
stage. For such fields there is :func:`replay`: it runs a step once forward, without a graph, and once backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from ...core.tensors.nested import tree_leaves
from ...core.tensors.transforms_active import transforms_active
from ...errors import ConfigError
from ...types import BoundDynamics
from .autograd_graph import find_leaves, next_number
from .flat_call import FlatCall

__all__ = ["checkpointed", "replay"]


def checkpointed(function: Callable[..., Any], dynamics: BoundDynamics, z: Tensor, t: Tensor) -> Callable[..., Any]:
    """``function`` without its activations kept; values and gradients are the same.

    Under a transform of torch.func, which records a step in its own way, this is ``function`` itself.

    Args:
        function: of tensors and nested tuples and dictionaries of tensors, to the same; it evaluates ``dynamics``.
        dynamics: with an attribute ``inner_autograd = False`` it promises not to differentiate inside. If it has a
            context manager ``repeating()``, evaluations that repeat others happen in it.
        z, t: where to evaluate it once to find the tensors that it depends on.
    """
    if transforms_active():
        return function
    leaves = None
    if torch.is_grad_enabled() and getattr(dynamics, "inner_autograd", True):
        leaves = _leaves(dynamics, z, t)
    if leaves is None:
        return lambda *args: checkpoint(_first_run_alone(function, dynamics), *args, use_reentrant=False)
    return lambda *args: replay(_first_run_alone(function, dynamics), args, leaves)


def _first_run_alone(function: Callable[..., Any], dynamics: BoundDynamics) -> Callable[..., Any]:
    """``function``, whose runs after the first one only repeat it."""
    ran = False

    def run(*args: Any) -> Any:
        nonlocal ran
        with _repeating(dynamics) if ran else contextlib.nullcontext():
            ran = True
            return function(*args)

    return run


def _repeating(dynamics: BoundDynamics) -> contextlib.AbstractContextManager[Any]:
    return getattr(dynamics, "repeating", contextlib.nullcontext)()


def _leaves(dynamics: BoundDynamics, z: Tensor, t: Tensor) -> list[Tensor] | None:
    """The leaf tensors that the dynamics depend on; None if they read the result of another computation."""
    # draws nothing from the streams that the solve will draw from
    devices = [z.device] if z.is_cuda else []
    with torch.enable_grad(), torch.random.fork_rng(devices), _repeating(dynamics):
        state = z.detach().requires_grad_()
        start = next_number(state)
        rates = dynamics(t.detach(), state)
    found = find_leaves([x for x in tree_leaves(rates) if isinstance(x, Tensor)], start)
    if found is None:  # a replay would run through that other graph at each step
        return None
    # a module may read some of its parameters at other times only
    known = [p for p in getattr(dynamics, "parameters", tuple)() if p.requires_grad]
    return list({id(x): x for x in [*found, *known] if x is not state}.values())


def replay(function: Callable[..., Any], args: Sequence[Any], leaves: Sequence[Tensor]) -> Any:
    """``function(*args)``, whose graph is made when its gradient is asked for.

    Gradients reach the tensors in ``args`` and ``leaves``; they cannot be differentiated again. Random numbers and
    autocast are in the second run what they were in the first.
    """
    call = FlatCall(function, args)
    return call.result(_Replay.apply(call, *call.tensors(), *leaves))  # pyright: ignore[reportArgumentType]


class _Replay(torch.autograd.Function):
    """A call as one node of the graph. Its forward looks at the random state, so it keeps its own context."""

    @staticmethod
    def forward(ctx: Any, call: FlatCall, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.autocast = _autocast_of(tensors[0].device.type)
        ctx.random = (torch.get_rng_state(), *get_device_states(*tensors[: call.count]))
        outputs = call.run(tensors[: call.count])
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
        needed = ctx.needs_input_grad[1:]
        # all require a gradient, so that nothing inside makes a leaf of its own from one that does not
        inputs = [x.detach().requires_grad_() if x.is_floating_point() else x for x in tensors[: call.count]]
        with torch.enable_grad(), _random_state(*ctx.random), ctx.autocast():
            start = next_number(torch.zeros((), requires_grad=True))
            outputs = call.run(inputs)
        known = [*inputs, *tensors[call.count :]]
        _check_complete(outputs, known, start)
        pairs = [(x, g) for x, g in zip(outputs, gradients, strict=True) if g is not None and x.requires_grad]
        sources = [x for x, need in zip(known, needed, strict=True) if need]
        found: Sequence[Tensor | None] = [None] * len(sources)
        if pairs and sources:
            found = torch.autograd.grad([x for x, _ in pairs], sources, [g for _, g in pairs], allow_unused=True)
        rest = iter(found)
        return None, *(next(rest) if need else None for need in needed)


def _check_complete(outputs: Sequence[Tensor], known: Sequence[Tensor], start: int) -> None:
    """Refuse to lose a gradient in silence.

    Raises:
        ConfigError: if a step reads a tensor that the first evaluation of its solve did not show.
    """
    leaves, ids = find_leaves(outputs, start), {id(x) for x in known}
    if leaves is None or any(id(x) not in ids for x in leaves):
        raise ConfigError(
            "a step depends on a tensor that the vector field did not read at the solve's first time, so its "
            "gradient would be lost: make it a parameter of the field's module, or use gradient='autograd'."
        )


@contextlib.contextmanager
def _random_state(cpu: Tensor, devices: list[int], states: list[Tensor]) -> Iterator[None]:
    with torch.random.fork_rng(devices):
        torch.set_rng_state(cpu)
        set_device_states(devices, states)
        yield


def _autocast_of(kind: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """A context of autocast as it is now on devices of this kind."""
    if not torch.amp.is_autocast_available(kind):  # such as meta
        return contextlib.nullcontext
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)
