"""torch.compile for pieces of the fused field, and what happens where it does not work."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from ...errors import ConfigError

__all__ = ["compiled", "works"]

_KINDS = 64  # shapes that one function is compiled for, times what the first evaluation of a flow has otherwise
_failed: list[str] = []  # why compiling did not work in this process, where it would fail again


def works() -> bool:
    """Whether nothing has failed to compile yet."""
    return not _failed


@cache
def compiled(function: Callable[..., Any], *, whole: bool = False) -> Callable[..., Any]:
    """``function`` compiled for each shape that it meets; itself, after one line, from the first failure on.

    A ``whole`` step, which takes long to compile and may hold a user's code, is compiled once more when one of its
    sizes changes, and then no more for that size.

    Raises:
        ConfigError: when called, if a whole step holds what torch.compile cannot trace.
    """
    import torch._dynamo as dynamo
    from torch._dynamo.exc import TorchDynamoException, Unsupported

    limit = "recompile_limit" if hasattr(dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(dynamo.config, limit, max(_KINDS, getattr(dynamo.config, limit)))
    fast = torch.compile(function, dynamic=None if whole else False, fullgraph=True)

    def run(*args: Any) -> Any:
        if not _failed:
            try:
                return fast(*args)
            except TorchDynamoException as error:  # before anything has been computed
                if whole and isinstance(error, Unsupported):
                    raise ConfigError(
                        f"torch.compile cannot trace this step: {_reason(error).rstrip('.')}. Leave compile=True "
                        "out, or the penalty of your own that does it."
                    ) from error
                _failed.append(_reason(error))
                if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
                    print(f"torch.compile does not work here, going on without it: {_failed[0]}", file=sys.stderr)
        return function(*args)

    return run


def _reason(error: BaseException) -> str:
    """The first line that says something, without the advice to developers that follows."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line or "ompiler" in line]
    return next(iter(named or lines), type(error).__name__)
