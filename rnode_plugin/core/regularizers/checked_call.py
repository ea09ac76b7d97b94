"""One call of a regularizer, checked: whatever it gets wrong ends in a message with its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, PluginError, RnodeError

__all__ = ["checked_call"]

_WRITES = (
    "the regularizer {!r} writes into the state or the velocity that it is shown, which changes the solve: use "
    "dz.square(), not dz.square_(), and so on."
)


def checked_call(regularizer: Any, record: Any, untouched: Sequence[Tensor], like: Tensor) -> Tensor:
    """``regularizer(record)``, a real floating-point tensor ``(B,)``.

    Args:
        regularizer: with a ``name``.
        record: what it is called with.
        untouched: tensors of ``record`` that the solve goes on with.
        like: a state ``(B, *event)``.

    Raises:
        ConfigError: for a result of another shape or type, and for a write into the record's tensors.
        PluginError: from another exception in the regularizer.
    """
    if torch.compiler.is_compiling():  # whoever compiles a step has made the same call uncompiled before
        return regularizer(record)
    # tensors of inference mode have no version
    versions = [None if x.is_inference() else x._version for x in untouched]
    try:
        value = regularizer(record)
    except (RnodeError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        # torch ends the second run of a checkpointed step by an exception of its own
        if "allocate memory" in text or type(error).__module__ == "torch.utils.checkpoint":
            raise
        if "in-place operation" in text:
            raise ConfigError(_WRITES.format(regularizer.name)) from error
        raise PluginError(f"the regularizer {regularizer.name!r} raised {type(error).__name__}: {text}") from error
    for x, before in zip(untouched, versions, strict=True):
        if before is not None and x._version != before:
            raise ConfigError(_WRITES.format(regularizer.name))
    if not isinstance(value, Tensor) or value.shape != like.shape[:1]:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(
            f"the regularizer {regularizer.name!r} returned {got}; it must return one number per sample, a tensor "
            f"of shape {tuple(like.shape[:1])}."
        )
    if not value.is_floating_point():
        raise ConfigError(
            f"the regularizer {regularizer.name!r} returned {value.dtype}; it must return real floats."
        )
    return value
