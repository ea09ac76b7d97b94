"""RegularizedCNF: a density model from a vector field, with log-likelihood, samples and the paper's penalties."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from torch.distributions.transforms import Transform

from ..core.trace_estimators import TraceEstimator
from ..errors import ConfigError
from .cnf import CNF
from .neural_ode import NeuralODE
from .solver_names import resolve_solver

__all__ = ["RegularizedCNF"]


class RegularizedCNF(nn.Module):
    """The density of ``x`` whose flow along a field over a time of 1 has the base distribution (eq. 4).

    In torchdyn's style: a :class:`~rnode_plugin.NeuralODE` of a :class:`~rnode_plugin.CNF`, as ``self.ode``. Add
    :meth:`reg_loss` to the loss after each :meth:`log_prob`::

        loss = -model.log_prob(x).mean() / model.dims + model.reg_loss()      # eq. 17, nats/dim

    Args:
        net: the field, ``net(t, z)`` or ``net(z)`` on ``z (B, *event_shape)``; torchdyn's DepthCat and Galerkin
            layers may be in it.
        base: distribution of ``z`` with an empty batch shape and the event shape of the data; None: the standard
            normal. Its tensors follow ``.to()`` of the model; they are not trained.
        event_shape: shape of one sample; may be left out where ``base`` has it.
        trace_estimator: ``"gaussian"``, ``"rademacher"`` (Hutchinson, noise drawn once a solve), ``"exact"``, or an
            estimator object.
        regularizers: as in :class:`~rnode_plugin.NeuralODE`.
        t_span: times of the solve from data to base; None: 0 to 1. A fixed-step solver takes one step per interval.
        solver, sensitivity, ...: further arguments of :class:`~rnode_plugin.NeuralODE`.
        atol, rtol: tolerances of an adaptive solver; None: 1e-5, the paper's.

    Raises:
        ConfigError: for shapes that do not fit together, and all that NeuralODE refuses.

    Example:
        >>> import torch
        >>> from rnode_plugin.fields import linear_field
        >>> model = RegularizedCNF(linear_field(2), event_shape=2, trace_estimator="exact")
        >>> x = torch.randn(8, 2)
        >>> loss = -model.log_prob(x).mean() / model.dims + model.reg_loss()
        >>> loss.backward()
        >>> tuple(model.sample(3, temperature=0.8).shape)
        (3, 2)
    """

    def __init__(
        self,
        net: nn.Module,
        base: Distribution | None = None,
        *,
        event_shape: Sequence[int] | int | None = None,
        trace_estimator: str | TraceEstimator = "gaussian",
        regularizers: Any = ("kinetic", "jacfrob"),
        t_span: Tensor | Sequence[float] | None = None,
        solver: str | nn.Module = "dopri5",
        atol: float | None = None,
        rtol: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.event_shape = _event_shape(base, event_shape)
        self.base = _standard_normal(self.event_shape) if base is None else copy.deepcopy(base)
        self.dims = self.event_shape.numel()
        for name in ("order", "integral_loss", "return_t_eval"):
            if name in options:
                raise ConfigError(f"{name}= has no meaning for a density; use NeuralODE and CNF for it.")
        adaptive = resolve_solver(solver).stepping_class == "adaptive"
        for name, tolerance in (("atol", atol), ("rtol", rtol)):
            if tolerance is not None or adaptive:  # a fixed grid warns of tolerances, which it has no use for
                options[name] = 1e-5 if tolerance is None else tolerance
        options |= {"solver": solver, "return_t_eval": False}
        cnf = CNF(net, trace_estimator, event_shape=self.event_shape)
        self.ode = NeuralODE(cnf, regularizers=regularizers, **options)
        # The same field without its trace, which samples have no use for. In a tuple, where torch sees no second
        # module with the same parameters.
        self._without_trace = (NeuralODE(_Velocity(cnf), **options),)
        times = torch.tensor([0.0, 1.0]) if t_span is None else torch.as_tensor(t_span)
        self.register_buffer("t_span", times, persistent=False)
        self.t_span: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """:meth:`log_prob`, so that the model can be wrapped (DistributedDataParallel)."""
        return self.log_prob(x)

    def log_prob(self, x: Tensor, *, penalties: bool | None = None) -> Tensor:
        """``log p(x) (B,)`` in nats, of ``x (B, *event_shape)``; unbiased with Hutchinson's estimator.

        Args:
            x: samples.
            penalties: as in :meth:`NeuralODE.forward`.

        Raises:
            ConfigError: for another shape.
            SolverError: from the solve.
        """
        z, logdet = self.transform(x, penalties=penalties)
        return self.base.log_prob(z) + logdet

    def transform(self, x: Tensor, *, penalties: bool | None = None) -> tuple[Tensor, Tensor]:
        """``z (B, *event_shape)`` and the log-determinant ``(B,)`` in nats of ``x -> z``."""
        if x.shape[1:] != self.event_shape:
            raise ConfigError(
                f"this density is one of samples {tuple(self.event_shape)}: give (B, *{tuple(self.event_shape)}), "
                f"not {tuple(x.shape)}."
            )
        flat = x.flatten(1)
        state = torch.cat([torch.zeros_like(flat[:, :1]), flat], 1)
        end = self.ode(state, self.t_span.to(x), penalties=penalties)[-1]
        return end[:, 1:].reshape(x.shape), -end[:, 0]

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0) -> Tensor:
        """``(n, *event_shape)``: base samples, drawn to the base's mean by ``temperature``, taken back to the data.

        Raises:
            ConfigError: for a temperature that is not positive, or not 1 with a base that has no mean.
            SolverError: from the solve.
        """
        if not temperature > 0:
            raise ConfigError(f"temperature must be > 0, not {temperature}.")
        z = self.base.sample(torch.Size([n]))
        if temperature != 1:
            try:
                mean = self.base.mean
            except NotImplementedError:
                raise ConfigError(
                    f"{type(self.base).__name__} has no mean for a temperature to shrink its samples to; use 1."
                ) from None
            z = mean + temperature * (z - mean)
        return self.inverse(z)

    def inverse(self, z: Tensor) -> Tensor:
        """``x (B, *event_shape)`` that flows to ``z``."""
        return self._without_trace[0](z, self.t_span.to(z).flip(0))[-1]

    def reg_loss(self, *, step: int | None = None, **lambdas: float) -> Tensor:
        """The penalties of the last :meth:`log_prob` in nats/dim; see :meth:`NeuralODE.reg_loss`."""
        return self.ode.reg_loss(step=step, **lambdas)

    @property
    def regularization(self) -> dict[str, Tensor]:
        """Integral of each penalty, ``(B,)`` by name; see :attr:`NeuralODE.regularization`."""
        return self.ode.regularization

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RegularizedCNF:
        super()._apply(fn, recurse)
        self.base = _moved(self.base, fn)
        return self


class _Velocity(nn.Module):
    """The field of a CNF on ``z (B, *event_shape)`` alone."""

    def __init__(self, cnf: CNF) -> None:
        super().__init__()
        self.cnf = cnf

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        return self.cnf.velocity(t, x, args)


def _event_shape(base: Distribution | None, event_shape: Sequence[int] | int | None) -> torch.Size:
    if event_shape is not None:
        event_shape = torch.Size([event_shape] if isinstance(event_shape, int) else event_shape)
    if base is None:
        if event_shape is None:
            raise ConfigError("give event_shape=, the shape of one sample, or a base distribution that has it.")
        return event_shape
    if base.batch_shape:
        raise ConfigError(
            f"the base distribution has batch shape {tuple(base.batch_shape)}: its density must be one of a whole "
            f"sample. Wrap it, torch.distributions.Independent(base, {len(base.batch_shape)})."
        )
    if event_shape is not None and base.event_shape != event_shape:
        raise ConfigError(f"event_shape={tuple(event_shape)} and the base's {tuple(base.event_shape)} differ.")
    return base.event_shape


def _standard_normal(shape: torch.Size) -> Distribution:
    return Independent(Normal(torch.zeros(shape), torch.ones(shape)), len(shape))


def _moved(part: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """A distribution with ``fn`` applied to all of its tensors; they are no parameters and torch moves none."""
    if isinstance(part, Tensor):
        return fn(part.detach())
    if isinstance(part, (list, tuple)):
        return type(part)(_moved(each, fn) for each in part) if not isinstance(part, torch.Size) else part
    if isinstance(part, (Distribution, Transform)):
        moved = copy.copy(part)
        # a transform remembers its inverse, which has the old tensors
        values = {k: None if isinstance(v, weakref.ref) else _moved(v, fn) for k, v in part.__dict__.items()}
        moved.__dict__.update(values)
        return moved
    return part
