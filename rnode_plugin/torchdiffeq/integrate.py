"""torchdiffeq's ``odeint`` and ``odeint_adjoint`` with penalties on the vector field along the trajectory.

torchdiffeq integrates. The state gets one ``(B,)`` more per penalty, which the error norm does not see: steps, NFE
and values of the rest are those of the plain call.
"""

from __future__ import annotations

import itertools
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn
from torchdiffeq._impl.adjoint import find_parameters
from torchdiffeq._impl.misc import _mixed_norm, _rms_norm

from ..core.derivatives import PartField, without_graph
from ..core.dynamics import Dynamics
from ..core.ops import transforms_active
from ..core.penalties import Penalties, attach
from ..core.regularizers import Weighted, kind_of, span_policy, warn_of_flat_state
from ..core.trace_estimators import TraceEstimator, get_estimator
from ..errors import ConfigError, suggest
from ..plugins.registry import resolve_regularizers
from ..solvers import QUADRATURES

# as they were before `install` or `regularize` put others in their place
PLAIN: dict[str, Any] = {"odeint": torchdiffeq.odeint, "odeint_adjoint": torchdiffeq.odeint_adjoint}


Penalized = int | Sequence[int] | slice | Tensor
"""A tensor of a tuple or several, or the columns of one tensor: a slice, or a mask of booleans."""


class _Here(threading.local):
    """This thread: whether it evaluates the field of a solve with penalties, and how its block makes a solve."""

    evaluating = False
    following: Any = None


here = _Here()


def odeint(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[..., Tensor] | None = None,
    regularizers: Any = None,
    penalized: Penalized | None = None,
    batch_dim: int | None = 0,
    trace_noise: str = "gaussian",
    penalty_quadrature: str = "full",
) -> Any:
    """torchdiffeq's ``odeint`` with penalties on the vector field (sections 4 and 5).

    Without ``regularizers`` this is torchdiffeq's own call. With them the same steps are taken, with one evaluation
    of ``func`` per stage; ``jacfrob`` costs one product with the Jacobian of it.

    The arguments before ``regularizers`` are torchdiffeq's.

    Args:
        func: the vector field ``(t, y) -> dy``, of the shapes of ``y0``.
        y0: the first state, a tensor or a tuple of tensors.
        t: times ``(T,)``, rising or falling; the first is that of ``y0``.
        rtol, atol: tolerances of an adaptive method.
        method: torchdiffeq's name of it; None: ``"dopri5"``.
        options: of the method, such as ``{"step_size": 0.1}``.
        event_fn: ``(t, y)``; the solve ends where it crosses zero. The penalties' gradient includes the motion of
            the event's time. The time and the solution have that gradient with torchdiffeq's ``odeint_event`` only.
        regularizers: names (``"kinetic"``, ``"jacfrob"``), regularizer objects or functions ``rate(t, z, dz) ->
            (B,)``, or a mapping from these to lambda, as for :class:`~rnode_plugin.NeuralODE`. Step penalties need
            the solver's steps, which torchdiffeq does not show: they are refused.
        penalized: the tensor of a tuple ``y0`` that the penalties are about, or several, joined; None: the first.
            The others count as constants: of position and velocity, ``total_derivative`` wants both. A slice or a
            mask of booleans chooses columns of one tensor (of the first one of a tuple): a slice along dimension 1
            of ``(B, D, ...)``, a mask over the first dimensions of a sample.
        batch_dim: dimension of this tensor that holds the samples; None: the whole state is one sample, as for a
            field that mixes its rows; the nodes of a graph are not samples.
        trace_noise: noise of the product that ``jacfrob`` needs, such as ``"gaussian"``, ``"rademacher:4"`` or
            ``"exact"``; drawn once per solve from torch's generator, so random numbers that are drawn later differ
            from the plain call's.
        penalty_quadrature: ``"full"``; or ``"sampled"``: one evaluation in eight, drawn at random, makes the
            products with the Jacobian and counts eight times. Unbiased; penalties that need no product stay full.
            Not for ``odeint_adjoint``, whose error norm would see the draws.

    Returns:
        The solution as torchdiffeq gives it; with ``regularizers`` the pair of it and the penalties
        (:class:`~rnode_plugin.core.penalties.Penalties`), a mapping from names to integrals ``(B,)`` along the path
        with the sum of eq. 17 as its ``loss()``. With ``event_fn`` the triple of time, solution and penalties.

    Raises:
        ConfigError: for a state that is neither a tensor nor a tuple of tensors, or complex; for ``penalized`` or
            ``batch_dim`` that it lacks; for a regularizer that is unknown, given twice or about the solver's steps.

    Example:
        >>> import torch
        >>> from rnode_plugin.torchdiffeq import odeint
        >>> y0, t = torch.ones(4, 2), torch.tensor([0.0, 1.0])
        >>> y, penalties = odeint(lambda t, y: -y, y0, t, regularizers={"kinetic": 0.01})
        >>> round(float(penalties["kinetic"][0]), 4)  # 1 - exp(-2)
        0.8647
    """
    given = {"rtol": rtol, "atol": atol, "method": method, "options": options, "event_fn": event_fn}
    if regularizers is None:
        return torchdiffeq.odeint(func, y0, t, **given)
    wanted = follow(
        regularizers, penalized=penalized, batch_dim=batch_dim, trace_noise=trace_noise,
        penalty_quadrature=penalty_quadrature,
    )  # fmt: skip
    return _with_penalties("odeint", func, y0, t, given, wanted)


def odeint_adjoint(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[..., Tensor] | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_params: Any = None,
    regularizers: Any = None,
    penalized: Penalized | None = None,
    batch_dim: int | None = 0,
    trace_noise: str = "gaussian",
) -> Any:
    """torchdiffeq's ``odeint_adjoint`` with penalties on the vector field; see :func:`odeint`.

    The adjoint carries the penalties; its error norm sees the user's part of the state alone. Only
    ``method="scipy_solver"`` has no such norm: there the penalties take part in the choice of the steps, and values
    differ from the plain call's by as much as the tolerance.

    Args:
        adjoint_rtol, adjoint_atol: tolerances of the solve backward; None: ``rtol`` and ``atol``.
        adjoint_method: method of the solve backward; None: ``method``.
        adjoint_options: options of that method.
        adjoint_params: the parameters that get gradients; None: those of ``func``. Parameters of regularizers that
            are modules are added.

    Returns:
        As :func:`odeint`.

    Raises:
        ConfigError: as :func:`odeint`.
    """
    given = {
        "rtol": rtol, "atol": atol, "method": method, "options": options, "event_fn": event_fn,
        "adjoint_rtol": adjoint_rtol, "adjoint_atol": adjoint_atol, "adjoint_method": adjoint_method,
        "adjoint_options": adjoint_options, "adjoint_params": adjoint_params,
    }  # fmt: skip
    if regularizers is None:
        return torchdiffeq.odeint_adjoint(func, y0, t, **given)
    wanted = follow(regularizers, penalized=penalized, batch_dim=batch_dim, trace_noise=trace_noise)
    return _with_penalties("odeint_adjoint", func, y0, t, given, wanted)


@dataclass(frozen=True)
class Follow:
    """The penalties to follow in a solve, and where: made by :func:`follow`, which checks them."""

    weighted: dict[str, Weighted]
    penalized: tuple[int, ...]
    columns: slice | Tensor | None
    batch_dim: int | None
    estimator: TraceEstimator
    sampled: bool

    @property
    def regularizers(self) -> list[Any]:
        return [w.regularizer for w in self.weighted.values()]


def follow(
    regularizers: Any,
    *,
    penalized: Penalized | None = None,
    batch_dim: int | None = 0,
    trace_noise: str = "gaussian",
    penalty_quadrature: str = "full",
) -> Follow:
    """The arguments that :func:`odeint` adds, checked as far as no state is needed."""
    weighted = resolve_regularizers(regularizers)
    steps = [name for name, w in weighted.items() if kind_of(w.regularizer) == "step"]
    if steps:
        raise ConfigError(
            f"{steps[0]!r} is a penalty on the solver's steps, which torchdiffeq does not show: use "
            "rnode_plugin.NeuralODE for it, or a rate such as 'kinetic' and 'jacfrob' here."
        )
    indices, columns = _chosen(penalized)
    if penalty_quadrature not in QUADRATURES:
        raise ConfigError(suggest(penalty_quadrature, QUADRATURES, "penalty quadrature"))
    sampled = penalty_quadrature == "sampled"
    return Follow(weighted, indices, columns, batch_dim, get_estimator(trace_noise), sampled)


def _chosen(penalized: Any) -> tuple[tuple[int, ...], slice | Tensor | None]:
    """The tensors of a state and the columns, None for all, that ``penalized`` names."""
    if penalized is None or isinstance(penalized, slice):
        return (0,), penalized
    if isinstance(penalized, int):
        return (penalized,), None
    if isinstance(penalized, Tensor):
        if penalized.dtype == torch.bool and penalized.ndim > 0:
            return (0,), penalized
    elif isinstance(penalized, (list, tuple)) and penalized:
        if all(isinstance(i, bool) for i in penalized):
            return (0,), torch.tensor(penalized)
        if all(isinstance(i, int) for i in penalized):
            return tuple(penalized), None
    raise ConfigError(
        "penalized must be an index of the state's tuple or several, or a slice or a mask of booleans for columns "
        f"of one tensor, not {penalized!r}."
    )


def _with_penalties(
    name: str, func: Any, y0: Any, t: Tensor, given: dict[str, Any], wanted: Follow
) -> tuple[Any, ...]:
    penalties = Penalties(wanted.weighted)
    solution, integrals, dims = solve(name, func, y0, t, given, wanted)
    penalties.add(integrals, dims)
    return (solution, penalties) if given["event_fn"] is None else (*solution, penalties)


def solve(
    name: str, func: Any, y0: Any, t: Tensor, given: dict[str, Any], wanted: Follow
) -> tuple[Any, dict[str, Tensor], int]:
    """One solve by torchdiffeq's function ``name``.

    Args:
        given: all of its keyword arguments.

    Returns:
        Its result, the penalties' integrals ``(B,)`` by name, and the number of dimensions of one sample.
    """
    if wanted.sampled and name != "odeint":
        raise ConfigError(
            "penalty_quadrature='sampled' needs odeint, which differentiates through the steps: the error norm of "
            "odeint_adjoint's backward solve would see the draws."
        )
    layout = _Layout.of(y0, wanted)
    policy = span_policy(wanted.regularizers)
    event_fn: Any = given["event_fn"]
    if policy is not None:
        training = torch.is_grad_enabled() and getattr(func, "training", True)
        t = policy.times(t, training=training)
    z0 = layout.penalized(y0)
    if z0.ndim == 1:
        warn_of_flat_state(z0, wanted.regularizers)
    system = _Augmented(func, layout, wanted, z0, t)
    rates, path = system.dynamics.rates, system.dynamics.path
    if event_fn is not None and (path is not None or policy is not None):
        raise ConfigError("a penalty of the trajectory or its times needs to know the end, which event_fn decides.")
    times, rows, inner = (t, None, []) if path is None else path.stops(t)
    state = (*layout.tensors(y0), *(z0.new_zeros(len(z0)) for _ in rates))
    grid = t if len(times) > len(t) else None
    result = PLAIN[name](system, state, times, **_extended(given, layout, system, grid=grid))
    event_t, full = (None, result) if event_fn is None else result
    count = len(layout.shapes)
    integrals = {key: value[-1] for key, value in zip(rates, full[count:], strict=True)}
    kept = [x if rows is None else x[rows] for x in full[:count]]
    layout.warn_of_still(y0, [x[-1] for x in kept])
    if event_t is not None:
        end = [x[-1] for x in kept]
        integrals = _to_event(system, event_fn, (t[0], y0), (event_t, end), integrals)
    if path is not None:
        for number, places in enumerate(inner):
            states = [layout.penalized(layout.of_user([x[i] for x in full])) for i in places.tolist()]
            key, value = path.of_trajectory(number, times[places], states, integrals)
            integrals[key] = value
        integrals = {key: value for key, value in integrals.items() if key not in path.hidden}
    if policy is not None:
        integrals[policy.name] = policy(z0)
    kept[0], integrals = attach(kept[0], integrals)
    solution = layout.of_user(kept)
    return (solution if event_t is None else (event_t, solution)), integrals, math.prod(z0.shape[1:])


# --- events ---


def _to_event(
    system: _Augmented,
    event_fn: Any,
    start: tuple[Tensor, Any],
    end: tuple[Tensor, Sequence[Tensor]],
    integrals: dict[str, Tensor],
) -> dict[str, Tensor]:
    """The integrals up to an event, with the gradient that goes through the event's time.

    torchdiffeq differentiates at a fixed time. If the event function changes by ``dc`` there, the event's time
    moves by ``-dc / (dc/dt)`` (implicit function theorem), and an integral by its rate times that.
    """
    of_user = system.layout.of_user
    with torch.no_grad():
        signs = event_fn(start[0], start[1]).sign()

    def value(t: Tensor, y: Sequence[Tensor]) -> Tensor:
        values = event_fn(t, of_user(y)) * signs
        return values[signs != 0].min()  # the first of several to change its sign ends the solve

    t, y = end[0].detach(), [x.detach() for x in end[1]]
    change = value(t, end[1])
    if not change.requires_grad:
        return integrals

    def slopes() -> tuple[Any, tuple[Tensor, ...]]:
        with torch.enable_grad():
            at = [x.clone().requires_grad_() for x in (t, *y)]
            by = torch.autograd.grad(value(at[0], at[1:]), at, allow_unused=True)
        with torch.no_grad():
            found = system.evaluate(t, y)
        motion = zip(by, (torch.ones_like(t), *found[: len(y)]), strict=True)
        slope = sum((d * v).sum() for d, v in motion if d is not None)
        return slope, found[len(y) :]

    return dict(zip(integrals, _ToEvent.apply(slopes, change, *integrals.values()), strict=True))


class _ToEvent(torch.autograd.Function):
    """Integrals whose end moves with the value of an event function."""

    @staticmethod
    def forward(ctx: Any, slopes: Callable[[], Any], change: Tensor, *integrals: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.slopes = slopes
        ctx.save_for_backward(change)
        return tuple(value.clone() for value in integrals)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        slope, rates = ctx.slopes()
        moved = sum((g * rate).sum() for g, rate in zip(gradients, rates, strict=True))
        return None, _Once.apply(ctx.saved_tensors[0], -moved / slope), *gradients


class _Once(torch.autograd.Function):
    """The gradient by a value, which cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise ConfigError("penalties up to an event have no second derivatives: differentiate them once.")


# --- states ---


@dataclass(frozen=True)
class _Layout:
    """How a state of torchdiffeq's holds the ``z (B, *event)`` that the penalties are about.

    Attributes:
        is_tuple: whether the user's state is a tuple.
        shapes: shapes of its tensors.
        places: the tensors that the penalties are about, rising.
        columns: the places of ``z`` among the entries of a sample's first dimensions, and how many of these
            dimensions are one; None: all entries.
        batch_dim: the dimension of the samples in these; None: the state is one sample.
    """

    is_tuple: bool
    shapes: tuple[torch.Size, ...]
    places: tuple[int, ...]
    columns: tuple[Tensor, int] | None
    batch_dim: int | None

    @classmethod
    def of(cls, y0: Any, wanted: Follow) -> _Layout:
        """The layout of ``y0``; a ConfigError for a state that penalties cannot be about."""
        tensors = (y0,) if isinstance(y0, Tensor) else y0
        if not isinstance(tensors, tuple) or not tensors or not all(isinstance(x, Tensor) for x in tensors):
            inner = f" of {', '.join(type(x).__name__ for x in y0) or 'nothing'}" if isinstance(y0, tuple) else ""
            raise ConfigError(f"y0 must be a tensor or a tuple of tensors, not a {type(y0).__name__}{inner}.")
        count, dim = len(tensors), wanted.batch_dim
        if any(not -count <= i < count for i in wanted.penalized):
            raise ConfigError(f"penalized={wanted.penalized} names a tensor that y0, with {count}, does not have.")
        places = tuple(sorted({i % count for i in wanted.penalized}))
        for x in (tensors[i] for i in places):
            if not x.is_floating_point():
                raise ConfigError(f"penalties need a real floating-point state, not one of {x.dtype}.")
            if dim is not None and not -x.ndim <= dim < x.ndim:
                raise ConfigError(
                    f"batch_dim={dim} is not a dimension of the state of shape {tuple(x.shape)}: penalties are per "
                    "sample. batch_dim=None takes the whole state as one sample."
                )
        whole = cls(tensors is y0, tuple(x.shape for x in tensors), places, None, dim)
        firsts = [whole.samples_first(tensors[i]) for i in places]
        if len({len(x) for x in firsts}) > 1:
            sizes = sorted({len(x) for x in firsts})
            raise ConfigError(f"the penalized tensors have different numbers of samples: {sizes}.")
        if wanted.columns is None:
            return whole
        return replace(whole, columns=_columns(wanted.columns, firsts[0]))

    @property
    def is_whole(self) -> bool:
        """Whether ``z`` is one of the tensors as it is; views would cost an evaluation of a small net a tenth."""
        return len(self.places) == 1 and self.batch_dim == 0 and self.columns is None

    def tensors(self, y: Any) -> tuple[Tensor, ...]:
        return tuple(y) if self.is_tuple else (y,)

    def of_user(self, state: Sequence[Tensor]) -> Any:
        """The user's state, from a state that may have penalties after it."""
        return tuple(state[: len(self.shapes)]) if self.is_tuple else state[0]

    def flat_of_user(self, flat: Tensor) -> Tensor:
        """The user's part of a flattened state, flat for a tuple as torchdiffeq has it."""
        own = flat[: sum(shape.numel() for shape in self.shapes)]
        return own if self.is_tuple else own.view(self.shapes[0])

    def samples_first(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0) if self.batch_dim is None else x.movedim(self.batch_dim, 0)

    def penalized(self, y: Any) -> Tensor:
        """``z (B, *event)``; of several tensors ``(B, D)``."""
        tensors = self.tensors(y)
        if self.is_whole:
            return tensors[self.places[0]]
        parts = [self.samples_first(tensors[i]) for i in self.places]
        if self.columns is not None:
            index, ndim = self.columns
            return parts[0].flatten(1, ndim).index_select(1, index)
        return parts[0] if len(parts) == 1 else torch.cat([x.unsqueeze(-1).flatten(1) for x in parts], 1)

    def replaced(self, state: Sequence[Tensor], z: Tensor) -> Any:
        """The user's state with ``z`` in its place."""
        tensors = list(state)
        if self.is_whole:
            tensors[self.places[0]] = z
            return self.of_user(tensors)
        firsts = [self.samples_first(tensors[i]) for i in self.places]
        if self.columns is not None:
            index, ndim = self.columns
            parts: Sequence[Tensor] = (firsts[0].flatten(1, ndim).index_copy(1, index, z),)
        else:
            parts = (z,) if len(firsts) == 1 else z.split([math.prod(x.shape[1:]) for x in firsts], 1)
        for i, first, part in zip(self.places, firsts, parts, strict=True):
            part = part.reshape(first.shape)
            tensors[i] = part.squeeze(0) if self.batch_dim is None else part.movedim(0, self.batch_dim)
        return self.of_user(tensors)

    def warn_of_still(self, y0: Any, end: Sequence[Tensor]) -> None:
        """Warn if a solve from ``y0`` to ``end`` moved the state but nothing of what the penalties are about."""
        others = self.columns is not None or len(self.shapes) > len(self.places)
        if not others or transforms_active():
            return
        # the interpolation of a constant may differ from it by a rounding
        z0, z1 = (self.penalized(y).detach() for y in (y0, self.of_user(end)))
        rounding = 100 * torch.finfo(z0.dtype).eps
        if torch.allclose(z0, z1, rounding, 0) and not all(
            torch.allclose(a.detach(), b.detach(), rounding, 0) for a, b in zip(self.tensors(y0), end, strict=True)
        ):
            warnings.warn(
                f"what the penalties are about did not move in a solve (shape {tuple(z0.shape)}), "
                "but other parts of the state did: choose the tensor or the columns that move by penalized=.",
                stacklevel=5,
            )


def _columns(chosen: slice | Tensor, z: Tensor) -> tuple[Tensor, int]:
    """The chosen entries of the samples ``z (B, *event)`` as :class:`_Layout` has them."""
    event = z.shape[1:]
    if isinstance(chosen, Tensor):
        mask = chosen
    else:
        size = event[0] if event else 0
        mask = torch.zeros(size, dtype=torch.bool)
        mask[list(range(*chosen.indices(size)))] = True
    if mask.shape != event[: mask.ndim] or not mask.any():
        raise ConfigError(f"penalized={chosen} selects nothing of a sample of shape {tuple(event)}.")
    return mask.flatten().nonzero().flatten().to(z.device), mask.ndim


# --- what torchdiffeq is given ---


class _Augmented:
    """``func`` with the rates of the penalties after its velocity: what torchdiffeq calls.

    What its callers read off ``func`` (callbacks, counters) is still there.
    """

    def __init__(self, func: Any, layout: _Layout, wanted: Follow, z0: Tensor, t: Tensor) -> None:
        self.func, self.layout = func, layout
        self._sign = -1.0 if len(t) > 1 and bool(t[0] > t[1]) else 1.0  # integrals are along the path
        self._part = PartField(func, part=layout.penalized, replaced=layout.replaced, aux=lambda t, z: {})
        followed = [r for r in wanted.regularizers if kind_of(r) != "span"]
        self.dynamics = Dynamics(self._part, regularizers=followed, estimator=wanted.estimator, divergence=False)
        self._noise = self.dynamics.draw(z0)
        self._factors = _one_in_eight() if wanted.sampled and self.dynamics.needs else itertools.repeat(1)

    def __call__(self, t: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self.evaluate(t, state, next(self._factors))

    def evaluate(self, t: Tensor, state: Sequence[Tensor], factor: int = 1) -> tuple[Tensor, ...]:
        """Velocity and rates. Rates that need products are multiplied by ``factor``; 0 makes no products."""
        part = self._part
        part.state = state[: len(self.layout.shapes)]
        z = self.layout.penalized(self.layout.of_user(state))
        before, here.evaluating = here.evaluating, True
        try:
            found = self.dynamics.evaluate(t, z, self._noise, products=factor > 0).penalties
        finally:
            here.evaluating = before
        if factor != 1:
            zero = z.new_zeros(len(z))
            found = {
                key: factor * found.get(key, zero) if rate.needs else found[key]
                for key, rate in self.dynamics.rates.items()
            }
        velocity, part.velocity, part.state = self.layout.tensors(part.velocity), None, None
        if not torch.is_grad_enabled():  # a product has made a graph
            velocity = tuple(map(without_graph, velocity))
        rates = found.values() if self._sign > 0 else [-rate for rate in found.values()]
        return (*velocity, *rates)

    def __getattr__(self, name: str) -> Any:
        found, layout = getattr(self.func, name), self.layout
        if not name.startswith("callback_"):
            return found
        if not name.endswith("_adjoint"):
            return lambda t, state, dt: found(t, layout.of_user(state), dt)

        def of_adjoint(t: Tensor, state: Sequence[Tensor], dt: Tensor) -> Any:
            time, y, adjoint, *rest = state
            return found(t, (time, layout.flat_of_user(y), layout.flat_of_user(adjoint), *rest), dt)

        return of_adjoint


_FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams", "fixed_adams")


def _extended(
    given: Mapping[str, Any], layout: _Layout, system: _Augmented, *, grid: Tensor | None
) -> dict[str, Any]:
    """torchdiffeq's arguments for the longer state: norms, tolerances and callables see the user's part alone.

    Args:
        grid: times at which a fixed method steps; None: those of the solve.
    """
    changed, options = dict(given), dict(given["options"] or {})
    norm = options.get("norm", _mixed_norm if layout.is_tuple else _rms_norm)
    options["norm"] = lambda state: norm(layout.of_user(state))
    if constructor := options.get("grid_constructor"):
        options["grid_constructor"] = lambda func, y, t: constructor(func, layout.flat_of_user(y), t)
    elif grid is not None and "step_size" not in options and given["method"] in _FIXED:
        # the times of a trajectory penalty are no steps
        options |= {"grid_constructor": lambda func, y, t: grid, "interp": "cubic"}
    changed["options"] = options
    if event_fn := given["event_fn"]:
        changed["event_fn"] = lambda t, state: event_fn(t, layout.of_user(state))
    # The iteration of these methods accepts no norm, so the penalties get an infinite tolerance. With an event the
    # methods need a number.
    iterates = given["method"] in ("implicit_adams", "fixed_adams") and event_fn is None
    for key, of_penalty in (("rtol", 1e-3), ("atol", math.inf)):
        if iterates or isinstance(given[key], (tuple, list)) or torch.as_tensor(given[key]).ndim > 0:
            changed[key] = _tolerances(given[key], layout, [of_penalty] * len(system.dynamics.rates))
    if "adjoint_params" in given:
        changed |= _adjoint(given, layout, system)
    return changed


def _tolerances(value: Any, layout: _Layout, of_penalties: list[float]) -> Any:
    """A tolerance of the user's state, one for each of its tensors or entries, extended to the longer state."""
    if layout.is_tuple and (isinstance(value, (tuple, list)) or torch.as_tensor(value).ndim > 0):
        rows = [torch.as_tensor(x) for x in value]  # float32 of a number, as in torchdiffeq
        if len(rows) != len(layout.shapes):
            return value  # torchdiffeq raises the error
    else:
        rows = [torch.as_tensor(value, dtype=torch.float64)] * len(layout.shapes)
    if layout.is_tuple:
        rows = [x.reshape(-1).expand(shape.numel()) for x, shape in zip(rows, layout.shapes, strict=True)]
    else:
        rows = [rows[0].expand(layout.shapes[0]).reshape(-1)]
    return (*rows, *map(rows[0].new_tensor, of_penalties))


def _adjoint(given: Mapping[str, Any], layout: _Layout, system: _Augmented) -> dict[str, Any]:
    """The arguments of the backward solve, whose state holds time, state, adjoint state and parameters."""
    changed: dict[str, Any] = {}
    for name in ("rtol", "atol"):  # torchdiffeq would take those of the longer state
        own = given[f"adjoint_{name}"]
        changed[f"adjoint_{name}"] = given[name] if own is None else own
    parameters = given["adjoint_params"]
    if parameters is None and isinstance(system.func, nn.Module):
        parameters = find_parameters(system.func)
    if parameters is not None:  # each once, or its gradient would count twice
        regularizers = [r for r in system.dynamics.regularizers if isinstance(r, nn.Module)]
        parameters = [*parameters, *(p for r in regularizers for p in r.parameters())]
        changed["adjoint_params"] = tuple({id(p): p for p in parameters}.values())
    options, own = given["options"], given["adjoint_options"]
    if own is None and (options is None or given["adjoint_method"] in (None, given["method"])):
        # torchdiffeq would infer them from those of the longer state
        changed["adjoint_options"] = {k: v for k, v in (options or {}).items() if k != "norm"}
    elif own is not None and callable(own.get("norm")):
        norm = own["norm"]

        def of_user(state: Sequence[Tensor]) -> Tensor:
            n, k = len(layout.shapes), len(layout.shapes) + len(system.dynamics.rates)
            time, parts, rest = state[0], state[1 : 1 + 2 * k], state[1 + 2 * k :]
            return norm((time, *parts[:n], *parts[k : k + n], *rest))

        changed["adjoint_options"] = {**own, "norm": of_user}
    return changed


def _one_in_eight() -> Iterator[int]:
    """8 for one evaluation in each eight, at random, and 0 for the others."""
    while True:
        chosen = int(torch.randint(8, ()))
        yield from (8 if i == chosen else 0 for i in range(8))
