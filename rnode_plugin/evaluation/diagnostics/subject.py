"""``Subject``: what the checks ask of a density model, whichever class it is of."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ...core.objective import FlowOutput, output_log_prob
from ...core.random_streams import Stream, seeded
from ...core.regularizers import Rate, span_policy
from ...core.trace_estimators import TraceEstimator
from ...errors import ConfigError
from ...flows.multiscale import MultiscaleFlow, logit, squeeze
from ...solvers import Solver
from ...solvers.config import solver_text
from ...torchdyn.density import RegularizedCNF

__all__ = ["Encoded", "HeldOut", "SolvedFlow", "Subject", "subject_of"]

_BATCH_NUMBERS = 400_000  # of the state in one solve: 510 images of MNIST
_MAX_BATCH = 4096


@runtime_checkable
class SolvedFlow(Protocol):
    """A flow that can be diagnosed: :class:`~rnode_plugin.MultiscaleFlow`, or a class of your own like it.

    Its ``forward`` draws the trace noise from :attr:`estimator` and follows :attr:`regularizers`; a copy with other
    ones solves with those. Its latents are standard normal. A conditional flow has ``context_shape``, and each
    method takes ``context=``, ``(B, *context_shape)``.

    Attributes:
        dims: number of dimensions of one sample.
        solver: the integrator where a call brings none.
        estimator: of the trace.
        regularizers: penalties that ``penalties=True`` follows.
    """

    dims: Any
    solver: Solver
    estimator: TraceEstimator
    regularizers: tuple[Any, ...]

    def forward(self, x: Tensor, *, solver: Solver | None = None, penalties: bool = True) -> FlowOutput: ...

    def inverse(self, z: Tensor, *, solver: Solver | None = None) -> Tensor: ...

    def sample(self, n: int, *, solver: Solver | None = None) -> Tensor: ...


@dataclass(frozen=True)
class HeldOut:
    """The data of a diagnosis.

    Attributes:
        x: samples ``(N, *event)``.
        context: ``(N, *context_shape)``; None for a model without.
        seed: of all noise.
    """

    x: Tensor
    context: Tensor | None
    seed: int

    def first(self, n: int) -> HeldOut:
        """The first ``n`` samples."""
        return HeldOut(self.x[:n], None if self.context is None else self.context[:n], self.seed)

    def noise(self, *index: int) -> AbstractContextManager[None]:
        """A block that draws the same noise each time; ``index`` tells one block from another."""
        return seeded(self.seed, Stream.DIAGNOSE, *index)


@dataclass(frozen=True)
class Encoded:
    """Data pushed to the latent.

    Attributes:
        z: latent ``(B, D)``.
        log_prob: of the data, ``(B,)`` in nats, double precision, on the CPU.
        nfe: evaluations of the vector fields, mean over the batches.
        penalties: integrals of what was followed, ``(B,)`` by name.
    """

    z: Tensor
    log_prob: Tensor
    nfe: float
    penalties: dict[str, Tensor]


class Subject(ABC):
    """A density model as the checks see it.

    Attributes:
        model: the model itself.
        dims: number of dimensions of one sample.
        context_shape: of one context; None for a model that takes none.
        estimator: the model's own, of the trace.
        solver_text: the model's own solver, in words.
        tolerance: that of its own solver; None for a fixed grid.
    """

    model: Any
    dims: int
    context_shape: torch.Size | None
    estimator: Any
    solver_text: str
    tolerance: float | None

    def encode(
        self,
        x: Tensor,
        context: Tensor | None,
        *,
        solver: Solver | None = None,
        estimator: TraceEstimator | None = None,
        rate: Rate | None = None,
    ) -> Encoded:
        """Push ``x (B, *event)`` to the latent, batch by batch.

        Args:
            x: data.
            context: ``(B, *context_shape)``, or None.
            solver: None for the model's own. A sampled quadrature of the trace is replaced by the full one.
            estimator: of the trace; None for the model's own.
            rate: a penalty to follow.
        """
        parts = [self._encode(*rows, solver, estimator, rate) for rows in self._batches(x, context)]
        names = parts[0].penalties
        return Encoded(
            torch.cat([part.z.flatten(1) for part in parts]),
            torch.cat([part.log_prob.cpu().double() for part in parts]),
            sum(part.nfe for part in parts) / len(parts),
            {name: torch.cat([part.penalties[name] for part in parts]) for name in names},
        )

    def decode(self, z: Tensor, context: Tensor | None, *, solver: Solver | None = None) -> Tensor:
        """The data of latents ``z (B, D)``."""
        return torch.cat([self._decode(*rows, solver) for rows in self._batches(z, context)])

    def sample(self, n: int, context: Tensor | None) -> Tensor:
        """``n`` samples; ``context`` has one row for each."""
        rows = self._batches(torch.empty(n, 0), context)
        return torch.cat([self._sample(len(part), given) for part, given in rows])

    def start(self, x: Tensor) -> Tensor | None:
        """Where the paths of ``x`` begin, ``(B, D)`` in the order of the latent; None: at the first state."""
        return None

    @abstractmethod
    def _encode(
        self,
        x: Tensor,
        context: Tensor | None,
        solver: Solver | None,
        estimator: TraceEstimator | None,
        rate: Rate | None,
    ) -> Encoded: ...

    @abstractmethod
    def _decode(self, z: Tensor, context: Tensor | None, solver: Solver | None) -> Tensor: ...

    @abstractmethod
    def _sample(self, n: int, context: Tensor | None) -> Tensor: ...

    @property
    def batch_size(self) -> int:
        """Samples of one solve."""
        return max(1, min(_MAX_BATCH, _BATCH_NUMBERS // self.dims))

    def _batches(self, x: Tensor, context: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
        parts = x.split(self.batch_size)
        contexts = [None] * len(parts) if context is None else context.split(self.batch_size)
        return list(zip(parts, contexts, strict=True))


class _FlowSubject(Subject):
    """A :class:`SolvedFlow`."""

    def __init__(self, model: Any) -> None:
        self.model, self.dims, self.estimator = model, int(model.dims), model.estimator
        self.context_shape = getattr(model, "context_shape", None)
        self.solver_text = solver_text(model.solver)
        self.tolerance = max(model.solver.atol, model.solver.rtol) if model.solver.adaptive else None

    def start(self, x: Tensor) -> Tensor | None:
        if not isinstance(self.model, MultiscaleFlow):
            return None
        y, leaving = logit(x, self.model.alpha)[0], []
        for stage in self.model.stages:
            if stage.squeezes:
                y = squeeze(y)
            else:
                leaving.append(y[:, stage.keeps :].flatten(1))
                y = y[:, : stage.keeps]
        return torch.cat(leaving, 1)

    def _encode(
        self,
        x: Tensor,
        context: Tensor | None,
        solver: Solver | None,
        estimator: TraceEstimator | None,
        rate: Rate | None,
    ) -> Encoded:
        flow = self.model
        if estimator is not None or rate is not None:
            flow = copy.copy(flow)
            flow.estimator = flow.estimator if estimator is None else estimator
            policy = span_policy(flow.regularizers)
            flow.regularizers = tuple(each for each in (rate, policy) if each is not None)
        full = replace(solver or flow.solver, trace_quadrature="full")
        output = flow(x, solver=full, penalties=rate is not None, **_given(context))
        return Encoded(output.z, output_log_prob(output), output.nfe, output.regularization)

    def _decode(self, z: Tensor, context: Tensor | None, solver: Solver | None) -> Tensor:
        return self.model.inverse(z, solver=solver, **_given(context))

    def _sample(self, n: int, context: Tensor | None) -> Tensor:
        return self.model.sample(n, **_given(context))


class _CnfSubject(Subject):
    """A :class:`~rnode_plugin.RegularizedCNF`."""

    def __init__(self, model: RegularizedCNF) -> None:
        self.model, self.dims, self.context_shape = model, model.dims, model.context_shape
        ode: Any = model.ode
        self.estimator = ode.vf.vf.trace_estimator
        name = next((name for built, name in ode._named if built is ode.solver), type(ode.solver).__name__)
        self.tolerance = max(ode.atol, ode.rtol) if ode.solver.stepping_class == "adaptive" else None
        grid = f"{len(model.t_span) - 1} steps" if self.tolerance is None else f"tolerance {self.tolerance:g}"
        self.solver_text = f"{name}, {grid}"

    def start(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def _encode(
        self,
        x: Tensor,
        context: Tensor | None,
        solver: Solver | None,
        estimator: TraceEstimator | None,
        rate: Rate | None,
    ) -> Encoded:
        model = self.model
        if not (solver is None and estimator is None and rate is None):
            rates = () if rate is None else (rate,)
            model = model.solved_with(solver=solver, estimator=estimator, regularizers=rates)
        before = model.ode.vf.nfe
        z, logdet = model.transform(x, context, penalties=rate is not None)
        nfe = model.ode.vf.nfe - before
        penalties = {} if rate is None else model.regularization
        return Encoded(z, model.base.log_prob(z) + logdet, nfe, penalties)

    def _decode(self, z: Tensor, context: Tensor | None, solver: Solver | None) -> Tensor:
        model = self.model if solver is None else self.model.solved_with(solver=solver)
        return model.inverse(z.reshape(len(z), *model.event_shape), context)

    def _sample(self, n: int, context: Tensor | None) -> Tensor:
        return self.model.sample(n, context=context)


def _given(context: Tensor | None) -> dict[str, Tensor]:
    return {} if context is None else {"context": context}


def subject_of(model: Any) -> Subject:
    """The model as the checks see it.

    Raises:
        ConfigError: it is not of a class that can be diagnosed.
    """
    if isinstance(model, RegularizedCNF):
        return _CnfSubject(model)
    if isinstance(model, nn.Module) and isinstance(model, SolvedFlow):
        return _FlowSubject(model)
    raise ConfigError(
        f"{type(model).__name__} cannot be diagnosed: give a RegularizedCNF, a MultiscaleFlow, or a flow with "
        "dims, solver, estimator, regularizers, forward, inverse and sample like those of MultiscaleFlow."
    )
