"""The field protocol: velocity, products with the Jacobian and directional derivatives from one pass.

:class:`Field` is the protocol. :class:`AutogradField` implements it for any function ``(t, z)`` by automatic
differentiation. A field that has a faster pass implements the protocol itself.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..errors import ConfigError
from .modes import exporting, transforms_active

Velocity = Callable[[Tensor, Tensor], Tensor]
"""A vector field ``f(t, z)``: time, a scalar tensor, and state ``(B, *event)`` to velocity ``(B, *event)``."""

DirectionalDerivative = Callable[[Tensor, float], Tensor]


class Ask(NamedTuple):
    """What one pass over a field gives in addition to the velocity.

    Attributes:
        products: ``"noise"`` for the products ``noise^T df/dz``, ``"rows"`` for all rows of ``df/dz``, ``""`` for
            none.
        jvp: whether derivatives along directions are wanted.
        divergence: whether the exact divergence is wanted.
        aux: whether values that the field offers by name are wanted.
    """

    products: Literal["", "noise", "rows"] = ""
    jvp: bool = False
    divergence: bool = False
    aux: bool = False


VELOCITY = Ask()
"""The velocity alone. Of an augmented system also the penalties that need nothing more."""

RATES = Ask("noise", jvp=True, divergence=True, aux=True)
"""All rates of an augmented system, from the one pass over the field that it needs for them."""


class Linearization(NamedTuple):
    """The result of one pass over a field. What was not asked for may be None.

    Attributes:
        dz: velocity ``f(t, z)``, ``(B, *event)``.
        products: ``noise^T df/dz`` of the shape of the noise, or all rows of ``df/dz``, ``(D, B, *event)``.
        jvp: ``(v, dt)`` to ``df/dz v + dt df/dt``, ``v`` and the result of the shape of ``z``.
        divergence: exact ``div f``, ``(B,)``.
        aux: values by name, such as ``"potential_rate"``, the ``(B,)`` of a potential's d/dt that ``hjb`` reads.
    """

    dz: Tensor
    products: Tensor | None = None
    jvp: DirectionalDerivative | None = None
    divergence: Tensor | None = None
    aux: Mapping[str, Tensor] | None = None


@runtime_checkable
class Field(Protocol):
    """A vector field that gives its velocity together with products and derivatives, from one pass.

    A call returns the velocity, computed by operations that autograd and ``torch.func`` can differentiate any
    number of times. A solve evaluates :meth:`linearize`, whose result has gradients of at least first order.
    """

    def __call__(self, t: Tensor, z: Tensor, /) -> Tensor:
        """Velocity ``(B, *event)`` at time ``t``, a scalar, and state ``z (B, *event)``."""
        ...

    def linearize(self, t: Tensor, z: Tensor, noise: Tensor | None = None, *, ask: Ask = VELOCITY) -> Linearization:
        """The velocity and what ``ask`` names.

        Args:
            t, z: as for a call.
            noise: ``(B, *event)``, or ``(k, B, *event)`` for k vectors, if ``ask.products`` is ``"noise"``.
            ask: what is wanted.
        """
        ...


def as_field(field: Velocity) -> Field:
    """``field`` itself if it implements the protocol, else an :class:`AutogradField` of it."""
    return field if isinstance(field, Field) else AutogradField(field)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of ``module`` may do more than its class does: it has hooks, or another forward method."""
    own = vars(module)
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(own.get(name) for name in names) or "forward" in own


class AutogradField:
    """Any differentiable function ``(t, z)`` as a :class:`Field`, by reverse-mode automatic differentiation.

    It also works under ``no_grad``, ``inference_mode`` and the transforms of ``torch.func``. Results have a graph
    if gradients are enabled. Reverse mode twice gives ``J v``. It is faster in training than forward mode, and it
    is right for custom autograd Functions, for which nested forward mode silently gives zero. A field that cuts its
    graph is refused, and so is the exact Jacobian of a field that mixes samples.

    A subclass overrides the call. If it passed a bound method as the function, each solve would make a reference
    cycle.

    Args:
        field: the function.
        aux: maps ``(t, z)`` to values by name that the field offers. None takes the function's method ``aux``, if
            it has one.
    """

    def __init__(
        self, field: Velocity, *, aux: Callable[[Tensor, Tensor], Mapping[str, Tensor]] | None = None
    ) -> None:
        self._field = field
        self._aux = getattr(field, "aux", None) if aux is None else aux
        self._ignores_state = False
        self._samples_are_apart = False

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        return self._field(t, z)

    def linearize(self, t: Tensor, z: Tensor, noise: Tensor | None = None, *, ask: Ask = VELOCITY) -> Linearization:
        aux = None
        if ask.aux:
            aux = {} if self._aux is None else self._aux(t, z)
        if not (ask.products or ask.jvp or ask.divergence):
            return Linearization(self(t, z), aux=aux)
        if transforms_active():
            return self._in_transform(t, z, noise, ask, aux)
        keep = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        several = ask.products == "rows" or ask.divergence or (noise is not None and noise.ndim > z.ndim)
        with torch.inference_mode(False), torch.enable_grad():
            if ask.jvp:
                t, z = _as_variables(t, z, keep=keep)
            else:
                t, z = _usable(t), _as_variable(z, keep=keep)
            dz = self(t, z)

            def pull(v: Tensor) -> Tensor:
                """``v^T d(dz)/dz``; zero for a field that ignores its state."""
                vjp = None
                if dz.requires_grad:
                    retain = keep or several or ask.jvp
                    v = _usable(v).to(dz.dtype)
                    vjp = torch.autograd.grad(dz, z, v, retain, create_graph=keep, allow_unused=True)[0]
                return self._zero(t, z, dz) if vjp is None else vjp

            products, divergence = _products(ask, z, noise, pull)
            if (ask.products == "rows" or ask.divergence) and not self._samples_are_apart:
                _refuse_mixed_samples(z, dz)
                self._samples_are_apart = True
        jvp = None
        if ask.jvp:
            jvp = _double_reverse(dz, t, z, keep=keep, zero=lambda: self._zero(t, z, dz))
        if not keep:
            dz = without_graph(dz)
            products = None if products is None else without_graph(products)
        return Linearization(dz, products, jvp, divergence, aux)

    def _zero(self, t: Tensor, z: Tensor, dz: Tensor) -> Tensor:
        """The product with the Jacobian of a field whose graph does not reach its state: zero.

        That is right for a field that ignores its state. A second evaluation at another state shows whether it
        does.

        Raises:
            ConfigError: if the velocity is different there.
        """
        if self._ignores_state or z.is_meta:
            return torch.zeros_like(z)
        with torch.no_grad():
            state = z.detach()
            # another value in each entry, so that no symmetry of the field hides the change
            shift = torch.linspace(0.1, 0.3, max(state.numel(), 1), dtype=state.real.dtype, device=state.device)
            moved = state + shift[: state.numel()].reshape(state.shape) * (1 + state.abs())
            there = copy.copy(self)(t.detach(), moved)  # a copy: this evaluation is not the solve's
        if not torch.equal(there, dz):
            raise ConfigError(
                "the vector field runs without a graph (no_grad, detach or numpy inside it), so its Jacobian would "
                "count as zero in jacfrob and in a trace. Let the field run with gradients, or follow penalties "
                "that need no Jacobian, such as kinetic."
            )
        self._ignores_state = bool(dz.any())  # where all is zero nothing can be seen
        return torch.zeros_like(z)

    def _in_transform(
        self, t: Tensor, z: Tensor, noise: Tensor | None, ask: Ask, aux: Mapping[str, Tensor] | None
    ) -> Linearization:
        """The same inside a transform of ``torch.func``, where autograd's own functions fail."""
        if not ask.jvp:
            dz, pull = torch.func.vjp(lambda z: self(t, z), z)[:2]
            products, divergence = _products(ask, z, noise, lambda v: pull(v.to(dz.dtype))[0])
            return Linearization(dz, products, None, divergence, aux)
        dz, pull = torch.func.vjp(self, t, z)[:2]
        products, divergence = _products(ask, z, noise, lambda v: pull(v.to(dz.dtype))[1])

        def jvp(v: Tensor, dt: float = 0.0) -> Tensor:
            transpose = torch.func.vjp(pull, torch.zeros_like(dz))[1]
            return transpose((torch.full_like(t, dt), v.to(z.dtype)))[0]

        return Linearization(dz, products, jvp, divergence, aux)


class PartField(AutogradField):
    """The field of a part of the state. The rest of the state is constant at each evaluation.

    Args:
        field: the field of the whole state.
        part: maps a state, or its velocity, to the part ``(B, *event)``.
        replaced: maps ``(state, z)`` to the state with ``z`` as that part.
        aux: as for :class:`AutogradField`.

    Attributes:
        state: the whole state of the evaluation.
        velocity: the whole velocity, once the field was evaluated there.
    """

    def __init__(
        self, field: Any, *, part: Callable[[Any], Tensor], replaced: Callable[[Any, Tensor], Any], aux: Any = None
    ) -> None:
        super().__init__(field, aux=aux)
        self.part, self._replaced = part, replaced
        self.state: Any = None
        self.velocity: Any = None

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        self.velocity = self._field(t, self._replaced(self.state, z))
        return self.part(self.velocity)


def total_derivative(field: Velocity, t: Tensor, z: Tensor, order: int) -> Tensor:
    """``d^order z / dt^order`` along the trajectory of ``field`` through ``(t, z)``, of the shape of ``z``.

    Order 1 is the velocity. Each of the ``order - 1`` nested derivatives costs about three times the one before.
    """
    derivative = field
    for _ in range(order - 1):
        derivative = _along(field, derivative)
    if transforms_active():
        return derivative(t, z).to(z.dtype)
    keep = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        found = derivative(*_as_variables(t, z, keep=keep)).to(z.dtype)
    return found if keep else without_graph(found)


def without_graph(x: Tensor) -> Tensor:
    """``x`` without its graph. A tangent of forward-mode differentiation stays; ``detach`` would drop it."""
    if transforms_active():  # no graph is made there unless the caller's gradients are enabled
        return x
    primal, tangent = forward_ad.unpack_dual(x)
    return primal.detach() if tangent is None else forward_ad.make_dual(primal.detach(), tangent.detach())


def trace_of_rows(rows: Tensor) -> Tensor:
    """The trace ``(B,)`` of Jacobians given by their rows ``(D, B, *event)``."""
    return rows.unsqueeze(-1).flatten(2).diagonal(dim1=0, dim2=2).sum(-1)


def unit_vectors(z: Tensor) -> Tensor:
    """The unit vectors of the event space of ``z (B, *event)``, ``(D, 1, *event)``."""
    dims = math.prod(z.shape[1:])
    return torch.eye(dims, dtype=z.dtype, device=z.device).reshape(dims, 1, *z.shape[1:])


def _along(field: Velocity, derivative: Velocity) -> Velocity:
    """The derivative of a function of ``(t, z)`` along the field's trajectories."""

    def along(t: Tensor, z: Tensor) -> Tensor:
        jvp = AutogradField(derivative).linearize(t, z, ask=Ask(jvp=True)).jvp
        assert jvp is not None
        return jvp(field(t, z), 1.0)

    return along


def _products(
    ask: Ask, z: Tensor, noise: Tensor | None, pull: Callable[[Tensor], Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """Products and exact divergence from ``pull``, which gives ``v^T df/dz``."""
    products = divergence = None
    if ask.products == "rows" or ask.divergence:
        products = torch.stack([pull(v.expand_as(z)) for v in unit_vectors(z)])
        divergence = trace_of_rows(products) if ask.divergence else None
    if ask.products == "noise":
        assert noise is not None
        products = torch.stack([pull(v) for v in noise]) if noise.ndim > z.ndim else pull(noise)
    return products if ask.products else None, divergence


def _double_reverse(
    dz: Tensor, t: Tensor, z: Tensor, *, keep: bool, zero: Callable[[], Tensor]
) -> DirectionalDerivative:
    """Derivatives along directions from the graph of ``dz``; ``zero()`` where that does not reach ``z``.

    ``u^T J`` is linear in ``u``, and its own transpose is the product wanted.
    """

    def jvp(v: Tensor, dt: float = 0.0) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            found = push(_usable(v), dt)
        return found if keep else without_graph(found)

    def push(v: Tensor, dt: float) -> Tensor:
        if not dz.requires_grad:
            return zero()
        u = torch.zeros_like(dz).requires_grad_()
        u = _Variables.apply(z, u)[1] if keep else u
        inputs, tangents = ((z,), (v,)) if dt == 0 else ((z, t), (v, torch.full_like(t, dt)))
        pulled = torch.autograd.grad(dz, inputs, u, create_graph=True, allow_unused=True)
        if pulled[0] is None:
            zero()
        pairs = [(p, w.to(p.dtype)) for p, w in zip(pulled, tangents, strict=True) if p is not None]
        pairs = [(p, w) for p, w in pairs if p.requires_grad]
        if not pairs:
            return torch.zeros_like(z)
        (product,) = torch.autograd.grad(
            [p for p, _ in pairs], u, [w for _, w in pairs], create_graph=True, allow_unused=True
        )
        return torch.zeros_like(z) if product is None else product

    return jvp


def _refuse_mixed_samples(z: Tensor, dz: Tensor) -> None:
    """Refuse a field whose velocity at one sample depends on other samples: a row of its Jacobian adds them up.

    Where samples are apart, a vector that is scaled by one number per sample gives the product scaled by the same
    numbers. They are powers of two, so that low precision rounds both in the same way. The check is left out where
    the host does not see values.
    """
    capturing = z.is_cuda and torch.cuda.is_current_stream_capturing()
    unseen = z.is_meta or capturing or exporting() or torch.compiler.is_compiling()
    if len(z) < 2 or not dz.requires_grad or unseen:
        return
    powers = torch.randint(8, (len(z),), generator=torch.Generator().manual_seed(0))
    powers[:8] = torch.arange(8)[: len(z)]  # samples of a small batch all differ
    scale = (2**powers).to(z).reshape(-1, *(1 for _ in z.shape[1:]))
    vectors = (torch.ones_like(dz), scale.to(dz.dtype).expand_as(dz))
    plain, scaled = (torch.autograd.grad(dz, z, v, True, allow_unused=True)[0] for v in vectors)
    if plain is None:  # the field ignores its state
        return
    apart, bound = scale * plain, torch.finfo(dz.dtype).eps ** 0.5
    if bool(((scaled - apart).abs() > bound * apart.abs().max()).any()):
        raise ConfigError(
            "the velocity of one sample depends on other samples, as in a graph or under batch norm, so the exact "
            "Jacobian of one sample does not exist. Give batch_dim=None, which makes the whole state one sample, "
            "to NeuralODE, odeint, regularize or penalties_at, or estimate by a random trace_noise."
        )


def _usable(x: Tensor) -> Tensor:
    """``x``, or a clone if it was made in inference mode: such a tensor cannot be saved for a backward pass."""
    return x.clone() if x.is_inference() else x


def _as_variable(x: Tensor, *, keep: bool) -> Tensor:
    """``x`` as a new variable to differentiate by, with the tangent of ``x``.

    It is a new one even if ``x`` requires a gradient: a derivative by the time must not run through a state that
    was computed from the same time.
    """
    x = _usable(x)
    if keep and x.requires_grad:
        return x.view_as(x)
    primal, tangent = forward_ad.unpack_dual(x)
    variable = primal.detach().requires_grad_()
    return variable if tangent is None else forward_ad.make_dual(variable, tangent)


def _as_variables(t: Tensor, z: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
    """Time and state as new variables; see :func:`_as_variable`."""
    if keep and (t.requires_grad or z.requires_grad):
        return _Variables.apply(_usable(t), _usable(z))
    return _as_variable(t, keep=keep), _as_variable(z, keep=keep)


class _Variables(torch.autograd.Function):
    """The tensors as they are, as the outputs of one node of the graph.

    Autograd walks the graph back to the earliest tensor that it differentiates by. From a leaf it would visit all
    steps of a solve at each evaluation.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tangents)
