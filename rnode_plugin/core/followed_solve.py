"""Regularizers sorted by kind, and what one solve follows of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ..errors import ConfigError
from .regularizer import KINDS, Rate, Regularizer, SpanPolicy, StepPenalty, TrajectoryPenalty


@dataclass(frozen=True)
class Kinds:
    """Regularizers, sorted by what they see of a solve; each group keeps its order.

    Attributes:
        penalties: all regularizers except the span policy, in the order in which they were given.
        rates, steps, trajectories: the penalties of each kind.
        span: the one span policy; None if there is none.
        needs: what an evaluation must provide for the rates, and for the rates that trajectory penalties read.
        held: names of the rates whose gradient by the times is wrong if it is taken through the steps of a solve.
        repeats: whether a rate evaluates the field again.
    """

    penalties: tuple[Regularizer, ...] = ()
    rates: tuple[Rate, ...] = ()
    steps: tuple[StepPenalty, ...] = ()
    trajectories: tuple[TrajectoryPenalty, ...] = ()
    span: SpanPolicy | None = None
    needs: frozenset[str] = frozenset()
    held: tuple[str, ...] = ()
    repeats: bool = False

    @classmethod
    def of(cls, regularizers: Iterable[Regularizer]) -> Kinds:
        """Sort regularizers by kind.

        Raises:
            ConfigError: for an object of none of the four classes, and for two span policies.
        """
        followed: list[Regularizer] = []
        rates: list[Rate] = []
        steps: list[StepPenalty] = []
        trajectories: list[TrajectoryPenalty] = []
        span: SpanPolicy | None = None
        for each in regularizers:
            if not isinstance(each, SpanPolicy):
                followed.append(each)
            if isinstance(each, Rate):
                rates.append(each)
            elif isinstance(each, StepPenalty):
                steps.append(each)
            elif isinstance(each, TrajectoryPenalty):
                trajectories.append(each)
            elif not isinstance(each, SpanPolicy):
                kinds = ", ".join(kind.__name__ for kind in KINDS.values())
                raise ConfigError(f"{each!r} is not a regularizer: its class must derive from one of {kinds}.")
            elif span is not None:
                raise ConfigError(f"{span.name} and {each.name} both change the times of a solve: choose one.")
            else:
                span = each
        read = list(rates)
        for penalty in trajectories:
            read += penalty.rates
        needs: set[str] = set()
        held: list[str] = []
        repeats = False
        for rate in read:
            needs.update(rate.needs)
            repeats = repeats or rate.repeats or "field" in rate.needs
            if not rate.time_gradient:
                held.append(rate.name)
        return cls(
            tuple(followed), tuple(rates), tuple(steps), tuple(trajectories), span, frozenset(needs), tuple(held),
            repeats,
        )  # fmt: skip


@dataclass(frozen=True)
class FollowedSolve:
    """The regularizers of one solve: penalties for its dynamics, and a span policy for its times.

    Every interface asks it in this order: :meth:`times` before the solve, ``kinds`` for the dynamics, and
    :meth:`complete` after the solve.

    Attributes:
        kinds: the rates, step penalties and trajectory penalties that the dynamics follow.
        policy: the span policy that changes the times; None if they stay.
        training: whether the policy may draw times.
        penalized: whether the policy's own penalty is wanted.
    """

    kinds: Kinds = Kinds()
    policy: SpanPolicy | None = None
    training: bool = False
    penalized: bool = False

    @classmethod
    def of(
        cls, regularizers: Iterable[Regularizer] | Kinds, *, penalized: bool = False, training: bool = False
    ) -> FollowedSolve:
        """Choose what a solve follows from the regularizers of a model.

        Args:
            regularizers: all of them; a model that solves often has sorted them once.
            penalized: whether to follow the penalties. A span policy acts in any case, since a learned end time is
                part of the model.
            training: whether a span policy may draw times. Without penalties it draws none.
        """
        kinds = regularizers if isinstance(regularizers, Kinds) else Kinds.of(regularizers)
        # the dynamics refuse a span policy, since this object applies it
        followed = Kinds() if not penalized else kinds if kinds.span is None else replace(kinds, span=None)
        return cls(followed, kinds.span, training and penalized, penalized)

    def times(self, t_span: Tensor) -> Tensor:
        """The times ``(T,)`` to solve through, in the direction of ``t_span (T,)``.

        Raises:
            ConfigError: from the policy, for a span that it cannot change.
        """
        return t_span if self.policy is None else self.policy.times(t_span, training=self.training)

    def complete(self, integrals: Mapping[str, Tensor], z: Tensor) -> dict[str, Tensor]:
        """Add the policy's penalty for ``z (B, *event)`` to the integrals ``(B,)`` of a solve, by name."""
        completed = dict(integrals)
        if self.policy is not None and self.penalized:
            completed[self.policy.name] = self.policy(z)
        return completed
