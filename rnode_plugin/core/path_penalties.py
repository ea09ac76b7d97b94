"""PathPenalties: the penalties of one solve that are not rates, those of steps and of the trajectory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..types import StepRecord, Trajectory
from .regularizers import Rate, StepPenalty, TrajectoryPenalty
from .regularizers.checked_call import checked_call

__all__ = ["PathPenalties"]


def _whole(state: Tensor) -> Tensor:
    return state


@dataclass(frozen=True)
class PathPenalties:
    """Step and trajectory penalties, and how they see a state.

    Attributes:
        steps: penalties on all accepted steps.
        local: penalties on one extra step.
        trajectories: penalties on states at times of their own.
        event: takes from a state ``(B, ...)`` what the penalties are about; a torchdyn state may hold more.
        hidden: names of rates that are integrated for trajectory penalties alone.
    """

    steps: tuple[StepPenalty, ...] = ()
    local: tuple[StepPenalty, ...] = ()
    trajectories: tuple[TrajectoryPenalty, ...] = ()
    event: Callable[[Tensor], Tensor] = _whole
    hidden: frozenset[str] = frozenset()

    def of_step(self, record: StepRecord, *, local: bool = False) -> dict[str, tuple[str, Tensor]]:
        """``(reduction, value (B,))`` of one step by name."""
        event = self.event
        seen = replace(
            record,
            z0=event(record.z0),
            z1=event(record.z1),
            states=[event(z) for z in record.states],
            velocities=[event(v) for v in record.velocities],
            error=None if record.error is None else event(record.error),
        )
        untouched = [seen.z0, seen.z1, *seen.states, *seen.velocities]
        penalties = self.local if local else self.steps
        return {r.name: (r.reduction, checked_call(r, seen, untouched, seen.z0)) for r in penalties}

    def times(self, t0: Tensor, t1: Tensor) -> list[Tensor]:
        """The times at which each trajectory penalty wants states, one row ``(k,)`` each."""
        return [penalty.times(t0, t1) for penalty in self.trajectories]

    def of_trajectory(
        self, index: int, t: Tensor, z: Sequence[Tensor], integrals: dict[str, Tensor]
    ) -> tuple[str, Tensor]:
        """Name and value ``(B,)`` of one trajectory penalty for states at the times ``t``."""
        penalty: Any = self.trajectories[index]
        states = torch.stack([self.event(each) for each in z])
        record = Trajectory(t, states, {rate.name: integrals[rate.name] for rate in penalty.rates})
        return penalty.name, checked_call(penalty, record, [states], states[0])


def hidden_rates(trajectories: Sequence[TrajectoryPenalty], followed: Sequence[Rate]) -> list[Rate]:
    """The rates that trajectory penalties read and nobody follows already."""
    names = {rate.name for rate in followed}
    found = {rate.name: rate for penalty in trajectories for rate in penalty.rates if rate.name not in names}
    return list(found.values())
