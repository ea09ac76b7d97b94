"""CNF: torchdyn's field of a continuous normalizing flow, for any event shape, whose products penalties share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchdyn.models import cnf as torchdyn_cnf

from ..core.signature import call_of, field_takes, refuse_state_first
from ..core.system import System
from ..core.trace_estimators import Exact, Hutchinson, TraceEstimator, get_estimator
from ..errors import ConfigError, check_count, check_shape


class CNF(torchdyn_cnf.CNF):
    """The field ``(t, [a, z]) -> [-div f(t, z), f(t, z)]`` on a state ``[B, 1 + D]`` (eq. 3 and 4).

    As in torchdyn, the first column accumulates minus the divergence in nats, so that after a solve
    ``log p(x) = log q(z) - column``. Put the field into a :class:`~rnode_plugin.NeuralODE`, which draws the noise
    once per solve and lets ``jacfrob`` read the products from which the trace is computed. torchdyn's own NeuralODE
    accepts the field too.

    Args:
        net: ``net(t, z)`` or ``net(z)``, whose result has the shape of ``z``.
        trace_estimator: None or ``"exact"`` for the exact divergence, ``"rademacher"`` or ``"gaussian"`` for
            Hutchinson's estimator, a :class:`~rnode_plugin.core.trace_estimators.TraceEstimator`, one of torchdyn's
            two functions, or a custom function ``(x_out, x_in, noise=...) -> (B,)``.
        noise_dist: distribution of the noise ``(D,)`` with ``sample(shape)``; None: the estimator draws its own,
            and torchdyn's ``hutch_trace`` becomes ``"rademacher"``.
        order: order of the differential equation. Above 1, ``z`` is position, velocity, ... along dimension 1.
        event_shape: shape of one sample of ``z`` as ``net`` takes it; None: ``(D,)``.

    Raises:
        ConfigError: for an unknown estimator, and an order or an event shape that is not made of whole numbers
            above 0; when evaluated, for a stochastic estimator without noise, a net that depends on time without a
            time, and a net that cuts its graph.

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
    ) -> None:
        refuse_state_first(net, "CNF")
        super().__init__(net, None, noise_dist, check_count(order, "order"))
        self.trace_estimator = _estimator(trace_estimator)
        self.event_shape = None if event_shape is None else check_shape(event_shape, "event_shape")
        self.t: Tensor | None = None  # a solve fills it, as in DepthCat, for calls with the state alone

    def forward(self, t: Tensor, x: Tensor | None = None, args: object = None) -> Tensor:  # pyright: ignore
        """The field at ``t`` and ``x [B, 1 + D]``. ``cnf(x)``, as in an nn.Sequential, takes the solver's time."""
        time, state = (self.t, t) if x is None else (t, x)
        if time is None and field_takes(self.net).order == "t, x":
            raise ConfigError("the net of this CNF depends on time, and no time is known: call it as cnf(t, x).")
        z = self.event(state)
        time = z.new_zeros(()) if time is None else time
        noise = self.noise
        if noise is not None and noise.shape[-z.ndim :] != z.shape:
            noise = noise.reshape(z.shape)
        if isinstance(self.trace_estimator, TraceEstimator):
            if noise is None and self.trace_estimator.needs_noise:
                raise ConfigError(
                    "the trace of this CNF needs noise, which rnode_plugin.NeuralODE draws, or a noise_dist=: "
                    "solve it by one of these."
                )
            rhs = System(trace_estimator=self.trace_estimator).start(self._velocity(args), z, probes=noise)
            rhs.check_field(time, z)
            dz, trace, _ = rhs(time, z)
            assert trace is not None
        else:
            with torch.enable_grad():
                z = z.requires_grad_()
                dz = self._velocity(args)(time, z)
                trace = self.trace_estimator(dz, z, noise=noise)
        return torch.cat([-trace[:, None], dz.flatten(1)], 1)

    def event(self, x: Tensor) -> Tensor:
        """``z (B, *event_shape)`` of a state ``x [B, 1 + D]``."""
        z = x[:, 1:]
        if self.event_shape is None:
            return z
        return z.reshape(z.shape[0], *self.event_shape)

    def _velocity(self, args: object) -> Callable[..., Tensor]:
        function = call_of(self.net, args)
        return function if self.order == 1 else first_order_system(function, self.order)


def noise_of(cnf: Any, z: Tensor) -> Tensor | None:
    """Noise for the trace in one solve from ``z``, by ``noise_dist`` or the estimator; None if neither draws."""
    if cnf.noise_dist is None:
        return cnf.trace_estimator.draw(z) if isinstance(cnf.trace_estimator, TraceEstimator) else None
    return cnf.noise_dist.sample((z.shape[0],)).to(z).reshape(z.shape)


class _AutogradTrace(Exact):
    """The exact trace, summed in torchdyn's order, so that values agree bitwise."""

    is_exact = False  # a field's own trace has another order

    def draw(self, z: Tensor, *, radius: int | None = None, generator: torch.Generator | None = None) -> None:
        return None  # colors have another order too

    def divergence(self, products: Tensor, noise: Tensor | None) -> Tensor:
        total = products[0][:, 0]
        for i, row in enumerate(products[1:], start=1):
            total = total + row[:, i]
        return total


class _HutchTrace(Hutchinson):
    """Hutchinson's estimate, summed by torchdyn's einsum, so that values agree bitwise."""

    def divergence(self, products: Tensor, noise: Tensor | None) -> Tensor:
        assert noise is not None
        return torch.einsum("bi,bi->b", products, noise)


def estimator_of(cnf: Any) -> TraceEstimator | None:
    """The estimator of a CNF's trace; None for a custom function."""
    estimator = cnf.trace_estimator
    if isinstance(estimator, TraceEstimator):
        return estimator
    if estimator is torchdyn_cnf.autograd_trace:
        return _AutogradTrace()
    return _HutchTrace() if estimator is torchdyn_cnf.hutch_trace else None


def first_order_system(function: Callable[..., Tensor], order: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The first-order system for ``x = (position, velocity, ...)`` along dimension 1.

    ``function`` returns the highest derivative.
    """

    def system(t: Tensor, x: Tensor) -> Tensor:
        size = x.size(1) // order
        highest = function(t, x)
        return torch.cat([x[:, size : size * order], highest], dim=1).to(x)

    return system


def _estimator(spec: str | TraceEstimator | Callable[..., Tensor] | None) -> TraceEstimator | Callable[..., Tensor]:
    if spec is None or spec is torchdyn_cnf.autograd_trace:
        return get_estimator("exact")
    if spec is torchdyn_cnf.hutch_trace:
        return get_estimator("rademacher")
    return get_estimator(spec) if isinstance(spec, TraceEstimator) or not callable(spec) else spec
