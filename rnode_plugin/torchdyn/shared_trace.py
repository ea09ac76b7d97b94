"""The products with the Jacobian that a CNF makes for its trace, shared with the penalties that read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchdyn.models.cnf import autograd_trace, hutch_trace

from ..core.field_evaluation import FieldEvaluation
from ..core.trace_estimators import Exact, Hutchinson, TraceEstimator, get_estimator
from ..errors import ConfigError

__all__ = ["Seen", "observing", "probe_for"]


@dataclass
class Seen:
    """What a CNF computed in one evaluation; empty where nothing was asked of it."""

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


def probe_for(cnf: Any, z: Tensor, trace_noise: str) -> Tensor | None:
    """Noise for a product of our own, where the CNF's estimator is one that we cannot look into."""
    if hasattr(cnf, "observer") or cnf.trace_estimator in (autograd_trace, hutch_trace):
        return None
    return get_estimator(trace_noise).draw(z)


@contextmanager
def observing(cnf: Any, probe: Tensor | None, *, products: bool) -> Iterator[Seen]:
    """Let the next evaluation of ``cnf`` leave what it computes in the object that this yields."""
    seen = Seen()
    if not products:
        yield seen
        return
    keep_graph = torch.is_grad_enabled()
    own, name = cnf.__dict__, "observer" if hasattr(cnf, "observer") else "trace_estimator"
    before = own.get(name, cnf)
    own[name] = seen if name == "observer" else _recording(cnf.trace_estimator, seen, probe, keep_graph=keep_graph)
    try:
        yield seen
    finally:
        if before is cnf:  # the estimator is a submodule, which the entry has only hidden
            del own[name]
        else:
            own[name] = before
    if seen.products is None:
        raise ConfigError("the CNF of the vector field was not evaluated; penalties cannot read its products.")


def _recording(
    estimator: Callable[..., Tensor], seen: Seen, probe: Tensor | None, *, keep_graph: bool
) -> Callable[..., Tensor]:
    """The same trace as ``estimator``'s, to the bit, with its products written down."""

    def products(output: Tensor, z: Tensor, direction: Tensor) -> Tensor:
        return torch.autograd.grad(output, z, direction, create_graph=keep_graph, retain_graph=True)[0]

    def trace(x_out: Tensor, x_in: Tensor, noise: Tensor | None = None, **kwargs: Any) -> Tensor:
        seen.z, seen.dz = x_in, x_out
        if estimator is hutch_trace and noise is not None:
            row = products(x_out, x_in, noise)
            seen.products, seen.noise, seen.estimator = row, noise, Hutchinson()
            return torch.einsum("bi,bi->b", row, noise)
        if estimator is autograd_trace and x_in.ndim == 2:
            ones = torch.ones_like(x_out[:, 0])
            rows = [products(x_out[:, i], x_in, ones) for i in range(x_in.shape[1])]
            seen.products, seen.estimator = torch.stack(rows), Exact()
            total = rows[0][:, 0]
            for i, row in enumerate(rows[1:], start=1):
                total = total + row[:, i]
            return total
        direction = torch.randn_like(x_in) if probe is None else probe
        seen.products, seen.noise, seen.estimator = products(x_out, x_in, direction), direction, Hutchinson()
        return estimator(x_out, x_in, noise=noise, **kwargs)

    return trace
