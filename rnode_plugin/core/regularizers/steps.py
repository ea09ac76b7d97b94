"""Step penalties: ``error`` and ``stiffness`` of the solver's steps, over all of them or of one extra step.

Each is ``(B,)`` and not divided by D: norms over the event are root mean squares, as in a solver's own error norm.
They need a gradient mode that differentiates through the steps (``autograd``, ``checkpointed``). The local ones
work in every mode.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ...types import StepRecord

__all__ = ["FunctionStepPenalty", "error", "local_error", "local_stiffness", "stiffness"]


@dataclass(frozen=True)
class FunctionStepPenalty:
    """A step penalty from a function of a :class:`~rnode_plugin.types.StepRecord`.

    Args:
        name: the key of the penalty in every result.
        value: step to ``(B,)``.
        uses: ``"error"`` and ``"pair"``, those that it reads.
        reduction: ``"sum"``, ``"mean"`` or ``"max"`` over the steps.
        local: whether it sees one extra step from a random time instead of the accepted ones.
        divided_by_dims: whether the objective divides the penalty by the number of dimensions.
    """

    name: str
    value: Callable[[StepRecord], Tensor]
    uses: Collection[str] = frozenset()
    reduction: str = "sum"
    local: bool = False
    divided_by_dims: bool = False
    kind: str = "step"

    def __post_init__(self) -> None:
        object.__setattr__(self, "uses", frozenset(self.uses))  # hashable: a key of {regularizer: lambda}

    def __call__(self, step: StepRecord, /) -> Tensor:
        return self.value(step)


def rms(x: Tensor) -> Tensor:
    """The root mean square over the event, ``(B,)``: 0 with the gradient 0 for ``x = 0``."""
    square = x.reshape(x.shape[0], -1).square().mean(1)
    zero = square == 0
    return torch.where(zero, torch.zeros_like(square), torch.where(zero, torch.ones_like(square), square).sqrt())


def _error(step: StepRecord) -> Tensor:
    """``E h``: root mean square of the embedded error estimate times the step's length (ERNODE; Pal et al., 2021).

    The authors' code divides the estimate by ``atol + rtol |z|`` first, as their solver's norm does. At an estimate
    of 0 the gradient of the root is 0.
    """
    assert step.error is not None
    return rms(step.error) * step.h


def _stiffness(step: StepRecord) -> Tensor:
    """``||f(b) - f(a)|| / ||b - a||`` of two stages a, b at one time (SRNODE; Pal et al., 2021): dopri5's and
    tsit5's last two, rk4's middle two.

    Safe form: 0 with the gradient 0 where the stages coincide, as at f = 0.
    """
    assert step.pair is not None
    a, b = step.pair
    apart = rms(step.states[b] - step.states[a])
    change = rms(step.velocities[b] - step.velocities[a])
    same = apart == 0
    return torch.where(same, torch.zeros_like(apart), change / torch.where(same, torch.ones_like(apart), apart))


error = FunctionStepPenalty("error", _error, uses=frozenset({"error"}))
"""``sum_j E_j h_j`` over the accepted steps. Needs an adaptive method."""

stiffness = FunctionStepPenalty("stiffness", _stiffness, uses=frozenset({"pair"}), reduction="mean")
"""The mean over the accepted steps of an estimate of the Jacobian's norm. Needs dopri5, tsit5 or rk4."""

local_error = FunctionStepPenalty("local_error", _error, uses=frozenset({"error"}), local=True)
"""``E h`` of one extra step of tsit5, whatever the solver, from a uniformly random time, its start detached (Pal et
al., 2023)."""

local_stiffness = FunctionStepPenalty("local_stiffness", _stiffness, uses=frozenset({"pair"}), local=True)
"""The stiffness of one extra step of tsit5, whatever the solver, from a uniformly random time with a detached start
(Pal et al., 2023)."""
