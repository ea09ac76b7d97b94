"""Which columns of a torchdyn state are a running cost or a trace, and which ones the penalties are about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchdyn.core.defunc import DEFunc

from ...errors import ConfigError

__all__ = ["Penalized", "StateLayout", "check_penalized", "is_cnf", "layout_of"]

Penalized = slice | Tensor
"""Columns of the state that the field is given: a slice, or a mask ``(D,)`` of booleans."""


@dataclass(frozen=True)
class StateLayout:
    """The columns (dimension 1) of a state ``(B, D, ...)``.

    Attributes:
        cost: 1 if ``integral_loss`` travels in the first column (gradients through the steps), else 0.
        trace: how many CNFs keep their accumulated trace in a column, in front of ``z``.
        penalized: the columns that the user names; None: all behind the cost and the trace.
    """

    cost: int
    trace: int
    penalized: Penalized | None = None

    def without_cost(self, x: Tensor) -> Tensor:
        """The state or velocity that the field itself knows."""
        return x[:, self.cost :] if self.cost else x

    def columns(self, x: Tensor) -> Tensor | slice:
        """The index along dimension 1 of what the penalties are about, in a state ``x`` without the cost.

        Raises:
            ConfigError: for a mask of another length, and for no column at all.
        """
        chosen = self.penalized
        if chosen is None:
            return slice(self.trace, None)
        size = x.shape[1] if x.ndim > 1 else 0
        if isinstance(chosen, Tensor):
            if len(chosen) != size:
                raise ConfigError(f"penalized= is a mask of {len(chosen)} columns, but the state has {size}.")
            chosen = chosen.nonzero().flatten().to(x.device)
            count = len(chosen)
        else:
            count = len(range(*chosen.indices(size)))
        if count == 0:
            raise ConfigError(f"penalized={self.penalized} selects nothing of a state with {size} columns.")
        return chosen

    def dims(self, x: Tensor) -> int:
        """Number of dimensions per sample of ``x``, the whole state, that the penalties are about."""
        if x.ndim < 2:
            return 1
        state = self.without_cost(x)
        return state[:, self.columns(state)].shape[1:].numel()


def layout_of(vf: Any, penalized: Penalized | None = None) -> StateLayout:
    """The layout of the states of torchdyn's wrapped field ``vf``."""
    cost = type(vf) is DEFunc and vf.integral_loss is not None and vf.sensitivity == "autograd"
    return StateLayout(int(cost), sum(1 for m in vf.modules() if is_cnf(m)), penalized)


def is_cnf(module: nn.Module) -> bool:
    """torchdyn's CNF, ours, or one that was written after theirs; not any module with a ``trace_estimator``."""
    own = module.__dict__
    return "noise_dist" in own and "noise" in own and hasattr(module, "trace_estimator")


def check_penalized(penalized: Any) -> Penalized | None:
    """``penalized`` as a slice, or as a mask that nobody else holds.

    Raises:
        ConfigError: for anything else.
    """
    if penalized is None or isinstance(penalized, slice):
        return penalized
    mask = torch.as_tensor(penalized) if isinstance(penalized, (Tensor, list, tuple)) else None
    if mask is None or mask.dtype != torch.bool or mask.ndim != 1:
        raise ConfigError(
            f"penalized= must be a slice of the state's columns or a mask of booleans (D,), not {penalized!r}."
        )
    return mask.detach().clone().cpu()
