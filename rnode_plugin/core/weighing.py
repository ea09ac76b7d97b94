"""Turns what a user writes as ``regularizers=`` into objects by name with their strengths."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..errors import ConfigError
from .followed_solve import Kinds
from .modes import transforms_active
from .regularizer import FunctionRegularizer, Regularizer, SpanPolicy
from .schedules import DEFAULT_LAMBDA, Strength, check_lambda
from .signature import accepts

if TYPE_CHECKING:
    from .field_evaluation import FieldEvaluation


One: TypeAlias = "str | Regularizer | Callable[..., Tensor]"
Regularizers: TypeAlias = "One | Iterable[One] | Mapping[Any, Strength | None] | None"
"""What ``regularizers=`` takes: one or several names, objects or functions ``rate(t, z, dz)``, or their lambdas."""


class Weighted(NamedTuple):
    """A regularizer and its strength lambda in the objective: a number, or a function of the optimizer's step."""

    regularizer: Regularizer
    strength: Strength


def warn_of_flat_state(z: Tensor, kinds: Kinds) -> None:
    """Warn about a state of shape ``(D,)`` if a penalty reads derivatives.

    Such a state is read as D samples of one number, so a Jacobian penalty misses the coupling between the entries.
    """
    if len(z) > 1 and kinds.needs:
        warnings.warn(  # Python shows it once
            f"a state of shape {tuple(z.shape)} counts as {len(z)} samples of one dimension, which must not depend "
            "on each other: give one sample as (1, D), or batch_dim=None.",
            stacklevel=5,
        )


def signs_for_columns(z: Tensor) -> Tensor | None:
    """Random signs, whose product with the Jacobian shows which columns of a state a field reads.

    Returns:
        Tensor: signs of the shape of ``z``; None for a state of fewer than two columns.
    """
    if z.ndim < 2 or z.shape[-1] < 2 or transforms_active() or z.is_meta:
        return None
    return torch.randint(2, z.shape, generator=torch.Generator().manual_seed(0)).to(z) * 2 - 1


def warn_of_unread_columns(velocity: Tensor, product: Tensor | None, *, stacklevel: int) -> bool:
    """Warn about columns that a field moves but never reads, such as a trace or a cost that it accumulates.

    The penalties would count such columns as a part of ``z``.

    Args:
        velocity: the velocity ``(B, ..., D)`` at a state.
        product: the product of :func:`signs_for_columns` with the Jacobian there; None for a field without a graph.
        stacklevel: as for ``warnings.warn``, counted from the caller.

    Returns:
        Whether the question is settled. A velocity of zero, which a fresh net may have, shows nothing.
    """
    if product is None:
        return True
    unread = (product == 0).flatten(0, -2).all(0)
    if velocity.numel() == 0 or bool(unread.all()):
        return False
    places = (unread & (velocity != 0).flatten(0, -2).any(0)).nonzero().flatten().tolist()
    if places:
        ahead = places == list(range(len(places))) and velocity.ndim == 2
        entries = "columns" if velocity.ndim == 2 else f"entries, {tuple(velocity.shape[1:])}"
        choice = f"slice({len(places)}, None)" if ahead else f"a mask of the other {entries}"
        warnings.warn(
            f"the vector field moves the columns {places} of the state but never reads them, so they look like a "
            "trace or a cost that it accumulates. The penalties count them as a part of z: give "
            f"penalized={choice}, or penalized=slice(None) if they are one.",
            stacklevel=stacklevel + 1,
        )
    return True


def undivided(regularizers: Iterable[Regularizer]) -> frozenset[str]:
    """Names of the regularizers whose penalty the objective does not divide by the number of dimensions."""
    return frozenset(r.name for r in regularizers if not r.divided_by_dims)


def weigh_regularizers(
    spec: Regularizers,
    *,
    by_name: Callable[[str], Regularizer],
) -> dict[str, Weighted]:
    """Resolve a specification to regularizers with their strengths, by name.

    Args:
        spec: names, :class:`Regularizer` objects or plain functions ``rate(t, z, dz) -> (B,)``, one or several,
            or a mapping from any of these to lambda: a number, a function of the optimizer's step, or None for
            :data:`~rnode_plugin.core.schedules.DEFAULT_LAMBDA`.
        by_name: looks up the regularizer of a name; ``rnode_plugin.plugins.registry.get_regularizer`` is one.

    Raises:
        ConfigError: for an unknown name, a name used twice, a lambda that is negative or not finite, a lambda of a
            regularizer that has no penalty, two span policies, or an object that is none of the three.
    """
    if spec is None:
        return {}
    if isinstance(spec, Mapping):
        items = list(spec.items())
    else:
        # a string is iterable, and so may be a regularizer, such as a module list with a call
        given: Any = spec
        several = isinstance(given, Iterable) and not isinstance(given, str) and not callable(given)
        items = [(entry, None) for entry in (given if several else [given])]
    resolved: dict[str, Weighted] = {}
    for entry, strength in items:
        found = _regularizer(entry, by_name)
        if found.name in resolved:
            raise ConfigError(f"the regularizer {found.name!r} is named twice; name each once.")
        resolved[found.name] = Weighted(found, checked_strength(found, strength))
    Kinds.of(entry.regularizer for entry in resolved.values())  # for its check: at most one span policy
    return resolved


def checked_strength(regularizer: Regularizer, strength: Strength | None) -> Strength:
    if not isinstance(regularizer, SpanPolicy) or regularizer.penalized:
        return check_lambda(regularizer.name, DEFAULT_LAMBDA if strength is None else strength)
    if strength is not None and check_lambda(regularizer.name, strength) != 1:
        raise ConfigError(
            f"{regularizer.name!r} has no penalty and takes no lambda: give None, or 1 in a recipe and on the "
            f"command line, {regularizer.name}=1. Its strength is an option, as in 'steer:0.25'."
        )
    return 1.0


def refuse_schedules(weighted: Mapping[str, Weighted]) -> None:
    """Refuse a lambda that is a function of the optimizer's step, for an ``install``, which knows no step."""
    for name, each in weighted.items():
        if callable(each.strength):
            raise ConfigError(
                f"lambda of {name!r} depends on the optimizer's step, which install() does not know: give a "
                "number, or add reg_loss(step=n), or penalties.loss(step=n) in torchdiffeq, to the loss."
            )


def _regularizer(entry: Any, by_name: Callable[[str], Regularizer]) -> Regularizer:
    if isinstance(entry, str):
        entry = by_name(entry)
    if isinstance(entry, Regularizer):
        entry.check()
        if isinstance(entry, FunctionRegularizer) and not accepts(entry.function, None):
            raise ConfigError(
                f"the function of {entry.name!r} must take one argument, an evaluation, which has t, z and dz: "
                "give FunctionRegularizer(name, lambda at: function(at.t, at.z, at.dz))."
            )
        return entry
    if not callable(entry) or isinstance(entry, type) or hasattr(entry, "name"):
        raise ConfigError(
            f"{entry!r} is not a regularizer: give a name, a function rate(t, z, dz) -> (B,), or an object, not a "
            "class, of a class derived from rnode_plugin.regularizers.Rate or another of the three kinds there."
        )
    name = entry.__name__ if inspect.isroutine(entry) else type(entry).__name__
    if not accepts(entry, None, None, None):
        raise ConfigError(
            f"the function {name!r} must take (t, z, dz). One that takes an evaluation becomes a regularizer by "
            f"FunctionRegularizer({name!r}, function), from rnode_plugin.regularizers."
        )
    return FunctionRegularizer(name, _OfPlainFunction(entry))


@dataclass(frozen=True)
class _OfPlainFunction:
    """A function of ``(t, z, dz)`` as a function of an evaluation; a class, because pickle takes no closure."""

    function: Callable[..., Any]

    def __call__(self, evaluation: FieldEvaluation, /) -> Tensor:
        return self.function(evaluation.t, evaluation.z, evaluation.dz)
