"""SolvePlan: all that the integrator is told about one solve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .config import DEFAULT_MAX_NFE, Solver
from .steps.tableaus import Method, get_method

__all__ = ["SolvePlan"]


@dataclass(frozen=True)
class SolvePlan:
    """A :class:`Solver` made concrete, or a solver object of torchdyn's.

    Args:
        method: how to take a step.
        step, atol, rtol, first_step, max_nfe, gradient, trace_quadrature: as in :class:`Solver`. Tolerances may be
            zero, but not both.
        keep: for each time of ``t_span`` whether its state is an output (fixed grids); None: all are.
        interpolator: torchdyn's: output times between steps are interpolated instead of stepped to.
        even_steps: whether an adaptive method divides what is left up to the next output evenly. torchdyn does not.
        every_step: makes each accepted step of an adaptive method an output, next to the times of ``t_span``.
        adjoint: how a continuous adjoint goes back; None: as the solve itself.

    Raises:
        ConfigError: for a tolerance that is negative or not finite, and for two that are zero.
    """

    method: Method
    step: float | None = None
    atol: float = 1e-5
    rtol: float = 1e-5
    first_step: float | None = None
    max_nfe: int | None = None
    gradient: str = "autograd"
    trace_quadrature: str = "full"
    keep: Sequence[bool] | None = None
    interpolator: Any = None
    even_steps: bool = False
    every_step: bool = False
    adjoint: SolvePlan | None = None

    def __post_init__(self) -> None:
        tolerances = {"atol": self.atol, "rtol": self.rtol}
        for name, value in tolerances.items():
            # a tensor of tolerances is looked at where it is given: here a look would cost each solve a wait
            if isinstance(value, (int, float)) and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} must be a finite number >= 0, not {value!r}.")
        if self.method.adaptive and all(isinstance(x, (int, float)) and x == 0 for x in tolerances.values()):
            raise ConfigError("atol and rtol are both 0, which no step can meet: raise one of them.")

    @property
    def budget(self) -> int | None:
        """The most evaluations of the solve; None: no limit."""
        if self.max_nfe is None and self.method.adaptive:
            return DEFAULT_MAX_NFE
        return self.max_nfe

    @classmethod
    def of(cls, solver: Solver) -> SolvePlan:
        """The plan of a :class:`Solver`.

        Raises:
            ConfigError: its step is still to be found.
        """
        if solver.step == "auto":
            raise ConfigError(
                "solver.step='auto' is a step that is found while a recipe trains: everywhere else give a number; "
                "rnode-cli tune-step finds one for a trained flow."
            )
        method = get_method(solver.method)
        shared: dict[str, Any] = {
            "method": method,
            "step": solver.step,
            "first_step": solver.first_step,
            "max_nfe": solver.max_nfe,
            "even_steps": True,
        }
        backward = cls(
            **shared,
            atol=solver.atol if solver.atol_adjoint is None else solver.atol_adjoint,
            rtol=solver.rtol if solver.rtol_adjoint is None else solver.rtol_adjoint,
        )
        return cls(
            **shared,
            atol=solver.atol,
            rtol=solver.rtol,
            gradient=solver.gradient,
            trace_quadrature=solver.trace_quadrature,
            adjoint=backward,
        )
