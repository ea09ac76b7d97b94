"""Chains of operations that run as one kernel on a device, where launches and bytes are what a step costs.

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


def transforms_active() -> bool:
    """Whether a transform of torch.func is active."""
    # torch has no public name for this; autograd.Function calls the same function
    return torch._C._are_functorch_transforms_active()


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
