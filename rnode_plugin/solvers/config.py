"""Which solver, at what accuracy, with which gradient: one frozen, validated object."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, suggest

FIXED_METHODS = ("euler", "midpoint", "rk4", "rk4_38")
ADAPTIVE_METHODS = ("dopri5", "tsit5")
METHODS = FIXED_METHODS + ADAPTIVE_METHODS
GRADIENTS = ("autograd", "checkpointed", "adjoint", "interpolated_adjoint")
QUADRATURES = ("full", "sampled")

DEFAULT_MAX_NFE = 100_000
"""Evaluations that an adaptive solve may use by default, so that a stiff field does not run forever."""


@dataclass(frozen=True)
class Solver:
    """How an initial value problem is integrated and differentiated.

    Args:
        method: fixed grid: ``euler``, ``midpoint``, ``rk4`` (classical), ``rk4_38`` (3/8 rule, the paper's);
            adaptive: ``dopri5``, ``tsit5``. Or a :class:`~rnode_plugin.solvers.Method`.
        step: longest step of a fixed grid; each interval of ``t_span`` is divided evenly into steps no longer
            than it. None: one step per interval. Adaptive methods do not use it.
        atol: absolute tolerance of an adaptive method; fixed grids use no tolerance. One of ``atol`` and ``rtol``
            may be 0.
        rtol: relative tolerance of an adaptive method.
        first_step: first trial step of an adaptive method; None estimates one with one more evaluation.
        max_nfe: most evaluations that one solve may use; None: 100,000 for an adaptive method, no limit for a
            fixed grid.
        gradient: ``autograd`` keeps all activations; ``checkpointed`` gives the same gradient with the
            activations of one step at a time, for one more evaluation pass; ``adjoint`` solves the continuous
            adjoint backward (as in the paper; its gradient differs from the gradient of the discrete loss by the
            discretization error); ``interpolated_adjoint`` does so along an interpolant of the forward states. Or
            an object of :mod:`~rnode_plugin.solvers.gradients`, such as ``Adjoint(atol=1e-6)``.
        quadrature: ``full``, or ``sampled``: few evaluations make products with the Jacobian. Where a density is
            followed, one stage of each step of a fixed grid makes them, for trace and penalties. Elsewhere
            about one evaluation in eight of a fixed grid, or one in each adaptive step, makes them for the
            penalties. On a fixed grid they are drawn by their weights in the step's quadrature, which is unbiased
            in value and gradient. Some weights of dopri5 and tsit5 are negative, so these draw by others, of order
            3: the mean over draws is another quadrature, which differs from the full one where the tolerances are
            loose. Penalties that need no product stay full. It needs a gradient through the
            steps, and an adaptive method may not follow a density, whose error it controls.

    Raises:
        ConfigError: for an unknown name or a number out of range.

    Example:
        >>> Solver(method="dopri5", atol=1e-5, rtol=1e-5).adaptive
        True
        >>> Solver(method="rk4_38", step=0.25).adaptive
        False
    """

    method: Any = "rk4_38"
    step: float | None = 0.25
    atol: float = 1e-5
    rtol: float = 1e-5
    first_step: float | None = None
    max_nfe: int | None = None
    gradient: Any = "autograd"
    quadrature: str = "full"

    def __post_init__(self) -> None:
        for value, known, kind, does in (
            (self.method, METHODS, "solver method", "advance"),
            (self.gradient, GRADIENTS, "gradient mode", "solve"),
            (self.quadrature, QUADRATURES, "quadrature", ""),
        ):
            is_object = does and not isinstance(value, type) and callable(getattr(value, does, None))
            if not is_object and value not in known:
                raise ConfigError(suggest(str(value), known, kind))
        for name in ("step", "first_step", "max_nfe"):
            value = getattr(self, name)
            positive = _is_number(value) and value > 0
            if value is not None and not positive:
                raise ConfigError(f"{name} must be a number > 0 or None, not {value!r}.")
        for name in ("atol", "rtol"):
            check_tolerance(getattr(self, name), name)
        if self.adaptive and all(isinstance(x, (int, float)) and x == 0 for x in (self.atol, self.rtol)):
            raise ConfigError("atol and rtol are both 0, which no step can meet: raise one of them.")

    @property
    def adaptive(self) -> bool:
        """Whether the method chooses its own steps."""
        return self.method in ADAPTIVE_METHODS if isinstance(self.method, str) else self.method.adaptive

    @property
    def name(self) -> str:
        """The method's name."""
        return self.method if isinstance(self.method, str) else self.method.name


def refuse_sampled_density(solver: Solver, name: str = "solver") -> None:
    """Refuse a sampled quadrature of a density by an adaptive method; ``name`` is for the message."""
    if solver.quadrature == "sampled" and solver.adaptive:
        raise ConfigError(
            f"{name}.quadrature='sampled' of a density needs a fixed grid: {solver.name} would control an error "
            f"that the log-determinant does not have. Use one of {', '.join(FIXED_METHODS)}, or quadrature='full'."
        )


def solver_text(solver: Solver) -> str:
    """``dopri5, tolerance 1e-05`` or ``rk4_38, step 0.25``."""
    if solver.adaptive:
        return f"{solver.name}, tolerance {solver.atol:g}"
    if solver.step is None:
        return f"{solver.name}, one step per interval"
    return f"{solver.name}, step {solver.step:g}"


def count_steps(length: float, longest: float) -> int:
    """How many steps no longer than ``longest`` a length is divided into, at least one.

    It forgives rounding: from 0.8 to 1.1 there are three steps of 0.1, not four.
    """
    return max(1, math.ceil(abs(length) / longest - 1e-6))


def check_tolerance(value: Any, name: str) -> None:
    """Refuse a tolerance that is not a number >= 0."""
    # a tensor of tolerances is checked where it is given: a check here would make each solve wait
    tensor = hasattr(value, "dtype") and not isinstance(value, float)
    if not (tensor or (_is_number(value) and value >= 0)):
        raise ConfigError(f"{name} must be a number >= 0, not {value!r}.")


def _is_number(value: Any) -> bool:
    """Whether ``value`` is a finite number, not a truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
