"""Small operations that the mathematics shares: sums over an event, counts, what torch does with the operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import lru_cache
from numbers import Integral
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

# torch has no public names for these
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map_only as tree_map_only
from torch.utils._pytree import tree_unflatten as tree_unflatten

from ..errors import ConfigError
from . import chains
from .chains import Chain
from .chains import transforms_active as transforms_active

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


def traced(*tensors: Tensor | None) -> bool:
    """Whether a transform of torch.func or an export is active, or a tensor has a tangent of forward mode."""
    given = (x for x in tensors if x is not None)
    return transforms_active() or exporting() or any(forward_ad.unpack_dual(x).tangent is not None for x in given)


def one_kernel(*tensors: Tensor) -> bool:
    """Whether a node of the graph whose passes are single kernels can take these tensors."""
    return chains.single_kernels(tensors[0]) and not traced(*tensors)


@lru_cache(maxsize=512)
def constant(values: float | tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor, made once, because every step needs them. Not to be written into."""
    # a tensor made in inference mode could not serve a later backward pass
    with on_host(), torch.inference_mode(False):
        if isinstance(values, float):  # without a copy, for which the host would wait
            return torch.full((), values, dtype=dtype, device=device)
        return torch.tensor(values, dtype=dtype, device=device)


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
    if x.ndim == 1:
        return x
    return x.flatten(1).sum(1) if x.is_cpu else x.sum(tuple(range(1, x.ndim)))


def sum_products(x: Tensor, y: Tensor) -> Tensor:
    """``sum x y`` over all but the first dimension: two ``(B, *event)`` to ``(B,)``."""
    return _sums(x, y) if one_kernel(x, y) else sum_event(x * y)


def sum_squares(x: Tensor) -> Tensor:
    """``sum x^2`` over all but the first dimension: ``(B, *event)`` to ``(B,)``."""
    return _sums(x, None) if one_kernel(x) else sum_event(x.square())


def _sums(x: Tensor, y: Tensor | None) -> Tensor:
    sums: Any = _Sums.apply(x, y)
    return sums


class _Sums(torch.autograd.Function):
    """``sum x y`` over an event, of squares if there is no ``y``."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        ctx.save_for_backward(*args)
        x, y = args
        return _SUM(x, x if y is None else y)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        x, y = ctx.saved_tensors
        g = grad_outputs[0].reshape(-1, *[1] * (x.ndim - 1))
        if y is None:
            return _TWICE(x, g), None
        return g * y if ctx.needs_input_grad[0] else None, g * x if ctx.needs_input_grad[1] else None


def summed(x: Tensor, y: Tensor) -> Tensor:
    return sum_event(x * y)


def twice(x: Tensor, g: Tensor) -> Tensor:
    return 2 * g * x


_SUM = Chain(summed, "(Tensor x, Tensor y) -> Tensor")
_TWICE = Chain(twice, "(Tensor x, Tensor g) -> Tensor")


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
