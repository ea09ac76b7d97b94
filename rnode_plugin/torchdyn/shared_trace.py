"""The products with the Jacobian that a CNF makes for its trace, shared with the penalties that read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchdyn.models.cnf import autograd_trace, hutch_trace

from ..core.derivatives import VELOCITY, Ask, Linearization, Velocity
from ..core.field_evaluation import FieldEvaluation
from ..core.trace_estimators import Exact, Hutchinson, Probes, TraceEstimator
from ..errors import ConfigError

__all__ = ["Seen", "WithoutTrace", "can_observe", "observing"]


@dataclass
class Seen:
    """What a CNF computed in one evaluation; empty if nothing was asked of it."""

    z: Tensor | None = None
    dz: Tensor | None = None
    products: Tensor | None = None
    noise: Tensor | None = None
    estimator: TraceEstimator | None = None

    def evaluation(self, t: Tensor, x: Tensor, dx: Tensor) -> FieldEvaluation:
        """What penalties may read; ``x`` and ``dx`` hold the trace in their first column."""
        if self.z is None or self.dz is None:
            return FieldEvaluation(t, x[:, 1:], dx[:, 1:])
        return FieldEvaluation(t, self.z, self.dz.to(self.z.dtype), self.noise, self.products, self.estimator)


def can_observe(cnf: Any, x: Tensor) -> bool:
    """Whether we know the products that this CNF makes for states like ``x``.

    We do for ours, and for one with an estimator of torchdyn's on flat states. Any other estimator is a function
    of its author's own, with arguments and products that only he knows.
    """
    return _has_observer(cnf) or (x.ndim == 2 and cnf.trace_estimator in (autograd_trace, hutch_trace))


@contextmanager
def observing(cnf: Any, *, products: bool) -> Iterator[Seen]:
    """Let the next evaluation of ``cnf`` leave what it computes in the object that this yields."""
    seen = Seen()
    if not products:
        yield seen
        return
    with _listening(cnf, seen):
        yield seen
    if seen.products is None:
        raise ConfigError("the CNF of the vector field was not evaluated; penalties cannot read its products.")


class WithoutTrace:
    """The velocity of ``z`` alone, behind a field of states with a trace in their first column.

    Args:
        field: the whole field, which evaluates ``cnf``.
        cnf: the module that makes the trace; here it makes none.
    """

    def __init__(self, field: Callable[[Tensor, Tensor], Tensor], cnf: Any) -> None:
        self._field, self._cnf = field, cnf

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        state = torch.cat([z.new_zeros(len(z), 1), z.flatten(1)], 1)
        none = _NoTrace() if _has_observer(self._cnf) else lambda x_out, x_in, **_: x_out.new_zeros(len(x_out))
        with _replaced(self._cnf, "trace_estimator", none):
            return self._field(t, state)[:, 1:].reshape(z.shape)


class _NoTrace(TraceEstimator):
    """A trace of zero, for nothing: the velocity alone is wanted."""

    def draw(self, z: Tensor, *, generator: torch.Generator | None = None) -> None:
        return None

    def bind(self, field: Velocity, ask: Ask = VELOCITY) -> Any:
        return lambda t, z, noise: Linearization(field(t, z), z.new_zeros(len(z)))

    def probes(self, products: Tensor, noise: Tensor | None) -> Probes:
        return Probes((), (), ())

    def divergence(self, products: Tensor, noise: Tensor | None) -> Tensor:
        return products


def _listening(cnf: Any, seen: Seen) -> Any:
    if _has_observer(cnf):
        return _replaced(cnf, "observer", seen)
    recording = _recording(cnf.trace_estimator, seen, keep_graph=torch.is_grad_enabled())
    return _replaced(cnf, "trace_estimator", recording)


def _has_observer(cnf: Any) -> bool:
    return hasattr(cnf, "observer")


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of ``module`` with another value for a while. A plain entry hides a submodule of that name."""
    own = vars(module)
    had, before = name in own, own.get(name)
    own[name] = value
    try:
        yield
    finally:
        if had:
            own[name] = before
        else:
            del own[name]


def _recording(estimator: Callable[..., Tensor], seen: Seen, *, keep_graph: bool) -> Callable[..., Tensor]:
    """The same trace as one of torchdyn's estimators, to the bit, with its products written down."""

    def products(output: Tensor, z: Tensor, direction: Tensor) -> Tensor:
        return torch.autograd.grad(output, z, direction, create_graph=keep_graph, retain_graph=True)[0]

    def hutchinson(x_out: Tensor, x_in: Tensor, noise: Tensor) -> Tensor:
        row = products(x_out, x_in, noise)
        seen.products, seen.noise, seen.estimator = row, noise, Hutchinson()
        return torch.einsum("bi,bi->b", row, noise)

    def exact(x_out: Tensor, x_in: Tensor) -> Tensor:
        ones = torch.ones_like(x_out[:, 0])
        rows = [products(x_out[:, i], x_in, ones) for i in range(x_in.shape[1])]
        seen.products, seen.estimator = torch.stack(rows), Exact()
        total = rows[0][:, 0]
        for i, row in enumerate(rows[1:], start=1):
            total = total + row[:, i]
        return total

    def trace(x_out: Tensor, x_in: Tensor, noise: Tensor | None = None, **kwargs: Any) -> Tensor:
        seen.z, seen.dz = x_in, x_out
        if estimator is autograd_trace:
            return exact(x_out, x_in)
        if noise is None:
            raise ConfigError("torchdyn's hutch_trace needs noise: give the CNF a noise_dist.")
        return hutchinson(x_out, x_in, noise)

    return trace
