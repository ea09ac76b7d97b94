"""Small operations that the mathematics shares: sums over an event, counts, what torch does with the operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from numbers import Integral
from typing import Any, NoReturn

import torch
from torch import Tensor

# torch has no public names for these
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map_only as tree_map_only
from torch.utils._pytree import tree_unflatten as tree_unflatten

from ..errors import ConfigError

_recording: ContextVar[bool] = ContextVar("_recording", default=False)


def is_count(value: Any) -> bool:
    """Whether ``value`` is a whole number of at least 1; True is not."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def check_count(value: Any, what: str) -> int:
    """``value``, a whole number of at least 1, or a ConfigError that calls it ``what``."""
    if not is_count(value):
        raise ConfigError(f"{what} must be a whole number of at least 1, not {value!r}.")
    return int(value)


def exporting() -> bool:
    """Whether the operations of this thread become a program: values of its inputs are unknown."""
    # torch.compile cannot trace a context variable, and what it compiles is never recorded
    return not torch.compiler.is_compiling() and _recording.get()


@contextmanager
def recording() -> Iterator[None]:
    """Around operations that become a program."""
    token = _recording.set(True)
    try:
        yield
    finally:
        _recording.reset(token)


def on_host() -> AbstractContextManager[object]:
    """Around operations that a program does not repeat: their results are constants of it, with known values."""
    return _disable_current_modes() if exporting() else nullcontext()


def transforms_active() -> bool:
    """Whether a transform of torch.func is active."""
    # torch has no public name for this; autograd.Function calls the same function
    return torch._C._are_functorch_transforms_active()


def read(x: Tensor) -> Any:
    """The numbers in ``x``, as ``x.tolist()`` gives them, for which the host waits; None if they do not exist.

    That is so on the device ``meta``, in an export, and inside ``torch.func.vmap``, where they differ from sample
    to sample.
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


def sum_event(x: Tensor) -> Tensor:
    """Sum over all but the first dimension: ``(B, *event)`` to ``(B,)``; of ``(B,)`` each entry is its own sum."""
    return x.flatten(1).sum(1) if x.ndim > 1 else x


def sum_products(x: Tensor, y: Tensor) -> Tensor:
    """``sum x y`` over all but the first dimension: two ``(B, *event)`` to ``(B,)``."""
    return sum_event(x * y)


def sum_squares(x: Tensor) -> Tensor:
    """``sum x^2`` over all but the first dimension: ``(B, *event)`` to ``(B,)``."""
    return sum_event(x.square())


@contextmanager
def outside_inference(*values: Any) -> Iterator[tuple[Any, ...]]:
    """A block outside of inference mode, for solves of fields that differentiate; it gives what it was given.

    Where inference mode was enabled, gradients stay disabled, and tensors are clones: those made in inference mode
    cannot be differentiated.
    """
    if not torch.is_inference_mode_enabled():
        yield values
        return
    with torch.inference_mode(False), torch.no_grad():
        yield tree_map_only(Tensor, Tensor.clone, values)


class OneProcessADevice:
    """A module that refuses DataParallel: its copies would lose penalties and NFE with the thread they ran in."""

    def _replicate_for_data_parallel(self) -> NoReturn:  # torch's DataParallel calls it for each module inside
        raise ConfigError(
            f"{type(self).__name__} does not work under DataParallel. Use one process a device: "
            "DistributedDataParallel, Lightning's strategy='ddp', or rnode-cli train --devices N."
        )
