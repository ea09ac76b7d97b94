"""The modes in which torch runs the operations of this thread: transforms, captured programs and inference mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# torch has no public names for these and for the imports from torch.utils
from torch._C._functorch import (
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    maybe_current_level,
    maybe_get_level,
)
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from ..errors import ConfigError

_recording: ContextVar[bool] = ContextVar("_recording", default=False)


transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""Whether a transform of torch.func is active. It has no public name; autograd.Function calls the same function."""


def escaped(x: Tensor) -> bool:
    """Whether ``x`` was made inside a ``torch.func.vmap`` that has ended, so that no operation accepts it."""
    current = maybe_current_level() or 0
    # each transform wraps a tensor once; a level above the current one belongs to a transform that has ended
    while is_functorch_wrapped_tensor(x):
        if is_batchedtensor(x) and (maybe_get_level(x) or 0) > current:
            return True
        x = get_unwrapped(x)
    return False


def exporting() -> bool:
    """Whether the operations of this thread are captured as a program, so that values of inputs are unknown."""
    # torch.compile cannot trace a context variable, and compiled operations are never recorded
    return not torch.compiler.is_compiling() and _recording.get()


@contextmanager
def recording() -> Iterator[None]:
    """Context for operations that are captured as a program."""
    token = _recording.set(True)
    try:
        yield
    finally:
        _recording.reset(token)


def on_host() -> AbstractContextManager[object]:
    """Context for operations that a captured program must not contain. Their results enter it as constants."""
    return _disable_current_modes() if exporting() else nullcontext()


def traced() -> bool:
    """Whether a transform of torch.func or an export is active."""
    return transforms_active() or exporting()


def refuse_dual_numbers() -> None:
    """Refuse forward mode outside of torch.func, since a solve would drop the tangents in silence.

    Raises:
        ConfigError: inside ``torch.autograd.forward_ad.dual_level()``.
    """
    # the level, which is negative outside of that context, has no public name
    if forward_ad._current_level >= 0 and not transforms_active():
        raise ConfigError(
            "a solve and its penalties do not compute with the dual numbers of torch.autograd.forward_ad: use "
            "torch.func.jvp or torch.func.jacfwd for forward mode."
        )


@lru_cache(maxsize=512)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor, cached because every step needs them. Do not write into the result."""
    # a tensor made in inference mode could not serve a later backward pass
    with on_host(), torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def read(x: Tensor) -> Any:
    """The numbers in ``x``, as ``x.tolist()`` gives them, for which the host waits; None if they do not exist.

    They do not exist on the device ``meta``, in an export, and inside ``torch.func.vmap``, where they differ from
    sample to sample.
    """
    if x.is_meta or exporting():
        return None
    try:
        return x.detach().tolist()
    except RuntimeError:
        if not transforms_active():
            raise
    try:  # in torch 2.6 `tolist` does not know the tensors of torch.func.grad
        return x.item() if x.ndim == 0 else [row.item() for row in x]
    except RuntimeError:
        return None


def differs(x: Tensor) -> bool:
    """Whether a number that a solve has once differs between the samples of a ``torch.func.vmap`` around it."""
    return transforms_active() and not x.is_meta and not exporting() and read(x) is None


def next_number(x: Tensor) -> int:
    """The number of the newest node of the graph; ``x`` is any tensor that requires a gradient.

    Nodes that are made later have a higher number. torch numbers nodes in the order of their creation, but keeps
    the number private, so this makes a node and reads its number.
    """
    node = (x * 1).grad_fn
    assert node is not None
    return node._sequence_nr()


def reaches(node: Any) -> bool:
    """Whether the backward pass that runs now reaches this node of the graph, which is not a leaf.

    ``needs_input_grad`` of a node says only whether an input requires a gradient, even in a pass for the gradients
    of other inputs. torch has no public name for this.
    """
    # torch.compile traces a backward pass before it runs
    return torch.compiler.is_compiling() or torch._C._will_engine_execute_node(node)


def refuse_capture(what: str) -> None:
    """Refuse a draw on the CPU while a CUDA graph is captured, because each replay would repeat it in silence.

    Raises:
        ConfigError: with the name of what is drawn.
    """
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise ConfigError(
            f"{what} is drawn on the CPU, and each replay of the CUDA graph that is captured here would repeat the "
            "draw: capture a solve with quadrature='full' and without local penalties and 'steer'."
        )


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """A time ``x``, one number, on a device. From the CPU it gets there without a copy unless it has a graph.

    A copy waits for the device, and a CUDA graph cannot capture one.
    """
    if x.device == device:
        return x
    # inside a transform of torch.func a number lacks the tangent of its tensor
    known = None if x.requires_grad or x.device.type != "cpu" or transforms_active() else read(x)
    if known is None:
        return x.to(device)
    return torch.full(x.shape, known if x.ndim == 0 else known[0], dtype=x.dtype, device=device)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is enabled on the device of ``x``."""
    # not available on "meta"; torch 2.6 cannot compile `torch.amp.is_autocast_available`
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def drop_casts() -> None:
    """Let autocast cast weights again, between evaluations of a field with gradients and without.

    Within one block autocast casts each weight once. Older releases of torch, such as 2.6, hand a copy without a
    graph on to evaluations with gradients, whose gradient with respect to that weight would be lost without an
    error.
    """
    torch.clear_autocast_cache()


@contextmanager
def without_kept_casts() -> Iterator[None]:
    """Context without autocast's cache of cast weights, where evaluations with and without gradients alternate."""
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)


@contextmanager
def without_hooks(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Context in which the hooks of tensors do not run, for a backward pass inside of another backward pass.

    The outer one runs them with the whole gradient. A hook that scales it would otherwise scale it twice. Another
    thread whose backward pass ends meanwhile does not run them either.
    """
    found = [hooks for x in tensors if (hooks := x._backward_hooks)]
    saved = [dict(hooks) for hooks in found]
    for hooks in found:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, each in zip(found, saved, strict=True):
            hooks.update(each)


def outside_checkpoints() -> AbstractContextManager[object]:
    """Context for a graph that is made only once, such as a check's, and does not outlive the block.

    ``torch.utils.checkpoint`` around a model counts the saved tensors, and its second run must save as many.
    """
    return torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged)


def _unchanged(x: Tensor) -> Tensor:
    return x


@contextmanager
def outside_inference(*values: Any) -> Iterator[tuple[Any, ...]]:
    """Leave inference mode within a block, for solves of fields that differentiate. The block gets ``values``.

    If inference mode was enabled, gradients stay disabled, and the tensors in ``values`` are cloned, because
    tensors made in inference mode cannot be differentiated.
    """
    if not torch.is_inference_mode_enabled():
        yield values
        return
    with torch.inference_mode(False), torch.no_grad():
        yield tree_map_only(Tensor, Tensor.clone, values)
