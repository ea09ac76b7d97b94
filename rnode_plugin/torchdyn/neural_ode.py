"""NeuralODE, torchdyn's class with ``regularizers=`` and gradients that are right in every mode."""

from __future__ import annotations

import contextlib
import functools
import io
import operator
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchdyn.core import neuralde as torchdyn_neuralde
from torchdyn.core.problems import ODEProblem
from torchdyn.numerics.interpolators import INTERP_DICT
from torchdyn.numerics.solvers.ode import RungeKutta4

from ..core.history import History, refuse_data_parallel
from ..core.integrals import Integrals, attach
from ..core.modes import outside_inference
from ..core.part import PartSpec, check_first
from ..core.regularizers import RegularizersLike
from ..core.schedules import Lambda
from ..core.signature import refuse_state_first
from ..core.system import COST, FieldRightHandSide, System
from ..core.trace_estimators import TraceEstimator, get_estimator
from ..errors import ConfigError, check_count, check_name
from ..plugins.registry import resolve_regularizers
from ..solvers import GRADIENTS, Adjoint, Autograd, FixedGrid, Method, Solver, get_gradient
from ..solvers.solution import Solution
from ..solvers.solver import check_tolerance, refuse
from .field import Cost, start_torchdyn
from .solver_objects import (
    SolverObject,
    StepwiseAdjoint,
    constants_of,
    kept_times,
    method_from_torchdyn,
    prepare,
    refuse_leapfrog,
    resolve_solver,
    solver_from,
    with_args,
)

_NO_CALL = (
    "call the model first. trajectory() integrates them in a block of collect_penalties(), or by penalties=True."
)

_OPTIONS: Mapping[str, tuple[str, object]] = {
    "atol": ("atol", 1e-3),
    "rtol": ("rtol", 1e-3),
    "sensitivity": ("sensalg", "autograd"),
    "atol_adjoint": ("atol_adjoint", 1e-4),
    "rtol_adjoint": ("rtol_adjoint", 1e-4),
    "interpolator": ("interpolator", None),
    "max_nfe": ("_max_nfe", None),
    "quadrature": ("_quadrature", "full"),
    "compile": ("_compile", False),
}
"""The options of a solver that torchdyn knows: the attribute and the default of each keyword."""

THEIRS = dict(vars(torchdyn_neuralde.NeuralODE))
"""The attributes of torchdyn's class, from before ``install()`` can replace them."""


class NeuralODE(torchdyn_neuralde.NeuralODE):
    """torchdyn's neural ODE with penalties on its vector field (sections 4 and 5 of the paper).

    Without new arguments its states equal those of torchdyn's class up to rounding, with the same number of
    evaluations. torchdyn rounds the coefficients of a solver given by name to single precision. This class does so
    only for an adaptive solver and a state in single precision.

    The arguments before ``regularizers`` are torchdyn's, in its order.

    Args:
        vector_field: a module or function ``(x)`` or ``(t, x)``, either with ``args``; see :doc:`/torchdyn`.
        solver: a name or object from torchdyn, ``"rk4_38"``, the 3/8 rule, or a :class:`~rnode_plugin.FixedGrid` or
            :class:`~rnode_plugin.Adaptive` object, which has its own tolerances and gradient: ``atol`` and the like
            are refused beside it. torchdyn's ``"rk4"`` evaluates stages 2 to 4 of a time-dependent field at t,
            t + h/2 and t + h/2 instead of t + h/2, t + h/2 and t + h, which lowers its order. ``"rk4"`` keeps this
            behavior, so that results do not change; ``FixedGrid("rk4", step=None)`` is the classical method.
        order: order of the differential equation; the state ``(B, order * D)`` is position, velocity, and so on.
        atol, rtol: tolerances of an adaptive solver.
        sensitivity: ``"autograd"``, ``"adjoint"``, ``"interpolated_adjoint"`` or ``"checkpointed"`` (autograd's
            gradient with the activations of one step at a time).
        solver_adjoint: solver of a continuous adjoint; None: ``solver``.
        atol_adjoint, rtol_adjoint: tolerances of a continuous adjoint.
        interpolator: ``"4th"`` or None; with ``"4th"`` and ``"dopri5"``, output times cost no steps.
        integral_loss: a running cost ``(t, x) -> (B,)``, integrated with the state.
        seminorm: has no effect, as in torchdyn, because a continuous adjoint never controls the error in the
            gradient of the parameters.
        return_t_eval: whether a call returns ``(t_eval, trajectory)`` or the trajectory alone.
        optimizable_params: parameters of an adjoint for a field without any, as in torchdyn.
        regularizers: names (``"kinetic"``, ``"jacfrob"``, names from plugins), regularizer objects or functions
            ``rate(t, z, dz) -> (B,)``, or a mapping from these to lambda. A module among them becomes a submodule,
            but not the owner of a method, whose parameters you give to the optimizer yourself.
        trace_estimator: noise for the product that ``jacfrob`` needs if no CNF computes one: ``"rademacher"``
            (signs), ``"gaussian"`` (the paper's), ``"exact"`` for the whole Jacobian, ``"difference"`` for layers
            without a second derivative, or an estimator.
        max_nfe: most evaluations of the field that one solve may use; None: 100,000 for an adaptive solver, no
            limit for fixed steps.
        penalized: the columns (dimension 1) of the state that the penalties measure, a slice or a mask ``(D,)`` of
            booleans, for a custom field that keeps a divergence or a cost in the state, which would otherwise count
            as a part of ``z``. They are counted without the column of an ``integral_loss``. None: all columns
            except the column of an ``integral_loss`` and the trace of a CNF, which are recognized (a module with an
            attribute ``noise_dist`` counts as a CNF). Columns that are left out count as constants in derivatives
            with respect to ``z``, as of ``jacfrob``. In derivatives along the trajectory (``total_derivative``,
            ``taylor``) they move by their own velocity, which takes further evaluations.
        batch_dim: 0, the dimension of the samples. None: the whole state is one sample, for a field that mixes the
            rows of its state, such as the nodes of a graph.
        quadrature: ``"full"``, or ``"sampled"`` to compute the products that penalties such as ``jacfrob`` need in
            a few evaluations only, see :class:`~rnode_plugin.Solver`. A CNF's trace needs the product in every
            evaluation, so there the quadrature stays full.
        warm_start: whether each call with an adaptive solver begins with the longest step that would have passed in
            the last one, as does the backward pass of a continuous adjoint. Otherwise each call guesses its first
            step, as torchdyn does. :meth:`trajectory` does not take part. ``history.longest_safe_steps[0]`` has
            the steps by direction of time. Copies by deepcopy and pickle keep them, a ``state_dict`` does not have
            them, and ``model.history.longest_safe_steps.clear()`` forgets them.
        compile: whether torch.compile makes one graph of a step in calls with gradients, see :doc:`/scaling`.

    After a call :attr:`regularization` has the integral of each penalty along the trajectory, and :meth:`reg_loss`
    returns their weighted sum. :meth:`trajectory` keeps those from the last call, except where each solve counts.
    For ``order`` 2 and higher, ``z`` is the whole state (position, velocity, ...), and penalties see the field of
    the first-order system.

    With an adjoint the gradient of ``integral_loss`` is added in the backward pass by itself, as in torchdyn, and
    it is complete.

    Raises:
        ConfigError: for an unknown solver, sensitivity, regularizer, noise or interpolator, a number out of range,
            and for multiple shooting and SDEs, which have no penalties. A call raises the errors of
            :meth:`forward`.

    Example:
        >>> import torch
        >>> from rnode_plugin.fields import linear_field
        >>> model = NeuralODE(linear_field(2), solver="dopri5", regularizers={"kinetic": 0.1, "jacfrob": 0.01})
        >>> t_eval, trajectory = model(torch.randn(64, 2), torch.linspace(0, 1, 2))
        >>> tuple(trajectory.shape), tuple(model.regularization["kinetic"].shape)
        ((2, 64, 2), (64,))
        >>> loss = trajectory[-1].square().mean() + model.reg_loss()
        >>> loss.backward()
    """

    vf: Any
    solver: Any
    solver_adjoint: Any
    integral_loss: Cost | None
    interpolator: str | Callable[..., object] | None

    # class attributes, because objects that torchdyn's class made before install() did not run our __init__
    _max_nfe: int | None = None
    _named: Sequence[tuple[SolverObject, str]] = ()
    _system: System = System()
    _quadrature: str = "full"
    _compile: bool = False
    _resolved: tuple[list[object], Solver] | None = None
    _replicate_for_data_parallel = refuse_data_parallel

    def __init__(
        self,
        vector_field: Callable[..., Any] | nn.Module,
        solver: str | Solver | nn.Module = "tsit5",
        order: int = 1,
        atol: float = 1e-3,
        rtol: float = 1e-3,
        sensitivity: str = "autograd",
        solver_adjoint: str | nn.Module | None = None,
        atol_adjoint: float = 1e-4,
        rtol_adjoint: float = 1e-4,
        interpolator: str | Callable[..., object] | None = None,
        integral_loss: Callable[..., Tensor] | None = None,
        seminorm: bool = False,
        return_t_eval: bool = True,
        optimizable_params: Iterable[nn.Parameter] | Generator[nn.Parameter, None, None] = (),
        *,
        regularizers: RegularizersLike = None,
        trace_estimator: str | TraceEstimator = "rademacher",
        max_nfe: int | None = None,
        penalized: slice | Tensor | Iterable[bool] | None = None,
        batch_dim: int | None = 0,
        quadrature: str = "full",
        warm_start: bool = False,
        compile: bool = False,
    ) -> None:
        resolved = resolve_regularizers(regularizers)
        order = check_count(order, "order")
        if isinstance(interpolator, str):
            check_name(interpolator, INTERP_DICT, "interpolator")
        refuse_state_first(vector_field, "NeuralODE")
        check_first(batch_dim)
        spec = PartSpec.of(penalized, batch_dim)
        if spec.tensors is not None or (isinstance(spec.columns, Tensor) and spec.columns.ndim > 1):
            raise ConfigError(
                f"penalized= must be a slice of the state's columns or a mask of booleans (D,), not {penalized!r}."
            )
        tolerances: dict[str, float] = {
            "atol": atol, "rtol": rtol, "atol_adjoint": atol_adjoint, "rtol_adjoint": rtol_adjoint,
        }  # fmt: skip
        for name, value in tolerances.items():
            check_tolerance(float(value.min()) if isinstance(value, Tensor) else value, name)
        forward: Any = solver if isinstance(solver, Solver) else resolve_solver(solver)
        backward = forward if solver_adjoint is None else resolve_solver(solver_adjoint, "solver_adjoint")
        with contextlib.redirect_stdout(io.StringIO()):  # torchdyn prints remarks on fields without time or weights
            THEIRS["__init__"](
                self, vector_field, solver=forward, order=order, sensitivity=sensitivity,
                interpolator=interpolator, integral_loss=integral_loss, seminorm=seminorm,
                return_t_eval=return_t_eval, optimizable_params=optimizable_params, **tolerances,
            )  # fmt: skip
        self.solver_adjoint, steps = backward, {} if warm_start else None
        self.history = History(resolved, longest_safe_steps=steps, absent=_NO_CALL)
        self._system = System(resolved, get_estimator(trace_estimator), part=spec)
        self._max_nfe, self._quadrature = max_nfe, quadrature
        self._compile = compile  # `compile` is a method of every module
        built = ((forward, solver), (backward, solver_adjoint))
        self._named = tuple((made, name) for made, name in built if isinstance(name, str))
        if resolved:
            refuse_leapfrog(forward)
        if resolved.modules:
            self.regularizer_modules = nn.ModuleList(resolved.modules)
        # resolved now, so that a wrong option fails here and not in the first call
        refuse(self._solver({}), resolved.steps)
        # torchdyn's field reads it to decide whether integral_loss is a column of the state
        through_steps = get_gradient(self._solver({}).gradient).through_steps
        self.vf.sensitivity = "autograd" if through_steps else "adjoint"

    @functools.cached_property
    def history(self) -> History:
        """The penalties and steps of the last solves. An object made before :func:`install` gets its own here."""
        return History()

    def forward(
        self,
        x: Any,
        t_span: Any = None,
        save_at: Any = (),
        args: object = {},
        *,
        penalties: bool | None = None,
    ) -> Any:
        """Solve from ``x (B, ...)`` through ``t_span``.

        Args:
            x: initial state.
            t_span: times ``(T,)``, increasing or decreasing; None: ``self.t_span``, or 0 to 1.
            save_at: times of ``t_span`` to keep (fixed steps only).
            args: passed to the field if it takes ``args``, and to a solver object's ``step``. Gradients reach the
                tensors in ``args`` in every mode.
            penalties: whether to integrate the penalties. None means yes in training mode with gradients enabled.

        Returns:
            ``(t_eval, solution)`` with the solution ``(T, B, ...)``, or the solution alone if ``return_t_eval`` is
            False. With ``sensitivity="interpolated_adjoint"`` and an adaptive solver each step is an output, as in
            torchdyn.

        Raises:
            ConfigError: for a state that is not a tensor, times that are not strictly monotonic, a ``save_at`` that
                is not among the times, and a regularizer that the solver or the state cannot have.
            SolverError: if the state is not finite, the step size underflows, or ``max_nfe`` is used up.
        """
        t_eval, sol = self.odeint(x, t_span, save_at, args, penalties=penalties)
        return (t_eval, sol) if self.return_t_eval else sol

    def odeint(
        self,
        x: Any,
        t_span: Any,
        save_at: Tensor | Sequence[float] = (),
        args: object = {},
        *,
        penalties: bool | None = None,
    ) -> tuple[Tensor, Any]:
        """Solve and return ``(t_eval, solution)``; arguments and errors as for :meth:`forward`."""
        history, training = self.history, torch.is_grad_enabled() and self.training
        history.begin()  # first, so that an error below leaves no penalties of an earlier call
        if t_span is None:
            t_span = torch.linspace(0, 1, 2) if self.t_span is None else self.t_span
        if isinstance(x, dict):
            # torchdyn solves a dict
            if history.regularizers or self.sensalg == "checkpointed" or isinstance(self.solver, Solver):
                raise ConfigError(
                    "penalties, a FixedGrid, an Adaptive and the sensitivity 'checkpointed' need a state that is "
                    "one tensor (B, ...), not a dict of them."
                )
            return ODEProblem.odeint(self, x, t_span, save_at, args)  # pyright: ignore[reportArgumentType]
        penalties = training if penalties is None else penalties
        regularizers = history.regularizers
        with outside_inference(x, t_span, args) as (x, t_span, args):
            solver, kept = self._solver(args), None
            x, t_span = self._start(x, t_span, solver)
            t_span = regularizers.times(t_span, training=training and penalties)
            if solver.adaptive:
                if len(save_at) > 0:
                    warnings.warn("Setting save_at has no effect on adaptive-step methods", stacklevel=3)
                if x.ndim > 0 and x.shape[0] == 0:  # no sample has an error to choose steps by
                    solver = FixedGrid("euler", step=None)
            else:
                if (self.atol, self.rtol) != (1e-3, 1e-3):  # torchdyn's defaults
                    warnings.warn("Setting tolerances has no effect on fixed-step methods", stacklevel=3)
                kept = kept_times(t_span, save_at) if len(save_at) > 0 else None
            through_steps, hidden = get_gradient(solver.gradient).through_steps, None
            if torch.is_grad_enabled() and not through_steps and self.vf.sensitivity != "autograd":
                hidden = self.integral_loss
            rhs = start_torchdyn(
                self._system_of(penalties=penalties), self.vf, x, args, one_graph=through_steps, hidden_cost=hidden
            )  # fmt: skip
            nfe = self.vf.nfe
            solution = solver.solve(rhs, x, t_span, **history.warm_start(t_span)).check()
            history.keep_step(solution.longest_safe_step, t_span)
            self.vf.nfe = nfe + solution.stats.nfe  # not counting the evaluation that prepares checkpointing
            if kept is not None:
                solution = replace(solution, t=solution.t[kept], z=solution.z[kept])
            return solution.t, self._remember(x, t_span, rhs, solution, penalties=penalties)

    def trajectory(self, x: Tensor, t_span: Tensor, *, penalties: bool | None = None) -> Tensor:
        """The solution ``(T, B, ...)`` at ``t_span``, differentiable through the steps whatever the sensitivity.

        A trajectory for a plot must not replace the penalties of the last call, to which :meth:`reg_loss` and
        :attr:`regularization` belong. So it integrates penalties only on request, or where each solve counts.

        Args:
            x: initial state ``(B, ...)``.
            t_span: times ``(T,)``, increasing or decreasing.
            penalties: whether to integrate the penalties. None means yes inside of :meth:`collect_penalties`, in
                training mode with gradients enabled.

        Raises:
            ConfigError, SolverError: as for :meth:`forward`.
        """
        history, training = self.history, torch.is_grad_enabled() and self.training
        penalties = training and history.is_collecting if penalties is None else penalties
        if penalties:
            history.begin()
        with outside_inference(x, t_span) as (x, t_span):
            solver = replace(self._solver({}).without_interpolation(), gradient=Autograd())
            x, t_span = self._start(x, t_span, solver)
            t_span = history.regularizers.times(t_span, training=training and penalties)
            rhs = start_torchdyn(self._system_of(penalties=penalties), self.vf, x, one_graph=True)
            solution = solver.solve(rhs, x, t_span).check()
            return self._remember(x, t_span, rhs, solution, penalties=True) if penalties else solution.z

    def collect_penalties(self) -> AbstractContextManager[History]:
        """Sum :meth:`reg_loss` over all calls in a ``with`` block, for a loss that solves several times::

            with model.collect_penalties():
                for x in sequence:
                    h = model(jump(x, h))[1][-1]
            (loss(h) + model.reg_loss()).backward()

        The sum is kept until the next call after the block. A call under ``torch.no_grad()``, for example for a log
        line, counts only if it integrates penalties (``penalties=True``). Such blocks cannot be nested
        (ConfigError).
        """
        return self.history.collecting()

    @property
    def regularization(self) -> dict[str, Tensor]:
        """Integral of each penalty along the last call's trajectory, ``(B,)`` by name, differentiable.

        After :meth:`collect_penalties` it is the sum over the collected calls. Without ``regularizers`` it is {}.

        Raises:
            ConfigError: if there was no call yet, or if the last call did not integrate penalties or ended
                in an error.
        """
        return self.history.as_dict()

    def reg_loss(self, *, step: int | None = None, **lambdas: Lambda) -> Tensor:
        """Sum lambda * mean over the batch / dimensions of ``z`` over all penalties (eq. 17): a scalar in nats/dim.

        It belongs to the last call, or to all calls in a :meth:`collect_penalties` block. A batch without samples
        counts as 0. Without ``regularizers`` it is 0, even before the first call, so that one training loop also
        serves an unpenalized baseline.

        Args:
            step: number of steps that the optimizer has taken, for a lambda that is a function of the step.
            lambdas: strengths to use instead of the constructor's, by name of the penalty. A scalar tensor gets a
                gradient, as a multiplier of Lagrange needs it.

        Raises:
            ConfigError: if there is nothing to sum (see :attr:`regularization`), for an unknown name, and for a
                strength that is negative or not finite.
        """
        return self.history.loss(step=step, **lambdas)

    @property
    def vf_params(self) -> Tensor:
        """The current parameters of the vector field in one row.

        torchdyn stores this tensor. It is not a leaf of a graph, so a stored one would make deepcopy and pickle
        fail.
        """
        return torch.cat([p.contiguous().flatten() for p in self.vf.parameters()])

    @vf_params.setter
    def vf_params(self, value: Tensor) -> None:
        """Ignore the value. torchdyn's constructor and solves assign one."""

    @property
    def defunc(self) -> nn.Module:
        """``vf`` under the name that torchdyn's tutorials of Hamiltonian and Lagrangian fields still use."""
        return self.vf

    def _system_of(self, *, penalties: bool) -> System:
        """The system of one solve, with the penalties of the model or without."""
        system = self._system
        return system if penalties else System(trace_estimator=system.estimator, part=system.part)

    def _start(self, x: object, t_span: Any, solver: Solver) -> tuple[Tensor, Tensor]:
        """Check the state and the times of a solve, and copy them, because a field or a penalty may change them."""
        if not isinstance(x, Tensor):
            raise ConfigError(
                f"the initial state must be a tensor (B, ...), not {type(x).__name__}. For a tuple: CNF integrates "
                "a log-density with z, penalized= chooses the columns that penalties see, and "
                "rnode_plugin.torchdiffeq.odeint takes tuples."
            )
        x = x.clone() if x.is_floating_point() or x.is_complex() else x.to(torch.get_default_dtype())
        precision = x.real.dtype
        try:
            times = t_span
            if not isinstance(t_span, Tensor):
                entries = list(t_span)
                row = bool(entries) and all(isinstance(t, Tensor) for t in entries)
                times = (
                    torch.cat([t.reshape(1) for t in entries]) if row else torch.tensor(entries, dtype=precision)
                )
        except (TypeError, ValueError, RuntimeError):
            raise ConfigError(f"t_span must be a row of times, not {t_span!r}.") from None
        # the steps of an adaptive solve take the precision of the times: a lower one would round their sums,
        # and a higher one would promote the state
        times = times.to(precision) if solver.adaptive or not times.is_floating_point() else times
        # on the CPU, so that the host knows the steps without waiting for the device
        times = times.to(x.device if times.requires_grad else "cpu", copy=True)
        prepare(solver, x, times[:1])
        return x, times

    def _remember(
        self, x: Tensor, t_span: Tensor, rhs: FieldRightHandSide, solution: Solution, *, penalties: bool
    ) -> Tensor:
        """The states of a solution, tied to the penalties, which are kept for :meth:`reg_loss`."""
        history, integrals = self.history, dict(solution.penalties)
        cost = integrals.pop(COST, None)
        if cost is not None and bool(t_span[-1] < t_span[0]):
            cost = -cost  # penalties are integrated over |dt|, but torchdyn's column for the cost over dt
        if penalties:
            z = x if self._system.part.batch_dim == 0 else x.unsqueeze(0)
            integrals = history.regularizers.with_span_penalty(integrals, z)
        sol, integrals = attach(solution.z, integrals, cost)
        history.add(Integrals(integrals, history.regularizers, rhs.dims, solution.stats.nfe))
        return sol

    def _solver(self, args: object) -> Solver:
        """The solver for a call with ``args``, resolved again if an attribute has changed.

        torchdyn reads its attributes, and the constants of a solver object, at each solve, and users change them
        between two solves. A stale solver would give wrong numbers silently.
        """
        key = [
            self.solver, self.solver_adjoint, self.sensalg, self.atol, self.rtol, self.atol_adjoint,
            self.rtol_adjoint, self.interpolator, *constants_of(self.solver), *constants_of(self.solver_adjoint),
        ]  # fmt: skip
        known = self._resolved
        # identity, because tensors cannot be compared by ==; an equal new object only resolves again
        if known is None or not all(map(operator.is_, known[0], key)):
            known = self._resolved = key, self._resolve()
        return known[1] if isinstance(args, dict) and not args else with_args(known[1], args)

    def _refuse_options(self, solver: Solver) -> None:
        """Refuse the options of torchdyn's solvers beside ``solver``, which has its own."""
        given = [] if isinstance(self.solver_adjoint, Solver) else ["solver_adjoint"]
        for name, (attribute, default) in _OPTIONS.items():
            value = getattr(self, attribute)
            if isinstance(value, Tensor) or value != default:
                given.append(name)
        if given:
            raise ConfigError(
                f"{given[0]}= belongs to a solver that is given by its name: {type(solver).__name__}(...) has "
                "options of its own, and gradient= in place of sensitivity= and the adjoint's."
            )

    def _resolve(self) -> Solver:
        """The solver that torchdyn's attributes describe now, which takes the steps of its solver objects.

        Raises:
            ConfigError: for an unknown sensitivity, a number out of range, and options that the method cannot have.
        """

        if isinstance(self.solver, Solver):
            self._refuse_options(self.solver)
            return self.solver

        def method(solver: SolverObject, interpolator: Any = None) -> Method:
            name = next((name for made, name in self._named if made is solver), None)
            return method_from_torchdyn(solver, name, interpolator=interpolator)

        check_name(self.sensalg, GRADIENTS, "sensitivity")  # an adjoint of another solver would lose it
        gradient = get_gradient(self.sensalg)
        if isinstance(gradient, Adjoint):
            check_tolerance(self.atol_adjoint, "atol of the adjoint")
            check_tolerance(self.rtol_adjoint, "rtol of the adjoint")
            # The gradient need not match torchdyn's, so take the rk4 that evaluates at the right times.
            ours = type(self.solver_adjoint) is RungeKutta4
            backward = solver_from(
                "rk4" if ours else method(self.solver_adjoint),
                atol=self.atol_adjoint,
                rtol=self.rtol_adjoint,
                max_nfe=self._max_nfe,
            )
            kind = StepwiseAdjoint if gradient.restarted else Adjoint
            gradient = kind(backward, restarted=gradient.restarted)
        return solver_from(
            method(self.solver, self.interpolator), atol=self.atol, rtol=self.rtol, gradient=gradient,
            max_nfe=self._max_nfe, quadrature=self._quadrature, compile=self._compile,
        )  # fmt: skip
