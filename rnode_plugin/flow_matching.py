"""Velocities trained without a solve: penalties at points, and flow_matching's ``ODESolver`` by our solver."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .core.derivatives import VELOCITY, Ask, AutogradField, Linearization, PartField, as_field
from .core.distribution import check_floating
from .core.dynamics import Dynamics, FieldEvaluation
from .core.regularizers import FunctionRegularizer, check_batch_dim
from .core.signature import call_of, time_first
from .core.trace_estimators import Hutchinson
from .errors import ConfigError
from .plugins.registry import resolve_regularizers
from .solvers import Solver, solve

_METHODS = {"rk4": "rk4_38"}  # flow_matching takes torchdiffeq's names, and its rk4 is the 3/8 rule


def penalties_at(
    field: Callable[..., Tensor],
    t: Tensor | float,
    z: Tensor,
    regularizers: Any,
    *,
    trace_noise: str = "gaussian",
    batch_dim: int | None = 0,
    velocity: Tensor | None = None,
) -> dict[str, Tensor]:
    """The rates of penalties at given points, for a loss without a solve such as flow matching's.

    At the points of a batch whose times are uniform in [0, 1] the mean of a rate estimates the penalty's integral;
    this mean times lambda / D is the term of eq. 17.

    Args:
        field: the velocity, called by the names of its parameters, as ``(t, x)`` if these are not informative.
        t: a number, or one time per sample, ``(B,)``.
        z: states ``(B, *event)``.
        regularizers: names, objects or functions of rates, as for :class:`~rnode_plugin.NeuralODE`, but without
            lambdas, which you apply to the result.
        trace_noise: noise of the product that ``jacfrob`` needs; one draw per call from torch's generator.
        batch_dim: 0, the dimension of the samples. None: all of ``z`` is one sample, as for a field that mixes the
            rows of its state; the nodes of a graph are not samples.
        velocity: ``field`` at ``t`` and ``z`` if the loss has computed it already. Penalties without a derivative,
            such as ``kinetic`` and ``finite_difference``, then cost no second evaluation of it.

    Returns:
        The rate ``(B,)`` of each by name, summed over the event; differentiable if gradients are enabled.

    Raises:
        ConfigError: for a regularizer that is unknown, not a rate or given with a lambda, for a ``t`` of another
            shape, and for one time per sample with a field of this package that takes one for all.

    Example:
        >>> import torch
        >>> from rnode_plugin import penalties_at
        >>> z = torch.ones(3, 2)
        >>> rates = penalties_at(lambda t, x: -2 * x, 0.5, z, ["kinetic", "jacfrob"], trace_noise="exact")
        >>> {name: rate.tolist() for name, rate in rates.items()}
        {'kinetic': [8.0, 8.0, 8.0], 'jacfrob': [8.0, 8.0, 8.0]}
    """
    if isinstance(regularizers, Mapping) and any(strength is not None for strength in regularizers.values()):
        raise ConfigError("penalties_at applies no lambda: give the names alone and weigh the rates by lambda / D.")
    weighted = resolve_regularizers(regularizers)
    check_batch_dim(batch_dim)
    for name, entry in weighted.items():
        if entry.regularizer.kind != "rate":
            raise ConfigError(f"{name!r} is not a rate: it needs a solve, which penalties_at does not make.")
    t = torch.as_tensor(t, dtype=z.dtype, device=z.device)
    if t.shape not in ((), z.shape[:1]):
        raise ConfigError(f"t must be a number or of shape {tuple(z.shape[:1])}, not {tuple(t.shape)}.")
    rates = [entry.regularizer for entry in weighted.values()]
    field, _, _ = call_of(time_first(field))
    if batch_dim is None:
        field = PartField(
            field, part=lambda v: v.unsqueeze(0), replaced=lambda _, z: z.squeeze(0), aux=lambda t, z: {}
        )
        z, velocity = z.unsqueeze(0), None if velocity is None else velocity.unsqueeze(0)
    if velocity is not None:
        field = _Evaluated(field, velocity)
    dynamics = Dynamics(field, regularizers=rates, estimator=trace_noise, divergence=False)
    return dynamics.bind(dynamics.draw(z)).evaluate(t, z).penalties


class _Evaluated(AutogradField):
    """A field whose velocity at the points is known."""

    def __init__(self, field: Callable[..., Tensor], velocity: Tensor) -> None:
        super().__init__(field)
        self._velocity = velocity

    def linearize(self, t: Tensor, z: Tensor, noise: Tensor | None = None, *, ask: Ask = VELOCITY) -> Linearization:
        return (
            Linearization(self._velocity)
            if ask == VELOCITY
            else as_field(self._field).linearize(t, z, noise, ask=ask)
        )


@dataclass(frozen=True)
class Likelihood:
    """Log-densities of samples.

    Attributes:
        log_prob: ``log p(x) (B,)`` in nats.
        stderr: standard error ``(B,)`` of the trace estimate, in nats; None for the exact trace and for one probe.
        x: the other end of the solve: the source points of given samples, or the samples of given source points.
        path: states at the times of the grid, ``(T, B, *event)``.
        nfe: evaluations of the velocity.
    """

    log_prob: Tensor
    stderr: Tensor | None
    x: Tensor
    path: Tensor
    nfe: int


class ODESolver:
    """flow_matching's ``ODESolver`` over the solver of this package: the same two methods, and two more.

    Beside flow_matching 1.0.10: likelihoods have gradients (``enable_grad=True``), exact traces work for every
    event shape, several probes give a standard error, and samples come with their log-densities from one solve.

    Args:
        velocity_model: called by the names of its parameters, such as ``model(x, t, **extras)``.

    Example:
        >>> import torch
        >>> from rnode_plugin.flow_matching import ODESolver
        >>> solver = ODESolver(lambda x, t: 3 * t**2 * torch.ones_like(x))
        >>> round(float(solver.sample(torch.zeros(1, 2), step_size=0.01, method="midpoint")[0, 0]), 3)
        1.0
    """

    def __init__(self, velocity_model: Callable[..., Tensor]) -> None:
        self.velocity_model = velocity_model

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
        **model_extras: Any,
    ) -> Tensor:
        """Samples from source points ``x_init (B, *event)``; the arguments are flow_matching's.

        Args:
            step_size: longest step of a fixed grid, which divides each interval of ``time_grid`` evenly; None: one
                step per interval of a ``time_grid`` that is given.
            method: ``"euler"``, ``"midpoint"``, ``"rk4"`` (the 3/8 rule, as in torchdiffeq), ``"dopri5"`` or
                another method of :class:`~rnode_plugin.Solver`.
            time_grid: times, by default from 0 to 1.
            return_intermediates: whether to return the states at all of them, ``(T, B, *event)``.

        Raises:
            ConfigError: for another method, and for a fixed one without ``step_size`` and ``time_grid``.
            SolverError: if the solve cannot go on.
        """
        field = self._field(model_extras)
        with torch.set_grad_enabled(enable_grad):
            dynamics = Dynamics(field, divergence=False)
            grid, solver = _plan(x_init, None, time_grid, method, step_size, atol, rtol)
            path = solve(dynamics.bind(None), x_init, grid, solver).z
        return path if return_intermediates else path[-1]

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
        **model_extras: Any,
    ) -> tuple[Tensor, Tensor]:
        """Source points of samples ``x_1``, and ``log p(x_1) (B,)`` in nats; the arguments are flow_matching's.

        Args:
            x_1: samples ``(B, *event)``.
            log_p0: log-density ``(B,)`` of the source.
            step_size, method, atol, rtol: as for :meth:`sample`.
            time_grid: times from 1 to 0, which are the default.
            return_intermediates: whether to return the states at all of them instead of the source points.
            exact_divergence: the exact trace; else one Rademacher probe. :meth:`log_prob` takes more of them.
            enable_grad: whether the result has gradients.
            model_extras: further arguments of the velocity.

        Raises:
            ConfigError, SolverError: as :meth:`log_prob`.
        """
        found = self.log_prob(
            x_1, log_p0, step_size=step_size, method=method, atol=atol, rtol=rtol, time_grid=time_grid,
            probes=None if exact_divergence else 1, enable_grad=enable_grad, **model_extras,
        )  # fmt: skip
        return found.path if return_intermediates else found.x, found.log_prob

    def log_prob(
        self,
        x_1: Tensor,
        log_p0: Callable[[Tensor], Tensor],
        *,
        probes: int | None = None,
        time_grid: Tensor | None = None,
        enable_grad: bool = False,
        step_size: float | None = None,
        method: str = "dopri5",
        atol: float = 1e-5,
        rtol: float = 1e-5,
        **model_extras: Any,
    ) -> Likelihood:
        """``log p(x_1)`` of samples ``(B, *event)``, with a standard error if there are several probes.

        Args:
            log_p0: log-density ``(B,)`` of the source.
            probes: Rademacher probes of Hutchinson's estimator, one product each; None: the exact trace, one
                product per dimension.
            time_grid: from 1 to 0.
            step_size, method, atol, rtol: as for :meth:`sample`.

        Raises:
            ConfigError: for a ``time_grid`` with other ends, another method or a number of probes below 1.
            SolverError: if the solve cannot go on.
        """
        grid, solver = _plan(x_1, (1.0, 0.0), time_grid, method, step_size, atol, rtol)
        with torch.set_grad_enabled(enable_grad):
            path, logdet, stderr, nfe = self._with_trace(x_1, grid, solver, probes, model_extras)
            return Likelihood(log_p0(path[-1]) + logdet, stderr, path[-1], path, nfe)

    def sample_and_log_prob(
        self,
        x_init: Tensor,
        log_p0: Callable[[Tensor], Tensor],
        *,
        probes: int | None = None,
        time_grid: Tensor | None = None,
        enable_grad: bool = False,
        step_size: float | None = None,
        method: str = "dopri5",
        atol: float = 1e-5,
        rtol: float = 1e-5,
        **model_extras: Any,
    ) -> Likelihood:
        """Samples from source points ``x_init (B, *event)`` and their log-densities in nats, from one solve.

        Arguments and errors as of :meth:`log_prob`, but for ``time_grid``, which goes from 0 to 1.
        """
        grid, solver = _plan(x_init, (0.0, 1.0), time_grid, method, step_size, atol, rtol)
        with torch.set_grad_enabled(enable_grad):
            path, logdet, stderr, nfe = self._with_trace(x_init, grid, solver, probes, model_extras)
            return Likelihood(log_p0(x_init) - logdet, stderr, path[-1], path, nfe)

    def _field(self, extras: dict[str, Any]) -> Any:
        model = self.velocity_model
        return call_of(time_first(functools.partial(model, **extras) if extras else model))[0]

    def _with_trace(
        self, x: Tensor, grid: Tensor, solver: Solver, probes: int | None, extras: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """Path, log-determinant ``(B,)`` of the map, its standard error and NFE."""
        estimator = "exact" if probes is None else Hutchinson("rademacher", probes=probes)
        several = probes is not None and probes > 1
        # the trace of each probe by itself, as a rate: its integral is along the path, so its sign is lost
        traces = [functools.partial(_probe_trace, probe=i) for i in range(probes or 0) if several]
        rates = [FunctionRegularizer(f"probe {i}", trace, {"vjp"}) for i, trace in enumerate(traces)]
        dynamics = Dynamics(self._field(extras), regularizers=rates, estimator=estimator)
        solution = solve(dynamics.bind(dynamics.draw(x)), x, grid, solver)
        assert solution.logdet is not None
        stderr = None
        if several:
            single = torch.stack([solution.penalties[rate.name] for rate in rates]).detach()
            stderr = single.std(0) / len(rates) ** 0.5
        return solution.z, solution.logdet[-1], stderr, solution.stats.nfe


def _probe_trace(evaluation: FieldEvaluation, *, probe: int) -> Tensor:
    _, vectors, rows = evaluation.probes()
    return (vectors[probe] * rows[probe]).flatten(1).sum(1)


def _plan(
    x: Tensor,
    ends: tuple[float, float] | None,
    time_grid: Tensor | None,
    method: str,
    step_size: float | None,
    atol: float,
    rtol: float,
) -> tuple[Tensor, Solver]:
    """The times of a solve with these ``ends``, None for any, and the solver."""
    check_floating(x, "points")
    solver = Solver(method=_METHODS.get(method, method), step=None, atol=atol, rtol=rtol)
    if not solver.adaptive:
        solver = dataclasses.replace(solver, step=step_size)
    if time_grid is None:
        if step_size is None and not solver.adaptive:
            raise ConfigError(f"{method} would take one step: give step_size=, or a time_grid of its steps.")
        time_grid = torch.tensor(ends or (0.0, 1.0))
    if ends is not None:
        first, last = float(time_grid[0]), float(time_grid[-1])
        # samples of a time before 1 have a density too, source points of a time after 0 have none that is known
        if first != ends[0] or (last <= first if first == 0 else last != ends[1]):
            raise ConfigError(
                f"this time_grid goes from {ends[0]:g} to {ends[1]:g}, not from {first:g} to {last:g}."
            )
    return time_grid.to(device=x.device, dtype=x.dtype), solver
