"""Chains of operations that run as one kernel on a device, where launches and bytes are what a step costs; sums.

A chain is a small pure function of tensors. On a CPU, inside transforms and where a graph is recorded it runs as it
is written, operation by operation. On a device it goes through torch.compile, which makes one kernel of it. On
``meta`` a custom operator stands for that kernel.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .modes import traced, transforms_active


def single_kernels(x: Tensor) -> bool:
    """Whether chains are single kernels where ``x`` is: on ``meta`` and on a device for which torch can compile."""
    if x.is_cpu or torch.compiler.is_compiling():  # a program that is compiled as a whole fuses more
        return False
    return x.is_meta or _compiler_works(x.device.type)


@cache
def _compiler_works(device: str) -> bool:
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device))
    except RuntimeError as error:  # torch's own errors of its compiler are of this kind too
        warnings.warn(
            f"torch.compile does not work on {device} ({type(error).__name__}), so pointwise operations run one by "
            "one. The numbers are the same, and a step takes longer.",
            stacklevel=2,
        )
        return False
    return True


class Chain:
    """A pure function whose first argument is a tensor, as one kernel on a device.

    Args:
        function: of tensors, lists of tensors and names. Its results share no memory with its arguments.
        schema: its arguments and results, as ``torch.library`` writes them.
    """

    def __init__(self, function: Callable[..., Any], schema: str) -> None:
        self._function = function
        self._operator = torch.library.custom_op(
            f"rnode_plugin::{function.__name__}", function, mutates_args=(), schema=schema
        )
        self._operator.register_fake(function)

    def __call__(self, x: Tensor, *rest: Any) -> Any:
        if not single_kernels(x) or torch.is_grad_enabled() or transforms_active():
            return self._function(x, *rest)
        # on a real device the operator would double what a call costs the host
        return (self._operator if x.is_meta else _compiled(self._function))(x, *rest)


class _OfThread(threading.local):
    """A patch of torch's configuration for each thread: older versions of torch let only one enter it at a time."""

    limit: Any = None


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    from torch._dynamo.config import patch

    compiled, of_thread = torch.compile(function, dynamic=True), _OfThread()

    def run(*args: Any) -> Any:
        if of_thread.limit is None:  # names, numbers of tensors and layouts
            of_thread.limit = patch(cache_size_limit=64)
        with of_thread.limit:
            return compiled(*args)

    return run


# sums over an event ---------------------------------------------------------------------------------------------


def one_kernel(*tensors: Tensor) -> bool:
    """Whether a node of the graph whose passes are single kernels can take these tensors."""
    return single_kernels(tensors[0]) and not traced(*tensors)


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
