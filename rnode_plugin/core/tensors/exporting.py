"""Whether a program is being recorded, and arithmetic that is no part of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch

# torch has no public name for it
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["exporting", "on_host", "recording"]

_recording: ContextVar[bool] = ContextVar("_recording", default=False)


def exporting() -> bool:
    """Whether the operations of this thread become a program: values of its inputs are unknown."""
    # torch.compile cannot trace a context variable, and nobody records what it compiles
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
