"""A torchdyn vector field as a field, and the system of one solve: columns, cost, trace and penalties."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from inspect import isfunction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchdyn.core.defunc import DEFunc, DEFuncBase
from torchdyn.models.cnf import CNF as TorchdynCNF  # noqa: N811
from torchdyn.models.cnf import autograd_trace, hutch_trace
from torchdyn.nn import DataControl, DepthCat
from torchdyn.nn.galerkin import GalLayer

from ..core.derivatives import RATES, Ask, AutogradField, Field, PartField, without_graph
from ..core.dynamics import BoundDynamics, Dynamics, PathPenalties, Rates
from ..core.ops import tree_leaves
from ..core.regularizers import Regularizer, needs_of
from ..core.signature import call_of, original
from ..core.trace_estimators import Exact, Hutchinson, TraceEstimator, get_estimator
from ..errors import ConfigError
from ..fields.recognise import PARTS, recognise
from ..solvers import Solver, gradient_of
from .cnf import CNF, first_order_system, noise_of

CONTROL = "_control"
"""torchdyn's private name for the initial state that a layer reads; a test fails by name when it goes."""

INTEGRAL_LOSS = "<integral_loss>"
"""Key under which the rate of a hidden ``integral_loss`` travels; no regularizer can have this name."""

# A private name of torch. A test fails by name when it goes.
_COMPILED_IN_PLACE = "_compiled_call_impl"

PARTS[DepthCat] = lambda module: ("t" if module.idx_cat in (1, -1) else "?", None)

Cost = Callable[[Tensor, Tensor], Tensor]

Penalized = slice | Tensor
"""Columns of the state that the field is given: a slice, or a mask ``(D,)`` of booleans."""


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


def is_cnf(module: nn.Module) -> bool:
    """Whether ``module`` keeps a trace in front of ``z``: torchdyn's CNF, ours, or one with a ``noise_dist``."""
    return hasattr(module, "noise_dist")


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


# --- the attributes through which torchdyn hands time, control and noise to layers ---


class _Slot(NamedTuple):
    """One attribute of one module."""

    attributes: dict[str, Any]
    name: str

    def fill(self, value: Any) -> None:
        self.attributes[self.name] = value


class _Slots:
    """The placeholders of a field with the values of a solve that starts at ``x``; they are given back each time.

    A layer has a placeholder if it is torchdyn's own, or if the attribute is a plain one that holds None. A
    submodule's own ``t`` or ``_control`` is left alone. Noise is drawn and the control is taken in the order of the
    modules, as in torchdyn: a layer behind a CNF has a control without the CNF's trace, in the shape of its event.

    Args:
        modules: of the field, in their order.
        x: the initial state.
        ahead: columns of ``x`` in front of the control: a cost.
        cnf: the CNF whose net the solve calls itself.
        traced: whether ``x`` has a column for the trace of each CNF.
    """

    def __init__(
        self, modules: Sequence[nn.Module], x: Tensor, ahead: int, cnf: nn.Module | None, *, traced: bool
    ) -> None:
        self.times: list[_Slot] = []
        self.values: list[tuple[_Slot, Tensor]] = []
        self.borrowed: list[_Slot] = []  # of modules that are not torchdyn's: they hold None again
        self.results: list[_Slot] = []  # weights that Galerkin layers compute and keep
        shape = None
        for module in modules:
            own = vars(module)
            if isinstance(module, DepthCat):
                self.times.append(_Slot(own, "t"))
            elif "t" in own and own["t"] is None and module is not cnf:
                self.times.append(_Slot(own, "t"))
                self.borrowed.append(_Slot(own, "t"))
            if is_cnf(module) and traced:
                noise = None if module is cnf else noise_of(module, x[:, ahead + 1 :])
                if noise is not None:
                    self.values.append((_Slot(own, "noise"), noise))
                ahead, shape = ahead + 1, getattr(module, "event_shape", None)
            if isinstance(module, DataControl) or (CONTROL in own and own[CONTROL] is None):
                control = x[:, ahead:].detach()
                control = control if shape is None else control.reshape(control.shape[0], *shape)
                self.values.append((_Slot(own, CONTROL), control))
                if not isinstance(module, DataControl):
                    self.borrowed.append(_Slot(own, CONTROL))
            if isinstance(module, GalLayer):
                self.results += [_Slot(own, name) for name in ("weight", "bias") if name in own]

    @property
    def found(self) -> bool:
        """Whether there are any."""
        return bool(self.times or self.values or self.results)

    def fill(self, t: Tensor) -> None:
        """Set all of them for an evaluation at ``t``."""
        for slot in self.times:
            slot.fill(t)
        for slot, value in self.values:
            slot.fill(value)

    def clear(self, t: Tensor) -> None:
        """Leave no graph on a module: it would keep memory, and deepcopy refuses it."""
        if t.requires_grad:
            for slot in self.times:
                slot.fill(t.detach())
        for attributes, name in self.results:
            attributes[name] = attributes[name].detach()
        for slot in self.borrowed:
            slot.fill(None)


# --- fields ---


class TorchdynField(AutogradField):
    """The user's function for one solve, ``f(t, z)``, without torchdyn's wrappers; its products are autograd's.

    It sets what belongs to the solve (control, noise, arguments) at each evaluation, also at those that a backward
    pass repeats: another solve in between changes nothing.

    Args:
        function, extra, keywords: called as ``function(t, z, *extra, **keywords)``.
        slots: the placeholders of the modules inside.
        aux: ``(t, z)`` to values that the field offers by name.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        extra: tuple[Any, ...],
        keywords: dict[str, Any],
        *,
        slots: _Slots,
        aux: Any,
    ) -> None:
        super().__init__(function, aux=aux)
        self._extra, self._keywords = extra, keywords
        self._slots = slots

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        self._slots.fill(t)
        try:
            return self._field(t, z, *self._extra, **self._keywords)
        finally:
            self._slots.clear(t)


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


# --- the system ---


@dataclass(eq=False)
class TorchdynSystem(BoundDynamics):
    """The right-hand side of one solve: the velocity of the whole state, and the rates of the penalties.

    Attributes:
        field: ``f(t, z)``.
        module: the field as a module, whose buffers evaluations may change.
        counters: attributes of torchdyn's wrappers, whose ``nfe`` counts evaluations.
        dims: number of dimensions per sample that the penalties are about.
        dynamics: the penalties, and a CNF's trace, with their noise; None without them.
        event_shape: of ``z`` behind the column of a CNF's trace, which ``dynamics`` gives; None without one.
        columns: the columns that ``dynamics`` is about; None: all.
        cost: ``integral_loss`` in the first column of the state, as torchdyn has it with gradients through the
            steps.
        hidden_cost: ``integral_loss`` for an adjoint, whose state has no column for it: its rate, summed over the
            batch, is the penalty :data:`INTEGRAL_LOSS`.
        tensors: gives what a continuous adjoint differentiates by.
        path: the penalties that are not rates.
    """

    field: Field
    module: nn.Module
    counters: Sequence[dict[str, Any]]
    dims: int = 1
    dynamics: Dynamics | None = None
    event_shape: Sequence[int] | None = None
    columns: PartField | None = None
    cost: Cost | None = None
    hidden_cost: Cost | None = None
    tensors: Callable[[], Sequence[Tensor]] = list
    path: PathPenalties | None = None

    def evaluate(self, t: Tensor, z: Tensor, ask: Ask = RATES) -> Rates:
        for counter in self.counters:
            counter["nfe"] += 1
        state = z if self.cost is None else z[:, 1:]
        dynamics, columns = self.dynamics, self.columns
        penalties: dict[str, Tensor] = {}
        if dynamics is None:
            dx = _at_least(self.field(t, state), state)
        elif self.event_shape is not None:  # the trace is part of the state: its products are always made
            event = state[:, 1:].reshape(state.shape[0], *self.event_shape)
            dz, divergence, penalties = dynamics.evaluate(t, event)
            assert divergence is not None
            dx = torch.cat([-divergence[:, None], dz.flatten(1)], 1)
        elif columns is None:
            dx, _, penalties = dynamics.evaluate(t, state, ask)
        else:
            columns.state = state
            penalties = dynamics.evaluate(t, columns.part(state), ask).penalties
            dx = _at_least(columns.velocity, state)
            dx = dx if torch.is_grad_enabled() else without_graph(dx)
        if self.cost is not None:
            running = self.cost(t, state)
            dx = torch.cat([running[:, None] if running.ndim == 1 else running, dx], 1).to(dx)
        elif self.hidden_cost is not None:
            penalties = {**penalties, INTEGRAL_LOSS: self.hidden_cost(t, state).sum()}
        return Rates(dx, None, penalties)

    def parameters(self) -> Sequence[Tensor]:
        return self.tensors()

    def repeating(self) -> contextlib.AbstractContextManager[None]:
        """Around evaluations that repeat others: running statistics take each only once."""
        return buffers_kept(self.module)


def system_of(
    vf: Any,
    x: Tensor,
    *,
    args: Any = None,
    regularizers: Sequence[Regularizer] = (),
    trace_noise: str | TraceEstimator = "gaussian",
    penalized: Penalized | None = None,
    batch_dim: int | None = 0,
    hidden_cost: Cost | None = None,
    tensors: Callable[[], Sequence[Tensor]] = list,
    prepare: bool = False,
    trace: bool = True,
    noise: Tensor | None = None,
) -> TorchdynSystem:
    """The right-hand side of one solve of torchdyn's wrapped field ``vf`` that starts at ``x (B, ...)``.

    Args:
        vf, x: the field and the initial state.
        args: handed to fields that take ``args``.
        regularizers: penalties of ``z`` alone. Behind a CNF they read the products that its trace is made of.
        trace_noise: of a product that no CNF makes.
        penalized: the columns of the state that are ``z``; None: all but those of a cost and a trace.
        batch_dim: None: all of ``z`` is one sample, and the penalties see it as ``(1, B, ...)``.
        hidden_cost, tensors: see :class:`TorchdynSystem`.
        prepare: whether evaluations may share one graph of what depends on the parameters alone.
        trace: False for the field of a :class:`~rnode_plugin.CNF` on ``z (B, *event_shape)`` alone.
        noise: of a CNF's trace; None: drawn here.

    Raises:
        ConfigError: for a state that cannot carry the penalties.
    """
    # what the state holds: a cost, the traces of CNFs, and z
    cost = vf.integral_loss if type(vf) is DEFunc and vf.sensitivity == "autograd" else None
    state = z = x if cost is None else x[:, 1:]
    modules = list(vf.modules())
    cnfs = [module for module in modules if is_cnf(module)] if trace else []
    if regularizers:
        _check_penalized_state(x, 0 if penalized is not None else len(cnfs))
    if batch_dim is None and cnfs:
        raise ConfigError("batch_dim=None has no meaning for a CNF: the density is one of each sample.")

    # the field; of a CNF its net, so that trace and penalties share the products with its Jacobian
    field, order = _unwrapped(vf)
    transparent = len(cnfs) == 1 and penalized is None and _is_transparent(field, state)
    cnf: Any = field if transparent or not trace else None
    if cnf is not None:
        field, order = cnf.net, cnf.order
    if transparent:
        z = cnf.event(state) if type(cnf) is CNF else state[:, 1:]
        noise = noise_of(cnf, z) if noise is None else noise
        vars(cnf)["noise"] = noise
    needs = needs_of(regularizers)
    differentiated = transparent or bool(needs & {"vjp", "jvp"})
    slots = _Slots(modules, x, 0 if cost is None else 1, cnf, traced=trace)
    function, extra, keywords = call_of(field, args)
    filled = slots.times or slots.values or slots.results
    plain = function is field and order == 1 and not (extra or keywords or filled)
    if order > 1:
        function, extra, keywords = first_order_system(function, extra, keywords, order), (), {}
    if (differentiated or cnfs) and _has_compiled_parts(modules):
        function = _run_original(function)
    aux: Any = None
    if "aux" in needs:
        aux = next((module.aux for module in modules if callable(getattr(type(module), "aux", None))), None)
    known: Any = TorchdynField(function, extra, keywords, slots=slots, aux=aux)

    system = TorchdynSystem(
        known, vf, [vars(part) for part in (vf, getattr(vf, "vf", None)) if type(part) in (DEFunc, DEFuncBase)],
        cost=cost, hidden_cost=hidden_cost, tensors=tensors,
    )  # fmt: skip
    if not (transparent or regularizers):
        return system

    # the trace and the penalties of z
    columns = _columns_of(state, len(cnfs), penalized)

    def seen(x: Tensor) -> Tensor:
        part = x if x.ndim == 1 else x[:, columns]
        return part if batch_dim == 0 else part.unsqueeze(0)

    system.dims = seen(state).shape[1:].numel()
    estimator = get_estimator(trace_noise)
    if cnfs and penalized is None:
        estimator = _estimator_of(cnfs[0]) or estimator
    if transparent:
        system.event_shape = z.shape[1:]
    elif penalized is not None or cnfs or batch_dim is None:
        index = torch.arange(state.shape[1], device=state.device)[columns] if state.ndim > 1 else None

        def replaced(x: Tensor, z: Tensor) -> Tensor:
            z = z if batch_dim == 0 else z.squeeze(0)
            return z if index is None or z.shape == x.shape else x.index_copy(1, index, z)

        known = PartField(known, part=seen, replaced=replaced, aux=aux if batch_dim == 0 else lambda t, z: {})
        system.columns, z = known, seen(state)
    if differentiated and system.columns is None:
        exact = prepare and order == 1 and type(estimator) is Exact and (transparent or "vjp" in needs)
        stack = recognise(field, z) if exact else None
        if stack is not None:
            known = stack
        elif plain and isinstance(field, Field):
            known = field
    dynamics = Dynamics(
        known, regularizers=regularizers, estimator=estimator, divergence=transparent,
        event=lambda x: seen(x if cost is None else x[:, 1:]),
    )  # fmt: skip
    system.path = dynamics.path
    system.dynamics = dynamics.bind(noise if transparent else dynamics.draw(z))
    return system


class NetDynamics(Dynamics):
    """The dynamics of a user's net in one solve: state, log-determinant and penalties.

    An adjoint differentiates by a context too, and evaluations that repeat others leave the net's buffers alone.

    Args:
        net: ``net(z)``, ``net(t, z)``, or with a context ``net(t, z, context)``.
        z: the state ``(B, *event)`` at the start.
        context: one row for each sample; None if the net takes none.
        solver: of the solve.
        options: of :class:`~rnode_plugin.core.dynamics.Dynamics`.
    """

    def __init__(
        self,
        net: Any,
        z: Tensor,
        context: Tensor | None,
        solver: Solver,
        *,
        regularizers: Sequence[Regularizer] = (),
        estimator: str | TraceEstimator = "exact",
        divergence: bool = True,
    ) -> None:
        self._net, self._context = net, context
        modules = list(net.modules()) if isinstance(net, nn.Module) else []
        function, extra, keywords = call_of(net) if context is None else (net, (context,), {})
        slots, needs = _Slots(modules, z, 0, None, traced=False), needs_of(regularizers)
        if divergence and _has_compiled_parts(modules):
            function = _run_original(function)
        aux: Any = None
        if "aux" in needs:
            aux = next((module.aux for module in modules if callable(getattr(type(module), "aux", None))), None)
        field: Any = TorchdynField(function, extra, keywords, slots=slots, aux=aux)
        if divergence:
            one_graph = type(estimator) is Exact and gradient_of(solver).through_steps
            stack = recognise(net, z) if one_graph else None
            if stack is not None:
                field = stack
            elif isinstance(net, Field) and function is net and not (extra or keywords or slots.found):
                field = net
        super().__init__(field, regularizers=regularizers, estimator=estimator, divergence=divergence)

    def parameters(self) -> Sequence[Tensor]:
        return tensors_of((self._net, *self.rates.values()), self._context)

    def repeating(self) -> contextlib.AbstractContextManager[None]:
        return buffers_kept(self._net)


def tensors_of(parts: Iterable[Any], args: Any) -> list[Tensor]:
    """What an adjoint differentiates by: the parameters of the modules in ``parts``, and tensors in ``args``."""
    found = [p for part in parts if isinstance(part, nn.Module) for p in part.parameters()]
    given = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.requires_grad]
    return list({id(x): x for x in [*found, *given]}.values())


def _check_penalized_state(x: Tensor, traces: int) -> None:
    if x.ndim == 0:
        raise ConfigError("penalties need a state with a batch dimension, (B, ...), not a single number.")
    if x.is_complex():
        raise ConfigError("penalties need a real state: give a complex one as torch.view_as_real(x).")
    if traces > 1:
        raise ConfigError(
            f"the vector field holds {traces} CNF modules; penalties need one, to tell z from the trace, or "
            "penalized=, the columns of the state that they are about."
        )


def _unwrapped(vf: Any) -> tuple[Any, int]:
    """The user's field inside torchdyn's wrappers, or the lone CNF in an nn.Sequential, and the order."""
    if type(vf) is not DEFunc:
        return vf, 1
    wrapped: Any = vf.vf
    field = wrapped.vf if type(wrapped) is DEFuncBase else wrapped
    inner: Any = field
    while type(inner) is nn.Sequential and len(inner) == 1 and not _has_hooks(inner):
        inner = inner[0]
    return (inner if isinstance(inner, nn.Module) and is_cnf(inner) else field), vf.order


def _is_transparent(field: Any, state: Tensor) -> bool:
    """Whether ``field`` is a CNF whose trace and velocity follow from its net and a known estimator."""
    if type(field) not in (CNF, TorchdynCNF) or _has_hooks(field) or _estimator_of(field) is None:
        return False
    return type(field) is CNF or (field.order == 1 and state.ndim == 2)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


@contextlib.contextmanager
def buffers_kept(module: Any) -> Iterator[None]:
    """Evaluations inside leave the buffers of ``module`` as they are: layers in training mode write into copies."""
    kept: list[tuple[nn.Module, str, Tensor]] = []
    for part in module.modules() if isinstance(module, nn.Module) else ():
        if part.training:
            kept += [(part, name, buffer) for name, buffer in part.named_buffers(recurse=False)]
    for part, name, buffer in kept:
        setattr(part, name, buffer.clone())
    try:
        yield
    finally:
        for part, name, buffer in kept:
            setattr(part, name, buffer)


def _has_compiled_parts(modules: Sequence[nn.Module]) -> bool:
    """Whether one of the modules, or a function that it holds, is compiled."""
    for module in modules:
        if original(module) is not module or getattr(module, _COMPILED_IN_PLACE, None) is not None:
            return True
        for value in vars(module).values():
            if isfunction(value) and original(value) is not value:
                return True
    return False


def _run_original(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with the originals of all that is compiled inside: torch.compile has no double backward."""

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        # inside a compiled region the stance cannot change; the caller's compiler decides there
        inside = torch.compiler.is_compiling()
        with contextlib.nullcontext() if inside else torch.compiler.set_stance("force_eager"):
            return function(*args, **kwargs)

    return evaluate


def _at_least(dx: Tensor, x: Tensor) -> Tensor:
    """Under autocast a field answers in low precision; sums of many steps need that of the state."""
    if dx.dtype is not x.dtype and torch.promote_types(dx.dtype, x.dtype) is x.dtype:
        return dx.to(x.dtype)
    return dx
