"""Runge-Kutta methods: our own steps on torchdyn's tableaus, and torchdyn's or a user's solver objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torchdyn.numerics.solvers._constants import construct_dopri5, construct_rk4, construct_tsit5
from torchdyn.numerics.solvers.ode import DormandPrince45, Euler, Midpoint, RungeKutta4, Tsitouras45

from ..errors import ConfigError, suggest
from .config import METHODS

__all__ = ["Method", "StepFunction", "get_method", "method_from_torchdyn"]

Field = Callable[[Tensor, Tensor], Tensor]
# (f, x, t, dt, k1) -> (f at the new state or None, new state, error estimate or None, stage velocities or None)
StepFunction = Callable[
    [Field, Tensor, Tensor, Tensor, "Tensor | None"],
    tuple["Tensor | None", Tensor, "Tensor | None", "Sequence[Tensor] | None"],
]


@dataclass(frozen=True)
class Method:
    """One way to take a step.

    Attributes:
        name: for messages.
        advance: the step itself.
        order: order of convergence, which the step-size controller uses.
        adaptive: whether ``advance`` gives an error estimate.
        weights: quadrature weight of each evaluation of the field in a step, in their order. None where they
            are not known (a user's solver object): a rate then counts with its value at the start of the step.
        error_weights: the same for the error estimate of a quadrature.
        safety, min_factor, max_factor: constants of the step-size controller.
    """

    name: str
    advance: StepFunction
    order: int
    adaptive: bool
    weights: tuple[float, ...] | None
    error_weights: tuple[float, ...] | None = None
    safety: float = 0.9
    min_factor: float = 0.2
    max_factor: float = 10.0

    @property
    def stages(self) -> int:
        """Evaluations that a step needs at most."""
        return len(self.weights) if self.weights else 1


@dataclass(frozen=True)
class _Tableau:
    """An explicit Runge-Kutta tableau in double precision; row i of ``a`` belongs to stage i + 1."""

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    error: tuple[float, ...] | None
    order: int

    @property
    def fsal(self) -> bool:
        """Whether the last stage is taken at the new state, so that its velocity is the next step's first."""
        return bool(self.a) and len(self.a) == len(self.b) - 1 and self.a[-1] == self.b[:-1] and self.b[-1] == 0

    def advance(
        self, f: Field, x: Tensor, t: Tensor, dt: Tensor, k1: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor | None, Sequence[Tensor]]:
        stages = [f(t, x) if k1 is None else k1]
        argument = x
        for c, row in zip(self.c, self.a, strict=True):
            argument = _combine(x, dt, row, stages)
            stages.append(f(t + c * dt, argument))
        new = argument if self.fsal else _combine(x, dt, self.b, stages)
        error = None if self.error is None else _combine(None, dt, self.error, stages)
        return (stages[-1] if self.fsal else None), new, error, stages


def _combine(x: Tensor | None, dt: Tensor, row: Sequence[float], stages: Sequence[Tensor]) -> Tensor:
    total: Tensor | None = None
    for weight, stage in zip(row, stages, strict=False):
        if weight:
            total = stage * weight if total is None else torch.add(total, stage, alpha=weight)
    assert total is not None
    increment = total * dt.to(total.dtype)
    return increment if x is None else x + increment


def _from_torchdyn_constants(constants: tuple[Any, ...], order: int) -> _Tableau:
    _, a, b, error = constants
    rows = tuple(tuple(row.tolist()) for row in a)
    # torchdyn's classical tableau lists c from the first stage, its others from the second; either way c_i is
    # the sum of row i, which does not depend on the convention
    times = tuple(sum(row) for row in rows)
    weights = tuple(b.tolist())
    return _Tableau(times, rows, weights, tuple(error.tolist()) if len(error) == len(weights) else None, order)


@cache
def _tableau(name: str) -> _Tableau:
    if name == "euler":
        return _Tableau((), (), (1.0,), None, 1)
    if name == "midpoint":
        return _Tableau((0.5,), ((0.5,),), (0.0, 1.0), None, 2)
    if name == "rk4":
        return _from_torchdyn_constants(construct_rk4(torch.float64), 4)
    if name == "rk4_38":
        rows = ((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0))
        return _Tableau((1 / 3, 2 / 3, 1.0), rows, (1 / 8, 3 / 8, 3 / 8, 1 / 8), None, 4)
    construct = {"dopri5": construct_dopri5, "tsit5": construct_tsit5}[name]
    return _from_torchdyn_constants(construct(torch.float64), 5)


@cache
def get_method(name: str) -> Method:
    """A method by its name, with coefficients in double precision whatever the state's type.

    Raises:
        ConfigError: for an unknown name.
    """
    if name not in METHODS:
        raise ConfigError(suggest(name, METHODS, "solver method"))
    tableau = _tableau(name)
    return Method(name, tableau.advance, tableau.order, tableau.error is not None, tableau.b, tableau.error)


_FAMILIES = {
    Euler: "euler",
    Midpoint: "midpoint",
    RungeKutta4: "rk4",
    DormandPrince45: "dopri5",
    Tsitouras45: "tsit5",
}


def method_from_torchdyn(solver: Any, args: Any = None) -> Method:
    """A torchdyn solver object (hypersolvers and a user's own included), stepping exactly as in torchdyn.

    ``args`` is handed to its ``step``.

    A solver of a known family (or a subclass: a hypersolver adds its correction to the same stages) brings that
    family's quadrature weights. Another one may have an attribute ``weights``, one number per evaluation in a
    step; without it a penalty's rate counts with its value at the start of each step.

    Raises:
        ConfigError: for an object without ``step`` and ``stepping_class``.
    """
    if not callable(getattr(solver, "step", None)) or not hasattr(solver, "stepping_class"):
        raise ConfigError(
            f"{solver!r} is no solver: give one of torchdyn's names, or an object with "
            "`step(f, x, t, dt, k1, args)` and `stepping_class` ('fixed' or 'adaptive'). Multiple-shooting solvers "
            "cannot carry penalties."
        )

    def advance(
        f: Field, x: Tensor, t: Tensor, dt: Tensor, k1: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor | None, Sequence[Tensor] | None]:
        result = solver.step(f, x, t, dt, k1=k1, args={} if args is None else args)
        return (*result, None) if len(result) == 3 else result

    def advance_either_way(
        f: Field, x: Tensor, t: Tensor, dt: Tensor, k1: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor | None, Sequence[Tensor] | None]:
        if bool(dt > 0):
            return advance(f, x, t, dt, k1)
        # torchdyn never shows a solver a negative step: it mirrors time and the field; so do we for solvers that
        # may do more with dt than scale velocities
        velocities: dict[int, Tensor] = {}

        def mirrored(s: Tensor, y: Tensor) -> Tensor:
            velocity = f(-s, y)
            opposite = -velocity
            velocities[id(opposite)] = velocity
            return opposite

        new_velocity, new, error, _ = advance(mirrored, x, -t, -dt, None if k1 is None else -k1)
        return velocities.get(id(new_velocity)), new, error, None

    family = next((name for kind, name in _FAMILIES.items() if isinstance(solver, kind)), None)
    weights = getattr(solver, "weights", _tableau(family).b if family else None)
    return Method(
        type(solver).__name__,
        advance if type(solver) in _FAMILIES else advance_either_way,
        getattr(solver, "order", 1),
        solver.stepping_class == "adaptive",
        None if weights is None else tuple(float(w) for w in weights),
        _tableau(family).error if family else None,
        *(
            float(getattr(solver, name, default))
            for name, default in (("safety", 0.9), ("min_factor", 0.2), ("max_factor", 10.0))
        ),
    )
