"""NeuralODE: torchdyn's class with ``regularizers=`` and gradients that are right in every mode; install()."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
import torchsde
from torch import Tensor, nn
from torchdyn.core import neuralde as torchdyn_neuralde
from torchdyn.core.defunc import SDEFunc
from torchdyn.core.problems import ODEProblem
from torchdyn.numerics.interpolators import INTERP_DICT

from ..core.citations import citation
from ..core.followed_solve import FollowedSolve, Kinds
from ..core.modes import on_host, outside_inference
from ..core.penalties import OneProcessADevice, Penalties, attach
from ..core.signature import Takes, field_takes, refuse_state_first
from ..core.tally import Tally
from ..core.trace_estimators import Hutchinson, TraceEstimator, get_estimator
from ..core.view import as_columns, check_batch_dim
from ..core.weighing import Regularizers, warn_of_flat_state
from ..errors import ConfigError, check_count, suggest
from ..plugins.registry import resolve_regularizers
from ..solvers import Autograd, FixedGrid, Solver
from ..solvers.checks import check_tolerance
from ..solvers.solution import Solution
from .choice import Choice, SolverObject, kept_times, refuse_leapfrog, resolve_solver, solver_name
from .field import INTEGRAL_LOSS, Cost, Followed, TorchdynSystem, system_of, warn_of_unread_columns

_Torchdyn = torchdyn_neuralde.NeuralODE
_THEIRS = dict(vars(_Torchdyn))  # from before install() can replace them


class NeuralODE(OneProcessADevice, torchdyn_neuralde.NeuralODE):
    """torchdyn's neural ODE with penalties on its vector field (sections 4 and 5).

    Without new arguments it returns what torchdyn's class returns, to the bit if the coefficients of the solver are
    the same. torchdyn rounds the coefficients of a solver given by name to single precision. This class does so
    only for a state in single precision.

    The arguments before ``regularizers`` are torchdyn's, in its order. ``seminorm`` changes nothing, here as there:
    a continuous adjoint never controls the error of the parameters' gradient.

    Args:
        vector_field: a module or function ``(x)`` or ``(t, x)``, either with ``args``; see docs/torchdyn.md.
        order: order of the differential equation; the state ``(B, order * D)`` is position, velocity, and so on.
        atol, rtol: tolerances of an adaptive solver.
        solver: a name or object of torchdyn's, or ``"rk4_38"``, the 3/8 rule. torchdyn's ``"rk4"`` evaluates stages
            2 to 4 of a time-dependent field at t, t + h/2 and t + h/2 instead of t + h/2, t + h/2 and t + h, which
            costs it its order; it stays as it is under its name.
        sensitivity: ``"autograd"``, ``"adjoint"``, ``"interpolated_adjoint"`` or ``"checkpointed"`` (autograd's
            gradient with the activations of one step at a time).
        solver_adjoint: solver of a continuous adjoint; None: the forward one.
        atol_adjoint, rtol_adjoint: its tolerances.
        interpolator: ``"4th"`` or None; with ``"dopri5"``, output times then cost no steps.
        integral_loss: a running cost ``(t, x) -> (B,)``, integrated with the state.
        seminorm: torchdyn's; it changes nothing.
        return_t_eval: whether a call returns ``(t_eval, trajectory)`` or the trajectory alone.
        optimizable_params: parameters of an adjoint for a field without any, as in torchdyn.
        regularizers: names (``"kinetic"``, ``"jacfrob"``, names of plugins), regularizer objects or functions
            ``rate(t, z, dz) -> (B,)``, or a mapping from these to lambda.
        trace_noise: noise of the product that ``jacfrob`` needs if no CNF makes one: ``"gaussian"``,
            ``"rademacher"``, ``"exact"`` for the whole Jacobian, ``"difference"`` for layers without a second
            derivative, or an estimator.
        max_nfe: most evaluations of the field that one solve may use; None: 100,000 for an adaptive solver, no
            limit for fixed steps.
        penalized: the columns (dimension 1) of the state that the penalties are about, a slice or a mask ``(D,)``
            of booleans: for a custom field that keeps a divergence or a cost in the state. They count without
            the column of an ``integral_loss``. None: all columns except the columns of an ``integral_loss`` and a
            CNF's trace, which are recognised (a module with an attribute ``noise_dist`` counts as a CNF).
        batch_dim: 0, the dimension of the samples. None: the whole state is one sample, as for a field that mixes
            the rows of its state; the nodes of a graph are not samples.
        quadrature: ``"full"``, or ``"sampled"``: few evaluations make the product that ``jacfrob`` and its
            like need, see :class:`~rnode_plugin.Solver`. With a CNF, whose trace makes it anyway, it stays full.
        error_norm: ``"rms"``, or ``"worst"`` for steps in which each sample meets the tolerances of an adaptive
            solver, see :class:`~rnode_plugin.Solver`.

    After a call :attr:`regularization` holds the integral of each penalty along the trajectory and
    :meth:`reg_loss` gives their weighted sum. :meth:`trajectory` follows no penalties and keeps the last ones. For
    ``order`` 2 and higher, ``z`` is the whole state (position, velocity, ...), and penalties see the field of its
    first-order system.

    ``integral_loss`` with an adjoint is added to the loss by itself, as in torchdyn, with its whole gradient.

    Raises:
        ConfigError: for an unknown solver, sensitivity, regularizer, noise or interpolator, a number out of range,
            for multiple shooting and SDEs, which carry no penalties. A call raises the errors of :meth:`forward`.

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

    # defaults of objects that torchdyn's class made before install(), which have no penalties
    _penalties: Penalties = Penalties()
    _tally: Tally | None = None
    _max_nfe: int | None = None
    _named: Sequence[tuple[SolverObject, str]] = ()
    _followed: Followed = Followed(Kinds(), Hutchinson("gaussian"))
    _quadrature: str = "full"
    _error_norm: str = "rms"
    _choice: Choice | None = None
    _known: tuple[object, Takes] = (None, Takes("?"))
    _columns_known: bool = False

    def __init__(
        self,
        vector_field: Callable[..., Any] | nn.Module,
        solver: str | nn.Module = "tsit5",
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
        regularizers: Regularizers = None,
        trace_noise: str | TraceEstimator = "gaussian",
        max_nfe: int | None = None,
        penalized: slice | Tensor | Iterable[bool] | None = None,
        batch_dim: int | None = 0,
        quadrature: str = "full",
        error_norm: str = "rms",
    ) -> None:
        added = regularizers is None and _installed_regularizers is not None
        weighted = resolve_regularizers(_installed_regularizers if added else regularizers)
        order = check_count(order, "order")
        if isinstance(interpolator, str) and interpolator not in INTERP_DICT:
            raise ConfigError(suggest(interpolator, ("4th",), "interpolator"))
        if isinstance(vector_field, (SDEFunc, torchsde.BaseSDE)):
            raise ConfigError(
                "this vector field belongs to an SDE, and NeuralODE solves ordinary differential equations."
            )
        refuse_state_first(vector_field, "NeuralODE")
        check_batch_dim(batch_dim)
        if batch_dim is None and error_norm == "worst":
            raise ConfigError(
                "error_norm='worst' is the error of the worst sample, and batch_dim=None has one sample."
            )
        columns = as_columns(penalized)
        if penalized is not None and (columns is None or (isinstance(columns, Tensor) and columns.ndim > 1)):
            raise ConfigError(
                f"penalized= must be a slice of the state's columns or a mask of booleans (D,), not {penalized!r}."
            )
        tolerances: dict[str, float] = {
            "atol": atol, "rtol": rtol, "atol_adjoint": atol_adjoint, "rtol_adjoint": rtol_adjoint,
        }  # fmt: skip
        for name, value in tolerances.items():
            check_tolerance(float(value.min()) if isinstance(value, Tensor) else value, name)
        forward = resolve_solver(solver)
        backward = forward if solver_adjoint is None else resolve_solver(solver_adjoint, "solver_adjoint")
        with contextlib.redirect_stdout(io.StringIO()):  # torchdyn prints about fields without time or weights
            _THEIRS["__init__"](
                self, vector_field, solver=forward, order=order, sensitivity=sensitivity,
                interpolator=interpolator, integral_loss=integral_loss, seminorm=seminorm,
                return_t_eval=return_t_eval, optimizable_params=optimizable_params, **tolerances,
            )  # fmt: skip
        self.solver_adjoint = backward
        self._penalties, self._tally = Penalties(weighted), _installed_tally if added else None
        self._followed = Followed(Kinds(), get_estimator(trace_noise), columns, batch_dim)
        self._max_nfe, self._quadrature, self._error_norm = max_nfe, quadrature, error_norm
        built = ((forward, solver), (backward, solver_adjoint))
        self._named = tuple((made, name) for made, name in built if isinstance(name, str))
        if weighted:
            refuse_leapfrog(forward)
        kinds = self._penalties.kinds
        given = [each.regularizer for each in weighted.values()]
        with_parameters = [each for each in given if isinstance(each, nn.Module)]
        if with_parameters:
            self.regularizer_modules = nn.ModuleList(with_parameters)
        made = self._solver({})  # checks what it is made of
        made.check_steps(kinds.steps)
        made.gradient.check_penalties(kinds.steps)
        made.gradient.check_field(self.vf)
        if sensitivity == "checkpointed":
            self.vf.sensitivity = "autograd"  # decides whether integral_loss is a column of the state

    def forward(
        self,
        x: Any,
        t_span: Any = None,
        save_at: Any = (),
        args: object = {},
        *,
        penalties: bool | None = None,
    ) -> Any:
        """Solve from ``x (B, ...)`` through ``t_span``: ``(t_eval, solution (T, B, ...))``, or the solution alone.

        Args:
            x: initial state.
            t_span: times, increasing or decreasing; None: ``self.t_span``, or 0 to 1.
            save_at: times of ``t_span`` to keep (fixed steps only).
            args: given to the field if it takes ``args``, and to a solver object's ``step``. Gradients reach the
                tensors in it in every mode.
            penalties: whether to integrate the penalties; None: in training mode with gradients enabled.

        With ``sensitivity="interpolated_adjoint"`` and an adaptive solver each step is an output, as in torchdyn.

        Raises:
            ConfigError: for a state that is not a tensor, times that are not a row that runs one way, a
                ``save_at`` that is not among them, and a regularizer that the solver or the state cannot have.
            SolverError: non-finite state, step-size underflow, ``max_nfe`` used up.
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
        """``(t_eval, solution)``; see :meth:`forward`."""
        left, training = self._penalties, torch.is_grad_enabled() and self.training
        left.begin()
        if t_span is None:
            t_span = torch.linspace(0, 1, 2) if self.t_span is None else self.t_span
        if isinstance(x, dict):
            if left.weighted:
                raise ConfigError("penalties need a state that is one tensor (B, ...), not a dict of them.")
            return ODEProblem.odeint(self, x, t_span, save_at, args)  # pyright: ignore[reportArgumentType]
        penalties = training if penalties is None else penalties
        of_solve = FollowedSolve.of(left.kinds, penalized=penalties, training=training)
        followed = replace(self._followed, kinds=of_solve.kinds)
        with outside_inference(x, t_span, args) as (x, t_span, args):
            solver, kept = self._solver(args), None
            x, t_span = self._start(x, t_span, solver)
            with on_host():
                t_span = of_solve.times(t_span)
            if penalties and x.ndim == 1 and followed.batch_dim == 0:
                warn_of_flat_state(x, left.kinds)
            if solver.adaptive:
                if len(save_at) > 0:
                    warnings.warn("Setting save_at has no effect on adaptive-step methods", stacklevel=3)
                if x.ndim > 0 and x.shape[0] == 0:  # no sample has an error to choose steps by
                    solver = FixedGrid("euler", step=None)
            else:
                if (self.atol, self.rtol) != (1e-3, 1e-3):  # torchdyn's defaults
                    warnings.warn("Setting tolerances has no effect on fixed-step methods", stacklevel=3)
                kept = kept_times(t_span, save_at) if len(save_at) > 0 else None
            through_steps, hidden = solver.gradient.through_steps, None
            if torch.is_grad_enabled() and not through_steps and self.vf.sensitivity != "autograd":
                hidden = self.integral_loss
            system = system_of(
                self.vf, x, args, followed, takes=self._takes, one_graph=through_steps, hidden_cost=hidden
            )
            if not self._columns_known and penalties and followed.kinds.penalties and x.ndim == 2:
                lone = system.event_shape is None and followed.penalized is None and followed.batch_dim == 0
                self._columns_known = not lone or warn_of_unread_columns(system, t_span[0], x)
            nfe = self.vf.nfe
            solution = solver.solve(system, x, t_span).check()
            self.vf.nfe = nfe + solution.stats.nfe  # without evaluations that prepare a replay
            if kept is not None:
                solution = replace(solution, t=solution.t[kept], z=solution.z[kept])
            return solution.t, self._record(x, t_span, system, solution, of_solve)

    def trajectory(self, x: Tensor, t_span: Tensor) -> Tensor:
        """The solution ``(T, B, ...)`` at ``t_span`` alone, differentiable through the steps, without penalties.

        :meth:`reg_loss` and :attr:`regularization` still belong to the last call of the model itself.
        """
        with outside_inference(x, t_span) as (x, t_span):
            solver = replace(self._solver({}).without_interpolation(), gradient=Autograd())
            x, t_span = self._start(x, t_span, solver)
            with on_host():
                t_span = FollowedSolve.of(self._penalties.kinds).times(t_span)
            system = system_of(self.vf, x, {}, self._followed, one_graph=True)
            return solver.solve(system, x, t_span).check().z

    def collect_penalties(self) -> AbstractContextManager[Penalties]:
        """For a loss that solves several times: :meth:`reg_loss` of all calls in a ``with`` block, summed::

            with model.collect_penalties():
                for x in sequence:
                    h = model(jump(x, h))[1][-1]
            (loss(h) + model.reg_loss()).backward()

        The sum stands until the next call after the block. A call under ``torch.no_grad()``, for a log line, counts
        only if it integrates penalties (``penalties=True``). Such blocks cannot be nested (ConfigError).
        """
        return self._penalties.collecting()

    @property
    def regularization(self) -> dict[str, Tensor]:
        """Integral of each penalty along the last call's trajectory, ``(B,)`` by name, differentiable.

        After :meth:`collect_penalties` it is the sum over the collected calls. Without ``regularizers`` it is {}.

        Raises:
            ConfigError: if there is none: no call yet, one that did not follow penalties or ended in an error, or
                one inside a ``torch.func.vmap`` that has ended.
        """
        return self._penalties.as_dict()

    def reg_loss(self, *, step: int | None = None, **lambdas: float) -> Tensor:
        """Sum over penalties of lambda * mean over the batch / dimensions of ``z`` (eq. 17): a scalar in nats/dim.

        It belongs to the last call, or to all calls of a :meth:`collect_penalties` block. A batch without samples
        counts as 0. Without ``regularizers`` it is 0, before the first call too, so that one training loop serves a
        baseline as well.

        Args:
            step: steps that the optimizer has taken, for a lambda that is a function of it.
            lambdas: strengths to use instead of the constructor's, by name of the penalty.

        Raises:
            ConfigError: if there is nothing to sum (see :attr:`regularization`), for an unknown name, and for a
                strength that is negative or not finite.
        """
        return self._penalties.loss(step=step, **lambdas)

    def citation(self) -> str:
        """BibTeX of the papers behind the penalties, the trace estimator and the solver of this model."""
        estimator = self._followed.estimator if "vjp" in self._penalties.kinds.needs else None
        given = [each.regularizer for each in self._penalties.weighted.values()]
        return citation(given, estimator=estimator, methods=[solver_name(self.solver)])

    @property
    def vf_params(self) -> Tensor:
        """The parameters of the vector field in one row, as they are now.

        torchdyn stores this tensor; not a leaf of a graph, it would make deepcopy and pickle fail.
        """
        return torch.cat([p.contiguous().flatten() for p in self.vf.parameters()])

    @vf_params.setter
    def vf_params(self, value: Tensor) -> None:
        """torchdyn's constructor and solves assign it; there is nothing to keep."""

    def _start(self, x: object, t_span: Any, solver: Solver) -> tuple[Tensor, Tensor]:
        """The checked state and times of a solve, which a field or a penalty may mark or write into."""
        if not isinstance(x, Tensor):
            raise ConfigError(
                f"the initial state must be a tensor (B, ...), not {type(x).__name__}. For a tuple: CNF follows a "
                "log-density with z, penalized= chooses the columns that penalties see, and "
                "rnode_plugin.torchdiffeq.odeint takes tuples."
            )
        x = x.clone() if x.is_floating_point() or x.is_complex() else x.to(torch.get_default_dtype())
        precision = x.real.dtype
        with on_host():
            try:
                times = t_span
                if not isinstance(t_span, Tensor):
                    entries = list(t_span)
                    row = bool(entries) and all(isinstance(t, Tensor) for t in entries)
                    times = (
                        torch.cat([t.reshape(1) for t in entries])
                        if row
                        else torch.tensor(entries, dtype=precision)
                    )
            except (TypeError, ValueError, RuntimeError):
                raise ConfigError(f"t_span must be a row of times, not {t_span!r}.") from None
            if times.is_complex() or times.dtype == torch.bool:
                raise ConfigError(f"t_span must hold real times, not {times.dtype}.")
            # steps of more precise times would raise an adaptive solve to their precision
            raises = solver.adaptive and torch.promote_types(times.dtype, precision) != precision
            times = times.to(precision) if raises or not times.is_floating_point() else times
            return x, times.to(x.device, copy=True)

    def _record(
        self, x: Tensor, t_span: Tensor, system: TorchdynSystem, solution: Solution, followed: FollowedSolve
    ) -> Tensor:
        """The states of a solution, tied to its penalties, which stay for :meth:`reg_loss`."""
        left, integrals = self._penalties, dict(solution.penalties)
        cost = integrals.pop(INTEGRAL_LOSS, None)
        if cost is not None and bool(t_span[-1] < t_span[0]):
            cost = -cost  # an integral over time, like the column it is with autograd; not one along the path
        integrals = followed.complete(integrals, x if self._followed.batch_dim == 0 else x.unsqueeze(0))
        if self._tally is not None and integrals:
            penalties_of_all = Penalties(left.weighted)
            penalties_of_all.add(integrals, system.dims)
            self._tally.watch(added := penalties_of_all.loss(), integrals)
            cost = added if cost is None else cost.sum() + added
        sol, integrals = attach(solution.z, integrals, cost)
        left.add(integrals, system.dims)
        return sol

    def _takes(self, net: object) -> Takes:
        """How ``net`` is called, found out once for each forward method: another one may be put in its place."""
        known = net, getattr(net, "forward", None)
        if self._known[0] != known:
            self._known = known, field_takes(net)
        return self._known[1]

    def _solver(self, args: object) -> Solver:
        """The solver of a call with ``args``, resolved again after an attribute or a solver object has changed."""
        choice = self._choice
        if choice is None or not choice.is_current(self):
            choice = self._choice = Choice.of(self)
        return choice.solver if isinstance(args, dict) and not args else choice.solver_for(args)


# The class itself is changed, not the names that refer to it: modules that imported it, subclasses, isinstance
# and pickle all keep working. It gets all attributes of our class and of the one that guards it, but those that
# Python puts into every class.
_BEHAVIOR = {
    name: value
    for name, value in {**vars(OneProcessADevice), **vars(NeuralODE)}.items()
    if name == "__init__" or not name.startswith(("__", "_abc_"))
}

_installed_regularizers: Regularizers = None  # names: each model resolves them to its own objects
_installed_tally = Tally()
_installed_torchdiffeq = False


def install(*, torchdiffeq: bool = False, regularizers: Regularizers = None) -> Tally:
    """Give torchdyn's ``NeuralODE`` the arguments and the behavior of :class:`~rnode_plugin.NeuralODE`.

    From then on this package solves each of its objects, also those made before: with the same values, with
    correct gradients, and with ``regularizers=``, ``trace_noise=``, ``penalized=``, ``batch_dim=``,
    ``quadrature=``, ``max_nfe=`` and ``sensitivity="checkpointed"``. A second call replaces the ``regularizers``.

    It works in this process alone; ``rnode-cli exec SCRIPT`` calls it before a script that cannot be changed.

    Args:
        torchdiffeq: whether torchdiffeq's ``odeint`` and ``odeint_adjoint``, also where a loaded module has bound
            their names, become those of :mod:`rnode_plugin.torchdiffeq`.
        regularizers: penalties for code that names none, as for ``NeuralODE``: of each ``NeuralODE`` that is made
            from now on, and of each solve by torchdiffeq. Their gradient (eq. 17) is added whenever backward goes
            through a solution; the losses that the code computes and prints stay without them. So lambda follows
            how the code scales its loss: k accumulated batches of ``loss / k`` count as k lambda (give lambda / k),
            two backward passes through one solution as 2 lambda, and a loss that is multiplied by s, as by a
            ``GradScaler``, as lambda / s (use bf16, or add ``reg_loss()`` to the loss). A gradient with respect to
            the input that goes through a solution contains the penalties' gradient too.

    Returns:
        How many solves these ``regularizers`` have penalized so far, and the mean of each penalty.

    Raises:
        ConfigError: for ``regularizers`` that ``NeuralODE`` refuses.

    Example:
        >>> import torch
        >>> from torchdyn.core import NeuralODE
        >>> _ = install()
        >>> from rnode_plugin.fields import linear_field
        >>> model = NeuralODE(linear_field(2), solver="rk4", regularizers=["kinetic"])
        >>> _ = model(torch.randn(8, 2), torch.linspace(0, 1, 5))
        >>> tuple(model.regularization["kinetic"].shape)
        (8,)
        >>> uninstall()
    """
    global _installed_regularizers, _installed_tally, _installed_torchdiffeq
    resolve_regularizers(regularizers)
    tally = Tally()
    if torchdiffeq or _installed_torchdiffeq:
        from .. import torchdiffeq as face

        face.install(regularizers, tally=tally)
        _installed_torchdiffeq = True
    _installed_regularizers, _installed_tally = regularizers, tally
    for name, value in _BEHAVIOR.items():
        setattr(_Torchdyn, name, value)
    return tally


def uninstall() -> None:
    """Undo all that :func:`install` did; without an install, do nothing.

    Objects stay usable. Arguments beyond torchdyn's no longer have an effect. Those with
    ``sensitivity="checkpointed"``, which torchdyn does not have, must be made again.

    Example:
        >>> import inspect
        >>> from torchdyn.core import NeuralODE
        >>> _ = install()
        >>> uninstall()
        >>> "regularizers" in inspect.signature(NeuralODE.__init__).parameters
        False
    """
    global _installed_regularizers, _installed_torchdiffeq
    for name in _BEHAVIOR.keys() & vars(_Torchdyn).keys():
        if name in _THEIRS:
            setattr(_Torchdyn, name, _THEIRS[name])
        else:
            delattr(_Torchdyn, name)
    _installed_regularizers = None
    if _installed_torchdiffeq:
        from .. import torchdiffeq as face

        face.uninstall()
        _installed_torchdiffeq = False
