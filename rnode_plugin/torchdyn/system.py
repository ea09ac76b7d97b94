"""The system of one solve of torchdyn's NeuralODE: its columns, a running cost, a CNF's trace and the penalties."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchdyn.core.defunc import DEFunc, DEFuncBase
from torchdyn.models.cnf import CNF as TorchdynCNF  # noqa: N811
from torchdyn.models.cnf import autograd_trace, hutch_trace

from ..core.derivatives import RATES, Ask, PartField, without_graph
from ..core.dynamics import BoundDynamics, Dynamics, PathPenalties, Rates
from ..core.regularizers import Regularizer, needs_of
from ..core.trace_estimators import Exact, Hutchinson, TraceEstimator
from ..errors import ConfigError
from .cnf import CNF, noise_of
from .field import Slots, TorchdynField, aux_of, buffers_kept, fastest, field_of, has_hooks, is_cnf, tensors_of

INTEGRAL_LOSS = "<integral_loss>"
"""Key under which the rate of a hidden ``integral_loss`` travels; no regularizer can have this name."""

Cost = Callable[[Tensor, Tensor], Tensor]

Penalized = slice | Tensor
"""Columns of the state that the field is given: a slice, or a mask ``(D,)`` of booleans."""


_GAUSSIAN = Hutchinson("gaussian")


@dataclass(frozen=True)
class Followed:
    """What a solve follows besides the state, and which part of the state it is about.

    Attributes:
        regularizers: the penalties.
        estimator: of a product that no CNF makes.
        penalized: the columns of the state that are ``z``; None: all but those of a cost and a trace.
        batch_dim: None: all of ``z`` is one sample, and the penalties see it as ``(1, B, ...)``.
    """

    regularizers: Sequence[Regularizer] = ()
    estimator: TraceEstimator = _GAUSSIAN
    penalized: Penalized | None = None
    batch_dim: int | None = 0

    def check(self, x: Tensor, traces: int) -> None:
        """Refuse an initial state ``x`` with the traces of so many CNFs that cannot carry the penalties."""
        if self.regularizers and x.ndim == 0:
            raise ConfigError("penalties need a state with a batch dimension, (B, ...), not a single number.")
        if self.regularizers and x.is_complex():
            raise ConfigError("penalties need a real state: give a complex one as torch.view_as_real(x).")
        if self.regularizers and traces > 1 and self.penalized is None:
            raise ConfigError(
                f"the vector field holds {traces} CNF modules; penalties need one, to tell z from the trace, or "
                "penalized=, the columns of the state that they are about."
            )
        if self.batch_dim is None and traces:
            raise ConfigError("batch_dim=None has no meaning for a CNF: the density is one of each sample.")


# --- the columns of a state ---


def _columns_of(x: Tensor, trace: int, penalized: Penalized | None) -> Tensor | slice:
    """The index along dimension 1 of what penalties are about, in a state ``x`` without the cost.

    Args:
        x: the state.
        trace: how many CNFs keep their accumulated trace in a column, in front of ``z``.
        penalized: the columns that the user names; None: all behind the trace.

    Raises:
        ConfigError: for a mask of another length, and for no column at all.
    """
    if penalized is None:
        return slice(trace, None)
    size = x.shape[1] if x.ndim > 1 else 0
    if isinstance(penalized, Tensor):
        if len(penalized) != size:
            raise ConfigError(f"penalized= is a mask of {len(penalized)} columns, but the state has {size}.")
        chosen = penalized.nonzero().flatten().to(x.device)
        count = len(chosen)
    else:
        chosen, count = penalized, len(range(*penalized.indices(size)))
    if count == 0:
        raise ConfigError(f"penalized={penalized} selects nothing of a state with {size} columns.")
    return chosen


def check_penalized(penalized: Any) -> Penalized | None:
    """``penalized`` as a slice, or as a mask of its own; a ConfigError for anything else."""
    if isinstance(penalized, slice) and penalized.step is not None and penalized.step < 1:
        raise ConfigError(f"penalized={penalized} runs backward: give the columns in their own order.")
    if penalized is None or isinstance(penalized, slice):
        return penalized
    mask = torch.as_tensor(penalized) if isinstance(penalized, (Tensor, list, tuple)) else None
    if mask is None or mask.dtype != torch.bool or mask.ndim != 1:
        raise ConfigError(
            f"penalized= must be a slice of the state's columns or a mask of booleans (D,), not {penalized!r}."
        )
    return mask.detach().clone().cpu()


# --- the systems ---


@dataclass(eq=False, kw_only=True)
class TorchdynSystem(BoundDynamics):
    """The right-hand side of one solve: the velocity of the whole state, and the rates of the penalties.

    Attributes:
        module: torchdyn's wrapped field, whose buffers evaluations may change.
        counters: its wrappers, whose ``nfe`` counts evaluations.
        cost: ``integral_loss`` in the first column of the state, as torchdyn has it with gradients through the
            steps.
        hidden_cost: ``integral_loss`` for an adjoint, whose state has no column for it: its rate, summed over the
            batch, is the penalty :data:`INTEGRAL_LOSS`.
        depends_on: what an adjoint differentiates by: modules, and arguments that hold tensors.
        dims: number of dimensions per sample that the penalties are about.
        path: the penalties that are not rates.
    """

    module: nn.Module
    counters: Sequence[dict[str, Any]]
    cost: Cost | None
    hidden_cost: Cost | None
    depends_on: tuple[Sequence[Any], Any]
    dims: int = 1
    path: PathPenalties | None = None

    def parameters(self) -> Sequence[Tensor]:
        return tensors_of(*self.depends_on)

    def repeating(self) -> contextlib.AbstractContextManager[None]:
        """Around evaluations that repeat others: running statistics take each only once."""
        return buffers_kept(self.module)

    def _begin(self, z: Tensor) -> Tensor:
        """Count an evaluation; the state without the column of a cost."""
        for counter in self.counters:
            counter["nfe"] += 1
        return z if self.cost is None else z[:, 1:]

    def _with_cost(self, t: Tensor, state: Tensor, dx: Tensor, penalties: dict[str, Tensor]) -> Rates:
        """The rates of all of the state, from those of the state without a cost."""
        if self.cost is not None:
            running = self.cost(t, state)
            dx = torch.cat([running[:, None] if running.ndim == 1 else running, dx], 1).to(dx)
        elif self.hidden_cost is not None:
            penalties = {**penalties, INTEGRAL_LOSS: self.hidden_cost(t, state).sum()}
        return Rates(dx, None, penalties)


@dataclass(eq=False, kw_only=True)
class PlainSystem(TorchdynSystem):
    """A field without penalties."""

    field: TorchdynField

    def evaluate(self, t: Tensor, z: Tensor, ask: Ask = RATES) -> Rates:
        state = self._begin(z)
        return self._with_cost(t, state, _at_least(self.field(t, state), state), {})


@dataclass(eq=False, kw_only=True)
class WholeSystem(TorchdynSystem):
    """With penalties of the whole state."""

    dynamics: Dynamics

    def evaluate(self, t: Tensor, z: Tensor, ask: Ask = RATES) -> Rates:
        state = self._begin(z)
        dx, _, penalties = self.dynamics.evaluate(t, state, ask)
        return self._with_cost(t, state, dx, penalties)


@dataclass(eq=False, kw_only=True)
class ColumnsSystem(TorchdynSystem):
    """With penalties of a part of the state."""

    dynamics: Dynamics
    columns: PartField

    def evaluate(self, t: Tensor, z: Tensor, ask: Ask = RATES) -> Rates:
        state = self.columns.state = self._begin(z)
        penalties = self.dynamics.evaluate(t, self.columns.part(state), ask).penalties
        dx = _at_least(self.columns.velocity, state)
        dx = dx if torch.is_grad_enabled() else without_graph(dx)
        return self._with_cost(t, state, dx, penalties)


@dataclass(eq=False, kw_only=True)
class TracedSystem(TorchdynSystem):
    """A CNF's net, with its trace as a column in front of ``z (B, *event_shape)``: its products are always made."""

    dynamics: Dynamics
    event_shape: Sequence[int]

    def evaluate(self, t: Tensor, z: Tensor, ask: Ask = RATES) -> Rates:
        state = self._begin(z)
        dz, divergence, penalties = self.dynamics.evaluate(
            t, state[:, 1:].reshape(state.shape[0], *self.event_shape)
        )
        assert divergence is not None
        return self._with_cost(t, state, torch.cat([-divergence[:, None], dz.flatten(1)], 1), penalties)


def system_of(
    vf: Any, x: Tensor, args: Any, followed: Followed, *, one_graph: bool, hidden_cost: Cost | None = None
) -> TorchdynSystem:
    """The right-hand side of one solve of torchdyn's wrapped field ``vf`` that starts at ``x (B, ...)``.

    Args:
        vf, x: the field and the initial state.
        args: handed to fields that take ``args``.
        followed: the penalties. With a CNF they read the products that its trace is made of.
        one_graph: whether evaluations may share one graph of what depends on the parameters alone.
        hidden_cost: see :class:`TorchdynSystem`.

    Raises:
        ConfigError: for a state that cannot carry the penalties.
    """
    # what the state holds: a cost, the traces of CNFs, and z
    cost = vf.integral_loss if type(vf) is DEFunc and vf.sensitivity == "autograd" else None
    state = x if cost is None else x[:, 1:]
    modules = list(vf.modules())
    cnfs = [module for module in modules if is_cnf(module)]
    followed.check(x, len(cnfs))
    net, order = _unwrapped(vf)
    regularizers = followed.regularizers
    columns = _columns_of(state, len(cnfs), followed.penalized) if regularizers else slice(len(cnfs), None)

    def seen(x: Tensor) -> Tensor:
        part = x if x.ndim == 1 else x[:, columns]
        return part if followed.batch_dim == 0 else part.unsqueeze(0)

    def seen_of_all(x: Tensor) -> Tensor:
        return seen(x if cost is None else x[:, 1:])

    cnf = net if len(cnfs) == 1 and followed.penalized is None and _is_transparent(net, state) else None
    slots = Slots(modules, x, ahead=0 if cost is None else 1, cnf=cnf)
    needs = needs_of(regularizers) | ({"vjp"} if cnfs else set())
    modules_of_penalties = [r for r in regularizers if isinstance(r, nn.Module)]
    wrappers = [part for part in (vf, getattr(vf, "vf", None)) if type(part) in (DEFunc, DEFuncBase)]
    known: dict[str, Any] = {
        "module": vf, "counters": [vars(part) for part in wrappers], "cost": cost, "hidden_cost": hidden_cost,
        "depends_on": ((vf, *modules_of_penalties, hidden_cost), args),
    }  # fmt: skip
    options: dict[str, Any] = {"regularizers": regularizers, "event": seen_of_all}
    if cnf is not None:  # its net, so that trace and penalties share the products with its Jacobian
        z = cnf.event(state) if type(cnf) is CNF else state[:, 1:]
        noise = vars(cnf)["noise"] = noise_of(cnf, z)
        estimator: Any = _estimator_of(cnf)
        field = field_of(cnf.net, modules, slots, args, order=cnf.order, needs=needs)
        field = fastest(field, cnf.net, z, one_graph=one_graph and cnf.order == 1 and type(estimator) is Exact)
        dynamics = Dynamics(field, estimator=estimator, **options)
        known |= {"dims": z.shape[1:].numel(), "path": dynamics.path}
        return TracedSystem(**known, dynamics=dynamics.bind(noise), event_shape=z.shape[1:])
    field = field_of(net, modules, slots, args, order=order, needs=needs)
    if not regularizers:
        return PlainSystem(**known, field=field)
    estimator, z = followed.estimator, seen(state)
    known["dims"], options["divergence"] = z.shape[1:].numel(), False
    if followed.penalized is None and not cnfs and followed.batch_dim == 0:
        if not needs.isdisjoint(("vjp", "jvp")):
            exact = one_graph and order == 1 and type(estimator) is Exact and "vjp" in needs
            field = fastest(field, net, z, one_graph=exact)
        dynamics = Dynamics(field, estimator=estimator, **options)
        return WholeSystem(**known, path=dynamics.path, dynamics=dynamics.bind(dynamics.draw(z)))
    if cnfs and followed.penalized is None:
        estimator = _estimator_of(cnfs[0]) or estimator
    index = torch.arange(state.shape[1], device=state.device)[columns] if state.ndim > 1 else None

    def replaced(x: Tensor, z: Tensor) -> Tensor:
        z = z if followed.batch_dim == 0 else z.squeeze(0)
        return z if index is None or z.shape == x.shape else x.index_copy(1, index, z)

    aux = aux_of(modules, needs) if followed.batch_dim == 0 else lambda t, z: {}
    part = PartField(field, part=seen, replaced=replaced, aux=aux)
    dynamics = Dynamics(part, estimator=estimator, **options)
    return ColumnsSystem(**known, path=dynamics.path, dynamics=dynamics.bind(dynamics.draw(z)), columns=part)


class _AutogradTrace(Exact):
    """The exact trace, summed as torchdyn does, to the bit."""

    def divergence(self, products: Tensor, noise: Tensor | None) -> Tensor:
        total = products[0][:, 0]
        for i, row in enumerate(products[1:], start=1):
            total = total + row[:, i]
        return total


class _HutchTrace(Hutchinson):
    """Hutchinson's estimate, summed as torchdyn does, to the bit."""

    def divergence(self, products: Tensor, noise: Tensor | None) -> Tensor:
        assert noise is not None
        return torch.einsum("bi,bi->b", products, noise)


def _estimator_of(cnf: Any) -> TraceEstimator | None:
    """The estimator behind the trace of a CNF; None for a function of its author's own."""
    estimator = cnf.trace_estimator
    if isinstance(estimator, TraceEstimator):
        return estimator
    return _AutogradTrace() if estimator is autograd_trace else _HutchTrace() if estimator is hutch_trace else None


def _unwrapped(vf: Any) -> tuple[Any, int]:
    """The user's field inside torchdyn's wrappers, or the lone CNF in an nn.Sequential, and the order."""
    if type(vf) is not DEFunc:
        return vf, 1
    wrapped: Any = vf.vf
    field = wrapped.vf if type(wrapped) is DEFuncBase else wrapped
    inner: Any = field
    while type(inner) is nn.Sequential and len(inner) == 1 and not has_hooks(inner):
        inner = inner[0]
    return (inner if isinstance(inner, nn.Module) and is_cnf(inner) else field), vf.order


def _is_transparent(field: Any, state: Tensor) -> bool:
    """Whether ``field`` is a CNF whose trace and velocity follow from its net and a known estimator."""
    if type(field) not in (CNF, TorchdynCNF) or has_hooks(field) or _estimator_of(field) is None:
        return False
    return type(field) is CNF or (field.order == 1 and state.ndim == 2)


def _at_least(dx: Tensor, x: Tensor) -> Tensor:
    """Under autocast a field answers in low precision; sums of many steps need that of the state."""
    if dx.dtype is not x.dtype and torch.promote_types(dx.dtype, x.dtype) is x.dtype:
        return dx.to(x.dtype)
    return dx
