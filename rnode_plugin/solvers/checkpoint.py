"""Steps that keep only their inputs and run again in the backward pass.

torch's checkpoint does this well for a plain field. If the field differentiates inside its evaluation (a product
with the Jacobian by automatic differentiation), torch's checkpoint runs the step again within the forward pass,
once per stage. For such fields a replay runs a step once forward, without a graph, and once backward.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from ..core.checks import FUSED_ATTENTION
from ..core.modes import drop_casts, next_number, number_of, transforms_active, tree, without_hooks
from ..core.system import RightHandSide
from ..errors import ConfigError

_Result = TypeVar("_Result")


def checkpointed(
    function: Callable[..., _Result], rhs: RightHandSide, z: Tensor, t: Tensor
) -> Callable[..., _Result]:
    """``function`` without keeping its activations. Values and gradients stay the same.

    Under a transform of torch.func, which records a step in its own way, this is ``function`` itself.

    Args:
        function: takes and returns tensors and nested tuples and dictionaries of tensors; it evaluates
            ``rhs``.
        rhs: the right-hand side.
        z, t: state and time at which the system is evaluated once, to find the tensors that it depends on.
    """
    if transforms_active():
        return function
    leaves, as_now, has_states = None, rhs.as_now(), _has_states(z.device.type)
    if not has_states:
        warnings.warn(  # Python shows it once
            f"torch cannot repeat the random numbers that a field draws on {z.device.type!r}, as dropout does: the "
            "gradient of 'checkpointed' would belong to another mask. Fields that draw nothing are right.",
            stacklevel=2,
        )
    if torch.is_grad_enabled() and (rhs.inner_autograd or not has_states):
        leaves = _leaves(rhs, as_now, z, t)
    if leaves is None and not has_states:  # torch's checkpoint needs the states
        return function
    if leaves is None:
        return lambda *args: checkpoint(_first_run_alone(function, as_now), *args, use_reentrant=False)
    return lambda *args: _replay(_first_run_alone(function, as_now), args, leaves)


def _first_run_alone(
    function: Callable[..., _Result], as_now: Callable[[], contextlib.AbstractContextManager[object]]
) -> Callable[..., _Result]:
    """``function``, with all runs after the first one marked as repetitions, which do not change buffers."""
    ran = False  # the forward pass has updated running statistics; a repetition must not do so again

    def run(*args: object) -> _Result:
        nonlocal ran
        with as_now() if ran else contextlib.nullcontext():
            ran = True
            return function(*args)

    return run


def _has_states(kind: str) -> bool:
    """Whether torch can read and restore the random states of devices of this kind; not of XLA's, for example."""
    return kind in ("cpu", "meta") or hasattr(getattr(torch, kind, None), "device")


# the leaves of a step -------------------------------------------------------------------------------------------


def _leaves(
    rhs: RightHandSide,
    as_now: Callable[[], contextlib.AbstractContextManager[object]],
    z: Tensor,
    t: Tensor,
) -> list[Tensor] | None:
    """The leaf tensors that the right-hand side depends on; None if they read the result of another computation."""
    # restore the generators, so that this extra evaluation does not change the random numbers of the solve
    devices = [z.device] if z.is_cuda else []
    with torch.enable_grad(), torch.random.fork_rng(devices), as_now():
        state = z.detach().requires_grad_()
        start = next_number(state)
        # a clone, because torch refuses a field that changes a leaf in place
        derivative = rhs(t.detach(), state.clone())
    leaves = _find_leaves([x for x in tree("tree_leaves")(derivative) if isinstance(x, Tensor)], start)
    if leaves is None:  # a replay would run through that other graph at each step
        return None
    # add all parameters, because a module may read some of them at other times only
    known = [p for p in rhs.inputs() if p.requires_grad]
    return list({id(x): x for x in [*leaves, *known] if x is not state}.values())


def _find_leaves(outputs: Sequence[Tensor], start: int, known: Sequence[object] = ()) -> list[Tensor] | None:
    """The leaves of the graph of ``outputs``; None if one of its nodes is older than number ``start``.

    An older node belongs to the graph of another computation. The search also ends at the tensors ``known``.
    """
    leaves: dict[int, Tensor] = {}
    pending: list[Node] = [x.grad_fn for x in outputs if x.grad_fn is not None]
    seen: set[Node | None] = {x.grad_fn for x in known if isinstance(x, Tensor)}
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        variable: Tensor | None = getattr(node, "variable", None)
        if variable is not None:
            leaves[id(variable)] = variable
        elif number_of(node) < start:
            return None
        pending += [parent for parent, _ in node.next_functions if parent is not None]
    return list(leaves.values())


# the replay -----------------------------------------------------------------------------------------------------


class _Call:
    """One call of a function with nested arguments, flattened for autograd."""

    def __init__(self, function: Callable[..., object], args: tuple[object, ...]) -> None:
        self.function = function
        self.flat, self.arguments = tree("tree_flatten")(args)
        self.result: object = None  # the structure of the result

    def run(self, flat: Sequence[object]) -> list[Any]:
        outputs, self.result = tree("tree_flatten")(self.function(*tree("tree_unflatten")(flat, self.arguments)))
        return outputs


def _replay(function: Callable[..., _Result], args: tuple[object, ...], leaves: Sequence[Tensor]) -> _Result:
    """``function(*args)``, whose graph is built in the backward pass by a second run.

    Gradients reach the tensors in ``args`` and ``leaves``. The second run repeats the random numbers and the
    autocast state of the first one.
    """
    call = _Call(function, args)
    outputs: Any = _Replay.apply(call, len(call.flat), *call.flat, *leaves)
    assert call.result is not None
    return tree("tree_unflatten")(outputs, call.result)


class _Replay(torch.autograd.Function):
    """A call as one node of the graph, which notes the random state and autocast before it runs."""

    @staticmethod
    def forward(ctx: Any, call: _Call, count: int, *values: Any) -> tuple[object, ...]:
        ctx.call, ctx.count = call, count
        kind = values[0].device.type
        ctx.autocast = _autocast_of(kind)
        # the second run must draw the same dropout masks
        devices, states = get_device_states(*values[:count]) if _has_states(kind) else ([], [])
        ctx.random = (torch.get_rng_state(), devices, states)
        ctx.others = [None if isinstance(x, Tensor) else x for x in values]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in values))
        ctx.set_materialize_grads(False)
        # a function may return one of its inputs, which autograd must see as a new tensor
        inputs = {id(x) for x in values if isinstance(x, Tensor)}
        outputs = call.run(values[:count])
        drop_casts()
        return tuple(x.view_as(x) if id(x) in inputs else x for x in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        count, needed = ctx.count, ctx.needs_input_grad[2:]
        values = [other if x is None else x for x, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
        leaves = values[count:]

        def gradient(args: Sequence[object], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
            again = torch.is_grad_enabled()  # create_graph=True: the arguments themselves must stay in the graph
            known = [*(args if again else map(_variable, args)), *leaves]
            with torch.enable_grad(), _random_state(*ctx.random), ctx.autocast():
                drop_casts()  # made before the second run, they are not a part of its graph
                start = next_number(torch.zeros((), requires_grad=True))
                outputs = ctx.call.run(known[:count])
            if not is_complete([x for x in outputs if isinstance(x, Tensor)], known, start):
                raise ConfigError(
                    "a step depends on a tensor that the vector field did not read at the solve's first time, so "
                    "its gradient would be lost: make it a parameter of the field's module, or use "
                    "gradient='autograd'."
                )
            pairs = [(x, g) for x, g in zip(outputs, gradients, strict=True) if g is not None and x.requires_grad]
            sources = [x for x, need in zip(known, needed, strict=True) if need]
            computed: Sequence[Tensor | None] = [None] * len(sources)
            if pairs and sources:
                reached, incoming = zip(*pairs, strict=True)
                try:
                    with without_hooks(leaves):
                        computed = torch.autograd.grad(
                            reached, sources, incoming, create_graph=again, allow_unused=True
                        )
                except RuntimeError as error:
                    # the kernel of the backward pass, not of the forward one
                    if "scaled_dot_product" in str(error):
                        raise ConfigError(FUSED_ATTENTION) from error
                    raise
            rest = iter(computed)
            return [next(rest) if need else None for need in needed]

        if not torch.is_grad_enabled():
            return None, None, *gradient(values[:count], gradients)
        # with create_graph=True the gradient is itself a replayed call, with the same leaves
        return None, None, *_replay(gradient, (values[:count], gradients), leaves)


def _variable(x: object) -> object:
    """A floating-point or complex tensor as a leaf that requires a gradient; anything else unchanged.

    Every such tensor requires a gradient, so that no code inside makes another leaf from one that does not.
    """
    if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()):
        return x.detach().requires_grad_()
    return x


def is_complete(outputs: Sequence[Tensor], known: Sequence[object], start: int) -> bool:
    """Whether the graph of ``outputs``, built since number ``start``, ends in tensors that are ``known``.

    A leaf may also share its memory with one of them, since a derivative with respect to the time makes a new
    variable from it.
    """
    leaves, places = _find_leaves(outputs, start, known), {x.data_ptr() for x in known if isinstance(x, Tensor)}
    return leaves is not None and all(x.data_ptr() in places for x in leaves)


@contextlib.contextmanager
def _random_state(cpu: Tensor, devices: list[int], states: list[Tensor]) -> Iterator[None]:
    with torch.random.fork_rng(devices):
        torch.set_rng_state(cpu)
        set_device_states(devices, states)
        yield


def _autocast_of(kind: str) -> Callable[[], contextlib.AbstractContextManager[object]]:
    """A function that makes a context with the current autocast settings for devices of this kind."""
    if not torch.amp.is_autocast_available(kind):  # such as meta
        return contextlib.nullcontext
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)
