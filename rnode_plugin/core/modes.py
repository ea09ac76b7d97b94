"""The modes in which torch runs the operations of this thread: transforms, forward mode and inference mode.

It is also the only module that uses names of torch that are not public.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..errors import ConfigError
from .noted import map_leaves

# names of torch that are not public ------------------------------------------------------------------------------

TESTED = "2.13"
"""The newest torch with which this package was tested; pyproject.toml names it, too."""

NAMES = {
    "torch._C._are_functorch_transforms_active": "solves are refused, because nothing else tells of torch.func",
    "torch._C._functorch.get_unwrapped": "solves with products are refused inside torch.func",
    "torch._C._functorch.is_functorch_wrapped_tensor": "solves with products are refused inside torch.func",
    "torch._C._functorch.is_batchedtensor": "penalties of solves inside torch.func are refused",
    "torch._C._functorch.maybe_current_level": "penalties of solves inside torch.func are refused",
    "torch._C._functorch.maybe_get_level": "penalties of solves inside torch.func are refused",
    "torch.autograd.forward_ad._current_level": "solves are refused, or would drop dual numbers in silence",
    "torch._C._will_engine_execute_node": "a backward pass computes the gradients of all weights",
    "torch.nn.modules.module._global_forward_hooks": "all layers count as having hooks, which autograd serves",
    "torch.nn.modules.module._global_forward_pre_hooks": "all layers count as having hooks, which autograd serves",
}
"""The names that torch may change without notice, with what happens in a torch that lacks one."""


def find_private(path: str) -> Any:
    """The object with this path, such as one of :data:`NAMES`; None in a version that has none."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None


def private(path: str) -> Any:
    """As :func:`find_private`; in a torch that has none, a function that raises a ConfigError."""

    def refuse(*args: object, **options: object) -> NoReturn:
        refuse_torch(path)

    value = find_private(path)
    return refuse if value is None else value


def refuse_torch(name: str) -> NoReturn:
    """Refuse a torch that lacks a name (ConfigError)."""
    raise ConfigError(
        f"torch {torch.__version__} has no {name}, which this call needs: install a torch from 2.9 to {TESTED}, "
        "with which rnode-plugin was tested."
    )


transforms_active: Callable[[], bool] = private("torch._C._are_functorch_transforms_active")
"""Whether a transform of torch.func is active. autograd.Function calls the same function."""

_get_unwrapped: Callable[[Tensor], Tensor] = private("torch._C._functorch.get_unwrapped")
_is_wrapped: Callable[[Tensor], bool] = private("torch._C._functorch.is_functorch_wrapped_tensor")
_is_batched: Callable[[Tensor], bool] = private("torch._C._functorch.is_batchedtensor")
_current_level: Callable[[], int | None] = private("torch._C._functorch.maybe_current_level")
_level: Callable[[Tensor], int | None] = private("torch._C._functorch.maybe_get_level")
_executes: Callable[[Any], bool] = find_private("torch._C._will_engine_execute_node") or (lambda node: True)
_HOOKS_OF_ALL: Any = tuple(
    find_private(f"torch.nn.modules.module._global_forward_{kind}") for kind in ("hooks", "pre_hooks")
)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where a module has its hooks, by their numbers."""


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of ``module`` may do more than its class does, through hooks or a replaced ``forward``.

    Hooks that are registered for all modules count too, except torch's own, which only count operations.
    """
    for hooks in _HOOKS:
        if getattr(module, hooks):
            return True
    # a forward that was assigned to this one instance, as offloading tools do
    return "forward" in vars(module) or None in _HOOKS_OF_ALL or _has_hooks_of_all()


def _has_hooks_of_all() -> bool:
    """Whether hooks other than torch's own are registered for all modules."""
    hooks = [hook for of_all in _HOOKS_OF_ALL if of_all is not None for hook in of_all.values()]
    return any(not getattr(hook, "__module__", "").startswith("torch.") for hook in hooks)


# transforms and forward mode -------------------------------------------------------------------------------------


def escaped(x: Tensor) -> bool:
    """Whether ``x`` was made inside a ``torch.func.vmap`` that has ended, so that no operation accepts it."""
    current = _current_level() or 0
    # each transform wraps a tensor once; a level above the current one belongs to a transform that has ended
    while _is_wrapped(x):
        if _is_batched(x) and (_level(x) or 0) > current:
            return True
        x = _get_unwrapped(x)
    return False


def dual_numbers() -> bool:
    """Whether forward mode is active, of ``torch.autograd.forward_ad`` or of ``torch.func.jvp``."""
    level = getattr(forward_ad, "_current_level", None)  # negative outside of forward mode
    return refuse_torch("torch.autograd.forward_ad._current_level") if level is None else level >= 0


def refuse_dual_numbers() -> None:
    """Refuse forward mode outside of torch.func, since a solve would drop the tangents in silence.

    Raises:
        ConfigError: inside ``torch.autograd.forward_ad.dual_level()``.
    """
    if dual_numbers() and not transforms_active():
        raise ConfigError(
            "a solve and its penalties do not compute with the dual numbers of torch.autograd.forward_ad: use "
            "torch.func.jvp or torch.func.jacfwd for forward mode."
        )


@lru_cache(maxsize=512)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor, cached because every step needs them. Do not write into the result."""
    # a tensor made in inference mode could not serve a later backward pass
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def read(x: Tensor) -> Any:
    """The numbers in ``x``, as ``x.tolist()`` gives them, for which the host waits; None if they do not exist.

    They do not exist on the device ``meta``, and inside ``torch.func.vmap``, where they differ from sample to
    sample.
    """
    if x.is_meta:
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
    return transforms_active() and not x.is_meta and read(x) is None


def reaches(node: Any) -> bool:
    """Whether the backward pass that runs now reaches this node of the graph, which is not a leaf.

    ``needs_input_grad`` of a node says only whether an input requires a gradient, even in a pass for the gradients
    of other inputs.
    """
    # torch.compile traces a backward pass before it runs
    return torch.compiler.is_compiling() or _executes(node)


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """A time ``x``, one number, on a device. From the CPU it gets there without a copy unless it has a graph.

    A copy waits for the device.
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


def autocast_of(x: Tensor) -> Callable[[], AbstractContextManager[object]]:
    """A function that makes a context with the present autocast settings for the device of ``x``."""
    kind = x.device.type
    if x.is_meta:
        return nullcontext
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)


@contextmanager
def without_kept_casts() -> Iterator[None]:
    """Context without autocast's cache of cast weights, where evaluations with and without gradients alternate."""
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)


def outside_checkpoints() -> AbstractContextManager[object]:
    """Context for a graph that is made only once, such as a check's, and does not outlive the block.

    ``torch.utils.checkpoint`` around a model counts the saved tensors, and its second run must save as many. The
    transforms of torch.func refuse hooks of saved tensors, so inside of them the context does nothing.
    """
    if transforms_active():
        return nullcontext()
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
        yield map_leaves(lambda x: x.clone() if isinstance(x, Tensor) else x, values)
