"""What a solve by torchdiffeq follows: the penalties, and the part of its state that they measure."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.followed_solve import Kinds
from ..core.modes import transforms_active
from ..core.regularizer import StepPenalty
from ..core.trace_estimators import TraceEstimator, get_estimator
from ..core.view import Columns, State, View, as_columns, places_of
from ..core.weighing import Regularizers, Weighted, weigh_regularizers
from ..errors import ConfigError, suggest
from ..plugins.registry import get_regularizer
from ..solvers import QUADRATURES

Given = dict[str, Any]
"""The keyword arguments of torchdiffeq's functions."""

Penalized = int | Sequence[int] | slice | Tensor
"""The index of a tensor in a tuple, several indices, or columns of one tensor as a slice or a mask of booleans."""


@dataclass(frozen=True)
class Follow:
    """The penalties to follow in a solve, and the part of the state that they measure; :func:`follow` makes it."""

    weighted: dict[str, Weighted]
    penalized: tuple[int, ...] | None
    columns: Columns | None
    batch_dim: int | None
    estimator: TraceEstimator
    sampled: bool

    @functools.cached_property
    def kinds(self) -> Kinds:
        """The regularizers, sorted by kind."""
        return Kinds.of(w.regularizer for w in self.weighted.values())


def follow(
    regularizers: Regularizers,
    *,
    penalized: Penalized | None = None,
    batch_dim: int | None = 0,
    trace_noise: str = "gaussian",
    quadrature: str = "full",
) -> Follow:
    """Check the arguments that :func:`odeint` adds, as far as this is possible without a state."""
    weighted = weigh_regularizers(regularizers, by_name=_by_name)
    steps = [name for name, w in weighted.items() if isinstance(w.regularizer, StepPenalty)]
    if steps:
        raise ConfigError(
            f"{steps[0]!r} is a penalty on the solver's steps, which torchdiffeq does not show: use "
            "rnode_plugin.NeuralODE for it, or a rate such as 'kinetic' and 'jacfrob' here."
        )
    indices, columns = _chosen(penalized)
    if batch_dim is not None and (not isinstance(batch_dim, int) or isinstance(batch_dim, bool)):
        raise ConfigError(
            f"batch_dim must be an int or None, not {batch_dim!r}: for samples in two leading dimensions of the "
            "state, 0 gives the same loss()."
        )
    if quadrature not in QUADRATURES:
        raise ConfigError(suggest(quadrature, QUADRATURES, "quadrature"))
    sampled = quadrature == "sampled"
    return Follow(weighted, indices, columns, batch_dim, get_estimator(trace_noise), sampled)


def _by_name(name: str) -> Any:
    """The regularizer of a name; a ConfigError for one with parameters, which no optimizer could have."""
    found = get_regularizer(name)
    if isinstance(found, nn.Module) and next(found.parameters(), None) is not None:
        raise ConfigError(
            f"the regularizer {name!r} has parameters, which nothing would train, because each use of the name "
            "makes new ones: give the object, such as LearnedEndTime(2.0) from rnode_plugin.regularizers, and give "
            "its parameters to the optimizer."
        )
    return found


def _chosen(penalized: Any) -> tuple[tuple[int, ...] | None, Columns | None]:
    """The indices of tensors (None: the first), and the columns (None: all), that ``penalized`` names."""
    columns = as_columns(penalized)
    if penalized is None or columns is not None:
        return None, columns
    indices = penalized if isinstance(penalized, (list, tuple)) else [penalized]
    if indices and all(isinstance(i, int) and not isinstance(i, bool) for i in indices):
        return tuple(indices), None
    raise ConfigError(
        "penalized must be an index of the state's tuple or several, or a slice or a mask of booleans for columns "
        f"of one tensor, not {penalized!r}."
    )


@dataclass(frozen=True)
class Layout:
    """The user's state in front of the penalties, as torchdiffeq integrates both.

    Attributes:
        shapes: shapes of the tensors of the user's state.
        view: the part of that state that the penalties measure.
    """

    shapes: tuple[torch.Size, ...]
    view: View

    @classmethod
    def of(cls, y0: State, wanted: Follow) -> Layout:
        """Find the layout of ``y0``; a ConfigError for a state that penalties cannot measure."""
        tensors = (y0,) if isinstance(y0, Tensor) else y0
        if not isinstance(tensors, tuple) or not tensors or not all(isinstance(x, Tensor) for x in tensors):
            inner = f" of {', '.join(type(x).__name__ for x in y0) or 'nothing'}" if isinstance(y0, tuple) else ""
            raise ConfigError(f"y0 must be a tensor or a tuple of tensors, not a {type(y0).__name__}{inner}.")
        count, dim, chosen = len(tensors), wanted.batch_dim, wanted.penalized or (0,)
        if wanted.penalized is not None and tensors is not y0:
            raise ConfigError(
                f"penalized={chosen} names tensors of a tuple, but y0 is one tensor: leave it out for all of y0, "
                f"or give columns, such as slice({chosen[0]}, {chosen[-1] + 1})."
            )
        if any(not -count <= i < count for i in chosen):
            raise ConfigError(f"penalized={chosen} names a tensor that y0, with {count}, does not have.")
        places = tuple(sorted({i % count for i in chosen}))
        for x in (tensors[i] for i in places):
            if not x.is_floating_point():
                raise ConfigError(f"penalties need a real floating-point state, not one of {x.dtype}.")
            if dim is not None and not -x.ndim <= dim < x.ndim:
                raise ConfigError(
                    f"batch_dim={dim} is not a dimension of the state of shape {tuple(x.shape)}: penalties are per "
                    "sample. batch_dim=None takes the whole state as one sample."
                )
        view = View(tensors is y0, places, batch_dim=dim)
        firsts = [view.samples_first(tensors[i]) for i in places]
        if len({len(x) for x in firsts}) > 1:
            sizes = sorted({len(x) for x in firsts})
            raise ConfigError(f"the penalized tensors have different numbers of samples: {sizes}.")
        if wanted.columns is not None:
            columns = places_of(wanted.columns, firsts[0].shape[1:], firsts[0].device)
            view = View(view.is_tuple, places, columns, dim)
        return cls(tuple(x.shape for x in tensors), view)

    def tensors(self, y: State) -> tuple[Tensor, ...]:
        return self.view.tensors(y)

    def of_user(self, state: Sequence[Tensor]) -> State:
        """The user's state, from a state that may have penalties after it."""
        return tuple(state[: len(self.shapes)]) if self.view.is_tuple else state[0]

    def flat_of_user(self, flat: Tensor) -> Tensor:
        """The user's part of a flattened state. For a tuple it stays flat, as in torchdiffeq."""
        own = flat[: sum(shape.numel() for shape in self.shapes)]
        return own if self.view.is_tuple else own.view(self.shapes[0])

    def warn_of_still(self, y0: State, end: Sequence[Tensor]) -> None:
        """Warn if a solve from ``y0`` to ``end`` moved the state, but not the part that the penalties measure."""
        others = self.view.columns is not None or len(self.shapes) > len(self.view.places)
        if not others or transforms_active():
            return
        z0, z1 = self.view.of(y0), self.view.of(self.of_user(end))
        pairs = zip(self.tensors(y0), end, strict=True)
        if _equal(z0, z1) and not all(_equal(*pair) for pair in pairs):
            warnings.warn(
                f"the part of the state that the penalties measure (shape {tuple(z0.shape)}) stayed constant in "
                "this solve, but other parts did move: choose the tensor or the columns that move by penalized=.",
                stacklevel=5,
            )


def _equal(start: Tensor, end: Tensor) -> bool:
    """Whether two tensors are equal up to rounding, since interpolation of a constant may round."""
    start, end = start.detach().to(end), end.detach()
    return torch.allclose(start, end, rtol=100 * torch.finfo(end.dtype).eps, atol=0)
