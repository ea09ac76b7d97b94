"""The model and the data in a diagnosis. The model is solved batch by batch, with a given solver or estimator."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.trace_estimators import TraceEstimator
from ..errors import ConfigError
from ..flows.density import DensityModel
from ..solvers import Solver
from .random_streams import Stream, seeded

_BATCH_NUMBERS = 400_000  # most numbers in the state of one solve, 510 images of MNIST
_MAX_BATCH = 4096


class HeldOut(NamedTuple):
    """The data for a diagnosis: samples ``x (N, *event)``, their contexts or None, and the seed of all noise."""

    x: Tensor
    context: Tensor | None
    seed: int

    def first(self, n: int) -> HeldOut:
        """The first ``n`` samples."""
        return self._replace(x=self.x[:n], context=None if self.context is None else self.context[:n])

    def noise(self) -> AbstractContextManager[None]:
        """Context in which random draws are the same each time."""
        return seeded(self.seed, Stream.DIAGNOSE)


class Encoded(NamedTuple):
    """Latents and log-densities of data.

    Attributes:
        z: latents ``(N, D)``.
        log_prob: log-density of each sample, ``(N,)`` in nats, in double precision on the CPU.
        nll: negative log-density in nats per dimension, ``(N,)``.
        nfe: number of evaluations of the vector fields in the solve of one batch, averaged over the batches.
    """

    z: Tensor
    log_prob: Tensor
    nll: Tensor
    nfe: float


class Subject:
    """A density model under diagnosis.

    Attributes:
        dims: number of dimensions of one sample.
        solver_text: description of the model's solver.
        tolerance: the larger tolerance of that solver; None for a fixed grid.
        batch_size: number of samples in one solve.

    Raises:
        ConfigError: if the model is not a :class:`~rnode_plugin.flows.density.DensityModel`.
    """

    def __init__(self, model: Any) -> None:
        if not isinstance(model, DensityModel):
            raise ConfigError(
                f"{type(model).__name__} cannot be diagnosed: give a RegularizedCNF, a MultiscaleFlow, a TableFlow "
                "or a subclass of rnode_plugin.flows.density.DensityModel."
            )
        self.model, self.dims = model, model.event_shape.numel()
        self.batch_size = max(1, min(_MAX_BATCH, _BATCH_NUMBERS // self.dims))
        solver = model.solver
        self.solver_text = solver.text
        self.tolerance = None if solver.tolerances is None else max(solver.tolerances)

    def encode(
        self, data: HeldOut, *, solver: Solver | None = None, estimator: TraceEstimator | None = None
    ) -> Encoded:
        """Map the data to the latent, batch by batch, with the same noise at each call.

        The noise is signs, also for a model that trains with Gaussian noise. ``estimator`` replaces the model's.
        """
        model = self.model.solved_with(
            solver=solver, trace_estimator=estimator or self.model.estimator.for_evaluation
        )
        with data.noise():
            outputs = [
                model.encode(part, context=given, penalties=False, solver=model.solver.full_quadrature)
                for part, given in self._batches(data.x, data.context)
            ]
        log_prob = torch.cat([model.log_prob_of(each).cpu().double() for each in outputs])
        nfe = sum(each.nfe for each in outputs) / len(outputs)
        return Encoded(torch.cat([each.z.flatten(1) for each in outputs]), log_prob, -log_prob / self.dims, nfe)

    def decode(self, z: Tensor, data: HeldOut, *, solver: Solver | None = None) -> Tensor:
        """The samples of latents ``z (N, D)``, with the contexts in ``data``."""
        model = self.model.solved_with(solver=solver)
        z = z.reshape(len(z), *self.model.base.event_shape)
        return torch.cat([model.inverse(part, context=given) for part, given in self._batches(z, data.context)])

    def sample(self, n: int, context: Tensor | None) -> Tensor:
        """Draw ``n`` samples; ``context`` has one row for each sample."""
        rows = self._batches(torch.empty(n, 0), context)
        return torch.cat([self.model.sample(len(part), context=given) for part, given in rows])

    def _batches(self, x: Tensor, context: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
        parts = x.split(self.batch_size)
        contexts = [None] * len(parts) if context is None else context.split(self.batch_size)
        return list(zip(parts, contexts, strict=True))
