"""A torchdyn vector field bound for one solve: a pure function of time and state.

torchdyn hands time, control and trace noise to layers through attributes. :func:`bind_field` takes a snapshot of
what belongs to the solve (control, noise, arguments) and sets it again at every evaluation, those that a backward
pass repeats included, so that another solve in between changes nothing.

An attribute counts as such a placeholder on torchdyn's own layers, and on any other module where it is a plain
attribute that holds None; a submodule's own ``t`` or ``_control``, whatever it is, is left alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchdyn.core.defunc import DEFunc, DEFuncBase
from torchdyn.nn import DataControl, DepthCat
from torchdyn.nn.galerkin import GalLayer

from ..core.augmented import Dynamics
from ..core.regularizers import Regularizer
from ..errors import ConfigError
from ..types import BoundDynamics, Rates
from .shared_trace import observing, probe_for

__all__ = ["INTEGRAL_LOSS", "bind_field", "count_columns"]

INTEGRAL_LOSS = "<integral_loss>"
"""Key under which the rate of a hidden ``integral_loss`` travels; no regularizer can have this name."""

Velocity = Callable[[Tensor, Tensor], Tensor]


class Columns(NamedTuple):
    """What the state of a torchdyn field holds before the ``z`` that the penalties are about.

    Attributes:
        cost: 1 where ``integral_loss`` travels in the first column (gradients through the steps), else 0.
        trace: 1 where a CNF keeps its accumulated trace in the column after it, else 0.
    """

    cost: int
    trace: int

    @property
    def total(self) -> int:
        return self.cost + self.trace


def count_columns(vf: nn.Module) -> Columns:
    """The extra columns of the state of ``vf``."""
    cost = type(vf) is DEFunc and vf.integral_loss is not None and vf.sensitivity == "autograd"
    return Columns(int(cost), sum(1 for m in vf.modules() if _is_cnf(m)))


def bind_field(
    vf: nn.Module,
    x: Tensor,
    *,
    args: Any = None,
    regularizers: Sequence[Regularizer] = (),
    trace_noise: str = "gaussian",
    hidden_cost: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> BoundDynamics:
    """The right-hand side of one solve that starts at ``x``.

    Noise is drawn and the control is taken here, in torchdyn's order.

    Args:
        vf: torchdyn's wrapped vector field.
        x: initial state ``(B, ...)``.
        args: handed to fields that take ``args``.
        regularizers: penalties, rates of ``z`` alone. Where a CNF takes products with the Jacobian they are its
            products; else one product with noise of the kind ``trace_noise`` is made.
        hidden_cost: ``integral_loss`` where it is not a column of the state; its rate, summed over the batch, is
            the penalty :data:`INTEGRAL_LOSS`.

    Raises:
        ConfigError: for penalties on a field with more than one CNF.
    """
    columns = count_columns(vf)
    if regularizers and columns.trace > 1:
        raise ConfigError(
            f"the vector field holds {columns.trace} CNF modules; penalties need one, to tell z from the trace."
        )
    field = _velocity_with_slots(vf, x, args)
    rates = _rates(field, vf, x, columns, regularizers, trace_noise)
    cost: Any = vf.integral_loss if columns.cost else None
    if cost is None and hidden_cost is None:
        return rates

    def with_cost(t: Tensor, z: Tensor, *, products: bool = True) -> Rates:
        if cost is None:
            dz, _, penalties = rates(t, z, products=products)
            assert hidden_cost is not None
            return Rates(dz, None, {**penalties, INTEGRAL_LOSS: hidden_cost(t, z).sum()})
        state = z[:, 1:]
        running = cost(t, state)
        dz, _, penalties = rates(t, state, products=products)
        if running.ndim == 1:
            running = running[:, None]
        return Rates(torch.cat([running, dz], 1).to(dz), None, penalties)

    return with_cost


def _rates(
    field: Velocity,
    vf: nn.Module,
    x: Tensor,
    columns: Columns,
    regularizers: Sequence[Regularizer],
    trace_noise: str,
) -> BoundDynamics:
    if not regularizers:
        nothing: dict[str, Tensor] = {}
        return lambda t, z, *, products=True: Rates(_at_least(field(t, z), z), None, nothing)
    dynamics = Dynamics(field, regularizers=regularizers, estimator=trace_noise, divergence=False)
    state = x[:, columns.cost :] if columns.cost else x
    if not columns.trace:
        noise = dynamics.draw(state)

        def rates(t: Tensor, z: Tensor, *, products: bool = True) -> Rates:
            if not products:  # for a guess of the first step: nobody asks for penalties
                return Rates(_at_least(field(t, z), z), None, {})
            return dynamics.evaluate(t, z, noise)

        return rates

    cnf = next(m for m in vf.modules() if _is_cnf(m))
    probe = probe_for(cnf, state[:, 1:], trace_noise) if dynamics.needs_products else None

    def cnf_rates(t: Tensor, z: Tensor, *, products: bool = True) -> Rates:
        if not products:
            return Rates(_at_least(field(t, z), z), None, {})
        with observing(cnf, probe, products=dynamics.needs_products) as seen:
            dx = _at_least(field(t, z), z)
        return Rates(dx, None, dynamics.penalties(seen.evaluation(t, z, dx)))

    return cnf_rates


def _at_least(dx: Tensor, x: Tensor) -> Tensor:
    """Under autocast a field answers in low precision; sums of many steps need that of the state."""
    if dx.dtype is not x.dtype and torch.promote_types(dx.dtype, x.dtype) is x.dtype:
        return dx.to(x.dtype)
    return dx


def _velocity_with_slots(vf: nn.Module, x: Tensor, args: Any) -> Velocity:
    """``f(t, x)`` that fills the placeholders first and counts evaluations as torchdyn does."""
    velocity, counters = _velocity(vf, args)
    times: list[dict[str, Any]] = []
    values: list[tuple[dict[str, Any], str, Any]] = []
    borrowed: list[tuple[dict[str, Any], str]] = []  # placeholders of modules that are not torchdyn's: given back
    stored: list[tuple[dict[str, Any], str]] = []  # results that Galerkin layers keep
    excess = count_columns(vf).cost
    shape: tuple[int, ...] | None = None  # in which a CNF gives the state to its net
    for module in vf.modules():
        own = module.__dict__
        if isinstance(module, DepthCat):
            times.append(own)
        elif "t" in own and own["t"] is None:
            times.append(own)
            borrowed.append((own, "t"))
        if _is_cnf(module):
            noise = _draw_noise(module, x, excess)
            if noise is not None:
                values.append((own, "noise", noise))
            excess += 1
            shape = getattr(module, "event_shape", None)
        placeholder = "_control" in own and own["_control"] is None
        if isinstance(module, DataControl) or placeholder:
            control = x[:, excess:].detach()
            values.append((own, "_control", control if shape is None else control.reshape(-1, *shape)))
            if not isinstance(module, DataControl):
                borrowed.append((own, "_control"))
        if isinstance(module, GalLayer):
            stored += [(own, name) for name in ("weight", "bias") if name in own]
    if not (times or values or stored or borrowed):

        def plain(t: Tensor, x: Tensor) -> Tensor:
            for counter in counters:
                counter["nfe"] += 1
            return velocity(t, x)

        return plain

    def with_slots(t: Tensor, x: Tensor) -> Tensor:
        for counter in counters:
            counter["nfe"] += 1
        for own in times:
            own["t"] = t
        for own, name, value in values:
            own[name] = value
        try:
            return velocity(t, x)
        finally:
            # no graph stays on a module: it would keep memory, and deepcopy refuses it
            if t.requires_grad:
                for own in times:
                    own["t"] = t.detach()
            for own, name in stored:
                own[name] = own[name].detach()
            for own, name in borrowed:
                own[name] = None

    return with_slots


def _velocity(vf: Any, args: Any) -> tuple[Velocity, tuple[dict[str, Any], ...]]:
    """What torchdyn's wrappers compute, and the modules whose evaluations they count.

    The wrappers themselves are left out: theirs is the search for placeholders at every evaluation.
    """
    if type(vf) is not DEFunc:
        return vf, ()
    counters = (vf.__dict__,)
    function: Any = vf.vf
    has_time = True
    if type(function) is DEFuncBase:
        wrapper: Any = function
        counters = (vf.__dict__, wrapper.__dict__)
        function, has_time = wrapper.vf, wrapper.has_time_arg
    if not has_time:
        velocity: Velocity = lambda t, x: function(x)  # noqa: E731
    elif _takes_args(function):
        given = {} if args is None else args
        velocity = lambda t, x: function(t, x, args=given)  # noqa: E731
    else:
        velocity = function
    return (velocity if vf.order == 1 else _first_order_system(velocity, vf.order)), counters


def _first_order_system(velocity: Velocity, order: int) -> Velocity:
    """``x = (position, velocity, ...)`` along dimension 1; the field gives the highest derivative."""

    def system(t: Tensor, x: Tensor) -> Tensor:
        size = x.size(1) // order
        return torch.cat([x[:, size : size * order], velocity(t, x)], dim=1).to(x)

    return system


def _takes_args(function: Any) -> bool:
    if isinstance(function, nn.Module):
        function = function.forward
    function = getattr(function, "__func__", function)
    try:
        return _signature_takes_args(function)
    except TypeError:  # not hashable
        return _signature_takes_args.__wrapped__(function)


@lru_cache(maxsize=256)
def _signature_takes_args(function: Any) -> bool:
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return True
    named = parameters.get("args")
    return named is not None and named.kind in (named.POSITIONAL_OR_KEYWORD, named.KEYWORD_ONLY)


def _is_cnf(module: nn.Module) -> bool:
    """torchdyn's CNF, ours, or one that was written after theirs; not any module with a ``trace_estimator``."""
    own = module.__dict__
    return "noise_dist" in own and "noise" in own and hasattr(module, "trace_estimator")


def _draw_noise(cnf: Any, x: Tensor, excess: int) -> Tensor | None:
    if cnf.noise_dist is not None:
        return cnf.noise_dist.sample((x.shape[0],)).to(x)
    draw = getattr(cnf, "draw_noise", None)  # our CNF knows its estimator and needs no distribution
    return None if draw is None else draw(x[:, excess + 1 :])
