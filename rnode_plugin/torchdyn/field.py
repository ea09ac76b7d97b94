"""Turns a user's vector field, which may contain torchdyn's layers, into the system of one solve."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from inspect import isfunction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchdyn.core.defunc import DEFunc, DEFuncBase
from torchdyn.models.cnf import CNF as TorchdynCNF  # noqa: N811
from torchdyn.nn import DataControl, DepthCat
from torchdyn.nn.galerkin import GalLayer

from ..core.derivatives import AutogradField, Field, Velocity
from ..core.modules import has_hooks, module_of
from ..core.noted import map_leaves
from ..core.signature import (
    COMPILED_FUNCTION,
    COMPILED_IN_PLACE,
    COMPILED_MODULE,
    Takes,
    call_of,
    field_takes,
)
from ..core.system import FieldRightHandSide, System, TorchdynColumns
from ..errors import ConfigError
from ..fields.recognize import recognize
from ..fields.stack import AtContext, StackField
from .cnf import CNF, estimator_of, first_order_system, noise_of

CONTROL = "_control"
"""torchdyn's private name for the initial state that a layer reads."""

Cost = Callable[[Tensor, Tensor], Tensor]


# --- the attributes through which torchdyn passes time, control and noise to layers ---


_ABSENT = object()


class _Slot(NamedTuple):
    """One attribute of one module."""

    module: nn.Module
    name: str

    # not through `vars`, because torch.compile does not see that the module reads what is written there, and not by
    # `setattr`, which would make a submodule or parameter of some values
    def fill(self, value: object) -> None:
        object.__setattr__(self.module, self.name, value)

    def restore(self, value: object) -> None:
        if value is not _ABSENT:
            self.fill(value)
        elif self.name in vars(self.module):  # the class has None
            delattr(self.module, self.name)


class Slots:
    """The placeholders of a field, which are filled for each evaluation in a solve that starts at ``x``.

    A layer has a placeholder if it is torchdyn's own, or if the attribute is a plain one, of the layer or of its
    class, whose value is None. After a solve by torchdyn the value is torchdyn's last tensor, so a plain ``t`` that
    is a scalar tensor and a plain ``_control`` that is a tensor are placeholders too. Any other ``t`` or
    ``_control`` of a submodule, such as a number, a buffer or a parameter, is left alone. Noise is drawn and the
    control is taken in the order of the modules, as in torchdyn. So a layer after a CNF has a control without the
    CNF's trace, in the shape of its event.

    Args:
        modules: the modules of the field in their order; the first one contains the others.
        x: the initial state.
        ahead: number of columns of ``x`` in front of the control, 1 for the column of a cost.
        cnf: the CNF whose net the solve calls directly.
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
            present = own.get(CONTROL, getattr(kind, CONTROL, _ABSENT))
            if isinstance(module, DepthCat):
                self.times.append(_Slot(module, "t"))
            elif module is not cnf and (t is None or (isinstance(t, Tensor) and t.ndim == 0)):
                self.times.append(_Slot(module, "t"))
                self.borrowed.append(_Slot(module, "t"))
            if is_cnf(module):
                noise = None if module is cnf else noise_of(module, x[:, ahead + 1 :])
                if noise is not None:
                    self.values.append((_Slot(module, "noise"), noise))
                ahead, shape = ahead + 1, getattr(module, "event_shape", None)
            if isinstance(module, DataControl) or present is None or isinstance(present, Tensor):
                control = x[:, ahead:].detach()
                control = control if shape is None else control.reshape(control.shape[0], *shape)
                self.values.append((_Slot(module, CONTROL), control))
                if not isinstance(module, DataControl):
                    self.borrowed.append(_Slot(module, CONTROL))
            if isinstance(module, GalLayer):
                self.results += [_Slot(module, name) for name in ("weight", "bias") if name in own]
        self.has_any = bool(self.times or self.values or self.results)

    def filling(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``function``, with the placeholders filled during each evaluation."""

        def evaluate(t: Tensor, z: Tensor) -> Tensor:
            self.fill(t)
            try:
                return function(t, z)
            finally:
                self.clear(t)

        return evaluate

    def fill(self, t: Tensor) -> None:
        """Fill all placeholders for an evaluation at ``t``."""
        self._before = [vars(module).get(name, _ABSENT) for module, name in self.borrowed]
        for slot in self.times:
            slot.fill(t)
        for slot, value in self.values:
            slot.fill(value)

    def clear(self, t: Tensor) -> None:
        """Remove graphs from the modules, because they keep memory alive and deepcopy refuses them."""
        if torch.compiler.is_compiling():  # a tensor inside of the graph must not leave it
            for slot in (*self.times, *self.results):
                slot.fill(None)
        else:
            if t.requires_grad:
                for slot in self.times:
                    slot.fill(t.detach())
            for slot in self.results:
                slot.fill(getattr(slot.module, slot.name).detach())
        for slot, value in zip(self.borrowed, self._before, strict=True):
            slot.restore(value)


# --- the right-hand side of a solve ---


def start_net(
    system: System,
    net: Any,
    z: Tensor,
    context: Tensor | None,
    *,
    density: bool,
    one_graph: bool,
    probes: Tensor | None = None,
) -> FieldRightHandSide:
    """Start a solve of a user's net.

    An adjoint also differentiates with respect to the context.

    Args:
        system: the penalties and the estimator.
        net: ``net(z)``, ``net(t, z)``, or with a context ``net(t, z, context)``.
        z: the state ``(B, *event)`` at the start.
        context: one row for each sample; None if the net takes none.
        density, one_graph, probes: as for :meth:`System.start`.

    Raises:
        ConfigError: for a net with layers that read the state at the start, as DataControl does.
    """
    modules = list(net.modules()) if isinstance(net, nn.Module) else []
    slots = Slots(modules, z)
    if slots.values:
        raise ConfigError(
            "a layer of this net reads the state at the start of the solve (DataControl), so the integral of "
            "the divergence is not the log-determinant: leave it out, or give a context= that the net reads."
        )
    wants = system.wants(density=density)
    takes = field_takes(net) if context is None else Takes("t, x")
    function = originals(net, modules) if wants else net
    if context is not None:
        context = context[...]  # apart from what it is computed from, see Noted
        function = AutogradField(function, context)
    function, plain = function_of(function, slots, takes=takes)
    if density:
        exact = system.estimator.is_exact and "jvp" not in wants
        function = fastest(function, net, z, context, plain=plain, exact=exact, one_graph=one_graph)
    return system.start(
        function, z, density=density, probes=probes, one_graph=one_graph, user_field=net, reads=context
    )


def start_torchdyn(
    system: System,
    vf: Any,
    x: Tensor,
    args: object = None,
    *,
    one_graph: bool,
    hidden_cost: Cost | None = None,
) -> FieldRightHandSide:
    """Start a solve of torchdyn's wrapped field ``vf``, as it is now.

    The state ``x`` consists of the column of a cost, the traces of CNFs, and ``z``. If there is a single CNF, its
    net is evaluated, so that its trace and the penalties share the products with its Jacobian.

    Args:
        system: the penalties, the estimator, unless a CNF has one, and the part of the state that is ``z``.
            Columns are counted without the column of the cost; without them ``z`` is all but the columns of a cost
            and a trace.
        vf: the field.
        x: the state ``(B, ...)`` at the start.
        args: passed to fields that take ``args``.
        one_graph: as for :meth:`System.start`.
        hidden_cost: ``integral_loss`` for an adjoint, whose state has no column for it.

    Raises:
        ConfigError: for a state that penalties cannot measure.
    """
    args = map_leaves(as_view, args)
    cost = vf.integral_loss if type(vf) is DEFunc and vf.sensitivity == "autograd" else None
    state = x if cost is None else x[:, 1:]
    modules = list(vf.modules())
    cnfs = list(filter(is_cnf, modules))
    net, order, counters = _unwrapped(vf)
    # torchdyn's wrapper does not register the modules of a function
    holder = vf if isinstance(net, nn.Module) else module_of(net)
    spec, estimator, probes, event_shape = system.part, system.estimator, None, None
    if spec.batch_dim is None and cnfs:
        raise ConfigError("batch_dim=None has no meaning for a CNF: the density is one of each sample.")
    # look inside a single CNF, so that its trace and the penalties share one evaluation of its net
    density = len(cnfs) == 1 and spec.columns is None and _is_transparent(net, state)
    slots = Slots(modules, x, ahead=0 if cost is None else 1, cnf=net if density else None)
    if cnfs and spec.columns is None:
        estimator = estimator_of(cnfs[0]) or estimator
        if len(cnfs) > 1 and system.regularizers.penalties:
            raise ConfigError(
                f"the vector field contains {len(cnfs)} CNF modules; penalties need one, to find z after the "
                "trace, or penalized=, the columns of the state that they measure."
            )
        if not density:
            spec = replace(spec, columns=slice(1, None))
    if density:
        z = net.event(state) if type(net) is CNF else state[:, 1:]
        probes = noise_of(net, z)
        vars(net)["noise"] = probes
        cnf: Any = net
        net, order, event_shape = cnf.net, cnf.order, z.shape[1:]
    else:
        z = state
    system = System(system.regularizers, estimator, part=spec)  # a CNF has its own
    wants = system.wants(density=density)
    # the trace of a CNF that is not looked into is differentiated too
    function = originals(net, modules) if wants or cnfs else net
    function, plain = function_of(function, slots, args, takes=field_takes(net), order=order)
    if wants and spec.is_all:
        exact = order == 1 and estimator.is_exact and "jvp" not in wants
        function = fastest(function, net, z, plain=plain, exact=exact, one_graph=one_graph)
    columns = None  # of a plain state with penalties, whose velocity has its shape
    if cost or hidden_cost or density or not (system.regularizers.rates and spec.is_all):
        columns = TorchdynColumns(hidden_cost if cost is None else cost, cost is None, event_shape)
    rhs = system.start(
        function, x, density=density, probes=probes, one_graph=one_graph, net=holder,
        user_field=net if order == 1 else None, columns=columns, reads=(vf, args),
    )  # fmt: skip
    return replace(rhs, owner=vf, counters=counters)


def function_of(
    function: Callable[..., Tensor],
    slots: Slots,
    args: object = None,
    *,
    takes: Takes,
    order: int = 1,
) -> tuple[Velocity, bool]:
    """A net as a function ``(t, z)``, and whether the call adds nothing to the net.

    It sets the attributes of the solve (control, noise, arguments) at each evaluation, also at the evaluations that
    a backward pass repeats. So another solve in between has no influence.

    Args:
        function: the user's module or function, without torchdyn's wrappers.
        slots: the placeholders of all modules of the field.
        args: passed to a net that takes ``args``.
        takes: how the net is called.
        order: order of the differential equation.
    """
    plain = takes.order == "t, x" and not takes.args
    if not plain:
        function = call_of(function, args, takes)
    if order > 1:
        function = first_order_system(function, order)
    if slots.has_any:
        function = slots.filling(function)
    return function, plain and order == 1 and not slots.has_any


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
    function: Velocity,
    net: Any,
    z: Tensor,
    context: Tensor | None = None,
    *,
    plain: bool,
    exact: bool,
    one_graph: bool,
) -> Velocity:
    """``net``, if it is a field with faster products than autograd's, without a double backward; else ``function``.

    Args:
        function: the function that calls ``net``.
        net: the user's module or function.
        z: a state.
        context: one row for each sample, for a net that takes a context.
        plain: the call adds nothing to the net (no placeholders, ``args``, ``order``), so a faster form of the net
            may replace it.
        exact: whether the exact trace is wanted, and no derivative along a direction. A perceptron is then turned
            into a stack, whose rows are faster.
        one_graph: whether evaluations may share one graph of the quantities that depend only on the parameters.
    """
    stack = recognize(net, z, adds_time=adds_time) if exact and one_graph and context is None else None
    if stack is not None:
        return stack
    if context is None:
        return net if plain and isinstance(net, Field) else function
    return AtContext(net, context) if plain and isinstance(net, StackField) else function


def adds_time(module: nn.Module) -> bool:
    """Whether a layer appends the time to its input as the last column."""
    return type(module) is DepthCat and module.idx_cat in (1, -1)


def as_view(x: Any) -> Any:
    """A tensor that requires a gradient as a view, which no other tensor of a solve is computed from."""
    # not view_as, which changes the strides of dimensions of size 1
    return x[...] if isinstance(x, Tensor) and x.requires_grad else x


def is_cnf(module: nn.Module) -> bool:
    """Whether ``module`` keeps a trace in front of ``z``, as every CNF does; they have a ``noise_dist``."""
    return hasattr(module, "noise_dist")


def originals(function: Callable[..., Tensor], modules: Iterable[nn.Module]) -> Callable[..., Tensor]:
    """``function`` for products, run without torch.compile if it contains compiled parts.

    The gradient of a product needs a double backward, which compiled parts do not have.

    Args:
        function: the user's module or function.
        modules: all modules of the field, including the wrappers.
    """
    for module in modules:
        attributes = vars(module)
        if COMPILED_MODULE in dict(module.named_children()) or attributes.get(COMPILED_IN_PLACE) is not None:
            return _without_compiler(function)
        for value in attributes.values():
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
