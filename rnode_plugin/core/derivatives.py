"""Field: a velocity, its products with the Jacobian and its directional derivatives, from one pass.

:class:`AutogradField` makes a field of any function ``(t, z)`` by automatic differentiation. A field that has a
faster pass derives from :class:`Field` itself.
"""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast, final

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .modes import exporting, next_number, refuse_dual_numbers, transforms_active
from .part import Part
from .second_derivatives import WithoutGradient, check_second_derivative, wrong_third_derivative

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

    A call returns the velocity, computed by operations that autograd and ``torch.func`` can differentiate any
    number of times. A solve evaluates :meth:`linearize`, whose result has gradients of at least first order.

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
        ...     def linearize(self, t, z, probes=None, wants=frozenset(), *, peek=None):
        ...         if wants <= {"products", "trace"}:
        ...             products = None if probes is None else -t * probes
        ...             return Linearization(self(t, z), products, trace=-t * z[0].numel() * z.new_ones(z.shape[0]))
        ...         return AutogradField(self).linearize(t, z, probes, wants, peek=peek)
        >>> Decay().linearize(torch.tensor(2.0), torch.ones(1, 3), None, frozenset({"trace"})).trace
        tensor([-6.])
    """

    radius: int | None = None

    @abstractmethod
    def __call__(self, t: Tensor, z: Tensor, /) -> Tensor:
        """Velocity ``(B, *event)`` at time ``t``, a scalar, and state ``z (B, *event)``."""

    @abstractmethod
    def linearize(
        self,
        t: Tensor,
        z: Tensor,
        probes: Tensor | None = None,
        wants: frozenset[str] = VELOCITY,
        *,
        peek: Velocity | None = None,
    ) -> Linearization:
        """The velocity and the quantities that ``wants`` names.

        Args:
            t, z: as for a call.
            probes: the probe vectors, ``(B, *event)``, or ``(k, B, *event)`` for k of them.
            wants: names of attributes of :class:`Linearization`: ``"products"`` (with the probes), ``"rows"``,
                ``"trace"``, ``"jvp"``, ``"pull"``. Only a ``"pull"`` may be left out.
            peek: evaluates this field at other points, for checks. It leaves buffers and random generators
                unchanged, and draws from the generators as they are. None: the field itself evaluates.
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

    def inputs(self) -> Sequence[Tensor]:
        """Further tensors with respect to which an adjoint differentiates, such as a context; by default none."""
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


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of ``module`` may do more than its class does, through hooks or a replaced ``forward``.

    Hooks that are registered for all modules count too, except torch's own, which only count operations.
    """
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    # torch has no public names for these
    of_torch = nn.modules.module
    for hook in (*of_torch._global_forward_hooks.values(), *of_torch._global_forward_pre_hooks.values()):
        if not getattr(hook, "__module__", "").startswith("torch."):
            return True
    # a forward that was assigned to this one instance, as offloading tools do
    return "forward" in vars(module)


@dataclass(slots=True)
class Checked:
    """Results of checks that need to run once for each solve of a field.

    They are not stored with the net: a result for one function of a net, with its present layers and modes, need
    not hold for another function or in a later solve.

    Attributes:
        ignores_state: whether the velocity does not depend on the state.
        samples_are_apart: whether the velocity of a sample does not depend on other samples.
        radius_holds: whether the velocity at a pixel depends on no pixel beyond the radius.
        twice_differentiable: whether products with the Jacobian can be differentiated.
        third_derivative: reason why the third derivative is wrong; ``""``: it is right; None: not checked yet.
    """

    ignores_state: bool = False
    samples_are_apart: bool = False
    radius_holds: bool = False
    twice_differentiable: bool = False
    third_derivative: str | None = None


@final
class AutogradField(Field):
    """A differentiable function ``(t, z)`` as a :class:`Field`, by reverse-mode automatic differentiation.

    It also works under ``no_grad``, ``inference_mode`` and the transforms of ``torch.func``. Results have a graph
    if gradients are enabled. ``J v`` comes from applying reverse mode twice. In training this is faster than
    forward mode, and it is right for custom autograd Functions, for which nested forward mode silently gives zero.

    Do not pass ``self.method`` as the function, because it would create a reference cycle in every solve.

    Args:
        field: the function, called as ``field(t, z, *extra)``.
        extra: constants of the function, such as a context.
        part: the part of the state to differentiate with respect to, whose velocity is differentiated; None: all of
            it. The ``dz`` of :meth:`linearize` is the velocity of the whole state, everything else belongs to the
            part.
        checked: results of earlier checks of the function, which need not run again; None: there are none.
        radius: the :attr:`Field.radius` of the part, which is checked; None: it is not known.

    Raises:
        ConfigError: from :meth:`linearize`, for a field that cuts its graph, for the exact Jacobian of a field that
            mixes samples, for several probes with a field beyond its radius, and for layers whose backward pass
            cannot be differentiated.
    """

    def __init__(
        self,
        field: Callable[..., Tensor],
        *extra: Tensor,
        part: Part | None = None,
        checked: Checked | None = None,
        radius: int | None = None,
    ) -> None:
        self._field, self._extra, self.part, self.radius = field, extra, part, radius
        self._checked = Checked() if checked is None else checked

    def __call__(self, t: Tensor, z: Tensor, /) -> Tensor:
        return self._field(t, z, *self._extra)

    def linearize(
        self,
        t: Tensor,
        z: Tensor,
        probes: Tensor | None = None,
        wants: frozenset[str] = VELOCITY,
        *,
        peek: Velocity | None = None,
    ) -> Linearization:
        f, extra, elsewhere = self._field, self._extra, self if peek is None else peek
        if not wants:
            return Linearization(f(t, z, *extra))
        if self.part is not None:
            return self._of_part(self.part, t, z, probes, wants, elsewhere)
        if transforms_active():
            return _in_transform(self, t, z, probes, wants)
        refuse_dual_numbers()
        checked = self._checked
        along, later = "jvp" in wants, "pull" in wants
        # Products need a graph even if the caller wants none, so gradients are enabled here in any case. `keep` is
        # whether the results keep their graph.
        keep = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        whole = "rows" in wants or "trace" in wants
        several = whole or (probes is not None and probes.ndim > z.ndim)
        with torch.inference_mode(False), torch.enable_grad():
            if along:
                t, z = _as_variables(t, z, keep=keep)
            else:
                t, z = _usable(t), _as_variable(z, keep=keep)
            # products are differentiated again by a loss (keep), and J v takes two derivatives for its value
            checks_second = not checked.twice_differentiable and (keep or along)
            # a loss that contains J v takes a third derivative
            checks_third = along and keep and checked.third_derivative is None
            # nodes with a lower number are older than this evaluation
            start = next_number(z) if checks_second or checks_third else 0
            dz = f(t, z, *extra)
            if checks_second:
                checked.twice_differentiable = check_second_derivative(
                    dz, z, start, elsewhere, t, field=self._field, jvp=along
                )

            def pull(v: Tensor) -> Tensor:
                """``v^T d(dz)/dz``; zero for a field that ignores its state."""
                vjp = None
                if dz.requires_grad:
                    # without a further reader, torch may free the graph during this product
                    retain = keep or several or along or later
                    v = _usable(v).to(dz.dtype)
                    vjp = torch.autograd.grad(dz, z, v, retain, create_graph=keep, allow_unused=True)[0]
                return self._zero(elsewhere, t, z, dz) if vjp is None else vjp

            products, rows, trace = _products(wants, z, probes, pull)
            # If samples mix, a random product still gives an unbiased trace, because terms with the probes of other
            # samples have mean zero. Unit vectors in all samples at once would add them up.
            radius = self.radius if several and not whole else None
            if (whole or radius is not None) and not checked.samples_are_apart:
                checked.samples_are_apart = refuse_mixed_samples(z, dz)
            if radius is not None and not checked.radius_holds:
                checked.radius_holds = _refuse_wider(z, dz, radius)
        jvp = None
        if along:
            if checks_third:
                checked.third_derivative = wrong_third_derivative(dz, z, start)
            wrong = checked.third_derivative or ""
            jvp = _double_reverse(dz, t, z, keep=keep, zero=lambda: self._zero(elsewhere, t, z, dz), wrong=wrong)
        found = dz
        if not keep:
            found = without_graph(dz)
            products = None if products is None else without_graph(products)
            rows = None if rows is None else without_graph(rows)
        return Linearization(
            found, products, rows, trace, jvp, functools.partial(_later, pull, keep) if later else None
        )

    def _of_part(
        self,
        part: Part,
        t: Tensor,
        state: Tensor,
        probes: Tensor | None,
        wants: frozenset[str],
        elsewhere: Velocity,
    ) -> Linearization:
        """Linearize with the part as the only variable: the rest of the state enters as a constant."""
        # The velocity of the whole state is stored by the call, since a second evaluation would cost as much and
        # could draw other random numbers.
        velocities: list[Tensor] = []

        def of_part(t: Tensor, z: Tensor) -> Tensor:
            velocities.append(self(t, cast("Tensor", part.put(state, z))))
            return part.take(velocities[-1])

        def of_part_elsewhere(t: Tensor, z: Tensor) -> Tensor:
            return part.take(elsewhere(t, cast("Tensor", part.put(state, z))))

        field = AutogradField(of_part, checked=self._checked, radius=self.radius)
        found = field.linearize(t, part.take(state), probes, wants, peek=of_part_elsewhere)
        whole = velocities[0]
        if not torch.is_grad_enabled():  # the graph was for the products, the caller wants none
            whole = tuple(map(without_graph, whole)) if part.is_tuple else without_graph(whole)
        return found._replace(dz=cast("Tensor", whole))

    def _zero(self, elsewhere: Velocity, t: Tensor, z: Tensor, dz: Tensor) -> Tensor:
        """The product with the Jacobian of a field whose graph does not reach its state: zero.

        That is right for a field that ignores its state. A second evaluation at another state shows whether it
        does.

        Raises:
            ConfigError: if the velocity is different there.
        """
        if self._checked.ignores_state or z.is_meta:
            return torch.zeros_like(z)
        with torch.no_grad():
            state = z.detach()
            # another value in each entry, so that no symmetry of the field hides the change
            shift = torch.linspace(0.1, 0.3, max(state.numel(), 1), dtype=state.real.dtype, device=state.device)
            moved = state + shift[: state.numel()].reshape(state.shape) * (1 + state.abs())
            there = elsewhere(t.detach(), moved)
        if not torch.equal(there, dz):
            raise ConfigError(
                "the vector field runs without a graph (no_grad, detach or numpy inside it), so its Jacobian would "
                "count as zero in jacfrob and in a trace. Let the field run with gradients, or use penalties "
                "that need no Jacobian, such as kinetic."
            )
        self._checked.ignores_state = bool(dz.any())  # a velocity of zero everywhere shows nothing
        return torch.zeros_like(z)


def _later(pull: Callable[[Tensor], Tensor], keep: bool, v: Tensor) -> Tensor:
    """Call ``pull`` after its evaluation has ended, in any grad mode."""
    with torch.inference_mode(False), torch.enable_grad():
        found = pull(v)
    return found if keep else without_graph(found)


def _in_transform(f: Velocity, t: Tensor, z: Tensor, probes: Tensor | None, wants: frozenset[str]) -> Linearization:
    """Velocity and derivatives inside a transform of ``torch.func``, where autograd's own functions fail."""
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
    field: Velocity, t: Tensor, z: Tensor, order: int, *, part: Callable[[Tensor], Tensor] | None = None
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
        derivative = _along(field, derivative)
    if transforms_active():
        return derivative(t, z).to(z.dtype)
    keep = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        found = derivative(*_as_variables(t, z, keep=keep)).to(z.dtype)
    return found if keep else without_graph(found)


def without_graph(x: Tensor) -> Tensor:
    """``x`` without its graph, outside of the transforms of torch.func, where ``detach`` would drop a tangent."""
    # no graph is made there unless the caller's gradients are enabled
    return x if transforms_active() else x.detach()


def trace_of_rows(rows: Tensor) -> Tensor:
    """The trace ``(B,)`` of Jacobians given by their rows ``(D, B, *event)``."""
    # (D, B, *event) -> (D, B, D); the extra dimension is for samples (B,), which have no event to flatten
    return rows.unsqueeze(-1).flatten(2).diagonal(dim1=0, dim2=2).sum(-1)


def unit_vectors(z: Tensor) -> Tensor:
    """The unit vectors of the event space of ``z (B, *event)``, ``(D, 1, *event)``."""
    dims = math.prod(z.shape[1:])
    return torch.eye(dims, dtype=z.dtype, device=z.device).reshape(dims, 1, *z.shape[1:])


_JVP = frozenset({"jvp"})


def _along(field: Velocity, derivative: Velocity) -> Velocity:
    """The derivative of a function of ``(t, z)`` along the field's trajectories."""

    def along(t: Tensor, z: Tensor) -> Tensor:
        jvp = AutogradField(derivative).linearize(t, z, None, _JVP).jvp
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


def _double_reverse(
    dz: Tensor, t: Tensor, z: Tensor, *, keep: bool, zero: Callable[[], Tensor], wrong: str = ""
) -> DirectionalDerivative:
    """Derivatives along directions from the graph of ``dz``; ``zero()`` where that does not reach ``z``.

    ``wrong`` is the reason why their gradient is wrong, for the error of a backward pass; ``""``: it is right.

    ``u^T J`` is linear in ``u``, so its derivative with respect to ``u``, pulled back with ``v``, is ``J v`` for
    any ``u``.
    """

    def jvp(v: Tensor, dt: float = 0.0) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            found = push(_usable(v), dt)
            if wrong and keep:
                found = WithoutGradient.apply(found, wrong)
        return found if keep else without_graph(found)

    def push(v: Tensor, dt: float) -> Tensor:
        if not dz.requires_grad:
            return zero()
        u = torch.zeros_like(dz).requires_grad_()
        u = _Variables.apply(z, u)[1] if keep else u  # younger than z, which keeps the walk back to it short
        inputs, tangents = ((z,), (v,)) if dt == 0 else ((z, t), (v, torch.full_like(t, dt)))
        pulled = torch.autograd.grad(dz, inputs, u, create_graph=True, allow_unused=True)
        if pulled[0] is None:
            zero()  # for its check alone: df/dt may still contribute
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


def refuse_mixed_samples(z: Tensor, dz: Tensor, *, known: Tensor | None = None) -> bool:
    """Refuse a field whose velocity at one sample depends on other samples, since one product would mix their rows.

    If samples are independent, scaling a vector by one number per sample scales the product by the same numbers.
    They are powers of two, so that low precision rounds both in the same way. The check is left out where the host
    cannot read values.

    Args:
        z, dz: state and velocity ``(B, *event)``, with their graph.
        known: the product with ones as a sum of others, if the caller has it. It saves a product unless it rounds
            too differently from the scaled one.

    Returns:
        True if the check was conclusive, so that it need not run again. It is not for one sample, nor for a
        Jacobian of zero.

    Raises:
        ConfigError: for samples that depend on each other.
    """
    if _unseen(z) or len(z) < 2 or not dz.requires_grad:  # in this order, since len() freezes a program's batch
        return False
    powers = torch.randint(8, (len(z),), generator=torch.Generator().manual_seed(0))
    powers[:8] = torch.arange(8)[: len(z)]  # samples of a small batch all differ
    scale = (2**powers).to(z).reshape(-1, *(1 for _ in z.shape[1:]))

    def product(v: Tensor) -> Tensor | None:
        return torch.autograd.grad(dz, z, v, True, allow_unused=True)[0]

    def mixed(scaled: Tensor, plain: Tensor) -> bool:
        # sqrt(eps) is far above rounding, which is of order eps
        apart, bound = scale * plain, torch.finfo(dz.dtype).eps ** 0.5
        return bool(((scaled - apart).abs() > bound * apart.abs().max()).any())

    scaled = product(scale.to(dz.dtype).expand_as(dz))
    if scaled is None:  # the field ignores its state
        return False
    if known is not None and not mixed(scaled, known):
        return bool((known != 0).any())
    plain = product(torch.ones_like(dz))
    assert plain is not None
    if mixed(scaled, plain):
        raise ConfigError(
            "the velocity of one sample depends on other samples, as in a graph or under batch norm, so the exact "
            "Jacobian of one sample does not exist. Give batch_dim=None, which makes the whole state one sample, "
            "to NeuralODE, odeint, regularize or penalties_at, or estimate by a random trace_noise."
        )
    return bool((plain != 0).any())


def _refuse_wider(z: Tensor, dz: Tensor, radius: int) -> bool:
    """Refuse a field whose velocity at a pixel depends on pixels beyond ``radius``, which colors would add up.

    The products of some pixels, with random signs on all channels, must be exactly zero outside of their radius: a
    tolerance would let too small a radius pass, whose trace is wrong by a fraction of a percent.

    Args:
        z, dz: state and velocity ``(B, C, *space)``, with their graph.
        radius: in pixels.

    Returns:
        True if the check was conclusive, so that it need not run again. It is not for a Jacobian of zero, which a
        fresh net may have.

    Raises:
        ConfigError: for a field with a larger radius.
    """
    if _unseen(z) or not dz.requires_grad:
        return False
    space, found = z.shape[2:], list[bool]()
    signs = torch.randint(2, z.shape[:2], generator=torch.Generator().manual_seed(0)).to(dz) * 2 - 1
    for pixels in _pixels_to_check(space, radius):
        at = torch.ones(space, dtype=torch.bool, device=z.device)
        far = ~at
        for dim, (places, size) in enumerate(zip(pixels, space, strict=True)):
            distances = torch.arange(size)[:, None] - torch.tensor(places)
            nearest = distances.abs().amin(1).reshape(-1, *(1 for _ in space[dim + 1 :])).to(z.device)
            at, far = at & (nearest == 0), far | (nearest > radius)
        # torch's own convolutions give exact zeros, the fast ones of cuDNN rounding errors
        with torch.backends.cudnn.flags(enabled=False):
            v = signs.reshape(*signs.shape, *(1 for _ in space)) * at
            product = torch.autograd.grad(dz, z, v, True, allow_unused=True)[0]
        if product is None:  # the field ignores its state
            return False
        if bool((product[..., far] != 0).any()):
            raise ConfigError(
                f"the velocity at a pixel depends on pixels more than {radius} rows or columns away, so the "
                f"radius {radius} of this exact trace is too small. Each convolution adds dilation * (kernel_size "
                "// 2) to it, times all strides before it. A normalization over the image, attention or circular "
                "padding has no radius: take Exact() with a product for each dimension, or a random estimator."
            )
        found.append(bool((product != 0).any()))
    return all(found)


def _pixels_to_check(space: Sequence[int], radius: int) -> Iterator[list[Sequence[int]]]:
    """The pixels of each product that checks a ``radius``, by their places along each dimension of ``space``."""
    corners = itertools.product(*({0, size - 1} for size in space))  # circular padding shows there alone
    for pixel in (*corners, tuple(size // 2 for size in space)):
        yield [[place] for place in pixel]
    # With strides the reach of a pixel depends on its place. So check pixels in all rows and columns, many at once,
    # with two pixels between their surroundings, at which wider ones show.
    apart = 2 * radius + 3
    for first in range(min(apart, max(space))):
        yield [range(first % size, size, apart) for size in space]


def _unseen(z: Tensor) -> bool:
    """Whether the host cannot read values, so that checks are left out."""
    capturing = z.is_cuda and torch.cuda.is_current_stream_capturing()
    return z.is_meta or capturing or exporting() or torch.compiler.is_compiling()


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
