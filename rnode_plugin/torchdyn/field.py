"""A user's vector field, torchdyn's layers included, as the field of one solve; and the dynamics of a net."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from inspect import isfunction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchdyn.nn import DataControl, DepthCat
from torchdyn.nn.galerkin import GalLayer

from ..core.derivatives import AutogradField, Field
from ..core.dynamics import Dynamics
from ..core.ops import tree_leaves
from ..core.regularizers import Regularizer, needs_of
from ..core.signature import call_of, original
from ..core.trace_estimators import Exact, TraceEstimator
from ..fields.recognise import PARTS, recognise
from ..solvers import Solver, gradient_of
from .cnf import first_order_system, noise_of

CONTROL = "_control"
"""torchdyn's private name for the initial state that a layer reads; a test fails by name when it goes."""

# A private name of torch. A test fails by name when it goes.
_COMPILED_IN_PLACE = "_compiled_call_impl"

PARTS[DepthCat] = lambda module: ("t" if module.idx_cat in (1, -1) else "?", None)


# --- the attributes through which torchdyn hands time, control and noise to layers ---


class _Slot(NamedTuple):
    """One attribute of one module."""

    attributes: dict[str, Any]
    name: str

    def fill(self, value: Any) -> None:
        self.attributes[self.name] = value


class Slots:
    """The placeholders of a field with the values of a solve that starts at ``x``; they are given back each time.

    A layer has a placeholder if it is torchdyn's own, or if the attribute is a plain one that holds None. A
    submodule's own ``t`` or ``_control`` is left alone. Noise is drawn and the control is taken in the order of the
    modules, as in torchdyn: a layer behind a CNF has a control without the CNF's trace, in the shape of its event.

    Args:
        modules: of the field, in their order.
        x: the initial state.
        ahead: columns of ``x`` in front of the control: a cost.
        cnf: the CNF whose net the solve calls itself.
    """

    def __init__(
        self, modules: Sequence[nn.Module], x: Tensor, *, ahead: int = 0, cnf: nn.Module | None = None
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
            if is_cnf(module):
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
        self.found = bool(self.times or self.values or self.results)

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
        plain: whether a call of it is a call of the user's net and nothing else.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        extra: tuple[Any, ...],
        keywords: dict[str, Any],
        *,
        slots: Slots,
        aux: Any,
        plain: bool = False,
    ) -> None:
        super().__init__(function, aux=aux)
        self._extra, self._keywords = extra, keywords
        self._slots, self.plain = slots, plain

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        self._slots.fill(t)
        try:
            return self._field(t, z, *self._extra, **self._keywords)
        finally:
            self._slots.clear(t)


def field_of(
    net: Any,
    modules: Sequence[nn.Module],
    slots: Slots,
    args: Any,
    *,
    order: int = 1,
    needs: Set[str] = frozenset(),
) -> TorchdynField:
    """The field of a net that is called with ``args`` if it takes them.

    Args:
        net: the user's module or function, without torchdyn's wrappers.
        modules: all of the field, with those around the net.
        slots: their placeholders.
        args: handed to a net that takes ``args``.
        order: order of the differential equation.
        needs: what is read of an evaluation; see :class:`~rnode_plugin.core.regularizers.Regularizer`.
    """
    function, extra, keywords = call_of(net, args)
    plain = function is net and order == 1 and not (extra or keywords or slots.found)
    if order > 1:
        function, extra, keywords = first_order_system(function, extra, keywords, order), (), {}
    if not needs.isdisjoint(("vjp", "jvp")):
        function = originals(function, modules)
    return TorchdynField(function, extra, keywords, slots=slots, aux=aux_of(modules, needs), plain=plain)


class NetDynamics(Dynamics):
    """The dynamics of a user's net in one solve: state, log-determinant and penalties.

    An adjoint differentiates by a context too, and evaluations that repeat others leave the net's buffers alone.

    Args:
        net: ``net(z)``, ``net(t, z)``, or with a context ``net(t, z, context)``.
        z: the state ``(B, *event)`` at the start.
        context: one row for each sample; None if the net takes none.
        solver: of the solve.
        regularizers, estimator, divergence: as in :class:`~rnode_plugin.core.dynamics.Dynamics`.
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
        slots, needs = Slots(modules, z), needs_of(regularizers) | ({"vjp"} if divergence else set())
        if context is None:
            field: Any = field_of(net, modules, slots, None, needs=needs)
        else:
            function = originals(net, modules) if divergence else net
            field = TorchdynField(function, (context,), {}, slots=slots, aux=aux_of(modules, needs))
        if divergence:
            field = fastest(field, net, z, one_graph=type(estimator) is Exact and gradient_of(solver).through_steps)
        super().__init__(field, regularizers=regularizers, estimator=estimator, divergence=divergence)

    def parameters(self) -> Sequence[Tensor]:
        return tensors_of((self._net, *self.rates.values()), self._context)

    def repeating(self) -> contextlib.AbstractContextManager[None]:
        return buffers_kept(self._net)


def fastest(field: TorchdynField, net: Any, z: Tensor, *, one_graph: bool) -> Field:
    """The net's own products where it has some, without a double backward; else ``field``.

    Args:
        field: the field of ``net``, whose products are autograd's.
        net: the user's module or function.
        z: a state.
        one_graph: whether evaluations may share one graph of what depends on the parameters alone, for a stack of
            layers that is recognised.
    """
    stack = recognise(net, z) if one_graph else None
    if stack is not None:
        return stack
    return net if field.plain and isinstance(net, Field) else field


def tensors_of(parts: Iterable[Any], args: Any) -> list[Tensor]:
    """What an adjoint differentiates by: the parameters of the modules in ``parts``, and tensors in ``args``."""
    found = [p for part in parts if isinstance(part, nn.Module) for p in part.parameters()]
    given = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.requires_grad]
    return list({id(x): x for x in [*found, *given]}.values())


def is_cnf(module: nn.Module) -> bool:
    """Whether ``module`` keeps a trace in front of ``z``: torchdyn's CNF, ours, or one with a ``noise_dist``."""
    return hasattr(module, "noise_dist")


def has_hooks(module: nn.Module) -> bool:
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


def originals(function: Callable[..., Any], modules: Iterable[nn.Module]) -> Callable[..., Any]:
    """``function`` with the originals of all that is compiled inside: torch.compile has no double backward."""
    return _run_original(function) if _has_compiled_parts(modules) else function


def aux_of(modules: Iterable[nn.Module], needs: Set[str]) -> Any:
    """The method ``aux`` of the module that has one, if it is needed."""
    if "aux" not in needs:
        return None
    return next((module.aux for module in modules if callable(getattr(type(module), "aux", None))), None)


def _has_compiled_parts(modules: Iterable[nn.Module]) -> bool:
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
