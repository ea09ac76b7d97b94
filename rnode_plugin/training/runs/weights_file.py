"""Weights as a ``.safetensors`` file, for programs that read nothing else; the recipe travels in its metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["SUFFIX", "read_weights", "weights_as_bytes"]

SUFFIX = ".safetensors"
_KEY = "rnode_plugin"


def weights_as_bytes(state: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> bytes:
    """The contents of a ``.safetensors`` file with ``header``, plain data, as JSON in its metadata."""
    from safetensors.torch import save

    # copies: the format refuses tensors that share memory or have strides of their own
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    return save(tensors, metadata={"format": "pt", _KEY: json.dumps(header)})


def read_weights(
    path: str | os.PathLike[str], *, map_location: str | torch.device = "cpu"
) -> tuple[dict[str, torch.Tensor], Any]:
    """The tensors of a ``.safetensors`` file and the header that :func:`weights_as_bytes` put in; None without one.

    Raises:
        CheckpointError: truncated, or no such file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(Path(path), framework="pt", device=str(map_location)) as file:  # pyright: ignore[reportArgumentType]
            header = (file.metadata() or {}).get(_KEY)
            return {name: file.get_tensor(name) for name in file.keys()}, header and json.loads(header)  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read, it is truncated or no safetensors file: {' '.join(str(error).split())}"
        ) from None
