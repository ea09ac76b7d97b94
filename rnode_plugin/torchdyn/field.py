"""Turns a user's vector field, which may contain torchdyn's layers, into the system of one solve."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, replace
from inspect import isfunction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves  # torch has no public name for it
from torchdyn.core.defunc import DEFunc, DEFuncBase
from torchdyn.models.cnf import CNF as TorchdynCNF  # noqa: N811
from torchdyn.nn import DataControl, DepthCat
from torchdyn.nn.galerkin import GalLayer

from ..core.derivatives import AutogradField, Field, has_hooks
from ..core.dynamics import BoundDynamics, Dynamics, Rates
from ..core.modes import outside_checkpoints
from ..core.part import Part, PartSpec, signs_for_columns, warn_of_unread_columns
from ..core.regularizers import NONE, Regularizers
from ..core.signature import (
    COMPILED_FUNCTION,
    COMPILED_IN_PLACE,
    COMPILED_MODULE,
    Takes,
    call_of,
    field_takes,
)
from ..core.surroundings import lock_of, module_of
from ..core.trace_estimators import TraceEstimator
from ..errors import ConfigError, RnodeError
from ..fields.recognize import recognize
from ..fields.stack import AtContext, StackField
from ..solvers import Solver, get_gradient
from .cnf import CNF, estimator_of, first_order_system, noise_of

CONTROL = "_control"
"""torchdyn's private name for the initial state that a layer reads."""

INTEGRAL_LOSS = "<integral_loss>"
"""Key of the rate of a hidden ``integral_loss`` among the penalties; no regularizer can have this name."""

Cost = Callable[[Tensor, Tensor], Tensor]


# --- the attributes through which torchdyn hands time, control and noise to layers ---


_ABSENT = object()


class _Slot(NamedTuple):
    """One attribute of one module."""

    attributes: dict[str, Any]
    name: str

    def fill(self, value: object) -> None:
        self.attributes[self.name] = value

    def restore(self, value: object) -> None:
        if value is _ABSENT:  # the class holds None
            self.attributes.pop(self.name, None)
        else:
            self.attributes[self.name] = value


class Slots:
    """The placeholders of a field, which are filled for each evaluation in a solve that starts at ``x``.

    A layer has a placeholder if it is torchdyn's own, or if the attribute is a plain one, of the layer or of its
    class, that holds None. After a solve by torchdyn it holds torchdyn's last tensor, so a plain ``t`` that is a
    scalar tensor and a plain ``_control`` that is a tensor are placeholders too. Any other ``t`` or ``_control`` of
    a submodule, such as a number, a buffer or a parameter, is left alone. Noise is drawn and the control is taken
    in the order of the modules, as in torchdyn. So a layer after a CNF has a control without the CNF's trace, in
    the shape of its event.

    Args:
        modules: the modules of the field in their order; the first one holds the others.
        x: the initial state.
        ahead: number of columns of ``x`` in front of the control, 1 for the column of a cost.
        cnf: the CNF whose net the solve calls directly.

    Attributes:
        lock: to be held while the placeholders are filled, because two threads may solve one model.
    """

    def __init__(
        self, modules: Sequence[nn.Module], x: Tensor, *, ahead: int = 0, cnf: nn.Module | None = None
    ) -> None:
        self.times: list[_Slot] = []
        self.values: list[tuple[_Slot, Tensor]] = []
        self.borrowed: list[_Slot] = []  # in modules that are not torchdyn's; restored after each evaluation
        self._before: list[object] = []
        self.results: list[_Slot] = []  # weights that Galerkin layers compute and keep
        shape = None
        for module in modules:
            own, kind = vars(module), type(module)
            t = own.get("t", getattr(kind, "t", _ABSENT))
            held = own.get(CONTROL, getattr(kind, CONTROL, _ABSENT))
            if isinstance(module, DepthCat):
                self.times.append(_Slot(own, "t"))
            elif module is not cnf and (t is None or (isinstance(t, Tensor) and t.ndim == 0)):
                self.times.append(_Slot(own, "t"))
                self.borrowed.append(_Slot(own, "t"))
            if is_cnf(module):
                noise = None if module is cnf else noise_of(module, x[:, ahead + 1 :])
                if noise is not None:
                    self.values.append((_Slot(own, "noise"), noise))
                ahead, shape = ahead + 1, getattr(module, "event_shape", None)
            if isinstance(module, DataControl) or held is None or isinstance(held, Tensor):
                control = x[:, ahead:].detach()
                control = control if shape is None else control.reshape(control.shape[0], *shape)
                self.values.append((_Slot(own, CONTROL), control))
                if not isinstance(module, DataControl):
                    self.borrowed.append(_Slot(own, CONTROL))
            if isinstance(module, GalLayer):
                self.results += [_Slot(own, name) for name in ("weight", "bias") if name in own]
        self.found = bool(self.times or self.values or self.results)
        self.lock = lock_of(modules[0] if self.found else None)

    def fill(self, t: Tensor) -> None:
        """Fill all placeholders for an evaluation at ``t``."""
        self._before = [attributes.get(name, _ABSENT) for attributes, name in self.borrowed]
        for slot in self.times:
            slot.fill(t)
        for slot, value in self.values:
            slot.fill(value)

    def clear(self, t: Tensor) -> None:
        """Remove graphs from the modules, because they keep memory alive and deepcopy refuses them."""
        if t.requires_grad:
            for slot in self.times:
                slot.fill(t.detach())
        for attributes, name in self.results:
            attributes[name] = attributes[name].detach()
        for slot, value in zip(self.borrowed, self._before, strict=True):
            slot.restore(value)


# --- fields ---


class TorchdynField(AutogradField):
    """The user's function for one solve, ``f(t, z)``, without torchdyn's wrappers; autograd computes its products.

    It sets what belongs to the solve (control, noise, arguments) at each evaluation, also at the evaluations that a
    backward pass repeats. So another solve in between has no influence.

    Args:
        function, extra: the function, called as ``function(t, z, *extra)``.
        slots: the placeholders of the modules inside.
        plain: whether a call of the field only calls the user's net.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        *extra: Tensor,
        slots: Slots,
        plain: bool = False,
    ) -> None:
        super().__init__(function)
        self._extra, self._slots, self.plain = extra, slots, plain

    def __call__(self, t: Tensor, z: Tensor, /) -> Tensor:
        slots = self._slots
        if not slots.found:
            return self._field(t, z, *self._extra)
        with slots.lock:
            slots.fill(t)
            try:
                return self._field(t, z, *self._extra)
            finally:
                slots.clear(t)


def field_of(
    net: Any,
    modules: Sequence[nn.Module],
    slots: Slots,
    args: object,
    *,
    takes: Takes,
    order: int = 1,
    needs: Set[str] = frozenset(),
) -> TorchdynField:
    """Make the field of a net, which is called with ``args`` if it takes them.

    Args:
        net: the user's module or function, without torchdyn's wrappers.
        modules: all modules of the field, including the wrappers.
        slots: the placeholders of these modules.
        args: handed to a net that takes ``args``.
        takes: how the net is called.
        order: order of the differential equation.
        needs: what penalties read of an evaluation; see :class:`~rnode_plugin.core.regularizer.Rate`.
    """
    is_plain = takes.order == "t, x" and not takes.args
    function = net if is_plain else call_of(net, args, takes)
    plain = is_plain and order == 1 and not slots.found
    if order > 1:
        function = first_order_system(function, order)
    if not needs.isdisjoint(("vjp", "jvp")):  # the gradient of a product needs a double backward
        function = originals(function, modules)
    return TorchdynField(function, slots=slots, plain=plain)


class NetDynamics(Dynamics):
    """The dynamics of a user's net in one solve: state, log-determinant and penalties.

    An adjoint also differentiates by the context.

    Args:
        net: ``net(z)``, ``net(t, z)``, or with a context ``net(t, z, context)``.
        z: the state ``(B, *event)`` at the start.
        context: one row for each sample; None if the net takes none.
        solver: the solver, whose gradient decides whether evaluations may share a graph.
        regularizers: the rates and step penalties.
        estimator, divergence: as in :class:`~rnode_plugin.core.dynamics.Dynamics`.

    Raises:
        ConfigError: for a net with layers that read the state at the start, as DataControl does.
    """

    def __init__(
        self,
        net: Any,
        z: Tensor,
        context: Tensor | None,
        solver: Solver,
        *,
        regularizers: Regularizers = NONE,
        estimator: TraceEstimator,
        divergence: bool = True,
    ) -> None:
        self._net, self._context = net, context
        modules = list(net.modules()) if isinstance(net, nn.Module) else []
        slots, needs = Slots(modules, z), regularizers.needs | ({"vjp"} if divergence else set[str]())
        if slots.values:
            raise ConfigError(
                "a layer of this net reads the state at the start of the solve (DataControl), so the integral of "
                "the divergence is not the log-determinant: leave it out, or give a context= that the net reads."
            )
        differentiates = divergence and bool(estimator.wants)
        if context is None:
            field: Field = field_of(
                net,
                modules,
                slots,
                None,
                takes=field_takes(net),
                needs=needs if differentiates else needs - {"vjp"},
            )
        else:
            function = originals(net, modules) if differentiates else net
            field = TorchdynField(function, context, slots=slots, plain=not slots.found)
        if divergence:
            exact = estimator.is_exact and "jvp" not in needs
            through_steps = get_gradient(solver.gradient).through_steps
            field = fastest(field, net, z, context, exact=exact, one_graph=through_steps)
        super().__init__(
            field, regularizers=regularizers, estimator=estimator, divergence=divergence,
            net=net if isinstance(net, nn.Module) else module_of(net), user_field=net,
        )  # fmt: skip

    def parameters(self) -> Sequence[Tensor]:
        return tensors_of((self._net, *(rate.of for rate in self.rates.values())), self._context)


@dataclass(frozen=True)
class Followed:
    """The penalties that a solve of a NeuralODE follows, and the part of the state that they measure.

    Attributes:
        regularizers: the rates and step penalties.
        estimator: the estimator of products, unless a CNF brings one.
        spec: the part of the state that is ``z``. Columns are counted without the column of a cost; without them
            ``z`` is all except the columns of a cost and a trace.
    """

    regularizers: Regularizers
    estimator: TraceEstimator
    spec: PartSpec

    def part(self, x: Tensor, state: Tensor, traces: int) -> Part | None:
        """The place of ``z`` in a state without the column of a cost; None if ``z`` is the whole state.

        Args:
            x: the initial state.
            state: the initial state without the column of a cost.
            traces: number of CNFs, whose traces are in front of ``z``.

        Raises:
            ConfigError: for a state that cannot carry the penalties.
        """
        spec = self.spec
        if spec.batch_dim is None and traces:
            raise ConfigError("batch_dim=None has no meaning for a CNF: the density is one of each sample.")
        if not self.regularizers:
            return None
        if x.ndim == 0:
            raise ConfigError("penalties need a state with a batch dimension, (B, ...), not a single number.")
        if spec.columns is None and traces > 1:
            raise ConfigError(
                f"the vector field holds {traces} CNF modules; penalties need one, to find z after the trace, or "
                "penalized=, the columns of the state that they measure."
            )
        return (replace(spec, columns=slice(traces, None)) if spec.columns is None and traces else spec).part(state)


@dataclass(eq=False, kw_only=True)
class TorchdynSystem(BoundDynamics):
    """The right-hand side of one solve of a NeuralODE: the velocity of the whole state, and rates of penalties.

    Attributes:
        module: torchdyn's wrapped field.
        args: arguments of the field.
        dynamics: the velocity of the state, and the penalties on the state or on a part of it.
        event_shape: shape of ``z`` if the state holds the trace of a single CNF in front of it. Then the net inside
            the CNF is evaluated, so that trace and penalties share the products with its Jacobian.
        cost: ``integral_loss`` in the first column of the state, where torchdyn puts it for gradients through
            steps.
        hidden_cost: ``integral_loss`` for an adjoint, whose state has no column for it. Its rate, summed over the
            batch, is integrated as the penalty :data:`INTEGRAL_LOSS`.
        counters: attributes of torchdyn's wrappers, whose ``nfe`` counts evaluations.
        dims: number of dimensions of one sample that the penalties measure.
        regularizers: the rates and step penalties.
        part: where ``z`` is in a state without the column of a cost; None if ``z`` is that whole state.
    """

    module: nn.Module
    args: object
    dynamics: Dynamics
    event_shape: Sequence[int] | None
    cost: Cost | None
    hidden_cost: Cost | None
    counters: Sequence[dict[str, Any]]
    dims: int
    regularizers: Regularizers
    part: Part | None

    def parameters(self) -> Sequence[Tensor]:
        return tensors_of((self.module, *self.regularizers.code, self.hidden_cost), self.args)

    def event(self, state: Tensor) -> Tensor:
        state = state if self.cost is None else state[:, 1:]
        return state if self.part is None else self.part.take(state)

    def repeating(self) -> Callable[[], contextlib.AbstractContextManager[None]]:
        return self.dynamics.door.repeating((*self.regularizers.code, self.hidden_cost))

    def evaluate(self, t: Tensor, z: Tensor, *, products: bool = True) -> Rates:
        for counter in self.counters:
            counter["nfe"] += 1
        state = z if self.cost is None else z[:, 1:]
        if self.event_shape is not None:  # a trace needs its products in every evaluation
            events = state[:, 1:].reshape(state.shape[0], *self.event_shape)
            dz, divergence, penalties = self.dynamics.evaluate(t, events)
            assert divergence is not None
            dx = torch.cat([-divergence[:, None], dz.flatten(1)], 1)
        elif self.dynamics.rates:
            dx, _, penalties = self.dynamics.evaluate(t, state, products=products)
            dx = dx.to(state.dtype)
        else:
            dx, penalties = self.dynamics.door.evaluate(t, state).dz, {}
            if dx.dtype is not state.dtype and torch.promote_types(dx.dtype, state.dtype) is state.dtype:
                dx = dx.to(state.dtype)  # under autocast dx has low precision, which sums over many steps must not
        if self.cost is not None:
            running = self.cost(t, state)
            dx = torch.cat([running[:, None] if running.ndim == 1 else running, dx], 1).to(dx)
        elif self.hidden_cost is not None:
            penalties = {**penalties, INTEGRAL_LOSS: self.hidden_cost(t, state).sum()}
        return Rates(dx, None, penalties)


def look_for_columns(system: TorchdynSystem, t: Tensor, x: Tensor) -> bool:
    """Warn about columns that the field moves but never reads, and return whether the question is settled."""
    state = x if system.cost is None else x[:, 1:]
    # a trace or columns may be set apart already
    signs = signs_for_columns(state) if system.dynamics.door.part is None else None
    if signs is None:
        return True
    try:
        with torch.no_grad(), outside_checkpoints():
            found = system.dynamics.door.again(t.to(state.device), state, frozenset({"products"}), signs)
    except (RnodeError, RuntimeError):  # no graph, or one that runs once: fine for penalties without a derivative
        return True
    return warn_of_unread_columns(found.dz, found.products, stacklevel=6)


def system_of(
    vf: Any,
    x: Tensor,
    args: object,
    followed: Followed,
    *,
    takes: Callable[[object], Takes] = field_takes,
    one_graph: bool,
    hidden_cost: Cost | None = None,
) -> TorchdynSystem:
    """Make the right-hand side for one solve of torchdyn's wrapped field ``vf`` that starts at ``x (B, ...)``.

    Args:
        vf: the field.
        x: the initial state, with the column of a cost, the traces of CNFs, and ``z``.
        args: handed to fields that take ``args``.
        followed: the penalties.
        takes: gives how a field is called.
        one_graph: whether evaluations may share one graph of what depends on the parameters alone.
        hidden_cost: see :class:`TorchdynSystem`.

    Raises:
        ConfigError: for a state that cannot carry the penalties.
    """
    cost = vf.integral_loss if type(vf) is DEFunc and vf.sensitivity == "autograd" else None
    state = x if cost is None else x[:, 1:]
    modules = list(vf.modules())
    cnfs = list(filter(is_cnf, modules))
    part = followed.part(x, state, len(cnfs))
    net, order, counters = _unwrapped(vf)
    visible = isinstance(net, nn.Module)
    holder = vf if visible else module_of(net)  # torchdyn's wrapper does not register the modules of a function
    # look inside a single CNF, so that its trace and the penalties share one evaluation of its net
    traced = len(cnfs) == 1 and followed.spec.columns is None and _is_transparent(net, state)
    slots = Slots(modules, x, ahead=0 if cost is None else 1, cnf=net if traced else None)
    regularizers, estimator = followed.regularizers, followed.estimator
    needs = regularizers.needs | ({"vjp"} if cnfs else set[str]())
    if not estimator.wants and not cnfs:  # differences of the velocity, for which a compiled net may stay compiled
        needs -= {"vjp"}

    noise = event_shape = None
    if traced:
        z = net.event(state) if type(net) is CNF else state[:, 1:]
        noise = vars(net)["noise"] = noise_of(net, z)
        estimator, event_shape = estimator_of(net) or estimator, z.shape[1:]
        net, order = net.net, net.order
    else:
        z = state if part is None else part.take(state)
        if cnfs and followed.spec.columns is None:
            estimator = estimator_of(cnfs[0]) or estimator
    field: Field = field_of(net, modules, slots, args, takes=takes(net), order=order, needs=needs)
    whole = traced or part is None
    if whole and (traced or regularizers) and not needs.isdisjoint(("vjp", "jvp")):
        exact = order == 1 and estimator.is_exact and "vjp" in needs and "jvp" not in needs
        field = fastest(field, net, z, exact=exact, one_graph=one_graph)
    dynamics = Dynamics(
        field, regularizers=regularizers, estimator=estimator, divergence=traced, part=None if whole else part,
        net=holder, user_field=net if order == 1 else None,
    )  # fmt: skip
    return TorchdynSystem(
        module=vf, args=args, dynamics=dynamics.bind(noise if traced else dynamics.draw(z)),
        event_shape=event_shape, cost=cost, hidden_cost=hidden_cost, counters=counters, dims=z.shape[1:].numel(),
        regularizers=regularizers, part=part,
    )  # fmt: skip


def _unwrapped(vf: Any) -> tuple[Any, int, Sequence[dict[str, Any]]]:
    """The user's field or lone CNF inside torchdyn's wrappers, its order, and the attributes of the wrappers."""
    if type(vf) is not DEFunc:
        return vf, 1, [vars(vf)] if type(vf) is DEFuncBase else []
    field: Any = vf.vf
    counters = [vars(vf)]
    if type(field) is DEFuncBase:
        counters.append(vars(field))
        field = field.vf
    inner: Any = field
    while type(inner) is nn.Sequential and len(inner) == 1 and not has_hooks(inner):
        inner = inner[0]
    return (inner if isinstance(inner, nn.Module) and is_cnf(inner) else field), vf.order, counters


def _is_transparent(field: Any, state: Tensor) -> bool:
    """Whether ``field`` is a CNF whose trace and velocity follow from its net and a known estimator."""
    if type(field) not in (CNF, TorchdynCNF) or has_hooks(field) or estimator_of(field) is None:
        return False
    return type(field) is CNF or (field.order == 1 and state.ndim == 2)


def fastest(
    field: TorchdynField, net: Any, z: Tensor, context: Tensor | None = None, *, exact: bool, one_graph: bool
) -> Field:
    """A field with faster products than autograd's, without a double backward, if ``net`` has one; else ``field``.

    Args:
        field: the field of ``net``, whose products come from autograd.
        net: the user's module or function.
        z: a state.
        context: one row for each sample, for a net that takes a context.
        exact: whether the exact trace is wanted, and no derivative along a direction. A perceptron is then turned
            into a stack, whose rows are faster.
        one_graph: whether evaluations may share one graph of what depends on the parameters alone.
    """
    stack = recognize(net, z, adds_time=adds_time) if exact and one_graph and context is None else None
    if stack is not None:
        return stack
    own = AtContext(net, context) if context is not None and isinstance(net, StackField) else net
    if not field.plain or not isinstance(own, Field) or (context is not None and own is net):
        return field
    return own.prepared(z, one_graph=one_graph)


def adds_time(module: nn.Module) -> bool:
    """Whether a layer appends the time to its input as the last column."""
    return type(module) is DepthCat and module.idx_cat in (1, -1)


def tensors_of(parts: Iterable[object], args: object) -> list[Tensor]:
    """The tensors that an adjoint differentiates by: parameters of modules in ``parts``, tensors in ``args``."""
    found = [p for part in parts if isinstance(part, nn.Module) for p in part.parameters()]
    given = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.requires_grad]
    return list({id(x): x for x in [*found, *given]}.values())


def is_cnf(module: nn.Module) -> bool:
    """Whether ``module`` keeps a trace in front of ``z``, as every CNF does; they have a ``noise_dist``."""
    return hasattr(module, "noise_dist")


def originals(function: Callable[..., Tensor], modules: Iterable[nn.Module]) -> Callable[..., Tensor]:
    """``function``, run without torch.compile if it contains compiled parts, which have no double backward."""
    for module in modules:
        held = vars(module)
        if COMPILED_MODULE in module._modules or held.get(COMPILED_IN_PLACE) is not None:
            return _without_compiler(function)
        for value in held.values():
            if isfunction(value) and hasattr(value, COMPILED_FUNCTION):
                return _without_compiler(function)
    return function


def _without_compiler(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def evaluate(*args: object) -> Tensor:
        # inside a compiled region the stance cannot change; the caller's compiler decides there
        inside = torch.compiler.is_compiling()
        with contextlib.nullcontext() if inside else torch.compiler.set_stance("force_eager"):
            return function(*args)

    return evaluate
