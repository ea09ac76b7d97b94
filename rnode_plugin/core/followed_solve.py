"""Regularizers sorted by kind, what one solve follows of them, and the checks of their calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, PluginError, RnodeError
from .modes import differs, on_host
from .regularizer import KINDS, Rate, Regularizer, SpanPolicy, StepPenalty


@dataclass(frozen=True)
class Kinds:
    """Regularizers, sorted by what they see of a solve; each group keeps its order.

    Attributes:
        penalties: all regularizers except the span policy, in the order in which they were given.
        rates: the rates by name.
        steps: the step penalties.
        span: the one span policy; None if there is none.
        needs: what an evaluation must provide for the rates.
        held: names of those whose gradient by the times is wrong if it is taken through the steps of a solve.
        repeats: whether one of them evaluates the field again.
    """

    penalties: tuple[Regularizer, ...] = ()
    rates: Mapping[str, Rate] = field(default_factory=dict[str, Rate])
    steps: tuple[StepPenalty, ...] = ()
    span: SpanPolicy | None = None
    needs: frozenset[str] = frozenset()
    held: tuple[str, ...] = ()
    repeats: bool = False

    @property
    def adds_evaluations(self) -> bool:
        """Whether a solve that follows them takes more evaluations than a solve without them, for a local step."""
        return any(each.local for each in self.steps)

    @classmethod
    def of(cls, regularizers: Iterable[Regularizer]) -> Kinds:
        """Sort regularizers by kind.

        Raises:
            ConfigError: for an object of none of the three classes, and for two span policies.
        """
        followed: list[Regularizer] = []
        rates: dict[str, Rate] = {}
        steps: list[StepPenalty] = []
        span: SpanPolicy | None = None
        for each in regularizers:
            if not isinstance(each, SpanPolicy):
                followed.append(each)
            if isinstance(each, Rate):
                rates[each.name] = each
            elif isinstance(each, StepPenalty):
                steps.append(each)
            elif not isinstance(each, SpanPolicy):
                kinds = ", ".join(kind.__name__ for kind in KINDS.values())
                raise ConfigError(f"{each!r} is not a regularizer: its class must derive from one of {kinds}.")
            elif span is not None:
                raise ConfigError(f"{span.name} and {each.name} both change the times of a solve: choose one.")
            else:
                span = each
        needs: set[str] = set()
        held: list[str] = []
        repeats = False
        for rate in rates.values():
            needs.update(rate.needs)
            repeats = repeats or rate.repeats or "field" in rate.needs
            if not rate.time_gradient:
                held.append(rate.name)
        return cls(
            penalties=tuple(followed),
            rates=rates,
            steps=tuple(steps),
            span=span,
            needs=frozenset(needs),
            held=tuple(held),
            repeats=repeats,
        )


@dataclass(frozen=True)
class FollowedSolve:
    """The regularizers of one solve: penalties for its dynamics, and a span policy for its times.

    Every interface asks it in this order: :meth:`times` before the solve, ``kinds`` for the dynamics, and
    :meth:`complete` after the solve.

    Attributes:
        kinds: the rates and step penalties that the dynamics follow.
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

    def times(self, t_span: Tensor, *, like: Tensor | None = None, backward: bool = False) -> Tensor:
        """The times ``(T,)`` to solve through.

        Args:
            t_span: the times of the model, ``(T,)``.
            like: has the dtype and device of the result; None: ``t_span`` itself.
            backward: whether the result runs in the other direction than ``t_span``.

        Raises:
            ConfigError: from the policy, for a span that it cannot change.
            PluginError: if the policy raises another error.
        """
        with on_host():  # a captured program has the times as constants
            times = t_span if like is None else t_span.to(like)
            times = times.flip(0) if backward else times
            if (policy := self.policy) is None:
                return times
            return times_of(policy, lambda: policy.times(times, training=self.training))

    def complete(self, integrals: Mapping[str, Tensor], z: Tensor) -> dict[str, Tensor]:
        """Add the policy's penalty for ``z (B, *event)`` to the integrals ``(B,)`` of a solve, by name.

        Raises:
            ConfigError, PluginError: as :func:`checked`.
        """
        completed = dict(integrals)
        if self.policy is not None and self.penalized:
            completed[self.policy.name] = checked(self.policy.name, self.policy, (z,), (z,), z)
        return completed


# calls of a regularizer -----------------------------------------------------------------------------------------

_WRITES = (
    "the regularizer {!r} writes into a tensor that it is shown, such as the velocity, which changes the solve or "
    "another penalty: use dz.square(), not dz.square_(), and so on."
)


def checked(
    name: str, call: Callable[..., Tensor], seen: Sequence[Any], untouched: Sequence[Tensor], like: Tensor
) -> Tensor:
    """``call(*seen)``, a real floating-point tensor ``(B,)``; an error names the regularizer.

    Args:
        name: of the regularizer.
        call: the regularizer, or its ``finish``.
        seen: what it sees.
        untouched: tensors of ``seen`` that the solve or other regularizers read later.
        like: a state ``(B, *event)``.

    Raises:
        ConfigError: for another result, and for a regularizer that writes into ``untouched``.
        PluginError: if the regularizer raises another error.
    """
    if torch.compiler.is_compiling():  # the same call was made uncompiled before
        return call(*seen)
    # torch counts writes into a tensor in its version; tensors made in inference mode have none
    versions = [None if x.is_inference() else x._version for x in untouched]
    try:
        value = call(*seen)
    except Exception as error:
        if _passes(error):
            raise
        text = _one_line(error)
        if "appears to not have been used in the graph" in text or "does not require grad" in text:
            text += (
                ". If the regularizer differentiates dz by z, let it declare needs={'vjp'}, as in "
                "FunctionRegularizer(name, function, needs={'vjp'}), and read evaluation.vjp(v)"
            )
        raise PluginError(f"the regularizer {name!r} raised {text}") from error
    for x, before in zip(untouched, versions, strict=True):
        if before is not None and x._version != before:
            raise ConfigError(_WRITES.format(name))
    if not isinstance(value, Tensor) or value.shape != like.shape[:1] or not value.is_floating_point():
        got = f"shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(
            f"the regularizer {name!r} returned {got}; it must return one real number per sample, a "
            f"tensor of floats of shape {tuple(like.shape[:1])}."
        )
    return value


def times_of(regularizer: Regularizer, call: Callable[[], Tensor]) -> Tensor:
    """The times that ``call`` asks a regularizer for.

    Raises:
        ConfigError: if they differ between the samples of a ``torch.func.vmap``.
        PluginError: if the regularizer raises an error that is not a RnodeError.
    """
    if torch.compiler.is_compiling():
        return call()
    try:
        times = call()
    except Exception as error:
        if _passes(error):
            raise
        raise PluginError(f"`times` of the regularizer {regularizer.name!r} raised {_one_line(error)}") from error
    if isinstance(times, Tensor) and differs(times):
        raise ConfigError(ONE_DRAW.format(f"the times of {regularizer.name!r}"))
    return times


ONE_DRAW = (
    "{} are drawn once for all samples of a torch.func.vmap, which share one solve: give vmap randomness='same'."
)


def _passes(error: Exception) -> bool:
    """Whether an error that a call of a regularizer raises is not about that regularizer."""
    if isinstance(error, (RnodeError, torch.OutOfMemoryError, MemoryError)):
        return True
    # torch stops the second run of a checkpointed step early by raising this
    return type(error).__module__ == "torch.utils.checkpoint"


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
