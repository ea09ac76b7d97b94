"""Regularizers: all of a model, resolved, sorted and weighted once; and the only calls of their code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import ConfigError, PluginError, RnodeError, check_name, is_out_of_memory
from .modes import read
from .modules import module_of
from .regularizer import Rate, Regularizer, SpanPolicy, StepPenalty, StepRecord, code_of
from .schedules import DEFAULT_LAMBDA, Lambda, Strength, checked_lambda, strength_at
from .signature import accepts

if TYPE_CHECKING:
    from .field_evaluation import FieldEvaluation

One: TypeAlias = "str | Regularizer | Callable[..., Tensor]"
RegularizersLike: TypeAlias = "Regularizers | One | Iterable[One] | Mapping[Any, Strength | None] | None"
"""Type of ``regularizers=``: one or several names, objects or functions ``rate(t, z, dz)``, or their lambdas."""


@dataclass(frozen=True, eq=False)
class Regularizers:
    """The regularizers of a model with their strengths, sorted by kind.

    Every interface asks it in this order: :meth:`times` before a solve, :attr:`integrated` for the right-hand side
    of the solve, which calls :meth:`of_step` and :meth:`finish`, and :meth:`with_span_penalty` after the solve.

    Attributes:
        by_name: all of them, in the order in which they were given. Iteration is over these objects.
        strengths: the lambda of each in the objective by name: a number, or a function of the optimizer's step.
        penalties: all except the span policy.
        rates: the rates by name.
        finished: the rates whose penalty is computed from their integral at the end of a solve.
        steps: the step penalties.
        span: the one span policy; None if there is none.
        needs: names of the quantities that an evaluation must provide for the rates.
        adds_evaluations: whether a solve with them takes more evaluations than a solve without them, for the extra
            step of a local penalty.
        undivided: names of those whose penalty the objective does not divide by the number of dimensions.

    Raises:
        ConfigError: for an object of none of the three kinds, and for two span policies.
    """

    by_name: Mapping[str, Regularizer] = field(default_factory=dict[str, Regularizer])
    strengths: Mapping[str, Strength] = field(default_factory=dict[str, Strength])
    penalties: tuple[Rate | StepPenalty, ...] = field(init=False)
    rates: Mapping[str, Rate] = field(init=False)
    finished: tuple[Rate, ...] = field(init=False)
    steps: tuple[StepPenalty, ...] = field(init=False)
    span: SpanPolicy | None = field(init=False)
    needs: frozenset[str] = field(init=False)
    adds_evaluations: bool = field(init=False)
    undivided: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        penalties: list[Rate | StepPenalty] = []
        rates: dict[str, Rate] = {}
        steps: list[StepPenalty] = []
        span: SpanPolicy | None = None
        needs: set[str] = set()
        for each in self.by_name.values():
            if isinstance(each, SpanPolicy):
                if span is not None:
                    raise ConfigError(f"{span.name} and {each.name} both change the times of a solve: choose one.")
                span = each
                continue
            penalties.append(each)
            if isinstance(each, Rate):
                rates[each.name] = each
                needs.update(each.needs)
            else:
                steps.append(each)
        derived: dict[str, object] = {
            "penalties": tuple(penalties), "rates": rates, "steps": tuple(steps), "span": span,
            "finished": tuple(rate for rate in rates.values() if rate.finish is not None),
            "needs": frozenset(needs),
            "adds_evaluations": any(each.local for each in steps),
            "undivided": frozenset(each.name for each in self if not each.divided_by_dims),
        }  # fmt: skip
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, spec: RegularizersLike, *, by_name: Callable[[str], Regularizer] | None = None) -> Regularizers:
        """Resolve the argument ``regularizers=``: names, objects or functions become regularizers with lambdas.

        Args:
            spec: names, regularizers or plain functions ``rate(t, z, dz) -> (B,)``, one or several, or a mapping
                from any of these to lambda: a number, a function of the optimizer's step, or None for
                :data:`~rnode_plugin.core.schedules.DEFAULT_LAMBDA`. Regularizers that are resolved already stay
                as they are.
            by_name: looks up the regularizer of a name; ``rnode_plugin.plugins.registry.get_regularizer`` is one.
                None: names are refused.

        Raises:
            ConfigError: for an unknown name, a name used twice, a lambda that is negative or not finite, a lambda
                of a regularizer that has no penalty, two span policies, or an object that is none of the three.
        """
        if isinstance(spec, Regularizers):
            return spec
        if spec is None:
            return cls()
        if isinstance(spec, Mapping):
            items = list(spec.items())
        else:
            # a string is iterable, and so may be a regularizer, such as a module list with a call
            given: Any = spec
            several = isinstance(given, Iterable) and not isinstance(given, str) and not callable(given)
            items = [(entry, None) for entry in (given if several else [given])]
        resolved: dict[str, Regularizer] = {}
        strengths: dict[str, Strength] = {}
        for entry, strength in items:
            one = _resolved(entry, by_name)
            if one.name in resolved:
                raise ConfigError(f"the regularizer {one.name!r} is named twice; name each once.")
            resolved[one.name], strengths[one.name] = one, _checked_strength(one, strength)
        return cls(resolved, strengths)

    def __iter__(self) -> Iterator[Regularizer]:
        return iter(self.by_name.values())

    def __len__(self) -> int:
        return len(self.by_name)

    @property
    def code(self) -> tuple[object, ...]:
        """The function or module of each penalty, and the span policy, in order."""
        # not an attribute, because pickle refuses a function whose name means its penalty
        code = map(code_of, self)
        return tuple(each.function if isinstance(each, _OfPlainFunction) else each for each in code)

    @property
    def modules(self) -> list[nn.Module]:
        """Those in :attr:`code` that are modules, whose parameters train with the model."""
        return [each for each in self.code if isinstance(each, nn.Module)]

    @property
    def called(self) -> list[nn.Module]:
        """The modules that penalties call, :attr:`modules` and owners of methods; gradients reach their parameters.

        An owner does not become a submodule of the model, because it may contain it, as a LightningModule does.
        """
        return [each for each in map(module_of, self.code) if each is not None]

    # strengths ---------------------------------------------------------------------------------------------------

    def strengths_at(self, step: int | None, lambdas: Mapping[str, Lambda] | None = None) -> dict[str, Lambda]:
        """The lambda of each penalty by name.

        Args:
            step: number of steps that the optimizer has taken, for a lambda that is a function of the step.
            lambdas: strengths to use instead of the model's, by name.

        Raises:
            ConfigError: for an unknown name, for a strength that is negative, not finite, or of a span policy that
                has no penalty, and for a function without a step.
        """
        strengths = dict(self.strengths)
        for name, strength in (lambdas or {}).items():
            check_name(name, strengths, "penalty")
            strengths[name] = _checked_strength(self.by_name[name], strength)
        return {name: strength_at(name, strength, step) for name, strength in strengths.items()}

    # a solve -----------------------------------------------------------------------------------------------------

    def times(
        self, t_span: Tensor, *, training: bool = False, like: Tensor | None = None, backward: bool = False
    ) -> Tensor:
        """The times ``(T,)`` of a solve, with penalties or without: a policy is part of a model.

        Args:
            t_span: the times of the model, ``(T,)``.
            training: whether a span policy may draw times. A solve without penalties draws none.
            like: has the dtype of the result; None: ``t_span`` itself.
            backward: whether the result runs in the other direction than ``t_span``.

        Returns:
            The times, where ``t_span`` is, unless a span policy has parameters on another device.

        Raises:
            ConfigError: from the policy, and for a span that it cannot change.
            PluginError: if the policy raises another error.
        """
        times = t_span if like is None else t_span.to(like.dtype)
        times = times if like is None or times.requires_grad else times.cpu()
        times = times.flip(0) if backward else times
        if (span := self.span) is None:
            return times
        own = next(span.parameters(), times) if isinstance(span, nn.Module) else times
        return _times_of(span, times.to(own.device), training=training)

    @property
    def integrated(self) -> Regularizers:
        """The regularizers that a solve integrates: all but the span policy."""
        if self.span is None:
            return self
        rest = {each.name: each for each in self.penalties}
        return replace(self, by_name=rest, strengths={name: self.strengths[name] for name in rest})

    def of_step(
        self, record: StepRecord, z_of: Callable[[Tensor], Tensor], *, local: bool
    ) -> dict[str, tuple[str, Tensor]]:
        """``(reduction, value (B,))`` of each step penalty by name, at one step.

        Args:
            record: the step, of the whole state.
            z_of: extracts the part that the penalties measure from a state ``(B, ...)``, which may have more.
            local: whether the step is the extra one, which local penalties read, or an accepted one.

        Raises:
            ConfigError, PluginError: as :func:`checked`.
        """
        # `z_of` selects the same entries of a state, of its velocity and of its error
        seen = replace(
            record,
            z0=z_of(record.z0),
            z1=z_of(record.z1),
            states=[z_of(z) for z in record.states],
            velocities=[z_of(v) for v in record.velocities],
            error=None if record.error is None else z_of(record.error),
        )
        return {
            each.name: (each.reduction, checked(each.name, each.of, (seen,), seen.z0))
            for each in self.steps
            if each.local == local
        }

    def finish(self, integrals: Mapping[str, Tensor], z0: Tensor, z1: Tensor, times: Tensor) -> dict[str, Tensor]:
        """The penalties ``(B,)`` by name that rates compute from their integrals over a whole solve.

        Args:
            integrals: of all rates by name.
            z0, z1: the part ``(B, *event)`` of the state that they measure, at both ends of the solve.
            times: of the solve, ``(T,)``. They may have a graph.

        Raises:
            ConfigError, PluginError: as :func:`checked`.
        """
        length = (times[-1] - times[0]).abs().to(z0.device)
        penalties: dict[str, Tensor] = {}
        for rate in self.finished:
            seen = integrals[rate.name], z0, z1, length
            assert rate.finish is not None
            penalties[rate.name] = checked(rate.name, rate.finish, seen, z0)
        return penalties

    def with_span_penalty(self, integrals: Mapping[str, Tensor], z: Tensor) -> dict[str, Tensor]:
        """Add the span policy's penalty for ``z (B, *event)`` to the integrals ``(B,)`` by name of a whole model.

        A flow of several blocks adds it once, after its last block.

        Raises:
            ConfigError, PluginError: as :func:`checked`.
        """
        if self.span is None:
            return dict(integrals)
        return {**integrals, self.span.name: checked(self.span.name, self.span.penalty, (z,), z)}

    def joined(
        self, before: Mapping[str, Tensor], last: Mapping[str, Tensor], *, solves: int, share: float
    ) -> dict[str, Tensor]:
        """Combine the penalties ``(B,)`` of consecutive solves, such as the blocks of a flow.

        Args:
            before: penalties of all solves except the last one, by name; empty if there are none.
            last: penalties of the last solve.
            solves: number of solves, the last one included.
            share: number of steps in the last solve, as a fraction of all steps, between 0 and 1.
        """
        penalties: dict[str, Tensor] = {}
        for each in self.penalties:
            value, sum_of = last[each.name], before.get(each.name)
            if sum_of is None:
                penalties[each.name] = value
            elif isinstance(each, Rate) or each.reduction == "sum":
                penalties[each.name] = sum_of + value
            elif each.reduction == "max":
                penalties[each.name] = sum_of.maximum(value)
            else:  # a running mean: over the solves, which have one local step each, or else over their steps
                penalties[each.name] = sum_of + (value - sum_of) * (1 / solves if each.local else share)
        return penalties


NONE = Regularizers()
"""The regularizers of a model that has none, and of a solve without penalties."""


# the argument regularizers= --------------------------------------------------------------------------------------


def _resolved(entry: Any, by_name: Callable[[str], Regularizer] | None) -> Regularizer:
    if isinstance(entry, str) and by_name is not None:
        entry = by_name(entry)
    if isinstance(entry, Rate) and not accepts(entry.of, None):
        raise ConfigError(
            f"the function of {entry.name!r} must take one argument, an evaluation, which has t, z and dz: "
            "give Rate(name, lambda at: function(at.t, at.z, at.dz))."
        )
    if isinstance(entry, Regularizer):
        return entry
    if not callable(entry) or isinstance(entry, type) or hasattr(entry, "name"):
        raise ConfigError(
            f"{entry!r} is not a regularizer: give a name, a function rate(t, z, dz) -> (B,), or a Rate, a "
            "StepPenalty or a SpanPolicy of rnode_plugin.regularizers, an object and not a class."
        )
    name = entry.__name__ if inspect.isroutine(entry) else type(entry).__name__
    if not accepts(entry, None, None, None):
        raise ConfigError(
            f"the function {name!r} must take (t, z, dz). One that takes an evaluation becomes a regularizer by "
            f"Rate({name!r}, function), from rnode_plugin.regularizers, and one that makes a regularizer is called "
            "first, such as taylor(3)."
        )
    return rate_of(entry, name)


def rate_of(function: Callable[..., Any], name: str) -> Rate:
    """The rate ``function(t, z, dz) -> (B,)``, described by the function's docstring."""
    return Rate(name, _OfPlainFunction(function))


@dataclass(frozen=True)
class _OfPlainFunction:
    """A function of ``(t, z, dz)`` as a function of an evaluation; a class, because pickle takes no closure."""

    function: Callable[..., Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "__doc__", self.function.__doc__)

    def __call__(self, evaluation: FieldEvaluation, /) -> Tensor:
        return self.function(evaluation.t, evaluation.z, evaluation.dz)


def _checked_strength(regularizer: Regularizer, strength: Strength | None) -> Strength:
    given = DEFAULT_LAMBDA if strength is None else strength
    if not callable(given):  # a schedule is checked at each step
        given = checked_lambda(regularizer.name, given)
    if not isinstance(regularizer, SpanPolicy) or regularizer.penalized:
        return given
    if strength is not None and given != 1:
        raise ConfigError(
            f"{regularizer.name!r} has no penalty and takes no lambda: give None, or 1 in a recipe and on the "
            f"command line, {regularizer.name}=1. Its strength is an option, as in 'steer:0.25'."
        )
    return 1.0


# calls of user code -----------------------------------------------------------------------------------------


def checked(name: str, call: Callable[..., Tensor], seen: Sequence[Any], like: Tensor) -> Tensor:
    """``call(*seen)``, a real floating-point tensor ``(B,)``; an error names the regularizer.

    The result has at least the precision of the state. A module in a rate may compute in low precision under
    autocast, too low for a sum over many steps.

    Args:
        name: of the regularizer.
        call: the function of a penalty, its ``finish``, or the ``penalty`` of a span policy.
        seen: the arguments of the call.
        like: a state ``(B, *event)``.

    Raises:
        ConfigError: for another result.
        PluginError: if the regularizer raises another error.
    """
    try:
        value = call(*seen)
    except Exception as error:
        if torch.compiler.is_compiling() or _passes(error):
            raise
        text = _one_line(error)
        if "appears to not have been used in the graph" in text or "does not require grad" in text:
            text += (
                ". If the regularizer differentiates dz with respect to z, let it declare needs={'vjp'}, as in "
                "Rate(name, function, needs={'vjp'}), and read evaluation.vjp(v)"
            )
        raise PluginError(f"the regularizer {name!r} raised {text}") from error
    if not isinstance(value, Tensor) or value.shape != like.shape[:1] or not value.is_floating_point():
        got = f"shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(
            f"the regularizer {name!r} returned {got}; it must return one real number per sample, a "
            f"tensor of floats of shape {tuple(like.shape[:1])}."
        )
    # torch.compile cannot trace `like.dtype.to_real()`
    return value.to(torch.promote_types(value.dtype, like.real.dtype))


def _times_of(policy: SpanPolicy, times: Tensor, *, training: bool) -> Tensor:
    if torch.compiler.is_compiling():
        return policy.times(times, training=training)
    before = times
    try:
        times = policy.times(times, training=training)
    except Exception as error:
        if _passes(error):
            raise
        raise PluginError(f"`times` of the regularizer {policy.name!r} raised {_one_line(error)}") from error
    alike = isinstance(times, Tensor) and (times.shape, times.dtype) == (before.shape, before.dtype)
    if not alike or times.device != before.device:
        got = f"{tuple(times.shape)}, {times.dtype}, {times.device}" if isinstance(times, Tensor) else repr(times)
        raise ConfigError(
            f"`times` of the regularizer {policy.name!r} must return a tensor like its argument, "
            f"{tuple(before.shape)}, {before.dtype}, {before.device}, not {got:.100}."
        )
    lengths = read(torch.stack([before[-1] - before[0], times[-1] - times[0]])) if len(before) > 1 else None
    # a length of NaN is not in any direction
    if lengths is not None and lengths[0] and not lengths[0] * lengths[1] >= 0:
        raise ConfigError(
            f"`times` of the regularizer {policy.name!r} must return finite times in the direction of its "
            f"argument, which are {'de' if lengths[0] < 0 else 'in'}creasing here."
        )
    return times


def _passes(error: Exception) -> bool:
    """Whether an error that a call of a regularizer raises is not about that regularizer."""
    if isinstance(error, RnodeError) or is_out_of_memory(error):
        return True
    # torch stops the second run of a checkpointed step early by raising this
    return type(error).__module__ == "torch.utils.checkpoint"


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
