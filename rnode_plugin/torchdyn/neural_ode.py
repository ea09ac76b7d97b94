"""NeuralODE: torchdyn's class with ``regularizers=`` and gradients that are right in every mode."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torchsde
from torch import Tensor, nn
from torchdyn.core import neuralde as torchdyn_neuralde
from torchdyn.core.defunc import SDEFunc

from ..core.no_data_parallel import OneProcessADevice
from ..core.regularizers import Weighted, check_lambda, kind_of, strength_at
from ..core.trace_estimators import get_estimator
from ..errors import ConfigError, suggest
from ..plugins.resolve import resolve_regularizers
from ..solvers import GRADIENTS
from ..solvers.path import check_steps
from .one_solve import run_solve
from .penalties import LastCalls
from .solver_names import method_from_torchdyn, resolve_solver
from .stacks.compiled_step import CompiledSteps, check_compile
from .wrapped.checks import check_interpolator, check_max_nfe, check_order, check_tolerances
from .wrapped.state_layout import Penalized, check_penalized

__all__ = ["NeuralODE"]

# kept from before install() can replace them
_torchdyn_init = torchdyn_neuralde.NeuralODE.__init__
_torchdyn_odeint = torchdyn_neuralde.NeuralODE.odeint


class NeuralODE(OneProcessADevice, torchdyn_neuralde.NeuralODE):
    """torchdyn's neural ODE with penalties on its vector field (sections 4 and 5).

    Without new arguments it returns what torchdyn's class returns, to the bit if the coefficients of the solver are
    the same: torchdyn rounds those of a solver given by name to single precision, this class does so only for a
    state in single precision.

    The arguments before ``regularizers`` are torchdyn's, in its order. ``seminorm`` changes nothing, here as there:
    a continuous adjoint never controls the error of the parameters' gradient.

    Args:
        solver: a name or object of torchdyn's, or ``"rk4_38"``, the 3/8 rule. torchdyn's ``"rk4"`` evaluates stages
            2 to 4 of a time-dependent field at t, t + h/2 and t + h/2 instead of t + h/2, t + h/2 and t + h, which
            costs it its order; it stays as it is under its name.
        sensitivity: ``"autograd"``, ``"adjoint"``, ``"interpolated_adjoint"`` or ``"checkpointed"`` (autograd's
            gradient with the activations of one step at a time).
        regularizers: names (``"kinetic"``, ``"jacfrob"``, those of plugins), regularizer objects or functions
            ``rate(t, z, dz) -> (B,)``, or a mapping from these to lambda.
        trace_noise: noise of the product that ``jacfrob`` needs if no CNF makes one: ``"gaussian"``,
            ``"rademacher"``, or ``"exact"`` for the whole Jacobian.
        max_nfe: most evaluations of the field that one solve may use; None: 100,000 for an adaptive solver, no
            limit for fixed steps.
        penalized: the columns (dimension 1) of the state that the penalties are about, a slice or a mask ``(D,)``
            of booleans: for a field of your own that keeps a divergence or a cost in the state. They count without
            the column of an ``integral_loss``. None: all columns, but for those of an ``integral_loss`` and of a
            CNF's trace, which are recognised (any module with ``noise_dist``, ``noise`` and ``trace_estimator``
            counts as a CNF).
        compile: compile each step with torch.compile, for a field that is a stack of ``nn.Linear`` and activations,
            alone or in a CNF. The first step takes up to a minute. Where no compiler works, one line says so.

    After a call :attr:`regularization` holds the integral of each penalty along the trajectory and
    :meth:`reg_loss` their weighted sum. :meth:`trajectory` follows no penalties and leaves those of the last call
    as they are. For ``order`` 2 and higher, ``z`` is the whole state (position, velocity, ...) and the field that
    of its first-order system.

    ``integral_loss`` with an adjoint is added to the loss by itself, as in torchdyn, with its whole gradient.

    Raises:
        ConfigError: for an unknown solver, sensitivity, regularizer, noise or interpolator, a number out of range,
            and for what cannot carry penalties (multiple shooting, SDEs); when called, for a state that is not a
            tensor and times that are not a row that runs one way.
        SolverError: when called: non-finite state, step-size underflow, ``max_nfe`` used up.

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
    integral_loss: Any
    interpolator: Any

    # defaults for objects that an older process pickled, or that were made before install()
    _penalties: dict[str, Weighted] = {}  # noqa: RUF012  (never written to)
    _trace_noise: str = "gaussian"
    _max_nfe: int | None = None
    _named: tuple[tuple[nn.Module, str], ...] = ()
    _penalized: Penalized | None = None
    _calls: LastCalls | None = None
    _compiled: CompiledSteps | None = None

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
        interpolator: str | Callable[..., Any] | None = None,
        integral_loss: Callable[..., Tensor] | None = None,
        seminorm: bool = False,
        return_t_eval: bool = True,
        optimizable_params: Iterable[nn.Parameter] | Generator[nn.Parameter, None, None] = (),
        *,
        regularizers: Any = None,
        trace_noise: str = "gaussian",
        max_nfe: int | None = None,
        penalized: slice | Tensor | Iterable[bool] | None = None,
        compile: bool = False,  # noqa: A002  (torch.compile's word for it)
    ) -> None:
        penalties = resolve_regularizers(regularizers)
        get_estimator(trace_noise)
        tolerances = check_tolerances(atol=atol, rtol=rtol, atol_adjoint=atol_adjoint, rtol_adjoint=rtol_adjoint)
        if sensitivity not in GRADIENTS:
            raise ConfigError(suggest(sensitivity, GRADIENTS, "sensitivity"))
        if isinstance(vector_field, (SDEFunc, torchsde.BaseSDE)):
            raise ConfigError(
                "this vector field is that of an SDE; NeuralODE solves ordinary differential equations."
            )
        forward = resolve_solver(solver)
        backward = forward if solver_adjoint is None else resolve_solver(solver_adjoint, "solver_adjoint")
        steps = [w.regularizer for w in penalties.values() if kind_of(w.regularizer) == "step"]
        check_steps(steps, method_from_torchdyn(forward), sensitivity)
        _torchdyn_init(
            self, vector_field, solver=forward, order=check_order(order), sensitivity=sensitivity,
            interpolator=check_interpolator(interpolator), integral_loss=integral_loss, seminorm=seminorm,
            return_t_eval=return_t_eval, optimizable_params=optimizable_params, **tolerances,
        )  # fmt: skip
        if compile:
            check_compile(
                vector_field, regularizers=[w.regularizer for w in penalties.values()], trace_noise=trace_noise,
                sensitivity=sensitivity, known_solver=isinstance(solver, str),
                whole_state=order == 1 and integral_loss is None and penalized is None,
            )  # fmt: skip
            self._compiled = CompiledSteps()
        self.solver_adjoint = backward
        self._penalties, self._trace_noise = penalties, trace_noise
        self._max_nfe, self._penalized = check_max_nfe(max_nfe), check_penalized(penalized)
        built = ((forward, solver), (backward, solver_adjoint))
        self._named = tuple((made, name) for made, name in built if isinstance(name, str))
        with_parameters = [w.regularizer for w in penalties.values() if isinstance(w.regularizer, nn.Module)]
        if with_parameters:
            self.regularizer_modules = nn.ModuleList(with_parameters)
        if sensitivity == "checkpointed":
            self.vf.sensitivity = "autograd"  # decides whether integral_loss is a column of the state

    def forward(
        self,
        x: Any,
        t_span: Any = None,
        save_at: Any = (),
        args: Any = {},  # noqa: B006  (torchdyn's default; never written to)
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
        """
        x, t_span = self._prep_integration(x, t_span)
        t_eval, sol = self.odeint(x, t_span, save_at, args, penalties=penalties)
        return (t_eval, sol) if self.return_t_eval else sol

    def odeint(
        self,
        x: Any,
        t_span: Any,
        save_at: Any = (),
        args: Any = {},  # noqa: B006
        *,
        penalties: bool | None = None,
    ) -> tuple[Tensor, Any]:
        """``(t_eval, solution)``; see :meth:`forward`."""
        calls = self._last_calls()
        calls.begin()
        if isinstance(x, dict):
            if self._penalties:
                raise ConfigError("penalties need a state that is one tensor (B, ...), not a dict of them.")
            return _torchdyn_odeint(self, x, t_span, save_at, args)  # pyright: ignore[reportArgumentType]
        if penalties is None:
            penalties = torch.is_grad_enabled() and self.training
        followed = self._penalties if penalties else {}
        solution, left = run_solve(self, x, t_span, save_at, args, self.sensalg, followed)
        calls.add(left)
        return solution

    def trajectory(self, x: Tensor, t_span: Tensor) -> Tensor:
        """The solution ``(T, B, ...)`` at ``t_span`` alone, differentiable through the steps, without penalties.

        :meth:`reg_loss` and :attr:`regularization` stay those of the last call of the model itself.
        """
        x, t_span = self._prep_integration(x, t_span)
        (_, sol), _ = run_solve(self, x, t_span, (), {}, "autograd", {}, interpolate=False)
        return sol

    def collect_penalties(self) -> AbstractContextManager[None]:
        """For a loss that solves several times: :meth:`reg_loss` of all calls in a ``with`` block, summed::

            with model.collect_penalties():
                for x in sequence:
                    h = model(jump(x, h))[1][-1]
            (loss(h) + model.reg_loss()).backward()

        The sum stands until the next call after the block. Such blocks cannot be nested (ConfigError).
        """
        return self._last_calls().collect()

    @property
    def regularization(self) -> dict[str, Tensor]:
        """Integral of each penalty along the last call's trajectory, ``(B,)`` by name, differentiable.

        After :meth:`collect_penalties` it is the sum over the collected calls.

        Raises:
            ConfigError: if there is none: no call yet, or one that did not follow penalties.
        """
        return self._last_calls().values()

    def reg_loss(self, *, step: int | None = None, **lambdas: float) -> Tensor:
        """Sum over penalties of lambda * mean over the batch / dimensions of ``z`` (eq. 17): a scalar in nats/dim.

        It belongs to the last call, or to all calls of a :meth:`collect_penalties` block. A batch without samples
        counts as 0.

        Args:
            step: steps that the optimizer has taken, for a lambda that is a function of it.
            lambdas: strengths to use instead of the constructor's, by name of the penalty.

        Raises:
            ConfigError: if there is nothing to sum (see :attr:`regularization`), if backward has already gone
                through it and freed it, for an unknown name, and for a strength that is negative or not finite.
        """
        strengths = {name: w.strength for name, w in self._penalties.items()}
        for name, strength in lambdas.items():
            if name not in strengths:
                raise ConfigError(suggest(name, self._penalties, "penalty"))
            strengths[name] = check_lambda(name, strength)
        return self._last_calls().loss({name: strength_at(name, s, step) for name, s in strengths.items()})

    @property
    def vf_params(self) -> Tensor:
        """The parameters of the vector field in one row, as they are now.

        torchdyn stores this tensor; not a leaf of a graph, it would make deepcopy and pickle fail.
        """
        return torch.cat([p.contiguous().flatten() for p in self.vf.parameters()])

    @vf_params.setter
    def vf_params(self, value: Tensor) -> None:
        """torchdyn's constructor and solves assign it; there is nothing to keep."""

    def _prep_integration(self, x: Any, t_span: Any) -> Any:
        # control and noise are set by the solve, at every evaluation
        if t_span is None:
            t_span = torch.linspace(0, 1, 2) if self.t_span is None else self.t_span
        return x, t_span

    def _last_calls(self) -> LastCalls:
        if self._calls is None:
            self._calls = LastCalls()
        return self._calls
