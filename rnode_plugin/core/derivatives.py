"""Field: a velocity, its products with the Jacobian and its directional derivatives, from one pass.

:class:`AutogradField` makes a field of any function ``(t, z)`` by automatic differentiation. A field that has a
faster pass derives from :class:`Field` itself.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast, final

import torch
from torch import Tensor

from .part import Part

Velocity = Callable[[Tensor, Tensor], Tensor]
"""A vector field ``f(t, z)``. It maps a scalar time and a state ``(B, *event)`` to a velocity ``(B, *event)``."""

DirectionalDerivative = Callable[[Tensor, float], Tensor]

VELOCITY: frozenset[str] = frozenset()
"""The argument ``wants`` of :meth:`Field.linearize` for a caller that needs the velocity alone."""


class Linearization(NamedTuple):
    """The result of one pass over a field. Quantities that were not wanted may be None.

    The names of the attributes, except ``dz``, are the names for ``wants``.

    Attributes:
        dz: velocity ``f(t, z)``, ``(B, *event)``.
        products: ``v^T df/dz`` for the probe vectors ``v``, with their shape.
        rows: all rows of ``df/dz``, ``(D, B, *event)``.
        trace: exact trace of ``df/dz``, the divergence of ``f``, ``(B,)``.
        jvp: function from ``(v, dt)`` to ``df/dz v + dt df/dt``; ``v`` and the result have the shape of ``z``.
        pull: function from ``v`` to ``v^T df/dz``, for products after the pass; ``v`` and the result have the shape
            of ``z``. A field may leave it out though it is wanted.
    """

    dz: Tensor
    products: Tensor | None = None
    rows: Tensor | None = None
    trace: Tensor | None = None
    jvp: DirectionalDerivative | None = None
    pull: Callable[[Tensor], Tensor] | None = None


class Field(ABC):
    """A vector field that computes its velocity, products with its Jacobian and derivatives in one pass.

    Derive from it to compute these faster than automatic differentiation does. A module derives from
    ``(nn.Module, Field)``, in this order, and its ``forward(t, z)`` is the call. Any other function or module
    ``f(t, z)`` becomes an :class:`AutogradField`.

    A call returns the velocity, computed by operations that autograd can differentiate any number of times. A
    solve evaluates :meth:`linearize`, whose result has gradients of at least first order.

    Attributes:
        radius: r, if the states are images ``(B, C, H, W)`` and the velocity at a pixel depends on no pixel that
            is more than r rows or more than r columns away; None if that is not known. An exact trace relies on
            it, as on the products: it is not checked.

    Example:
        >>> import torch
        >>> from rnode_plugin.core.derivatives import AutogradField, Field, Linearization
        >>> class Decay(torch.nn.Module, Field):
        ...     def forward(self, t, z):
        ...         return -t * z
        ...
        ...     def linearize(self, t, z, probes=None, wants=frozenset()):
        ...         if wants <= {"products", "trace"}:
        ...             products = None if probes is None else -t * probes
        ...             return Linearization(self(t, z), products, trace=-t * z[0].numel() * z.new_ones(z.shape[0]))
        ...         return AutogradField(self).linearize(t, z, probes, wants)
        >>> Decay().linearize(torch.tensor(2.0), torch.ones(1, 3), None, frozenset({"trace"})).trace
        tensor([-6.])
    """

    radius: int | None = None

    @abstractmethod
    def __call__(self, t: Tensor, z: Tensor, /) -> Tensor:
        """Velocity ``(B, *event)`` at time ``t``, a scalar, and state ``z (B, *event)``."""

    @abstractmethod
    def linearize(
        self, t: Tensor, z: Tensor, probes: Tensor | None = None, wants: frozenset[str] = VELOCITY
    ) -> Linearization:
        """The velocity and the quantities that ``wants`` names.

        Args:
            t, z: as for a call.
            probes: the probe vectors, ``(B, *event)``, or ``(k, B, *event)`` for k of them.
            wants: names of attributes of :class:`Linearization`: ``"products"`` (with the probes), ``"rows"``,
                ``"trace"``, ``"jvp"``, ``"pull"``. Only a ``"pull"`` may be left out.
        """

    def prepared(self, z: Tensor, probes: Tensor | None = None, *, one_graph: bool = True) -> Field:
        """This field for one solve from ``z (B, *event)``, with all constants of the solve computed; or itself.

        Args:
            z: a state of the shape, dtype and device of the solve's.
            probes: the probe vectors of the solve, if they are known.
            one_graph: whether evaluations may share one graph of the quantities that depend only on the parameters.
                A continuous adjoint needs a graph to the parameters themselves at each evaluation.
        """
        return self

    def layout(self, x: Tensor) -> Tensor:
        """``x (B, *event)`` in the memory layout in which this field is fast; by default ``x`` itself."""
        return x

    def traceable(self) -> Field:
        """This field in operations that torch.compile can trace, without checks; by default the field itself."""
        return self

    def inputs(self) -> Sequence[Tensor]:
        """Tensors that evaluations read and no module has, such as a context or what :meth:`prepared` made.

        A backward pass that evaluates again differentiates with respect to them; by default there are none.
        """
        return ()


def as_field(field: Velocity, part: Part | None = None, *, radius: int | None = None) -> Field:
    """``field`` itself if it is a :class:`Field` of all of the state, else an :class:`AutogradField` of it.

    ``radius`` is given by the user for a field without a known radius. Such a field becomes an
    :class:`AutogradField` too, which checks it.
    """
    # a field with a faster pass differentiates the whole state, so for a part autograd does the work instead
    if part is None and isinstance(field, Field) and (radius is None or field.radius is not None):
        return field
    return AutogradField(field, part=part, radius=radius)


def radius_of(field: object, given: int | None) -> int | None:
    """The radius by which an exact trace of ``field`` takes its products: its own, else the ``given`` one."""
    own = field.radius if isinstance(field, Field) else None
    return given if own is None else own


@final
class AutogradField(Field):
    """A differentiable function ``(t, z)`` as a :class:`Field`, by reverse-mode automatic differentiation.

    It also works under ``no_grad`` and ``inference_mode``. Results have a graph if gradients are enabled.
    ``J v`` comes from applying reverse mode twice. In training this is faster than forward mode, and it is right
    for custom autograd Functions, for which nested forward mode silently gives zero.

    Do not pass ``self.method`` as the function, because it would create a reference cycle in every solve.

    Args:
        field: the function, called as ``field(t, z, *extra)``.
        extra: constants of the function, such as a context.
        part: the part of the state to differentiate with respect to, whose velocity is differentiated; None: all of
            it. The ``dz`` of :meth:`linearize` is the velocity of the whole state, everything else belongs to the
            part.
        captured: whether evaluations become a part of one compiled step, in which nothing can be checked.
        radius: the :attr:`Field.radius` of the part, which is checked; None: it is not known.
    """

    def __init__(
        self,
        field: Callable[..., Tensor],
        *extra: Tensor,
        part: Part | None = None,
        captured: bool = False,
        radius: int | None = None,
    ) -> None:
        self._field, self._extra, self.part, self.radius = field, extra, part, radius
        self.captured = captured

    def __call__(self, t: Tensor, z: Tensor, /) -> Tensor:
        return self._field(t, z, *self._extra)

    def linearize(
        self, t: Tensor, z: Tensor, probes: Tensor | None = None, wants: frozenset[str] = VELOCITY
    ) -> Linearization:
        f, extra = self._field, self._extra
        if not wants:
            return Linearization(f(t, z, *extra))
        if self.part is not None:
            return self._of_part(self.part, t, z, probes, wants)
        if self.captured:
            return by_vjp(self, t, z, probes, wants)
        if torch.compiler.is_dynamo_compiling():
            # a user's own torch.compile cannot trace autograd.grad, so its graph leaves this evaluation out
            outside = cast("Callable[..., Linearization]", torch.compiler.disable(self.linearize))
            return outside(t, z, probes, wants)
        along, later = "jvp" in wants, "pull" in wants
        # Products need a graph even if the caller wants none, so gradients are enabled here in any case. `keep` is
        # whether the results keep their graph.
        keep = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        several = "rows" in wants or "trace" in wants or (probes is not None and probes.ndim > z.ndim)
        with torch.inference_mode(False), torch.enable_grad():
            if along:
                t, z = _as_variables(t, z, keep=keep)
            else:
                t, z = _usable(t), _as_variable(z, keep=keep)
            dz = f(t, z, *extra)

            def pull(v: Tensor) -> Tensor:
                """``v^T d(dz)/dz``; zero for a field that ignores its state."""
                vjp = None
                if dz.requires_grad:
                    # without a further reader, torch may free the graph during this product
                    retain = keep or several or along or later
                    v = _usable(v).to(dz.dtype)
                    vjp = torch.autograd.grad(dz, z, v, retain, create_graph=keep, allow_unused=True)[0]
                return torch.zeros_like(z) if vjp is None else vjp

            products, rows, trace = _products(wants, z, probes, pull)
            jvp = _double_reverse(dz, t, z, keep=keep) if along else None
            pull_later = functools.partial(_later, pull, keep) if later else None
        linearization = Linearization(dz, products, rows, trace, jvp, pull_later)
        if keep:
            return linearization
        return linearization._replace(
            dz=dz.detach(),
            products=None if products is None else products.detach(),
            rows=None if rows is None else rows.detach(),
        )

    def traceable(self) -> AutogradField:
        return AutogradField(self._field, *self._extra, part=self.part, captured=True, radius=self.radius)

    def _of_part(
        self, part: Part, t: Tensor, state: Tensor, probes: Tensor | None, wants: frozenset[str]
    ) -> Linearization:
        """Linearize with the part as the only variable: the rest of the state enters as a constant."""
        # The velocity of the whole state is stored by the call, since a second evaluation would cost as much and
        # could draw other random numbers.
        velocities: list[Tensor] = []

        def of_part(t: Tensor, z: Tensor) -> Tensor:
            velocities.append(self(t, cast("Tensor", part.put(state, z))))
            return part.take(velocities[-1])

        field = AutogradField(of_part, captured=self.captured, radius=self.radius)
        linearization = field.linearize(t, part.take(state), probes, wants)
        whole = velocities[0]
        if not torch.is_grad_enabled():  # the graph was for the products, the caller wants none
            whole = tuple(x.detach() for x in whole) if part.is_tuple else whole.detach()
        return linearization._replace(dz=cast("Tensor", whole))


def _later(pull: Callable[[Tensor], Tensor], keep: bool, v: Tensor) -> Tensor:
    """Call ``pull`` after its evaluation has ended, in any grad mode."""
    with torch.inference_mode(False), torch.enable_grad():
        product = pull(v)
    return product if keep else product.detach()


def by_vjp(f: Velocity, t: Tensor, z: Tensor, probes: Tensor | None, wants: frozenset[str]) -> Linearization:
    """Velocity and derivatives by ``torch.func.vjp``.

    It reads no number and checks nothing, so that torch.compile can trace it.
    """
    if "jvp" not in wants:
        dz, pull_z = torch.func.vjp(lambda z: f(t, z), z)[:2]

        def pull(v: Tensor) -> Tensor:
            return pull_z(v.to(dz.dtype))[0]

        return Linearization(dz, *_products(wants, z, probes, pull), pull=pull)
    dz, pull_both = torch.func.vjp(f, t, z)[:2]

    def pull_second(v: Tensor) -> Tensor:
        return pull_both(v.to(dz.dtype))[1]

    def jvp(v: Tensor, dt: float = 0.0) -> Tensor:
        # u -> (u^T df/dt, u^T df/dz) is linear, so its transpose at any u, here 0, gives df/dt dt + df/dz v
        transpose = torch.func.vjp(pull_both, torch.zeros_like(dz))[1]
        return transpose((torch.full_like(t, dt), v.to(z.dtype)))[0]

    return Linearization(dz, *_products(wants, z, probes, pull_second), jvp=jvp, pull=pull_second)


def total_derivative(
    field: Velocity,
    t: Tensor,
    z: Tensor,
    order: int,
    *,
    part: Callable[[Tensor], Tensor] | None = None,
    captured: bool = False,
) -> Tensor:
    """``d^order z / dt^order`` along the trajectory of ``field`` through ``(t, z)``, of the shape of ``z``.

    Order 1 is the velocity. Each of the ``order - 1`` nested derivatives costs about three times the one before.
    With ``part``, which takes a part of a velocity, it is the derivative of that part, while all of ``z`` moves.
    """

    def velocity_of_part(t: Tensor, z: Tensor) -> Tensor:
        return field(t, z) if part is None else part(field(t, z))

    # d/dt of g(t, z(t)) is the derivative of g along (f, 1), which is again a function of (t, z)
    derivative = velocity_of_part
    for _ in range(order - 1):
        derivative = _along(field, derivative, captured=captured)
    if captured:
        return derivative(t, z).to(z.dtype)
    keep = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        total = derivative(*_as_variables(t, z, keep=keep)).to(z.dtype)
    return total if keep else total.detach()


def trace_of_rows(rows: Tensor) -> Tensor:
    """The trace ``(B,)`` of Jacobians given by their rows ``(D, B, *event)``."""
    # (D, B, *event) -> (D, B, D); the extra dimension is for samples (B,), which have no event to flatten
    return rows.unsqueeze(-1).flatten(2).diagonal(dim1=0, dim2=2).sum(-1)


def unit_vectors(z: Tensor) -> Tensor:
    """The unit vectors of the event space of ``z (B, *event)``, ``(D, 1, *event)``."""
    dims = math.prod(z.shape[1:])
    return torch.eye(dims, dtype=z.dtype, device=z.device).reshape(dims, 1, *z.shape[1:])


_JVP = frozenset({"jvp"})


def _along(field: Velocity, derivative: Velocity, *, captured: bool) -> Velocity:
    """The derivative of a function of ``(t, z)`` along the field's trajectories."""

    def along(t: Tensor, z: Tensor) -> Tensor:
        jvp = AutogradField(derivative, captured=captured).linearize(t, z, None, _JVP).jvp
        assert jvp is not None
        return jvp(field(t, z), 1.0)

    return along


def _products(
    wants: frozenset[str], z: Tensor, probes: Tensor | None, pull: Callable[[Tensor], Tensor]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Products with the probes, rows and exact trace, as far as they are wanted, from ``v^T df/dz = pull(v)``."""
    products = rows = trace = None
    if "rows" in wants or "trace" in wants:
        rows = torch.stack([pull(v.expand_as(z)) for v in unit_vectors(z)])
        trace = trace_of_rows(rows) if "trace" in wants else None
    if "products" in wants:
        assert probes is not None
        products = torch.stack([pull(v) for v in probes]) if probes.ndim > z.ndim else pull(probes)
    return products, rows if "rows" in wants else None, trace


def _double_reverse(dz: Tensor, t: Tensor, z: Tensor, *, keep: bool) -> DirectionalDerivative:
    """Derivatives along directions from the graph of ``dz``; zero where that does not reach ``z``.

    ``u^T J`` is linear in ``u``, so its derivative with respect to ``u``, pulled back with ``v``, is ``J v`` for
    any ``u``.
    """

    def jvp(v: Tensor, dt: float = 0.0) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            derivative = push(_usable(v), dt)
        return derivative if keep else derivative.detach()

    def push(v: Tensor, dt: float) -> Tensor:
        if not dz.requires_grad:
            return torch.zeros_like(z)
        u = torch.zeros_like(dz).requires_grad_()
        u = _Variables.apply(z, u)[1] if keep else u  # younger than z, which keeps the walk back to it short
        inputs, tangents = ((z,), (v,)) if dt == 0 else ((z, t), (v, torch.full_like(t, dt)))
        pulled = torch.autograd.grad(dz, inputs, u, create_graph=True, allow_unused=True)
        pairs = [(p, w.to(p.dtype)) for p, w in zip(pulled, tangents, strict=True) if p is not None]
        # a function that is linear in u and does not depend on u is zero
        pairs = [(p, w) for p, w in pairs if p.requires_grad]
        if not pairs:
            return torch.zeros_like(z)
        (product,) = torch.autograd.grad(
            [p for p, _ in pairs], u, [w for _, w in pairs], create_graph=True, allow_unused=True
        )
        return torch.zeros_like(z) if product is None else product

    return jvp


def _usable(x: Tensor) -> Tensor:
    """``x``, or a clone if it was made in inference mode: such a tensor cannot be saved for a backward pass."""
    return x.clone() if x.is_inference() else x


def _as_variable(x: Tensor, *, keep: bool) -> Tensor:
    """``x`` as a new variable to differentiate with respect to.

    It is a new one even if ``x`` requires a gradient, because a derivative with respect to the time must not run
    through a state that was computed from the same time.
    """
    x = _usable(x)
    if keep and x.requires_grad:
        return x.view_as(x)  # a node of the graph, so that the loss still reaches x
    return x.detach().requires_grad_()


def _as_variables(t: Tensor, z: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
    """Time and state as new variables; see :func:`_as_variable`."""
    if keep and (t.requires_grad or z.requires_grad):
        return _Variables.apply(_usable(t), _usable(z))
    return _as_variable(t, keep=keep), _as_variable(z, keep=keep)


class _Variables(torch.autograd.Function):
    """Views of the tensors as outputs of one node of the graph.

    Autograd walks the graph back as far as the earliest tensor with respect to which it differentiates. If one of
    these were a leaf, each evaluation would walk back over all earlier steps of the solve.
    """

    @staticmethod
    def forward(ctx: object, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients
