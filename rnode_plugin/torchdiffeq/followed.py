"""What a solve by torchdiffeq follows: the penalties, and the part of its state that they measure."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.modes import transforms_active
from ..core.part import Part, PartSpec, State, tensors_of
from ..core.regularizer import Regularizer, code_of
from ..core.regularizers import Regularizers, RegularizersLike
from ..core.trace_estimators import TraceEstimator, get_estimator
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

    regularizers: Regularizers
    spec: PartSpec
    estimator: TraceEstimator
    sampled: bool


def follow(
    regularizers: RegularizersLike,
    *,
    penalized: Penalized | None = None,
    batch_dim: int | None = 0,
    trace_noise: str = "gaussian",
    quadrature: str = "full",
) -> Follow:
    """Check the arguments that :func:`odeint` adds, as far as this is possible without a state."""
    resolved = Regularizers.of(regularizers, by_name=_by_name)
    if resolved.steps:
        raise ConfigError(
            f"{resolved.steps[0].name!r} is a penalty on the solver's steps, which torchdiffeq does not show: use "
            "rnode_plugin.NeuralODE for it, or a rate such as 'kinetic' and 'jacfrob' here."
        )
    if quadrature not in QUADRATURES:
        raise ConfigError(suggest(quadrature, QUADRATURES, "quadrature"))
    sampled = quadrature == "sampled"
    return Follow(resolved, PartSpec.of(penalized, batch_dim), get_estimator(trace_noise), sampled)


def _by_name(name: str) -> Regularizer:
    """The regularizer of a name; a ConfigError for one with parameters, which no optimizer could have."""
    found = get_regularizer(name)
    code = code_of(found)
    if isinstance(code, nn.Module) and next(code.parameters(), None) is not None:
        raise ConfigError(
            f"the regularizer {name!r} has parameters, which nothing would train, because each use of the name "
            "makes new ones: give the object, such as LearnedEndTime(2.0) from rnode_plugin.regularizers, and give "
            "its parameters to the optimizer."
        )
    return found


@dataclass(frozen=True)
class Layout:
    """The user's state in front of the penalties, as torchdiffeq integrates both.

    Attributes:
        shapes: shapes of the tensors of the user's state.
        part: the part of that state that the penalties measure.
    """

    shapes: tuple[torch.Size, ...]
    part: Part

    @classmethod
    def of(cls, y0: State, wanted: Follow) -> Layout:
        """Find the layout of ``y0``; a ConfigError for a state that penalties cannot measure."""
        tensors = (y0,) if isinstance(y0, Tensor) else y0
        if not isinstance(tensors, tuple) or not tensors or not all(isinstance(x, Tensor) for x in tensors):
            inner = f" of {', '.join(type(x).__name__ for x in y0) or 'nothing'}" if isinstance(y0, tuple) else ""
            raise ConfigError(f"y0 must be a tensor or a tuple of tensors, not a {type(y0).__name__}{inner}.")
        return cls(tuple(x.shape for x in tensors), wanted.spec.part(y0) or Part())

    def tensors(self, y: State) -> tuple[Tensor, ...]:
        return tensors_of(y)

    def of_user(self, state: Sequence[Tensor]) -> State:
        """The user's state, from a state that may have penalties after it."""
        return tuple(state[: len(self.shapes)]) if self.part.is_tuple else state[0]

    def flat_of_user(self, flat: Tensor) -> Tensor:
        """The user's part of a flattened state. For a tuple it stays flat, as in torchdiffeq."""
        own = flat[: sum(shape.numel() for shape in self.shapes)]
        return own if self.part.is_tuple else own.view(self.shapes[0])

    def warn_of_still(self, y0: State, end: Sequence[Tensor]) -> None:
        """Warn if a solve from ``y0`` to ``end`` moved the state, but not the part that the penalties measure."""
        others = self.part.entries is not None or len(self.shapes) > len(self.part.tensors)
        if not others or transforms_active():
            return
        z0, z1 = self.part.take(y0), self.part.take(self.of_user(end))
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
