"""View: selects the part of a solver's state that penalties measure, such as columns given by a slice or a mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError

State = Tensor | tuple[Tensor, ...]
"""What a solve integrates: a tensor, or the tensors of a tuple."""

Columns = slice | Tensor
"""A slice of the first dimension of a sample, or a mask of booleans over its first dimensions."""


def check_batch_dim(batch_dim: object) -> None:
    """Refuse a ``batch_dim`` that is neither 0 nor None (None: the state is one sample)."""
    if batch_dim not in (0, None):
        raise ConfigError(f"batch_dim must be 0, or None for a state that is one sample, not {batch_dim!r}.")


def as_columns(penalized: object) -> Columns | None:
    """``penalized`` as a slice or as a mask on the CPU; None if it is neither."""
    if isinstance(penalized, slice):
        return penalized
    if (
        isinstance(penalized, (list, tuple))
        and penalized
        and all(isinstance(x, (bool, np.bool_)) for x in penalized)
    ):
        return torch.tensor(penalized)
    if isinstance(penalized, Tensor) and penalized.dtype == torch.bool and penalized.ndim > 0:
        return penalized.detach().clone().cpu()
    return None


class Places(NamedTuple):
    """Selected entries of a state whose samples are along dimension 0.

    Attributes:
        entries: indices of the entries along the flattened dimensions, increasing.
        first, last: the first and the last dimension that are flattened.
    """

    entries: Tensor
    first: int
    last: int


def places_of(columns: Columns, event: Sequence[int], device: torch.device) -> Places:
    """Find the entries that ``columns`` selects in a sample of shape ``event``.

    Raises:
        ConfigError: if they select nothing, or a mask has another shape.
    """
    if isinstance(columns, slice):
        size = event[0] if event else 0
        mask = torch.zeros(size, dtype=torch.bool)
        mask[list(range(size)[columns])] = True
    else:
        mask = columns
    if tuple(mask.shape) != tuple(event[: mask.ndim]) or not mask.any():
        raise ConfigError(f"penalized={columns} selects nothing of a sample of shape {tuple(event)}.")
    return Places(mask.flatten().nonzero().flatten().to(device), 1, mask.ndim)


@dataclass(frozen=True)
class View:
    """Where a state holds the ``z (B, *event)`` that penalties measure. The rest of the state is held constant.

    Attributes:
        is_tuple: whether a state is a tuple of tensors.
        places: indices of the tensors in a tuple that make up ``z``, increasing. Several are joined to ``(B, D)``.
        columns: the entries of a sample that make up ``z``; None: all.
        batch_dim: the dimension of the samples; None: the whole state is one sample.
    """

    is_tuple: bool = False
    places: tuple[int, ...] = (0,)
    columns: Places | None = None
    batch_dim: int | None = 0

    @property
    def is_whole(self) -> bool:
        """Whether ``z`` is one of the tensors, unchanged. Views of it would slow a small net down by a tenth."""
        return len(self.places) == 1 and self.batch_dim == 0 and self.columns is None

    def tensors(self, state: State) -> tuple[Tensor, ...]:
        """The tensors of a state, or of its velocity."""
        return (state,) if isinstance(state, Tensor) else tuple(state)

    def samples_first(self, x: Tensor) -> Tensor:
        """``x`` with the samples along dimension 0."""
        return x.unsqueeze(0) if self.batch_dim is None else x.movedim(self.batch_dim, 0)

    def of(self, state: State) -> Tensor:
        """Extract ``z (B, *event)`` from a state, or the same part from its velocity."""
        tensors = self.tensors(state)
        if self.is_whole:
            return tensors[self.places[0]]
        parts = [self.samples_first(tensors[i]) for i in self.places]
        if self.columns is not None:
            index, first, last = self.columns
            return parts[0].flatten(first, last).index_select(first, index)
        return parts[0] if len(parts) == 1 else torch.cat([x.unsqueeze(-1).flatten(1) for x in parts], 1)

    def into(self, state: State, z: Tensor) -> State:
        """A copy of the state in which ``z`` replaces its part."""
        # no write in place: the graph of the state must stay valid, and z may require a gradient
        tensors = list(self.tensors(state))
        if self.is_whole:
            tensors[self.places[0]] = z
            return tuple(tensors) if self.is_tuple else z
        firsts = [self.samples_first(tensors[i]) for i in self.places]
        parts: Sequence[Tensor]
        if self.columns is not None:
            index, first, last = self.columns
            parts = (firsts[0].flatten(first, last).index_copy(first, index, z),)
        else:
            parts = (z,) if len(firsts) == 1 else z.split([math.prod(x.shape[1:]) for x in firsts], 1)
        for i, whole, part in zip(self.places, firsts, parts, strict=True):
            part = part.reshape(whole.shape)
            tensors[i] = part.squeeze(0) if self.batch_dim is None else part.movedim(0, self.batch_dim)
        return tuple(tensors) if self.is_tuple else tensors[0]
