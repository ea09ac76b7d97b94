"""Compiled vector fields: the original behind them, and how to run it where a field is differentiated twice.

``torch.compile`` does not support double backward, and it frees the buffers that a second product would need. A
penalty such as ``jacfrob`` and the trace of a CNF differentiate the field and then the result, so they run the
original code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from inspect import isfunction
from typing import Any

import torch
from torch import nn

from ...core.signature import original

__all__ = ["has_compiled_parts", "run_original"]

# A private name of torch. A test fails by name when it goes.
_COMPILED_IN_PLACE = "_compiled_call_impl"


def has_compiled_parts(field: Any) -> bool:
    """Whether ``field``, or a module inside it, is compiled."""
    if original(field) is not field:
        return True
    if not isinstance(field, nn.Module):
        return False
    return any(
        original(module) is not module
        or getattr(module, _COMPILED_IN_PLACE, None) is not None
        or any(isfunction(value) and original(value) is not value for value in vars(module).values())
        for module in field.modules()
    )


def run_original(velocity: Callable[..., Any]) -> Callable[..., Any]:
    """``velocity`` with everything compiled inside it replaced by its original during the call."""

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        # inside a compiled region nobody may change the stance; the caller's compiler decides there
        inside = torch.compiler.is_compiling()
        with contextlib.nullcontext() if inside else torch.compiler.set_stance("force_eager"):
            return velocity(*args, **kwargs)

    return evaluate
