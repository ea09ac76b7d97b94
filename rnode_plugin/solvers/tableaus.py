"""Runge-Kutta methods by name: their tableaus, one step of each, and the cubic between two states.

Importing this needs no torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import check_name

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.derivatives import Velocity

    # velocity at the new state or None, the new state, its error estimate or None, and optionally the stage
    # velocities
    StepResult: TypeAlias = (
        tuple[Tensor | None, Tensor, Tensor | None]
        | tuple[Tensor | None, Tensor, Tensor | None, Sequence[Tensor] | None]
    )
    StepFunction: TypeAlias = Callable[[Velocity, Tensor, Tensor, Tensor, Tensor | None], StepResult]
    """``(f, x, t, dt, k1) -> StepResult``; ``k1`` is ``f(t, x)`` if it is known already, else None."""

    FitStep: TypeAlias = Callable[[Tensor, Tensor, float], Tensor]
    """``(dt, rest, sign)`` to the length of a step, where ``rest`` is the time left to the next stop."""
    Interpolate: TypeAlias = Callable[[Any, Tensor, Any, Tensor, Tensor, Sequence[Tensor]], list[Tensor]]
    """``(step, z, first, t, dt, times)`` to the states at ``times`` inside a step from ``(t, z)``, where ``first``
    is the derivative."""


def count_steps(length: float, longest: float) -> int:
    """The number of steps, at least one, that divide ``length`` into steps no longer than ``longest``.

    A small slack absorbs rounding. From 0.8 to 1.1 there are three steps of 0.1, although 1.1 - 0.8 is above 0.3.
    """
    return max(1, math.ceil(abs(length) / longest - 1e-6))


def evenly(dt: Tensor, rest: Tensor, sign: float) -> Tensor:
    """A step no longer than ``dt`` that divides ``rest``, the time left to the next stop, evenly.

    Without this a short last step would often remain, which costs as many evaluations as any step.
    """
    dt, rest = dt.detach(), rest.detach()
    steps = float(rest / dt)
    if not math.isfinite(steps):  # dt is 0 or NaN, and the solve ends
        return dt
    # Make the last step overshoot. The solve cuts it off exactly at the stop, whose time has the graph.
    count = count_steps(steps, 1.0)
    # as a float, because torch takes no whole number beyond 64 bits: an exploded velocity needs more steps
    return rest / float(count) if count > 1 else (dt * sign).maximum(2 * rest * sign) * sign


@dataclass(frozen=True)
class Method:
    """One way to take a step.

    Attributes:
        name: the name in messages.
        advance: computes the step.
        order: order of convergence, which the step-size controller uses.
        adaptive: whether ``advance`` gives an error estimate.
        weights: quadrature weight of each evaluation of the field in a step, in their order. None if they are not
            known (a user's solver object); a rate is then taken at the start of the step.
        error_weights: the weights for the error estimate of a quadrature.
        draws: the probability that an evaluation represents the step in a sampled quadrature, one for each of the
            ``weights``, with the sum 1. These are the weights of a quadrature without negative weights. The first
            one of an adaptive method is 0, because the previous step has evaluated that stage already. None:
            quadratures cannot be sampled.
        safety, min_factor, max_factor: constants of the step-size controller.
        nodes: time of each stage as a fraction of the step, in the order of their evaluation; None if not known.
        fit: fits the length of an adaptive step to the time left to the next stop; None leaves the length.
        interpolate: returns the states at output times inside a step; None: the solve stops at each output time.
        traceable: whether torch.compile can trace ``advance``.
    """

    name: str
    advance: StepFunction
    order: int
    adaptive: bool
    weights: tuple[float, ...] | None
    error_weights: tuple[float, ...] | None = None
    draws: tuple[float, ...] | None = None
    safety: float = 0.9
    min_factor: float = 0.2
    max_factor: float = 10.0
    nodes: tuple[float, ...] | None = None
    fit: FitStep | None = evenly
    interpolate: Interpolate | None = None
    traceable: bool = True

    @functools.cached_property
    def stages(self) -> int:
        """Number of evaluations that a step needs at most."""
        return len(self.weights) if self.weights else 1

    @property
    def pair(self) -> tuple[int, int] | None:
        """The last two stages at one time: dopri5's and tsit5's at the end of the step, rk4's in its middle."""
        nodes = self.nodes or ()
        same = [(i, j) for j in range(len(nodes)) for i in range(j) if abs(nodes[i] - nodes[j]) < 1e-9]
        return same[-1] if same else None


def length_of(dt: Tensor) -> Tensor | float:
    """The length of a step as a number, which takes fewer operations on tensors, where the host has it."""
    import torch

    if torch.compiler.is_compiling() or not dt.is_cpu or dt.requires_grad:
        return dt
    return dt.item()


def _increment(dt: Tensor | float, row: Sequence[float], stages: Sequence[Tensor]) -> Tensor:
    """``dt sum_j row_j k_j`` for the velocities ``k_j`` of the first stages."""
    length, rest = (dt, None) if isinstance(dt, (int, float)) else (1.0, dt)
    total: Tensor | None = None
    for weight, stage in zip(row, stages, strict=False):  # a row may be shorter, and later stages unknown
        if weight:
            scale = length * weight
            total = stage * scale if total is None else total.add(stage, alpha=scale)
    assert total is not None
    return total if rest is None else total * rest.to(total.dtype)


@dataclass(frozen=True)
class _ExplicitStep:
    """A step of an explicit Runge-Kutta method.

    Attributes:
        a: row i belongs to stage i + 1.
        b: weights of the new state.
        nodes: time of each stage but the first as a fraction of the step.
        error: weights of the error estimate of the new state; None without one.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    nodes: tuple[float, ...]
    error: tuple[float, ...] | None

    def __call__(self, f: Velocity, x: Tensor, t: Tensor, dt: Tensor, k1: Tensor | None) -> StepResult:
        length = length_of(dt)
        stages = [f(t, x) if k1 is None else k1]
        argument = x  # after the loop, the state of the last stage, which is the new state of an FSAL method
        for node, row in zip(self.nodes, self.a, strict=True):
            argument = _moved(x, length, row, stages)
            stages.append(f(t + node * dt if node else t, argument))
        new = argument if self.fsal else _moved(x, length, self.b, stages)
        estimate = None if self.error is None else _increment(length, self.error, stages)
        return (stages[-1] if self.fsal else None), new, estimate, stages

    @functools.cached_property
    def fsal(self) -> bool:
        """First same as last: the last stage is taken at the new state, so its velocity begins the next step."""
        return len(self.a) == len(self.b) - 1 and self.a[-1:] == (self.b[:-1],) and self.b[-1] == 0


def _moved(x: Tensor, dt: Tensor | float, row: Sequence[float], stages: Sequence[Tensor]) -> Tensor:
    """``x + dt sum_j row_j k_j``, in one operation where one stage has a weight and the host has the length."""
    if isinstance(dt, (int, float)) and row[-1] and not any(row[:-1]):
        return x.add(stages[len(row) - 1], alpha=dt * row[-1])
    return x + _increment(dt, row, stages)


def explicit(
    name: str,
    order: int,
    a: tuple[tuple[float, ...], ...],
    b: tuple[float, ...],
    *,
    c: tuple[float, ...] | None = None,
    error: tuple[float, ...] | None = None,
    draws: tuple[float, ...] | None = None,
) -> Method:
    """A method from its tableau in double precision. Row i of ``a`` belongs to stage i + 1.

    The time of a stage, as a fraction of the step, is the sum of its row unless ``c`` gives it.
    """
    nodes = tuple(sum(row) for row in a) if c is None else c
    step = _ExplicitStep(a, b, nodes, error)
    return Method(name, step, order, error is not None, b, error, draws or b, nodes=(0.0, *nodes))


_DOPRI5_B = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0)
# the embedded solution of order 4
_DOPRI5_B4 = (1951 / 21600, 0.0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60)
_DOPRI5_A = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    _DOPRI5_B[:-1],
)
_TSIT5_B = (
    0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774, 0.0,
)  # fmt: skip
_TSIT5_ERROR = (
    0.0017800110522257773, 0.0008164344596567463, -0.007880878010261994, 0.1447110071732629, -0.5823571654525552,
    0.45808210592918686, -0.015151515151515152,
)  # fmt: skip
_TSIT5_A = (
    (0.161,),
    (-0.008480655492356989, 0.335480655492357),
    (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
    (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
    (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
    _TSIT5_B[:-1],
)


# Dormand and Prince (1980); Tsitouras (2011); the others are in every textbook. Some weights of dopri5 and tsit5
# are negative, so their draws are the non-negative weights of third-order quadratures on the same stages. The first
# stage has weight 0 there, because the previous step has evaluated it already.
_METHODS = [
    explicit("euler", 1, (), (1.0,)),
    explicit("midpoint", 2, ((0.5,),), (0.0, 1.0)),
    explicit("rk4", 4, ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
    explicit(
        "rk4_38",
        4,
        ((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
        (1 / 8, 3 / 8, 3 / 8, 1 / 8),
        c=(1 / 3, 2 / 3, 1.0),
    ),
    explicit(
        "dopri5",
        5,
        _DOPRI5_A,
        _DOPRI5_B,
        error=tuple(b - b4 for b, b4 in zip(_DOPRI5_B, _DOPRI5_B4, strict=True)),
        draws=(0.0, 0.0, 2 / 3, 1 / 6, 0.0, 0.0, 1 / 6),
    ),
    explicit(
        "tsit5",
        5,
        _TSIT5_A,
        _TSIT5_B,
        error=_TSIT5_ERROR,
        draws=(0.0, 0.01371596088086835, 0.7126775982927023, 0.08860285169962806, 0.0, 0.0, 0.18500358912680132),
    ),
]


_BY_NAME = {method.name: method for method in _METHODS}

METHODS = tuple(_BY_NAME)
FIXED_METHODS = tuple(name for name, method in _BY_NAME.items() if not method.adaptive)
ADAPTIVE_METHODS = tuple(name for name, method in _BY_NAME.items() if method.adaptive)


def get_method(method: str | Method) -> Method:
    """Look up a method by its name; a method is returned unchanged.

    Raises:
        ConfigError: for an unknown name.
    """
    if isinstance(method, Method):
        return method
    check_name(method, METHODS, "solver method")
    return _BY_NAME[method]


def hermite(t0: Tensor, z0: Tensor, v0: Tensor, t1: Tensor, z1: Tensor, v1: Tensor, t: Tensor) -> Tensor:
    """The cubic through the states ``z0``, ``z1`` at ``t0``, ``t1`` with velocities ``v0``, ``v1``, at ``t``."""
    # linear interpolation plus a correction that vanishes at both ends
    h = (t1 - t0).to(z0.dtype)
    s = ((t - t0) / (t1 - t0)).to(z0.dtype)
    rise = z1 - z0
    return z0 + s * rise + s * (1 - s) * ((1 - s) * (h * v0 - rise) - s * (h * v1 - rise))
