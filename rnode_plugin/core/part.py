"""Part: the part of a solver's state that penalties measure, such as columns given by a slice or a mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError

State = Tensor | tuple[Tensor, ...]
"""The state of a solve: a tensor, or a tuple of tensors."""


@dataclass(frozen=True)
class Part:
    """The place of ``z (B, *event)``, which penalties measure, in a state.

    Attributes:
        is_tuple: whether a state is a tuple of tensors.
        tensors: indices of the tensors in a tuple that make up ``z``, increasing. Several are joined to ``(B, D)``.
        entries: indices of the entries of a sample that make up ``z``, along the flattened :attr:`dims`,
            increasing; None: all entries.
        dims: the first and the last dimension that are flattened to find the :attr:`entries`.
        batch_dim: the dimension of the samples; None: the whole state is one sample.
    """

    is_tuple: bool = False
    tensors: tuple[int, ...] = (0,)
    entries: Tensor | None = None
    dims: tuple[int, int] = (1, 1)
    batch_dim: int | None = 0

    @property
    def is_one_tensor(self) -> bool:
        """Whether ``z`` is exactly one of the tensors.

        It is then used as it is, because slicing would make a small net 10 % slower.
        """
        return len(self.tensors) == 1 and self.batch_dim == 0 and self.entries is None

    def leaves_out(self, state: State) -> bool:
        """Whether the state has more than ``z``."""
        return self.entries is not None or len(self.tensors) < len(tensors_of(state))

    def take(self, state: State) -> Tensor:
        """Extract ``z (B, *event)`` from a state, or the same part from its velocity."""
        tensors = tensors_of(state)
        if self.is_one_tensor:
            return tensors[self.tensors[0]]
        parts = [samples_first(tensors[i], self.batch_dim) for i in self.tensors]
        if self.entries is not None:
            first, last = self.dims
            return parts[0].flatten(first, last).index_select(first, self.entries)
        return parts[0] if len(parts) == 1 else torch.cat([x.unsqueeze(-1).flatten(1) for x in parts], 1)

    def put(self, state: State, z: Tensor) -> State:
        """A copy of the state in which ``z`` replaces its part."""
        # no write in place: the graph of the state must stay valid, and z may require a gradient
        tensors = list(tensors_of(state))
        if self.is_one_tensor:
            tensors[self.tensors[0]] = z
            return tuple(tensors) if self.is_tuple else z
        before = [samples_first(tensors[i], self.batch_dim) for i in self.tensors]
        parts: Sequence[Tensor]
        if self.entries is not None:
            first, last = self.dims
            parts = (before[0].flatten(first, last).index_copy(first, self.entries, z),)
        else:
            parts = (z,) if len(before) == 1 else z.split([math.prod(x.shape[1:]) for x in before], 1)
        for i, old, new in zip(self.tensors, before, parts, strict=True):
            new = new.reshape(old.shape)
            tensors[i] = new.squeeze(0) if self.batch_dim is None else new.movedim(0, self.batch_dim)
        return tuple(tensors) if self.is_tuple else tensors[0]


@dataclass(frozen=True)
class PartSpec:
    """The arguments ``penalized=`` and ``batch_dim=``. They become a :class:`Part` where a state is known.

    Attributes:
        tensors: indices of the tensors of a tuple that penalties measure, which are joined; None: the first one, or
            all of a state that is one tensor.
        columns: a slice of the first dimension of a sample, or a mask of booleans on the CPU over its first
            dimensions; None: all of a sample. A slice or a mask ``(D,)`` of a state ``(N, D)`` that is one sample
            selects among the D.
        batch_dim: the dimension of the samples; None: the whole state is one sample.
    """

    tensors: tuple[int, ...] | None = None
    columns: slice | Tensor | None = None
    batch_dim: int | None = 0

    @classmethod
    def of(cls, penalized: Any, batch_dim: int | None = 0) -> PartSpec:
        """Make a specification from the arguments of a user.

        Raises:
            ConfigError: for anything but None, indices of tensors, a slice, and a mask of booleans, and for a
                ``batch_dim`` that is neither a whole number nor None.
        """
        if batch_dim is not None and (not isinstance(batch_dim, int) or isinstance(batch_dim, bool)):
            raise ConfigError(
                f"batch_dim must be an int or None, not {batch_dim!r}: for samples in two leading dimensions of "
                "the state, 0 gives the same loss()."
            )
        if penalized is None or isinstance(penalized, slice):
            return cls(None, penalized, batch_dim)
        if isinstance(penalized, Tensor) and penalized.dtype == torch.bool and penalized.ndim > 0:
            return cls(None, penalized.detach().clone().cpu(), batch_dim)
        given: list[Any] = list(penalized) if isinstance(penalized, (list, tuple)) else [penalized]
        if given and all(isinstance(x, (bool, np.bool_)) for x in given) and penalized is not given[0]:
            return cls(None, torch.tensor(given), batch_dim)
        if given and all(isinstance(i, int) and not isinstance(i, bool) for i in given):
            return cls(tuple(given), None, batch_dim)
        raise ConfigError(
            "penalized must be a slice or a mask of booleans for columns of one tensor, or an index of the state's "
            f"tuple or several, not {penalized!r}."
        )

    @property
    def is_all(self) -> bool:
        """Whether it is all of a state that is one tensor with the samples along dimension 0."""
        return self.tensors is None and self.columns is None and self.batch_dim == 0

    def part(self, state: State) -> Part | None:
        """Find the part in a state; None if ``z`` is the whole state, a tensor with the samples along dimension 0.

        Raises:
            ConfigError: for a state that has no such part, or that penalties cannot measure.
        """
        if self.is_all and isinstance(state, Tensor) and state.is_floating_point() and state.ndim > 0:
            return None
        tensors, is_tuple = tensors_of(state), not isinstance(state, Tensor)
        count, chosen, dim = len(tensors), self.tensors or (0,), self.batch_dim
        if (self.tensors is not None and not is_tuple) or any(not -count <= i < count for i in chosen):
            raise ConfigError(
                f"penalized={chosen} names tensors of a tuple, and this state is "
                f"{f'a tuple of {count}' if is_tuple else 'one tensor: give its columns, such as slice(0, 2)'}."
            )
        indices = tuple(sorted({i % count for i in chosen}))
        for x in (tensors[i] for i in indices):
            check_real(x)
            if x.ndim == 0 or (dim is not None and not -x.ndim <= dim < x.ndim):
                raise ConfigError(
                    f"batch_dim={dim} is not a dimension of the state of shape {tuple(x.shape)}: penalties belong "
                    "to samples, along a batch dimension. batch_dim=None takes the whole state as one sample."
                )
        samples = [samples_first(tensors[i], dim) for i in indices]
        if len({len(x) for x in samples}) > 1:
            sizes = sorted({len(x) for x in samples})
            raise ConfigError(f"the penalized tensors have different numbers of samples: {sizes}.")
        if self.columns is None:
            return None if not is_tuple and dim == 0 else Part(is_tuple, indices, batch_dim=dim)
        # the columns of a state (N, D) that is one sample are the D, which are dimension 2 of (1, N, D)
        one_row = isinstance(self.columns, slice) or self.columns.ndim == 1
        first = 2 if dim is None and one_row and samples[0].ndim > 2 else 1
        mask = self._mask(samples[0].shape[first:])
        entries = mask.flatten().nonzero().flatten().to(samples[0].device)
        return Part(is_tuple, indices, entries, (first, first + mask.ndim - 1), dim)

    def _mask(self, event: Sequence[int]) -> Tensor:
        """The columns as a mask over the first dimensions of ``event``."""
        columns = self.columns
        if isinstance(columns, slice):
            size = event[0] if event else 0
            mask = torch.zeros(size, dtype=torch.bool)
            mask[list(range(size)[columns])] = True
        else:
            assert columns is not None
            mask = columns
        if tuple(mask.shape) != tuple(event[: mask.ndim]) or not mask.any():
            raise ConfigError(f"penalized={columns} selects nothing of a sample of shape {tuple(event)}.")
        return mask


def check_real(z: Tensor) -> None:
    """Refuse a state of whole or complex numbers, which products with a real Jacobian cannot have."""
    if not z.is_floating_point():
        raise ConfigError(
            f"penalties and checks of a field need a real floating-point state, not one of {z.dtype}: give a "
            "complex one as torch.view_as_real(x)."
        )


def check_first(batch_dim: int | None) -> None:
    """Refuse samples along another dimension than the first, where a caller takes no other."""
    if batch_dim not in (0, None):
        raise ConfigError(f"batch_dim must be 0, or None for a state that is one sample, not {batch_dim!r}.")


def tensors_of(state: State) -> tuple[Tensor, ...]:
    """The tensors of a state, or of its velocity."""
    return (state,) if isinstance(state, Tensor) else tuple(state)


def joined(state: State) -> Tensor:
    """A state or its velocity as one tensor: itself, or the entries of all tensors of a tuple in a row."""
    return state if isinstance(state, Tensor) else torch.cat([x.flatten() for x in state])


def parted(row: Tensor, like: State) -> State:
    """The inverse of :func:`joined`, for a state whose tensors are like those of ``like``."""
    if isinstance(like, Tensor):
        return row
    parts = row.split([x.numel() for x in like])
    return tuple(part.reshape(x.shape).to(x.dtype) for part, x in zip(parts, like, strict=True))


def samples_first(x: Tensor, batch_dim: int | None) -> Tensor:
    """``x`` with the samples along dimension 0."""
    return x.unsqueeze(0) if batch_dim is None else x.movedim(batch_dim, 0)
