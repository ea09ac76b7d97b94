"""Penalties without a solve of this package: at given points, and along the states that another solver returned."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .core.derivatives import Velocity
from .core.integrals import Integrals
from .core.modes import outside_inference
from .core.modules import module_of
from .core.part import PartSpec, State, check_first, tensors_of
from .core.regularizer import Rate, Regularizer
from .core.regularizers import RegularizersLike
from .core.signature import accepts, call_of, field_takes, time_first
from .core.system import System
from .core.trace_estimators import TraceEstimator
from .errors import ConfigError
from .plugins.registry import resolve_regularizers
from .solvers.step import check_times


def penalties_at(
    field: Callable[..., Tensor],
    t: Tensor | float,
    z: Tensor,
    regularizers: RegularizersLike,
    *,
    trace_estimator: str | TraceEstimator = "rademacher",
    batch_dim: int | None = 0,
    velocity: Tensor | None = None,
    context: Tensor | None = None,
) -> dict[str, Tensor]:
    """Compute the rates of penalties at given points, for a loss without a solve, such as flow matching.

    If the times of a batch are uniform in [0, 1], the mean of a rate over the batch estimates the penalty's
    integral. This mean times lambda / D is the penalty's term in eq. 17.

    Args:
        field: the velocity. The names of its parameters decide how it is called, by default ``(t, x)``.
        t: a number, or one time per sample, ``(B,)`` or ``(B, 1)``, as the field takes it.
        z: states ``(B, *event)``.
        regularizers: names, objects or functions of rates, as for :class:`~rnode_plugin.NeuralODE`, but without
            lambdas, which you apply to the result.
        trace_estimator: noise for the product that ``jacfrob`` needs, signs if it is not given. Each call draws
            once from torch's generator.
        batch_dim: 0, the dimension of the samples. None: all of ``z`` is one sample, for a field that mixes the
            rows of its state, such as the nodes of a graph.
        velocity: ``field`` at ``t`` and ``z``, if the loss has computed it already. Penalties without a derivative,
            such as ``kinetic``, then do not evaluate it a second time. A penalty with a
            derivative evaluates the field itself, with its own dropout mask.
        context: a third argument of the field, ``field(t, z, context)``, passed on as it is.

    Returns:
        The rate ``(B,)`` of each penalty by name, summed over the event; differentiable if gradients are enabled.

    Raises:
        ConfigError: for a regularizer that is unknown, not a rate or given with a lambda, for a ``t`` of another
            shape, for a field that takes no ``context``, and for a ``velocity`` of a field with dropout where a
            penalty evaluates the field at another point.

    Example:
        >>> import torch
        >>> from rnode_plugin import penalties_at
        >>> z = torch.ones(3, 2)
        >>> rates = penalties_at(lambda t, x: -2 * x, 0.5, z, ["kinetic", "jacfrob"], trace_estimator="exact")
        >>> {name: rate.tolist() for name, rate in rates.items()}
        {'kinetic': [8.0, 8.0, 8.0], 'jacfrob': [8.0, 8.0, 8.0]}
    """
    if isinstance(regularizers, Mapping) and any(strength is not None for strength in regularizers.values()):
        raise ConfigError("penalties_at applies no lambda: give the names alone and weigh the rates by lambda / D.")
    rates = resolve_regularizers(regularizers)
    check_first(batch_dim)
    t = torch.as_tensor(t, dtype=z.dtype, device=z.device)
    if t.ndim and (t.numel(), t.shape[:1]) != (len(z), z.shape[:1]):
        raise ConfigError(f"t must be a number or of shape ({len(z)},) or ({len(z)}, 1), not {tuple(t.shape)}.")
    _refuse_all_but_rates(rates, ends=False)
    system = System(rates, trace_estimator, part=PartSpec(batch_dim=batch_dim))
    with outside_inference(t, z, velocity, context) as (time, z, velocity, context):
        function = _velocity_of(field, context)
        rhs = system.start(function, z, density=False, user_field=field, velocity=velocity)
        rhs.check_field(time, z)
        return rhs(time, z).penalties


def penalties_along(
    field: Callable[..., Any],
    times: Tensor | Iterable[float | Tensor],
    states: State,
    regularizers: RegularizersLike,
    *,
    trace_estimator: str | TraceEstimator = "rademacher",
    batch_dim: int | None = 0,
    penalized: Any = None,
    velocities: State | None = None,
    context: Tensor | None = None,
) -> Integrals:
    """Integrate penalties along the states that any solver returned, such as zuko's, torchode's or your own loop.

    It evaluates the rates at each of the T states, which takes T evaluations of the field, and integrates cubic
    polynomials through the rates at four neighboring times. Two times give the trapezoidal rule, three equidistant
    ones Simpson's rule, and four the 3/8 rule. For smooth paths the error falls as the fourth power of the distance
    between the times. Give 10 to 20 times, and compare the result with that of twice as many.

    For very uneven times, such as intervals that double, a weight of this quadrature may be negative. Then the
    trapezoidal rule takes its place, so that a non-negative rate has a non-negative integral.

    The gradient goes through the graph that the solver has left in ``states``. Detached states have none, so the
    gradient then lacks a part, and you get a warning. :doc:`/start/any_solver` has a program for each solver.

    Args:
        field: the velocity. The names of its parameters decide how it is called, by default ``(t, x)``.
        times: one row of times ``(T,)`` for all samples, increasing or decreasing, two or more. A gradient reaches
            times with a graph.
        states: the states at these times, ``(T, B, *event)``, or a tuple of such tensors for a field of a tuple,
            as torchdiffeq returns them. The times come first: ``ys.transpose(0, 1)`` for torchode's ``(B, T, D)``.
        regularizers: names, objects or functions of rates, or a mapping from these to lambda, as for
            :class:`~rnode_plugin.NeuralODE`.
        trace_estimator: noise for the product that ``jacfrob`` needs, drawn at each time from torch's generator.
        batch_dim: dimension of the samples in the state of one time. None: the whole state is one sample, for a
            field that mixes the rows of its state, such as the nodes of a graph; integrals are then ``(1,)``.
        penalized: the tensors of a tuple, or the columns of a state, that the penalties measure, as for
            :func:`rnode_plugin.torchdiffeq.odeint`; None: the first tensor, or all of a state that is one tensor.
        velocities: ``field`` at these times and states, in the form of ``states``, if they are known. Penalties
            without a derivative, such as ``kinetic``, then do not evaluate the field. A penalty with a derivative
            evaluates the field itself, with its own dropout mask.
        context: a third argument of the field, ``field(t, z, context)``, passed on as it is.

    Returns:
        Integrals: a mapping from names to integrals ``(B,)`` over ``|dt|``, whose ``loss()`` is their weighted sum
            in eq. 17.

    Raises:
        ConfigError: for times that are not one finite, strictly monotonic row, for a list of states or states
            without the times along their first dimension, for a regularizer that is unknown, a span policy or a
            penalty on the steps of a solver, for times with a gradient that a rate cannot give, and for a
            ``penalized`` or ``batch_dim`` that the state does not have.

    Example:
        >>> import torch
        >>> from rnode_plugin import penalties_along
        >>> times = torch.linspace(0, 1, 21)
        >>> states = torch.ones(21, 4, 2) * torch.exp(-times)[:, None, None]  # any solver's
        >>> penalties = penalties_along(lambda t, x: -x, times, states, {"kinetic": 0.01})
        >>> round(float(penalties["kinetic"][0]), 4)  # 1 - exp(-2)
        0.8647
    """
    resolved = resolve_regularizers(regularizers)
    _refuse_all_but_rates(resolved, ends=True)
    row = _row_of(times)
    _check_states("states", states, len(row))
    if velocities is not None:
        _check_states("velocities", velocities, len(row))
        shapes, wanted = ([tuple(x.shape) for x in tensors_of(each)] for each in (velocities, states))
        if shapes != wanted:
            raise ConfigError(f"velocities must have the shape of states, {wanted}, not {shapes}.")
    if torch.is_grad_enabled() and not any(x.requires_grad for x in tensors_of(states)):
        net = module_of(field)
        if net is not None and any(p.requires_grad for p in net.parameters()):
            warnings.warn(_NO_GRAPH, stacklevel=2)
    system = System(resolved, trace_estimator, part=PartSpec.of(penalized, batch_dim))
    with outside_inference(row, states, velocities, context) as (row, states, velocities, context):
        function, path = _velocity_of(field, context), _each_time(states)
        known: list[Any] = [None] * len(row) if velocities is None else _each_time(velocities)
        part = system.part.part(path[0])
        z0, z1 = (tensors_of(x)[0] if part is None else part.take(x) for x in (path[0], path[-1]))
        by_name: dict[str, list[Tensor]] = {name: [] for name in resolved.rates}
        for i, (t, state, velocity) in enumerate(zip(row.to(z0), path, known, strict=True)):
            rhs = system.start(function, state, density=False, user_field=field, velocity=velocity)
            if i == len(row) // 2:
                rhs.check_field(t, state)
            for name, rate in rhs(t, state).penalties.items():
                by_name[name].append(rate)
        weights = _weights(row).to(z0)[:, None]
        integrals = {name: (weights * torch.stack(rates)).sum(0) for name, rates in by_name.items()}
        integrals |= resolved.finish(integrals, z0, z1, row)
    nfe = 0 if velocities is not None and not system.wants(density=False) else len(row)
    return Integrals(integrals, resolved, z0.shape[1:].numel(), nfe)


_NO_GRAPH = (
    "the states have no graph, so the gradient of these penalties lacks the part that goes through the states: "
    "solve with gradients enabled, and do not detach the states. For points that do not come from the field, such "
    "as a path between data, penalties_at gives the whole gradient."
)


def _velocity_of(field: Callable[..., Any], context: Tensor | None) -> Velocity:
    """The field as a function of time and state, in the order that the names of its parameters tell."""
    function = call_of(time_first(field, with_context=context is not None))
    if context is None:
        return function
    takes = field_takes(field)
    if takes.order == "x" or ("*" not in takes.order and not accepts(field, None, None, None)):
        raise ConfigError("context= makes the call field(t, z, context), which this field does not take.")
    return lambda t, z: function(t, z, context)


def _refuse_all_but_rates(regularizers: Iterable[Regularizer], *, ends: bool) -> None:
    """Refuse what reads the steps or the times of a solver, and without ``ends`` what reads the ends of a solve."""
    for each in regularizers:
        if not isinstance(each, Rate) or not (ends or each.finish is None):
            raise ConfigError(
                f"{each.name!r} reads or changes a solve, and none is made here: use it in NeuralODE or "
                "RegularizedCNF, and a rate such as 'kinetic' or 'jacfrob' here."
            )


def _row_of(times: Tensor | Iterable[float | Tensor]) -> Tensor:
    """The times as one row ``(T,)``, checked."""
    if not isinstance(times, Tensor):
        given = [torch.as_tensor(t, dtype=torch.float64) for t in times]
        times = torch.stack(given) if given else torch.zeros(0)
    if times.ndim != 1:
        raise ConfigError(
            f"times must be one row (T,) for all samples, not of shape {tuple(times.shape)}: where each sample may "
            "have times of its own, as in torchode, solve to times that all samples share."
        )
    row = times if times.is_floating_point() else times.double()
    check_times(row, "times")
    return row


def _check_states(name: str, states: object, count: int) -> None:
    """Refuse what is not a tensor, or a tuple of tensors, with the times along the first dimension."""
    tensors = (states,) if isinstance(states, Tensor) else states
    fit = isinstance(tensors, tuple) and all(isinstance(x, Tensor) and x.shape[:1] == (count,) for x in tensors)
    if not (fit and tensors):
        got = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
        raise ConfigError(
            f"{name} must be a tensor ({count}, B, ...) with the times first, or a tuple of such tensors for a "
            f"field of a tuple, not {got}: torch.stack makes a tensor of a list of states, and where the samples "
            "come first, as in torchode, give states.transpose(0, 1)."
        )


def _each_time(states: State) -> list[State]:
    """The state at each time."""
    if isinstance(states, Tensor):
        return list(states.unbind())
    return list(zip(*(x.unbind() for x in states), strict=True))


def _weights(times: Tensor) -> Tensor:
    """The weight ``(T,)`` of each time in an integral over ``|dt|``, none of them negative, in double precision."""
    t = times.cpu().double()
    t = t if bool(t[-1] > t[0]) else -t
    weights = _interpolatory(t, min(4, len(t)))
    return _interpolatory(t, 2) if bool((weights < 0).any()) else weights


def _interpolatory(t: Tensor, points: int) -> Tensor:
    """The weights of a quadrature that integrates, from each time to the next, a polynomial through near values.

    Args:
        t: increasing times ``(T,)``.
        points: number of values, 2 to 4, that determine a polynomial: those at both ends of its interval, and
            their neighbors on both sides, as far as there are any.
    """
    first = (torch.arange(len(t) - 1) - (points - 2) // 2).clamp(0, len(t) - points)
    near = first[:, None] + torch.arange(points)  # (T - 1, points)
    knots, itself = t[near], torch.eye(points, dtype=torch.bool)
    gaps = (knots[:, :, None] - knots[:, None]).masked_fill(itself, 1.0)
    half, middle = t.diff() / 2, (t[1:] + t[:-1]) / 2
    weights = torch.zeros_like(t)
    for node in (middle - half / math.sqrt(3), middle + half / math.sqrt(3)):  # Gauss's rule, exact for cubics
        factors = (node[:, None, None] - knots[:, None]) / gaps
        lagrange = factors.masked_fill(itself, 1.0).prod(2)  # the polynomials that are 1 at one of the times
        weights = weights.index_add(0, near.flatten(), (half[:, None] * lagrange).flatten())
    return weights
