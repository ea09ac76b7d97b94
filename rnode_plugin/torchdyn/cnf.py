"""CNF: torchdyn's field of a continuous normalizing flow, for any event shape; penalties share its products."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchdyn.models import cnf as torchdyn_cnf

from ..core.derivatives import Ask, AutogradField, Field
from ..core.signature import accepts, field_takes, refuse_state_first
from ..core.trace_estimators import Exact, Hutchinson, HutchPlusPlus, TraceEstimator, get_estimator
from ..errors import ConfigError
from .wrapped.lost_graph import refuse_lost_graph
from .wrapped.velocity import Velocity, called_as_it_takes, first_order_system

if TYPE_CHECKING:
    from .shared_trace import Seen

__all__ = ["CNF", "check_shape", "is_count"]


class CNF(torchdyn_cnf.CNF):
    """The field ``(t, [a, z]) -> [-div f(t, z), f(t, z)]`` on a state ``[B, 1 + D]`` (eq. 3 and 4).

    torchdyn's contract: the first column accumulates minus the divergence in nats, so that after a solve
    ``log p(x) = log q(z) - column``. Put it into a :class:`~rnode_plugin.NeuralODE`, which draws the noise once per
    solve and lets ``jacfrob`` read the products that the trace is made of; torchdyn's own class takes it too.

    Args:
        net: ``net(t, z)`` or ``net(z)``, of the shape of ``z``.
        trace_estimator: None or ``"exact"`` for the exact divergence, ``"gaussian"`` or ``"rademacher"`` for
            Hutchinson's estimator, a :class:`~rnode_plugin.core.trace_estimators.TraceEstimator`, one of torchdyn's
            two functions, or a function of your own ``(x_out, x_in, noise=...) -> (B,)``.
        noise_dist: distribution of the noise ``(D,)`` with ``sample(shape)``; None: the estimator draws its own.
        order: order of the differential equation; ``z`` then holds position, velocity, ... along its first
            dimension.
        event_shape: shape that ``net`` wants for ``z``; None: ``(D,)``.
        conditional: the net is ``net(t, z, context)``, and ``args`` of the solve is its context, a tensor with one
            row per sample.

    Raises:
        ConfigError: for an unknown estimator, an order or an event shape that is not made of whole numbers above
            0, and a conditional net that does not take three arguments; when evaluated, for a state of another
            shape, a stochastic estimator without noise, a net that depends on time without a time, a conditional
            one without a context, and a net that cuts its graph.

    Example:
        >>> import torch
        >>> from rnode_plugin import NeuralODE
        >>> net = torch.nn.Linear(2, 2)
        >>> model = NeuralODE(CNF(net, "exact"), solver="dopri5", regularizers=["jacfrob"])
        >>> x = torch.randn(5, 2)
        >>> _, trajectory = model(torch.cat([torch.zeros(5, 1), x], 1), torch.linspace(0, 1, 2))
        >>> minus_logdet, z = trajectory[-1, :, 0], trajectory[-1, :, 1:]
        >>> bool(torch.allclose(minus_logdet, -net.weight.diagonal().sum(), atol=1e-5))
        True
    """

    def __init__(
        self,
        net: nn.Module,
        trace_estimator: str | TraceEstimator | Callable[..., Tensor] | None = None,
        noise_dist: Any = None,
        order: int = 1,
        *,
        event_shape: Sequence[int] | None = None,
        conditional: bool = False,
    ) -> None:
        refuse_state_first(net, "CNF")
        if conditional and not accepts(net, None, None, None):
            raise ConfigError("a conditional net is called net(t, z, context), but this one does not take that.")
        if not is_count(order) or order < 1:
            raise ConfigError(f"order must be a whole number >= 1, not {order!r}.")
        super().__init__(net, None, noise_dist, int(order))
        self.trace_estimator = _estimator(trace_estimator)
        self.event_shape = None if event_shape is None else tuple(check_shape(event_shape, "event_shape"))
        self.conditional = conditional
        self._given: tuple[Tensor | None] | None = None
        self.t: Tensor | None = None  # filled as DepthCat's is, for when the module is called with the state alone
        if isinstance(self.trace_estimator, TraceEstimator):
            self.observer: Seen | None = None

    def forward(self, t: Tensor, x: Tensor | None = None, args: Any = None) -> Tensor:  # pyright: ignore
        """The field at ``t`` and ``x [B, 1 + D]``; ``cnf(x)``, in an nn.Sequential, is at the solver's time."""
        if x is None:
            x, t = t, self.t  # pyright: ignore[reportAssignmentType]
        z = self._event(x)
        field = self._field(t, args)
        t = z.new_zeros(()) if t is None else t
        if isinstance(self.trace_estimator, TraceEstimator):
            dz, trace = self._estimate(self.trace_estimator, field, t, z)
        else:
            with torch.enable_grad():
                z = z.requires_grad_()
                dz = field(t, z)
                trace = self.trace_estimator(dz, z, noise=self._noise_like(z))
        return torch.cat([-trace[:, None], dz.flatten(1)], 1)

    def velocity(self, t: Tensor | None, z: Tensor, args: Any = None) -> Tensor:
        """``f(t, z)``, of the shape of ``z (B, *event_shape)``, without its trace."""
        return self._field(t, args)(t, z)  # pyright: ignore[reportArgumentType]

    def draw_noise(self, state: Tensor) -> Tensor | None:
        """Noise for one solve from ``state (B, D)``; None if the estimator needs none."""
        if self._given is not None:
            return self._given[0]
        if not isinstance(self.trace_estimator, TraceEstimator):
            return None
        return self.trace_estimator.draw(state)

    @contextmanager
    def given_noise(self, noise: Tensor | None) -> Iterator[None]:
        """Solves inside use ``noise``, ``(B, D)`` or ``(k, B, D)`` for k probes, or none, instead of drawing it."""
        self._given = (noise,)
        try:
            yield
        finally:
            self._given = None

    def _estimate(self, estimator: TraceEstimator, field: Velocity, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        noise = self._noise_like(z)
        if noise is None and isinstance(estimator, (Hutchinson, HutchPlusPlus)):
            raise ConfigError(
                "this CNF has a stochastic trace estimator but no noise: put it into rnode_plugin.NeuralODE, which "
                "draws the noise once per solve, or give it a noise_dist."
            )
        if not isinstance(field, Field):
            field = AutogradField(refuse_lost_graph(field))
        if isinstance(estimator, Exact) and self.observer is None:
            dz, _, _, divergence, _ = field.linearize(t, z, ask=Ask(divergence=True))
            assert divergence is not None
            return dz.to(z.dtype), divergence.to(z.dtype)
        dz, products = estimator.bind(field)(t, z, noise)[:2]
        assert products is not None
        dz, products = dz.to(z.dtype), products.to(z.dtype)
        seen = self.observer
        if seen is not None:
            seen.z, seen.dz, seen.products, seen.noise, seen.estimator = z, dz, products, noise, estimator
        return dz, estimator.divergence(products, noise)

    def _field(self, t: Tensor | None, args: Any) -> Velocity:
        net = self.net
        if self.conditional:
            if not isinstance(args, Tensor):
                raise ConfigError(
                    "this CNF is conditional: give the solve a context, model(x, t_span, args=context)."
                )
            velocity: Velocity = lambda t, z: net(t, z, args)  # noqa: E731
        elif field_takes(net).time and t is None:
            raise ConfigError("the net of this CNF depends on time, and no time is known: call it as cnf(t, x).")
        else:
            velocity = called_as_it_takes(net, args)
        return velocity if self.order == 1 else first_order_system(velocity, self.order)

    def _event(self, x: Tensor) -> Tensor:
        z = x[:, 1:]
        if self.event_shape is None:
            return z
        if x.ndim != 2 or z.shape[1] != math.prod(self.event_shape):
            raise ConfigError(
                f"a CNF with event_shape={self.event_shape} takes states [B, {1 + math.prod(self.event_shape)}] "
                f"(trace, then the flattened event), not {list(x.shape)}; flatten the event, a zero first."
            )
        return z.reshape(z.shape[0], *self.event_shape)

    def _noise_like(self, z: Tensor) -> Tensor | None:
        noise = self.noise
        if noise is None:
            return None
        if noise.ndim == 3 and math.prod(noise.shape[1:]) == z.numel():  # several probes (k, B, D)
            return noise.reshape(len(noise), *z.shape)
        if noise.numel() != z.numel():
            raise ConfigError(
                f"the noise of this CNF has shape {tuple(noise.shape)} for a state of shape {tuple(z.shape)}: give "
                "a noise_dist whose samples have as many entries as one event."
            )
        return noise.reshape(z.shape)


def _estimator(spec: str | TraceEstimator | Callable[..., Tensor] | None) -> TraceEstimator | Callable[..., Tensor]:
    if spec is None or spec is torchdyn_cnf.autograd_trace:
        return get_estimator("exact")
    if spec is torchdyn_cnf.hutch_trace:
        return get_estimator("gaussian")
    if isinstance(spec, (str, TraceEstimator)):
        return get_estimator(spec)
    if callable(spec):
        return spec
    raise ConfigError(
        f"trace_estimator={spec!r} is not an estimator: give 'exact', 'gaussian', 'rademacher', an estimator "
        "object or a function (x_out, x_in, noise=...) -> (B,)."
    )


def check_shape(shape: Sequence[int] | int, name: str) -> torch.Size:
    """The shape of one sample or context: a whole number >= 1 or a sequence of them."""
    sizes: Any = [shape] if is_count(shape) else shape
    good = isinstance(sizes, Sequence) and len(sizes) > 0 and all(is_count(size) and size > 0 for size in sizes)
    if not good:
        raise ConfigError(f"{name} must hold one or more whole numbers >= 1, not {shape!r}.")
    return torch.Size(int(size) for size in sizes)


def is_count(value: Any) -> bool:
    """Whether ``value`` is a whole number; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)
