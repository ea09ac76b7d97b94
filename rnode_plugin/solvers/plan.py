"""A :class:`~rnode_plugin.solvers.Solver` made concrete: what the integrator is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .config import Solver
from .tableaus import Method, get_method

__all__ = ["SolvePlan"]


@dataclass(frozen=True)
class SolvePlan:
    """A :class:`Solver` made concrete; see there for the meaning of the fields.

    ``keep`` says for each time of ``t_span`` whether its state is an output (fixed grids; None: all are).
    ``interpolator`` is torchdyn's: output times between steps are interpolated instead of stepped to.
    ``every_step`` makes each accepted step of an adaptive method an output, next to the times of ``t_span``.
    ``adjoint`` says how a continuous adjoint goes back; None: as the solve itself.
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
    every_step: bool = False
    adjoint: SolvePlan | None = None

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
