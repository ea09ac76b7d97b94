"""Scores at points, and flow_matching's ``ODESolver``, for velocities that are trained without a solve."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .core.distribution import check_log_density
from .core.history import History
from .core.integrals import Integrals, attach
from .core.modes import outside_inference
from .core.regularizers import NONE, Regularizers, RegularizersLike
from .core.signature import SCALAR, call_of, time_first
from .core.system import System
from .core.trace_estimators import TraceEstimator, get_estimator
from .errors import ConfigError, suggest
from .plugins.registry import resolve_regularizers
from .solvers import FIXED_METHODS, METHODS, Adaptive, FixedGrid, Solver

_METHODS = {"rk4": "rk4_38"}  # flow_matching takes torchdiffeq's names, and its rk4 is the 3/8 rule


def score(v: Callable[..., Tensor], t: Tensor | float, x: Tensor, *, noise_time: float) -> Tensor:
    """Compute the score ``grad log p_t(x)`` from a velocity that was trained on straight paths from noise to data.

    For ``x_t = t data + (1 - t) noise`` with standard normal noise, paired with the data at random, the score is
    ``(t v(t, x) - x) / (1 - t)`` (arXiv 2303.08797). Unless the velocity is exact, this differs from the score of
    the density that the velocity samples. For that score, differentiate ``log_prob`` of
    :meth:`RegularizedCNF.from_velocity`.

    Args:
        v: the velocity. The names of its parameters decide how it is called, by default ``(t, x)``.
        t: a number, or one time per sample, ``(B,)`` or ``(B, 1)``, as the velocity takes it.
        x: states ``(B, *event)``.
        noise_time: 0 for noise at time 0, as in flow_matching and torchcfm; 1 for noise at time 1. There is no
            default, since the other one would give a wrong score.

    Returns:
        The score ``(B, *event)``.

    Raises:
        ConfigError: for another ``noise_time``, and for times outside of [0, 1] or where the state has less than
            1e-4 of the noise.

    Example:
        >>> import torch
        >>> from rnode_plugin.flow_matching import score
        >>> x = torch.ones(1, 2)
        >>> score(lambda t, x: -x / (1 - t), 0.5, x, noise_time=0)  # the data are all zero: x_t = (1 - t) noise
        tensor([[-4., -4.]])
    """
    if noise_time not in (0, 1):
        raise ConfigError(f"noise_time must be 0 or 1, not {noise_time!r}: the paths are straight between these.")
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    velocity = call_of(time_first(v))(t, x)
    noise = t if noise_time == 1 else 1 - t
    if not bool(((noise >= 1e-4) & (noise <= 1)).all()):
        raise ConfigError(
            f"the paths go from the noise, time {noise_time:g}, to the data, time {1 - noise_time:g}, where the "
            "score is singular: give times between."
        )
    noise = noise.reshape(-1, *(1,) * (x.ndim - 1)) if noise.ndim else noise
    # with noise at time 0, replacing t by 1 - t reverses the velocity
    sign = 1 if noise_time == 1 else -1
    return -(x + sign * (1 - noise) * velocity) / noise


class ODESolver:
    """flow_matching's ``ODESolver`` with the same two methods, solved by a :class:`~rnode_plugin.Solver`.

    Unlike in flow_matching 1.0.10, likelihoods have gradients (``enable_grad=True``) and exact traces work for
    every event shape. For several probes, or samples with their density from one solve, use
    :meth:`RegularizedCNF.from_velocity`.

    Args:
        velocity_model: the velocity, such as ``model(x, t, **extras)``. The names of its parameters decide how it
            is called.
        time_shape: ``"(B,)"`` or ``"(B, 1)"`` for a model that takes one time for each sample in this shape; None:
            a scalar.
        regularizers: penalties, as for :class:`~rnode_plugin.NeuralODE`. A call with ``enable_grad=True``
            integrates them, for :meth:`reg_loss`. Another call, such as samples for a plot, leaves those of the
            last one.
        trace_estimator: noise of the product that ``jacfrob`` needs in :meth:`sample`. In
            :meth:`compute_likelihood` it shares the product of the divergence.

    Raises:
        ConfigError: for an unknown regularizer, and for a span policy, because ``time_grid`` determines the times.

    Attributes:
        nfe: number of evaluations of the velocity in the last call.
        history: the penalties of the last call that integrated them, by name.

    Example:
        >>> import torch
        >>> from rnode_plugin.flow_matching import ODESolver
        >>> solver = ODESolver(lambda x, t: 3 * t**2 * torch.ones_like(x))
        >>> round(float(solver.sample(torch.zeros(1, 2), step_size=0.01, method="midpoint")[0, 0]), 3)
        1.0
        >>> solver.nfe
        200
        >>> solver = ODESolver(lambda x, t: -x, regularizers={"kinetic": 0.5})
        >>> samples = solver.sample(torch.ones(4, 2), method="dopri5", enable_grad=True)
        >>> round(float(solver.reg_loss()), 4)  # 0.5 * (1 - exp(-2)) / 2
        0.2162
    """

    def __init__(
        self,
        velocity_model: Callable[..., Tensor],
        *,
        time_shape: str | None = None,
        regularizers: RegularizersLike = None,
        trace_estimator: str | TraceEstimator = "rademacher",
    ) -> None:
        resolved = resolve_regularizers(regularizers)
        if resolved.span is not None:
            raise ConfigError(
                f"{resolved.span.name!r} changes the times of a solve, which the time_grid of an ODESolver gives: "
                "use RegularizedCNF.from_velocity for it."
            )
        self.velocity_model, self.time_shape = velocity_model, time_shape
        self.nfe, self.estimator = 0, get_estimator(trace_estimator)
        self.history = History(resolved, absent="call sample or compute_likelihood with enable_grad=True first.")

    def reg_loss(self, *, step: int | None = None, **lambdas: float) -> Tensor:
        """The sum of the weighted penalties (eq. 17) of the last call with ``enable_grad=True``, in nats/dim.

        Arguments and errors are as for :meth:`NeuralODE.reg_loss`. Without regularizers it is 0.
        """
        return self.history.loss(step=step, **lambdas)

    def sample(
        self,
        x_init: Tensor,
        step_size: float | None = None,
        method: str = "euler",
        atol: float = 1e-5,
        rtol: float = 1e-5,
        time_grid: Tensor | None = None,
        return_intermediates: bool = False,
        enable_grad: bool = False,
        **model_extras: object,
    ) -> Tensor:
        """Compute samples from source points ``x_init (B, *event)``; the arguments are flow_matching's.

        Args:
            x_init: source points ``(B, *event)``.
            step_size: longest step of a fixed grid, which divides each interval of ``time_grid`` evenly; None: one
                step per interval of a ``time_grid`` that is given.
            method: ``"euler"``, ``"midpoint"``, ``"rk4"`` or ``"rk4_38"`` (both the 3/8 rule, which torchdiffeq
                calls rk4), ``"dopri5"`` or ``"tsit5"``.
            atol, rtol: tolerances of an adaptive method.
            time_grid: times ``(T,)``; None: 0 to 1.
            return_intermediates: whether to return the states at all times, ``(T, B, *event)``.
            enable_grad: whether the result has gradients.
            model_extras: further arguments of the velocity.

        Returns:
            The samples ``(B, *event)``, or the states at all times.

        Raises:
            ConfigError: for another method, for a fixed one without ``step_size`` and ``time_grid``, and for points
                that are not floating-point numbers.
            SolverError: if the solve fails.
        """
        regularizers, field = self._begin(enable_grad), self._field(model_extras)
        grid = _grid((0.0, 1.0), time_grid, method, step_size, like=x_init)
        with torch.set_grad_enabled(enable_grad), outside_inference(x_init, grid) as (start, times):
            rhs = System(regularizers, self.estimator).start(
                field, start, density=False, user_field=self.velocity_model
            )
            solution = _solver(method, step_size, atol, rtol).solve(rhs, start, times).check()
            states, integrals = attach(solution.z, solution.penalties)
            self.nfe = solution.stats.nfe
            if enable_grad:
                self.history.add(Integrals(integrals, regularizers, rhs.dims, self.nfe))
        return states if return_intermediates else states[-1]

    def compute_likelihood(
        self,
        x_1: Tensor,
        log_p0: Callable[[Tensor], Tensor],
        step_size: float | None = None,
        method: str = "euler",
        atol: float = 1e-5,
        rtol: float = 1e-5,
        time_grid: Tensor | None = None,
        return_intermediates: bool = False,
        exact_divergence: bool = False,
        enable_grad: bool = False,
        **model_extras: object,
    ) -> tuple[Tensor, Tensor]:
        """Compute source points and ``log p (B,)`` in nats of samples ``x_1``; the arguments are flow_matching's.

        Args:
            x_1: samples ``(B, *event)``.
            log_p0: log-density of the source, which maps ``(B, *event)`` to ``(B,)`` in nats.
            step_size, method, atol, rtol: as for :meth:`sample`.
            time_grid: times ``(T,)`` from 1 to 0; None: only these two.
            return_intermediates: whether to return the states at all times instead of the source points.
            exact_divergence: whether to take the exact trace instead of one Rademacher probe.
            enable_grad: whether the result has gradients.
            model_extras: further arguments of the velocity.

        Returns:
            The source points ``(B, *event)``, or the states at all times, and the log-densities.

        Raises:
            ConfigError: as for :meth:`sample`, for a ``time_grid`` with other ends, and for a ``log_p0`` that does
                not give real numbers ``(B,)`` or gives NaN or +inf.
            SolverError: if the solve fails.
        """
        from .torchdyn.density import RegularizedCNF  # loads torchdyn, which no other function here needs

        regularizers, field = self._begin(enable_grad), self._field(model_extras)
        grid = _grid((1.0, 0.0), time_grid, method, step_size, like=x_1)
        first, last = float(grid[0]), float(grid[-1])
        if (first, last) != (1.0, 0.0):
            raise ConfigError(f"the time_grid of a likelihood goes from 1 to 0, not from {first:g} to {last:g}.")
        density = RegularizedCNF.from_velocity(
            field, call=lambda field, t, x: field(t, x), event_shape=x_1.shape[1:],
            trace_estimator="exact" if exact_divergence else "rademacher", regularizers=regularizers,
        )  # fmt: skip
        density.solver, density.t_span = _solver(method, step_size, atol, rtol), grid
        with torch.set_grad_enabled(enable_grad):
            output = density.encode(x_1, penalties=enable_grad)
            if enable_grad:
                self.history.add(Integrals(output.regularization, regularizers, density.dims, output.nfe))
            log_prob = check_log_density(log_p0(output.z), len(x_1), "log_p0") + output.logdet
            path, self.nfe = output.z, output.nfe
            if return_intermediates:  # a second solve, because the solution of a density has no states between
                path = density.trajectory(x_1)
                self.nfe += density.nfe
        return path, log_prob

    def _begin(self, enable_grad: bool) -> Regularizers:
        """Begin a call, and return the penalties that it integrates."""
        if enable_grad:  # first, so that an error leaves no penalties of an earlier call
            self.history.begin()
        return self.history.regularizers if enable_grad else NONE

    def _field(self, extras: dict[str, object]) -> Any:
        """The velocity as a function of time and state."""
        if "regularizers" in extras:  # a model that takes any extra would swallow it
            raise ConfigError("the penalties of an ODESolver are given once, ODESolver(model, regularizers=...).")
        model = self.velocity_model
        model = functools.partial(model, **extras) if extras else model
        return call_of(time_first(model, time_shape=self.time_shape or SCALAR, with_context=False))


def _solver(method: str, step_size: float | None, atol: float, rtol: float) -> Solver:
    if method not in METHODS:
        known = suggest(method, METHODS, "solver method")
        raise ConfigError(f"{known} flow_matching's other methods are torchdiffeq's: solve with its own ODESolver.")
    if method in FIXED_METHODS:
        return FixedGrid(_METHODS.get(method, method), step=step_size)
    return Adaptive(method, atol=atol, rtol=rtol)


def _grid(
    ends: tuple[float, float], time_grid: Tensor | None, method: str, step_size: float | None, *, like: Tensor
) -> Tensor:
    """The times of a solve, with the dtype and device of the points ``like``."""
    if not like.is_floating_point():
        raise ConfigError(f"points must be floating-point numbers, not {like.dtype}: give x.float().")
    if time_grid is None and step_size is None and method in FIXED_METHODS:
        raise ConfigError(
            f"{method} would take one step: give step_size=, a time_grid of its steps, or method='dopri5'."
        )
    return (torch.tensor(ends) if time_grid is None else time_grid).to(like)
