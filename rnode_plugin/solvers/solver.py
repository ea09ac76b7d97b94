"""Solvers of initial value problems, as data: :class:`FixedGrid` and :class:`Adaptive`, of the base Solver.

Importing, making and printing them needs no torch. A solve imports the code that takes the steps, ``fixed.py`` or
``adaptive.py``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self, TypeAlias, TypeGuard

from ..errors import ConfigError, check_count, check_name
from .gradients import Gradient, get_gradient
from .tableaus import ADAPTIVE_METHODS, FIXED_METHODS, METHODS, Method, get_method

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.regularizer import StepPenalty
    from ..core.system import RightHandSide
    from .solution import Solution
    from .step import Problem, Step, Tolerance

    MethodLike: TypeAlias = str | Method
    GradientLike: TypeAlias = str | Gradient
else:  # the types in the settings of a recipe, by which pydantic reads and checks them
    Tolerance, MethodLike, GradientLike = float, str, str

QUADRATURES = ("full", "sampled")


@dataclass(frozen=True)
class Solver(ABC):
    """A solver of initial value problems with its gradient: a :class:`FixedGrid` or :class:`Adaptive`.

    Attributes:
        method: the method of a step, a name or a :class:`~rnode_plugin.solvers.Method`. It is stored as it was
            given; :func:`~rnode_plugin.solvers.get_method` looks it up.
        gradient: the way to differentiate a solve, a name or a gradient object, stored as it was given.
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
        compile: whether torch.compile makes one graph of a step, which saves time for small fields and hardly any
            for image fields on a CPU and exact traces of tables, see :doc:`/scaling`.
        adaptive: whether the method chooses the steps.
        name: the method's name.
        text: a short description, such as ``rk4_38, step 0.25``.

    Example:
        >>> from rnode_plugin import Adaptive, FixedGrid
        >>> [solver.text for solver in (FixedGrid("rk4_38", step=0.25), Adaptive("dopri5"))]
        ['rk4_38, step 0.25', 'dopri5, tolerance 1e-05']
    """

    method: MethodLike
    _: KW_ONLY
    gradient: GradientLike = "autograd"
    quadrature: str = "full"
    max_nfe: int | None = None
    compile: bool = False
    adaptive: ClassVar[bool]

    def __post_init__(self) -> None:
        get_method(self.method)
        get_gradient(self.gradient)
        check_name(self.quadrature, QUADRATURES, "quadrature")
        if self.max_nfe is not None:
            check_count(self.max_nfe, "max_nfe")
        if not isinstance(self.compile, bool):
            raise ConfigError(f"compile must be True or False, not {self.compile!r}.")
        refuse(self)

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
    def full_quadrature(self) -> Self:
        """This solver with ``quadrature="full"``, for a call that takes the products at every evaluation."""
        return self if self.quadrature == "full" else replace(self, quadrature="full")

    def solve(
        self,
        rhs: RightHandSide,
        z0: Tensor,
        t_span: Tensor | Sequence[float],
        *,
        safe_step: float | None = None,
        adjoint_safe_step: float | None = None,
        keep_adjoint_step: Callable[[float], None] | None = None,
        save_steps: bool = False,
    ) -> Solution:
        """Solve the augmented system (RNODE) from ``t_span[0]`` through all of ``t_span``.

        Args:
            rhs: the right-hand side, such as ``System(...).start(field, z0)``.
            z0: state ``(B, *event)`` at ``t_span[0]``.
            t_span: times ``(T,)``, increasing or decreasing. If they are on the CPU, they are read without waiting
                for the device. Numbers take the precision of ``z0``.
            safe_step: the ``longest_safe_step`` of an earlier solution of the same field in the same direction of
                time. An adaptive solver first tries it, times the safety factor of its method unless the whole step
                reaches the end of the solve. None: the solver's ``first_step``, which a solve also takes where the
                state after the safe step is not finite. A fixed grid does not use it.
            adjoint_safe_step: the same for the backward pass of a continuous adjoint.
            keep_adjoint_step: called by each backward pass of an adaptive continuous adjoint with its longest safe
                step. This is a function, because the backward pass runs after the solution was returned.
            save_steps: whether the solution contains the accepted steps.

        Returns:
            Solution: states at all of ``t_span``, log-determinant (nats), integrals of the penalties, and the cost.
            A fixed grid does not check that the solve stayed finite; call :meth:`Solution.check`.

        Raises:
            ConfigError: for times that are not finite and strictly monotonic, for a safe step that is not above 0,
                for a quadrature or a penalty that the method or the gradient cannot have, and for an adaptive
                solver on the device ``meta``, where errors cannot be read.
            SolverError: if a state of an adaptive solver is not finite, if the step size underflows, and if the
                budget of evaluations is used up.
        """
        import torch

        from .path_penalties import with_path_penalties
        from .step import Problem, check_times, inside

        regularizers, gradient = rhs.regularizers, get_gradient(self.gradient)
        # without gradients the values are the same in every gradient mode
        refuse(self, regularizers.steps, density=rhs.divergence, differentiated=torch.is_grad_enabled())
        if not isinstance(t_span, torch.Tensor):
            t_span = torch.tensor(t_span, dtype=z0.dtype.to_real())
        check_times(t_span)
        for length in (safe_step, adjoint_safe_step):
            if length is not None and not length > 0:
                raise ConfigError(f"a safe step must be a length > 0 or None, not {length!r}.")
        rhs.check_field(inside(t_span, z0.device), z0)
        problem = Problem(
            rhs=rhs, z=z0, t_span=t_span, save_steps=save_steps or regularizers.adds_evaluations,
            safe_step=safe_step, adjoint_safe_step=adjoint_safe_step, keep_adjoint_step=keep_adjoint_step,
        )  # fmt: skip
        if self.compile:
            from . import graph

            solution = graph.solve(self, problem, gradient.solve)
        else:
            solution = gradient.solve(self, problem)
        if regularizers.finished or regularizers.adds_evaluations:
            solution = with_path_penalties(solution, problem, self.tolerances)
        return solution if save_steps or solution.steps is None else replace(solution, steps=None)

    @abstractmethod
    def march(self, problem: Problem, *, take: Callable[..., Step] | None = None) -> Solution:
        """Take all steps of a solve, without local penalties. The result is differentiable through the steps.

        Args:
            problem: the arguments of :meth:`solve`.
            take: takes one step as a :class:`~rnode_plugin.solvers.step.Stepper` does; None: a stepper.
        """

    def without_interpolation(self) -> Self:
        """The same solver, but one that stops at each output time instead of interpolating."""
        return replace(self, method=replace(get_method(self.method), interpolate=None))


@dataclass(frozen=True)
class FixedGrid(Solver):
    """Divides each interval of the times into equal steps. The host reads nothing from the device.

    Args:
        method: ``euler``, ``midpoint``, ``rk4`` (classical) or ``rk4_38`` (3/8 rule, the paper's), or a
            :class:`~rnode_plugin.solvers.Method`.
        step: longest step; None: one step for each interval of the times.
        max_nfe, quadrature, compile: see :class:`Solver`.
        gradient: an object of :mod:`~rnode_plugin.solvers.gradients`, or a name: ``autograd`` keeps all
            activations. ``checkpointed`` gives the same gradient with the activations of one step at a time, and
            evaluates each step once more. ``adjoint`` solves the continuous adjoint backward (as in the paper); its
            gradient differs from the gradient of the discrete loss by the discretization error.
            ``interpolated_adjoint`` (torchdyn's name) also restarts from the stored state of each accepted step.

    Raises:
        ConfigError: for an unknown name, a number out of range, and a method that chooses its own steps.

    Example:
        >>> FixedGrid("rk4_38", step=0.25).adaptive
        False
    """

    method: MethodLike = "rk4_38"
    _: KW_ONLY
    step: float | None = 0.25
    adaptive: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if get_method(self.method).adaptive:
            raise ConfigError(
                f"{self.name} chooses its own steps and has no fixed grid: use Adaptive({self.name!r}), or one of "
                f"{', '.join(FIXED_METHODS)}."
            )
        _check_positive(self.step, "step")

    @property
    def text(self) -> str:
        return f"{self.name}, " + ("one step per interval" if self.step is None else f"step {self.step:g}")

    def march(self, problem: Problem, *, take: Callable[..., Step] | None = None) -> Solution:
        from .fixed import march

        return march(self, problem, take=take)


@dataclass(frozen=True)
class Adaptive(Solver):
    """Takes steps as long as the errors in the state and in the log-determinant allow.

    The error that is compared with the tolerances is the root mean square over all entries of the batch. So one of
    B samples may have an error of sqrt(B) times the tolerance.

    Args:
        method: ``dopri5`` or ``tsit5``, or a :class:`~rnode_plugin.solvers.Method` with an error estimate.
        atol: absolute tolerance. One of ``atol`` and ``rtol`` may be 0.
        rtol: relative tolerance.
        first_step: first trial step; None estimates one with one more evaluation.
        max_nfe, gradient, quadrature, compile: see :class:`FixedGrid`.

    Raises:
        ConfigError: for an unknown name, a number out of range, and a method without an error estimate.

    Example:
        >>> Adaptive("dopri5", atol=1e-6, rtol=1e-6).adaptive
        True
    """

    method: MethodLike = "dopri5"
    _: KW_ONLY
    atol: Tolerance = 1e-5
    rtol: Tolerance = 1e-5
    first_step: float | None = None
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not get_method(self.method).adaptive:
            raise ConfigError(
                f"{self.name} has no error estimate to choose steps from: use FixedGrid({self.name!r}, step=...), "
                f"or one of {', '.join(ADAPTIVE_METHODS)}."
            )
        check_tolerance(self.atol, "atol")
        check_tolerance(self.rtol, "rtol")
        if _is_number(self.atol) and _is_number(self.rtol) and self.atol == self.rtol == 0:
            raise ConfigError("atol and rtol are both 0, which no step can meet: raise one of them.")
        _check_positive(self.first_step, "first_step")

    @property
    def text(self) -> str:
        absolute, relative = map(_tolerance_text, self.tolerances)
        both = f"tolerance {absolute}" if absolute == relative else f"atol {absolute}, rtol {relative}"
        return f"{self.name}, {both}"

    @property
    def tolerances(self) -> tuple[Tolerance, Tolerance]:
        return self.atol, self.rtol

    def march(self, problem: Problem, *, take: Callable[..., Step] | None = None) -> Solution:
        from .adaptive import march

        return march(self, problem, take=take)


def get_solver(solver: str | Solver, *, step: float | None = 0.25) -> Solver:
    """The solver of a method's name, with the defaults of its class; a solver is returned unchanged.

    Args:
        solver: a name, or a solver.
        step: longest step of a fixed grid that is given by its name; None: one step for each interval of the times.

    Raises:
        ConfigError: for an unknown name and any other object.
    """
    if isinstance(solver, Solver):
        return solver
    if not isinstance(solver, str):
        raise ConfigError(
            f"solver= is a name ({', '.join(METHODS)}), a FixedGrid or an Adaptive solver, not "
            f"{type(solver).__name__}: torchdyn's solver objects, a hypersolver and your own belong in NeuralODE."
        )
    return Adaptive(solver) if get_method(solver).adaptive else FixedGrid(solver, step=step)


# checks and texts -----------------------------------------------------------------------------------------------


_WITHOUT = {
    "error": ("has no error estimate", "dopri5 or tsit5"),
    "pair": ("has no two stages at one time", "dopri5, tsit5 or rk4"),
}


def refuse(
    solver: Solver,
    penalties: Sequence[StepPenalty] = (),
    *,
    density: bool = False,
    differentiated: bool = True,
    name: str = "solver",
) -> None:
    """Refuse a combination that the method or the gradient of a solver cannot have, and name those that work.

    A solver asks when it is made, a model when it knows its penalties, and each solve.

    Args:
        solver: the solver.
        penalties: the step penalties.
        density: whether the log-determinant is integrated.
        differentiated: whether gradients are taken.
        name: the name of the solver in messages.

    Raises:
        ConfigError: for a sampled quadrature with a continuous adjoint, with stages that cannot be drawn, or of a
            density with an adaptive method, and for a penalty on accepted steps that the method or the gradient
            does not have.
    """
    method, through_steps = get_method(solver.method), get_gradient(solver.gradient).through_steps
    if solver.quadrature == "sampled":
        if not through_steps:
            raise ConfigError(
                "quadrature='sampled' needs the gradient of the steps that were drawn, which a continuous adjoint "
                "does not take: use 'autograd' or 'checkpointed' (sensitivity= of a NeuralODE), or "
                "quadrature='full'."
            )
        _check_draws(method)
        if density and solver.adaptive:
            raise ConfigError(
                f"{name}.quadrature='sampled' of a density needs a fixed grid: {method.name} would control an "
                f"error that the log-determinant does not have. Use one of {', '.join(FIXED_METHODS)}, or "
                "quadrature='full'."
            )
    on_accepted = [penalty for penalty in penalties if not penalty.local]
    for penalty in on_accepted:
        has = {"error": solver.adaptive, "pair": method.pair is not None}
        for use in penalty.uses:
            if not has[use]:
                what, good = _WITHOUT[use]
                raise ConfigError(
                    f"{penalty.name!r} cannot be computed: the method {method.name!r} {what}; use {good}, or "
                    "'local_error' or 'local_stiffness', which take a separate step with any method."
                )
    if on_accepted and differentiated and not through_steps:
        raise ConfigError(
            f"{on_accepted[0].name!r} is a penalty on the solver's steps, and a continuous adjoint does not go "
            "through them: use 'autograd' or 'checkpointed', or 'local_error' or 'local_stiffness' instead."
        )


def check_tolerance(value: object, name: str) -> None:
    """Refuse a tolerance that is not a number >= 0."""
    # a tensor of tolerances is checked where the user gives it, because here each solve would wait for the device
    tensor = hasattr(value, "dtype") and not isinstance(value, float)
    if not (tensor or (_is_number(value) and value >= 0)):
        raise ConfigError(f"{name} must be a number >= 0, not {value!r}.")


def _check_draws(method: Method) -> None:
    """Refuse probabilities of stages whose sampled quadrature would be biased or incomplete."""
    draws = method.draws
    if draws is None:
        return
    wrong = ""
    if len(draws) != method.stages:
        wrong = f"they are {len(draws)}, and the step has {method.stages} quadrature weights"
    elif min(draws) < 0 or not abs(sum(draws) - 1) <= 1e-3:  # NaN too
        wrong = f"they are not probabilities with the sum 1, but {draws}"
    elif method.adaptive and draws[0] != 0:
        wrong = "the first one must be 0, because the previous step has evaluated the first stage, without products"
    if wrong:
        raise ConfigError(
            f"quadrature='sampled' cannot draw stages by the `draws` of the method {method.name!r}: {wrong}."
        )


def _check_positive(value: object, name: str) -> None:
    """Refuse a value that is neither None nor a finite number > 0."""
    if value is not None and not (_is_number(value) and value > 0):
        raise ConfigError(f"{name} must be a number > 0 or None, not {value!r}.")


def _is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a finite number, but not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _tolerance_text(tolerance: Tolerance) -> str:
    """A tolerance, or the range of a tensor of tolerances."""
    if isinstance(tolerance, (int, float)):
        return f"{tolerance:g}"
    low, high = float(tolerance.min()), float(tolerance.max())
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
