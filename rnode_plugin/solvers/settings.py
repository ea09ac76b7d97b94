"""SolverSettings: a solver as plain data. Importing this needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .checks import (
    ADAPTIVE_METHODS,
    ERROR_NORMS,
    METHODS,
    adaptive_text,
    check_name,
    check_positive,
    check_quadrature,
    check_tolerances,
    grid_text,
    refuse_worst,
)
from .gradients import get_gradient

if TYPE_CHECKING:
    from .solver import Solver


@dataclass(frozen=True)
class SolverSettings:
    """A solver as flat, plain data, as recipes and the command line write it. :meth:`build` makes the solver.

    Args:
        method: ``euler``, ``midpoint``, ``rk4`` or ``rk4_38`` for a :class:`~rnode_plugin.FixedGrid`; ``dopri5`` or
            ``tsit5`` for an :class:`~rnode_plugin.Adaptive` solver.
        step: longest step of a fixed grid, None for one per interval; an adaptive solver does not use it.
        atol, rtol, first_step: as for an adaptive solver; a fixed grid does not use them.
        error_norm: as for an adaptive solver; a fixed grid refuses ``worst``.
        max_nfe, quadrature: as for both kinds.
        gradient: ``autograd``, ``checkpointed``, ``adjoint`` or ``interpolated_adjoint``.
        warm_start: whether each step of a training begins its solves with the longest step that would have passed
            in the step before, see :attr:`History.longest_safe_steps <rnode_plugin.core.history.History>`.
            It belongs to the model, so :meth:`build` and a fixed grid do not use it.

    Raises:
        ConfigError: for an unknown name, a number out of range, and a quadrature that the gradient cannot have.

    Example:
        >>> from rnode_plugin.solvers import SolverSettings
        >>> SolverSettings(method="dopri5", atol=1e-6).build().adaptive
        True
        >>> SolverSettings(method="rk4_38", step=0.25).text
        'rk4_38, step 0.25'
    """

    method: str = "rk4_38"
    step: float | None = 0.25
    atol: float = 1e-5
    rtol: float = 1e-5
    first_step: float | None = None
    max_nfe: int | None = None
    gradient: str = "autograd"
    quadrature: str = "full"
    error_norm: str = "rms"
    warm_start: bool = True

    def __post_init__(self) -> None:
        check_name(self.method, METHODS, "solver method")
        check_quadrature(self.quadrature)
        gradient = get_gradient(self.gradient)
        for name in ("step", "first_step", "max_nfe"):
            check_positive(getattr(self, name), name)
        check_tolerances(self.atol, self.rtol)
        check_name(self.error_norm, ERROR_NORMS, "error norm")
        if not self.adaptive:
            refuse_worst(self.error_norm, self.method)
        if self.quadrature == "sampled":
            gradient.check_sampling()

    @property
    def adaptive(self) -> bool:
        """Whether the method chooses its own steps."""
        return self.method in ADAPTIVE_METHODS

    @property
    def name(self) -> str:
        """The method's name."""
        return self.method

    @property
    def text(self) -> str:
        """``dopri5, tolerance 1e-05`` or ``rk4_38, step 0.25``."""
        if not self.adaptive:
            return grid_text(self.method, self.step)
        return adaptive_text(self.method, self.atol, self.rtol, self.error_norm)

    def build(self) -> Solver:
        """Make the solver, a :class:`~rnode_plugin.FixedGrid` or an :class:`~rnode_plugin.Adaptive` one."""
        from .named import solver_of

        options = dict(vars(self))
        del options["warm_start"]
        return solver_of(**options)
