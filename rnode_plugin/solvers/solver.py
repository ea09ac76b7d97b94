"""Solver, the base of all solvers: one solve with its gradient and its penalties."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import ClassVar, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from ..core.dynamics import BoundDynamics
from ..core.health import HealthCheck, health
from ..core.modes import differs, drop_casts, exporting, on_host, refuse_dual_numbers, transforms_active
from ..core.regularizer import StepPenalty
from ..core.regularizers import ONE_DRAW
from ..errors import ConfigError
from .checks import Tolerance, check_name, check_positive, check_quadrature, refuse_sampled_density
from .gradients import Gradient, get_gradient
from .solution import Solution, Steps
from .step import Problem, Step, Stepper, fail_integrals
from .tableaus import Method, get_method, hermite

WEIGHT_GRADIENTS = ("all", "half")

_Self = TypeVar("_Self", bound="Solver")


@dataclass(frozen=True)
class Solver(ABC):
    """How an initial value problem is integrated and differentiated: a :class:`FixedGrid` or :class:`Adaptive`.

    Attributes:
        method: how a step is taken, a name or a :class:`~rnode_plugin.solvers.Method`. It is kept as it was given;
            :func:`~rnode_plugin.solvers.get_method` looks it up.
        gradient: how a solve is differentiated, a name or a gradient object, kept as it was given.
        quadrature: ``"full"``, or ``"sampled"`` to compute products with the Jacobian in a few evaluations only.
            For a density, one stage of each step in a fixed grid computes them, for trace and penalties. Otherwise
            about one evaluation in eight of a fixed grid, or one in each adaptive step, computes them for the
            penalties. On a fixed grid a stage is drawn with probability proportional to its quadrature weight,
            which is unbiased in value and gradient. dopri5 and tsit5 have negative weights, so for them a
            third-order quadrature without negative weights is used. Its mean over draws differs from the full
            quadrature where the tolerances are loose. Penalties that read the velocity alone stay full. Sampling
            needs a gradient through the steps, and an adaptive method cannot sample a density, because it controls
            the density's error.
        max_nfe: most evaluations that one solve may use; None: no limit for a fixed grid, 100,000 for an adaptive
            solver.
        adaptive: whether the method chooses the steps.
        name: the method's name.
        text: a short description, such as ``rk4_38, step 0.25``.

    Example:
        >>> from rnode_plugin import Adaptive, FixedGrid
        >>> [solver.text for solver in (FixedGrid("rk4_38", step=0.25), Adaptive("dopri5"))]
        ['rk4_38, step 0.25', 'dopri5, tolerance 1e-05']
    """

    method: str | Method
    _: KW_ONLY
    gradient: str | Gradient = "autograd"
    quadrature: str = "full"
    max_nfe: int | None = None
    adaptive: ClassVar[bool]

    def __post_init__(self) -> None:
        get_method(self.method)
        gradient = get_gradient(self.gradient)
        check_quadrature(self.quadrature)
        check_positive(self.max_nfe, "max_nfe")
        if self.quadrature == "sampled":
            gradient.check_sampling()

    @property
    def name(self) -> str:
        return get_method(self.method).name

    @property
    @abstractmethod
    def text(self) -> str: ...

    @property
    def tolerances(self) -> tuple[Tolerance, Tolerance] | None:
        """Absolute and relative tolerance; None for a fixed grid."""
        return None

    @property
    def full_quadrature(self: _Self) -> _Self:
        """This solver with ``quadrature="full"``, for a call that takes the products at every evaluation."""
        return self if self.quadrature == "full" else replace(self, quadrature="full")

    def solve(
        self,
        dynamics: BoundDynamics,
        z0: Tensor,
        t_span: Tensor | Sequence[float],
        *,
        safe_step: float | None = None,
        adjoint_safe_step: float | None = None,
        keep_adjoint_step: Callable[[float], None] | None = None,
        save_steps: bool = False,
        weight_gradients: str = "all",
    ) -> Solution:
        """Solve the augmented system (RNODE) from ``t_span[0]`` through all of ``t_span``.

        Args:
            dynamics: the system with its noise fixed: ``Dynamics(...).bind(noise)``.
            z0: state ``(B, *event)`` at ``t_span[0]``.
            t_span: times ``(T,)``, increasing or decreasing. If they are on the CPU, they are read without waiting
                for the device. Numbers take the precision of ``z0``. An exported program has the times as
                constants, so a model that makes them during a call gives numbers.
            safe_step: the ``longest_safe_step`` of an earlier solution of the same field in the same direction of
                time. An adaptive solver first tries it, times the safety factor of its method unless the whole step
                reaches the end of the solve. None: the solver's ``first_step``. A fixed grid does not use it.
            adjoint_safe_step: the same for the backward pass of a continuous adjoint.
            keep_adjoint_step: called by each backward pass of an adaptive continuous adjoint with its longest safe
                step. This is a function, because the backward pass runs after the solution was returned.
            save_steps: whether the solution holds the accepted steps.
            weight_gradients: ``"all"``, or ``"half"`` to compute gradients with respect to the weights of the field
                at two of the four evaluations of each step, twice as large: the first and the third, or the second
                and the fourth, drawn by torch's generator. Values and the gradient with respect to ``z0`` are those
                of ``"all"``. The gradient with respect to the weights is random, and its mean is that of ``"all"``.

        Returns:
            Solution: states at all of ``t_span``, log-determinant (nats), integrals of the penalties, and the cost.
            A fixed grid does not check that the solve stayed finite; call :meth:`Solution.check`. Inside a
            transform of torch.func every gradient goes through the steps, as with ``autograd``.

        Raises:
            ConfigError: for times that are not finite and strictly monotonic, for a safe step that is not above 0,
                for a quadrature or a penalty that the method or the gradient cannot have, and for an adaptive
                solver inside ``torch.func.vmap`` or on the device ``meta``, where errors cannot be read.
            SolverError: if a state of an adaptive solver is not finite, if the step size underflows, and if the
                budget of evaluations is used up.
        """
        self.check_weight_gradients(weight_gradients)
        refuse_dual_numbers()
        if dynamics.divergence and self.adaptive and self.quadrature == "sampled":
            refuse_sampled_density(self.name, self.quadrature, adaptive=self.adaptive)
        if not isinstance(t_span, Tensor):
            with on_host():
                t_span = torch.tensor(t_span, dtype=z0.dtype.to_real())
        check_times(t_span)
        regularizers = dynamics.regularizers
        if regularizers.no_time_gradient:
            through_steps = get_gradient(self.gradient).through_steps or transforms_active()
            regularizers.check_gradient_by_times(t_span, through_steps=through_steps)
        for length in (safe_step, adjoint_safe_step):
            if length is not None and not length > 0:
                raise ConfigError(f"a safe step must be a length > 0 or None, not {length!r}.")
        problem = Problem(
            dynamics, z0, t_span, save_steps, safe_step, adjoint_safe_step, keep_adjoint_step, weight_gradients
        )
        if regularizers.steps or regularizers.finished:
            solution = self._solve_with_path(problem)
        else:
            solution = get_gradient(self.gradient).solve(self, problem)
        return solution if save_steps or solution.steps is None else replace(solution, steps=None)

    def _solve_with_path(self, problem: Problem) -> Solution:
        """Solve with penalties on steps, and finish the integrals of rates."""
        regularizers, gradient = problem.dynamics.regularizers, get_gradient(self.gradient)
        self.check_steps(regularizers.steps)
        if torch.is_grad_enabled():  # without gradients the values are the same in every mode
            gradient.check_penalties(regularizers.steps)
        save_steps = problem.save_steps or regularizers.adds_evaluations
        solution = gradient.solve(self, problem._replace(save_steps=save_steps))
        return _with_path_penalties(solution, problem, self)

    @abstractmethod
    def march(self, problem: Problem, *, take: Callable[..., Step] | None = None) -> Solution:
        """Take all steps of a solve, differentiable through the steps, without local penalties.

        Args:
            problem: the arguments of :meth:`solve`.
            take: takes one step as a :class:`~rnode_plugin.solvers.step.Stepper` does; None: a stepper.
        """

    def without_interpolation(self: _Self) -> _Self:
        """The same solver, but one that stops at each output time instead of interpolating."""
        return replace(self, method=replace(get_method(self.method), interpolate=None))

    def of_adjoint(self: _Self) -> _Self:
        """This solver adapted to the backward pass of an adjoint, whose state is not a batch of samples."""
        return self.without_interpolation()

    def check_use(self, penalties: Sequence[StepPenalty]) -> None:
        """Refuse step penalties that the method or the gradient cannot give, where a model is made.

        Raises:
            ConfigError: names what works instead.
        """
        self.check_steps(penalties)
        get_gradient(self.gradient).check_penalties(penalties)

    def check_weight_gradients(self, weight_gradients: str) -> None:
        """Refuse an unknown choice, and gradients at half of the evaluations that this solver cannot draw.

        Raises:
            ConfigError: names what works.
        """
        check_name(weight_gradients, WEIGHT_GRADIENTS, "choice of weight gradients")
        if weight_gradients == "all":
            return
        if all(get_method(self.method) is not get_method(name) for name in ("rk4", "rk4_38")):
            raise ConfigError(
                f"weight_gradients='half' draws two of the four evaluations of a step of rk4 or rk4_38 on a fixed "
                f"grid, not of {self.name}."
            )
        if self.quadrature != "full":
            raise ConfigError(
                "weight_gradients='half' needs quadrature='full': with a sampled one it would save little time and "
                "add much noise."
            )
        if not get_gradient(self.gradient).through_steps:
            raise ConfigError(
                "weight_gradients='half' needs the gradient of the steps that were drawn, which a continuous "
                "adjoint does not take: use the gradient 'autograd' or 'checkpointed'."
            )

    def check_steps(self, penalties: Sequence[StepPenalty]) -> None:
        """Refuse penalties on accepted steps that the method cannot give, and name what works."""
        for penalty in penalties:
            if penalty.local:
                continue
            has = {"error": self.adaptive, "pair": get_method(self.method).pair is not None}
            for use in penalty.uses:
                if not has[use]:
                    what, good = _WITHOUT[use]
                    raise ConfigError(
                        f"{penalty.name!r} cannot be computed: the method {self.name!r} {what}; use {good}, or "
                        f"'local_error' or 'local_stiffness', which take a separate step with any method."
                    )


def chosen_solver(solver: object, otherwise: Solver) -> Solver:
    """``solver``, or ``otherwise`` for None.

    Raises:
        ConfigError: for any other object, such as a name or the settings of a recipe.
    """
    chosen = otherwise if solver is None else solver
    if isinstance(chosen, Solver):
        return chosen
    raise ConfigError(
        f"solver= takes a FixedGrid or an Adaptive object here, not {chosen!r:.60}: get_solver(name, ...) of "
        "rnode_plugin.solvers makes one, and so does build() of a recipe's solver."
    )


def check_times(t_span: Tensor) -> None:
    """Refuse times that are not a finite, strictly monotonic row of at least two (ConfigError)."""
    if exporting() and type(t_span) not in (Tensor, nn.Parameter):  # it stands for an input, without values
        raise ConfigError(
            "a solve in a program takes its times as numbers, (0.0, 1.0), not as a tensor of the call"
        )
    good = t_span.ndim == 1 and len(t_span) >= 2 and t_span.is_floating_point()
    if good:
        with on_host():
            steps = t_span.detach().diff()
            good = bool(((steps > 0).all() | (steps < 0).all()) & torch.isfinite(t_span.detach()).all())
    if not good:
        raise ConfigError(
            "t_span must be finite and strictly increasing or decreasing, a row of at least two floating-point "
            f"times, not {t_span.tolist()}: where it turns back or stands still, start another solve from the last "
            "state."
        )


# penalties beyond single evaluations ----------------------------------------------------------------------------

_WITHOUT = {
    "error": ("has no error estimate", "dopri5 or tsit5"),
    "pair": ("has no two stages at one time", "dopri5, tsit5 or rk4"),
}


def _with_path_penalties(solution: Solution, problem: Problem, solver: Solver) -> Solution:
    """Finish the integrals of rates, and add local penalties."""
    extra, stats, checks = dict[str, Tensor](), solution.stats, solution.health
    regularizers, event = problem.dynamics.regularizers, problem.dynamics.event
    if regularizers.finished:
        z0, z1 = event(solution.z[0]), event(solution.z[-1])
        # the times of the problem carry the graph of t_span, which the output times of a continuous adjoint do not
        extra = regularizers.finish(solution.penalties, z0, z1, problem.t_span)
    if regularizers.adds_evaluations:
        assert solution.steps is not None
        local, nfe = _local_penalties(problem.dynamics, solver, solution.steps)
        extra |= local
        stats = replace(stats, nfe=stats.nfe + nfe)
    penalties = solution.penalties | extra
    if extra:

        def fail(_: int) -> NoReturn:
            fail_integrals(solution.z[-1], None, penalties, float(solution.t[-1].detach()), stats.steps, stats.nfe)

        check = HealthCheck(torch.stack([health(value) for value in extra.values()]), fail)
        checks = (*checks, check)
    return replace(solution, penalties=penalties, stats=stats, health=checks)


def _local_penalties(dynamics: BoundDynamics, solver: Solver, steps: Steps) -> tuple[dict[str, Tensor], int]:
    """The local penalties of one step of tsit5 from a uniformly random time, and the number of its evaluations.

    The step starts, detached, on the cubic interpolant of the accepted states, and has the length of the accepted
    step there, or less if the solve ends earlier.
    """
    knots = steps.t.detach()
    start, end = knots[0], knots[-1]
    # drawn on the CPU, so that one seed gives the same time on every device
    s = start + (end - start) * torch.rand((), dtype=torch.float64).to(knots)
    if differs(s):
        raise ConfigError(ONE_DRAW.format("the steps of local penalties"))
    backward = bool(end < start)
    passed = (knots >= s) if backward else (knots <= s)
    k = min(max(int(passed.sum()) - 1, 0), len(knots) - 2)
    (t0, t1), (z0, z1) = knots[k : k + 2], steps.z[k : k + 2].detach()
    with torch.no_grad():
        # two evaluations, counted below: a solve with saved steps does not save velocities
        v0, v1 = (dynamics.evaluate(t, z, products=False).dz for t, z in ((t0, z0), (t1, z1)))
        z = hermite(t0, z0, v0, t1, z1, v1, s)
    drop_casts()
    h = torch.minimum((t1 - t0).abs(), (end - s).abs())
    take = Stepper(dynamics, get_method("tsit5"), solver.tolerances, local=True)
    step = take(z, s, -h if backward else h, None, {})  # an empty draw: no stage computes products
    return {name: value for name, (_, value) in step.path.items()}, step.nfe + 2
