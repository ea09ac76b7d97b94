"""A torchdyn vector field bound for one solve: a pure function of time and state to velocity and penalties.

:func:`bind_field` takes a snapshot of what belongs to the solve (control, noise, arguments) and sets it again at
every evaluation, also those that a backward pass repeats. Another solve in between changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.derivatives import AutogradField, Field
from ..core.dynamics import BoundDynamics, Dynamics, PathPenalties, Rates
from ..core.field_evaluation import FieldEvaluation
from ..core.ops import tree_leaves
from ..core.regularizers import Regularizer
from ..core.signature import buffers_kept
from ..errors import ConfigError
from .running_cost import Cost, with_cost_column, with_hidden_cost
from .shared_trace import WithoutTrace, can_observe, observing
from .stacks.recognise import fast_rates
from .wrapped.compiled import has_compiled_parts, run_original
from .wrapped.lost_graph import refuse_lost_graph
from .wrapped.slots import find_slots
from .wrapped.state_layout import Penalized, StateLayout, is_cnf, layout_of
from .wrapped.velocity import Counter, Velocity, counters, unwrapped, with_slots

__all__ = ["BoundField", "bind_field", "tensors_of"]


@dataclass(frozen=True)
class BoundField:
    """The right-hand side of one solve.

    Attributes:
        rates: velocity and penalties.
        tensors: what a continuous adjoint differentiates by.
        path: the penalties that are not rates.
        module: the field, whose buffers evaluations may change.
    """

    rates: BoundDynamics
    tensors: tuple[Tensor, ...]
    path: PathPenalties | None = None
    module: nn.Module | None = None

    def __call__(self, t: Tensor, z: Tensor, *, products: bool = True) -> Rates:
        return self.rates(t, z, products=products)

    def parameters(self) -> tuple[Tensor, ...]:
        return self.tensors

    def repeating(self) -> AbstractContextManager[None]:
        """Around evaluations that repeat others: running statistics take each only once."""
        return buffers_kept(self.module)


def bind_field(
    vf: Any,
    x: Tensor,
    *,
    args: Any = None,
    regularizers: Sequence[Regularizer] = (),
    trace_noise: str = "gaussian",
    penalized: Penalized | None = None,
    hidden_cost: Cost | None = None,
    tensors: Sequence[Tensor] = (),
    prepare: bool = False,
) -> BoundField:
    """The right-hand side of one solve that starts at ``x``.

    Noise is drawn and the control is taken here, in torchdyn's order.

    Args:
        vf: torchdyn's wrapped vector field.
        x: initial state ``(B, ...)``.
        args: handed to fields that take ``args``.
        regularizers: penalties of ``z`` alone. If a CNF makes products with the Jacobian they are its
            products; otherwise one product with noise of the kind ``trace_noise`` is made.
        penalized: the columns of the state that are ``z``; None: all but those of a cost and a trace.
        hidden_cost: ``integral_loss`` if it is not a column of the state; its rate, summed over the batch, is
            the penalty :data:`~rnode_plugin.torchdyn.running_cost.INTEGRAL_LOSS`.
        tensors: what a continuous adjoint differentiates by.
        prepare: whether evaluations may share one graph of what depends on the parameters alone.

    Raises:
        ConfigError: for penalties on a field with more than one CNF.
    """
    layout = layout_of(vf, penalized)
    if regularizers:
        _check_penalized_state(x, layout)
    fast = fast_rates(vf, x, layout, regularizers, trace_noise) if prepare else None
    if fast is not None:
        return BoundField(fast[0], tuple(tensors), fast[1].path)
    velocity = unwrapped(vf, args)
    if (layout.trace or _differentiates(regularizers)) and has_compiled_parts(vf):
        velocity = run_original(velocity)
    source = with_slots(velocity, find_slots(vf, x, layout))
    state = layout.without_cost(x)
    dynamics = None
    if regularizers:
        dynamics = _dynamics(source, vf, layout, regularizers, trace_noise)
    rates = _counting(_rates(source, vf, state, layout, dynamics), counters(vf))
    if layout.cost:
        rates = with_cost_column(rates, vf.integral_loss)
    elif hidden_cost is not None:
        rates = with_hidden_cost(rates, hidden_cost)
    return BoundField(rates, tuple(tensors), None if dynamics is None else dynamics.path, vf)


def tensors_of(parts: Iterable[Any], args: Any) -> list[Tensor]:
    """What an adjoint differentiates by: the parameters of the modules in ``parts``, and tensors in ``args``."""
    found = [p for part in parts if isinstance(part, nn.Module) for p in part.parameters()]
    given = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.requires_grad]
    return list({id(x): x for x in [*found, *given]}.values())


def _check_penalized_state(x: Tensor, layout: StateLayout) -> None:
    if x.ndim == 0:
        raise ConfigError("penalties need a state with a batch dimension, (B, ...), not a single number.")
    if x.is_complex():
        raise ConfigError("penalties need a real state: give a complex one as torch.view_as_real(x).")
    if layout.penalized is None and layout.trace > 1:
        raise ConfigError(
            f"the vector field holds {layout.trace} CNF modules; penalties need one, to tell z from the trace, or "
            "penalized=, the columns of the state that they are about."
        )


def _differentiates(regularizers: Sequence[Regularizer]) -> bool:
    dynamics = Dynamics(lambda t, z: z, regularizers=regularizers, divergence=False)
    return dynamics.needs_products or dynamics.inner_autograd


def _dynamics(
    source: Velocity, vf: Any, layout: StateLayout, regularizers: Sequence[Regularizer], trace_noise: str
) -> Dynamics:
    """The penalties and their products, for a state without a running cost."""
    field = AutogradField(refuse_lost_graph(source), aux=_aux_of(vf))
    return Dynamics(
        field, regularizers=regularizers, estimator=trace_noise, divergence=False,
        event=lambda state: (inner := layout.without_cost(state))[:, layout.columns(inner)],
    )  # fmt: skip


def _aux_of(vf: Any) -> Callable[[Tensor, Tensor], Mapping[str, Tensor]] | None:
    """The values that a module of the user's field offers by name."""
    return next((m.aux for m in vf.modules() if callable(getattr(m, "aux", None))), None)


def _counting(rates: BoundDynamics, counted: Sequence[Counter]) -> BoundDynamics:
    """``rates`` whose evaluations count as those of torchdyn's wrappers."""

    def counting(t: Tensor, z: Tensor, *, products: bool = True) -> Rates:
        for counter in counted:
            counter["nfe"] += 1
        return rates(t, z, products=products)

    return counting


def _rates(velocity: Velocity, vf: Any, x: Tensor, layout: StateLayout, dynamics: Dynamics | None) -> BoundDynamics:
    """The rates of the state without a running cost, by the cheapest way to the products that are needed."""
    if dynamics is None:
        return _plain(velocity)
    if layout.penalized is None and not layout.trace:
        return _of_whole_state(velocity, dynamics, x)
    cnf = next((m for m in vf.modules() if is_cnf(m)), None)
    if layout.penalized is None and can_observe(cnf, x):
        return _shared_with_trace(velocity, dynamics, cnf, vf)
    return _of_columns(velocity, vf, dynamics, x, layout)


def _plain(velocity: Velocity) -> BoundDynamics:
    nothing: dict[str, Tensor] = {}
    return lambda t, z, *, products=True: Rates(_at_least(velocity(t, z), z), None, nothing)


def _of_whole_state(velocity: Velocity, dynamics: Dynamics, x: Tensor) -> BoundDynamics:
    """Penalties on all of the state, with a product of their own if they need one."""
    noise = dynamics.draw(x)

    def rates(t: Tensor, z: Tensor, *, products: bool = True) -> Rates:
        if not products:  # for a guess of the first step: nobody asks for penalties
            return Rates(_at_least(velocity(t, z), z), None, {})
        return dynamics.evaluate(t, z, noise)

    return rates


def _shared_with_trace(velocity: Velocity, dynamics: Dynamics, cnf: Any, vf: Any) -> BoundDynamics:
    """Penalties of ``z`` behind the trace of a CNF, which read the products that the trace is made of."""
    aux = _aux_of(vf) if "aux" in dynamics.needs else None
    inner = AutogradField(WithoutTrace(velocity, cnf))

    def rates(t: Tensor, z: Tensor, *, products: bool = True) -> Rates:
        if not products:
            return Rates(_at_least(velocity(t, z), z), None, {})
        with observing(cnf, products=dynamics.needs_products) as seen:
            dx = _at_least(velocity(t, z), z)
        evaluation = seen.evaluation(t, z, dx)
        offered = {} if aux is None else aux(t, evaluation.z)
        evaluation = replace(evaluation, field=inner, shared_aux=offered)
        return Rates(dx, None, dynamics.penalties(evaluation))

    return rates


def _of_columns(velocity: Velocity, vf: Any, dynamics: Dynamics, x: Tensor, layout: StateLayout) -> BoundDynamics:
    """Penalties of some columns: noise of zero in the others gives products with their block of the Jacobian."""
    columns = layout.columns(x)
    noise, padded = dynamics.draw(x[:, columns]), None
    if noise is not None:
        if noise.shape != x[:, columns].shape:
            raise ConfigError(
                f"penalties of some columns work with one probe, not with {dynamics.estimator}: use 'gaussian', "
                "'rademacher' or 'exact'."
            )
        padded = torch.zeros_like(x)
        padded[:, columns] = noise
    linearize = dynamics.estimator.bind(dynamics.field)
    aux = _aux_of(vf) if "aux" in dynamics.needs else None
    index = torch.arange(x.shape[1], device=x.device)[columns]

    def block(whole: Tensor) -> Field:
        """The field of these columns; the others stay as they are at this evaluation."""
        return AutogradField(lambda t, z: velocity(t, whole.index_copy(1, index, z))[:, columns])

    def rates(t: Tensor, z: Tensor, *, products: bool = True) -> Rates:
        if not products:
            return Rates(_at_least(velocity(t, z), z), None, {})
        mine, rows = z[:, columns], None
        if dynamics.needs_products:
            dx, rows = linearize(t, z, padded)[:2]
            assert rows is not None
            rows = rows.to(z.dtype)
            if rows.ndim > z.ndim:  # the whole Jacobian, a row for each dimension of one sample
                rows = rows.unflatten(0, z.shape[1:])[columns].flatten(0, z.ndim - 2)[:, :, columns]
            else:
                rows = rows[:, columns]
        else:
            dx = velocity(t, z)
        dx = _at_least(dx, z)
        evaluation = FieldEvaluation(
            t, mine, dx[:, columns], noise, rows, dynamics.estimator, block(z),
            shared_aux={} if aux is None else aux(t, mine),
        )  # fmt: skip
        return Rates(dx, None, dynamics.penalties(evaluation))

    return rates


def _at_least(dx: Tensor, x: Tensor) -> Tensor:
    """Under autocast a field answers in low precision; sums of many steps need that of the state."""
    if dx.dtype is not x.dtype and torch.promote_types(dx.dtype, x.dtype) is x.dtype:
        return dx.to(x.dtype)
    return dx
