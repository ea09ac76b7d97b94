"""Rows drawn from the flow of a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ..core.random_streams import Stream, seeded
from ..errors import ConfigError

if TYPE_CHECKING:
    from ..flows.table import TableFlow

__all__ = ["sample_rows"]

_BATCH = 10_000


def sample_rows(
    flow: TableFlow,
    count: int,
    *,
    context: np.ndarray | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = _BATCH,
) -> np.ndarray:
    """Draw rows ``(count, columns)`` in the unit of the data, on the CPU.

    Args:
        flow: the model.
        count: how many.
        context: ``(count, C)``, one for each row; only for a conditional density.
        temperature: standard deviation of the latents.
        seed: of the latents.
        batch_size: rows per solve.

    Raises:
        ConfigError: for a count below one, another number of contexts, or a temperature that is not positive.
        SolverError: if the integration fails.
    """
    if count < 1 or batch_size < 1 or (context is not None and len(context) != count):
        raise ConfigError("sampling needs at least one row, a batch size of one, and a context for each row.")
    device = next(flow.parameters()).device
    parts = []
    for first in range(0, count, batch_size):
        size = min(batch_size, count - first)
        given = None if context is None else torch.from_numpy(context[first : first + size]).to(device)
        with torch.no_grad(), seeded(seed, Stream.SAMPLE, first):
            parts.append(flow.sample(size, context=given, temperature=temperature).cpu().numpy())
    return np.concatenate(parts)
