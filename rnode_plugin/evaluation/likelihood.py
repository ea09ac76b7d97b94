"""The likelihood of a flow on held-out samples, NFE and penalties, by the measure of their kind of data.

Two things are random: which samples there are, and the noise of the dequantisation and of the trace estimate. An
evaluation keeps the second below the first. In few dimensions the trace is exact. In many, Rademacher probes
estimate it, which have the smallest variance of independent ones, and there are as many draws of noise as that
takes.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..core.objective import FlowOutput, output_log_prob
from ..core.random_streams import Stream, seeded
from ..core.regularizers.base import kind_of
from ..core.trace_estimators import Exact, Hutchinson
from ..errors import ConfigError, SolverError
from ..flows.base import BlockFlow
from ..solvers import StepMemory
from .measures import Evaluation, EvaluationResult, ImageMeasure, Mean, Measure, batch_of

if TYPE_CHECKING:
    from ..flows.multiscale import MultiscaleFlow
    from ..solvers import Solver

__all__ = ["evaluate", "evaluate_by"]


_PILOT = 32  # samples: at least so many are drawn twice to learn how large the noise is
_FEWEST_TO_JUDGE = 8  # samples: the spread of fewer says too little
_MAX_DRAWS = 8
_NOISE_SHARE = 0.5  # of the samples' error: so large the noise's may be

R = TypeVar("R", bound=Evaluation)


def evaluate_by(
    measure: Measure[R],
    flow: Any,
    samples: Any,
    *,
    batch_size: int = 200,
    draws: int | None = None,
    solver: Solver | None = None,
    seed: int = 0,
    training_solver: Solver | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> R:
    """Measure ``flow`` on samples.

    Args:
        measure: of the kind of data, see :func:`~rnode_plugin.evaluation.measures.measure_of`.
        flow: the model; it stays on its device and in its mode. Its own trace estimator is not used, see above.
        samples: as the data come, array or tensor ``(N, ...)``.
        batch_size: samples per solve. An adaptive solver chooses its steps for a whole batch, and begins with those
            that suited the batch before.
        draws: draws of noise per sample. None for as many as make the error from the noise at most half of that
            from the samples, one to eight: the first samples are drawn twice to learn that.
        solver: the integrator; None for the flow's own.
        seed: of the noise.
        training_solver: a fixed grid to be compared with ``solver``; None, an adaptive one or one whose step is not
            known: no comparison.
        progress: called with batches done and batches in all.

    Returns:
        Means over samples: the last, smaller batch counts by its samples.

    Raises:
        ConfigError: for counts below one, or no samples.
        SolverError: if the integration fails.
    """
    if (draws is not None and draws < 1) or batch_size < 1 or len(samples) < 1:
        raise ConfigError(f"evaluation needs at least one {measure.sample}, one draw and a batch size of one.")
    start = time.monotonic()
    measuring = _Measuring(measure, flow, samples, batch_size, solver, seed, progress)
    if draws is None:
        draws = measuring.choose_draws()
    measuring.finish(draws)
    return measure.result(
        {quantity.name: measuring.mean(draws, k) for k, quantity in enumerate(measure.quantities)},
        draws=draws,
        nfe_mean=float(np.mean(measuring.nfe)),
        nfe_min=min(measuring.nfe),
        nfe_max=max(measuring.nfe),
        penalties=measuring.penalties(draws),
        gap=measuring.gap(training_solver),
        seconds=time.monotonic() - start,
    )


class _Measuring:
    """The solves of an evaluation: each batch of samples, draw of noise and quantity once.

    Attributes:
        nfe: evaluations of each solve.
    """

    def __init__(
        self,
        measure: Measure[Any],
        flow: Any,
        samples: Any,
        batch_size: int,
        solver: Solver | None,
        seed: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._measure, self._flow = measure, _with_least_noise(flow, measure)
        self._samples, self._solver, self._seed = samples, solver, seed
        self._batches = [slice(first, first + batch_size) for first in range(0, len(samples), batch_size)]
        self._pilot = min(len(self._batches), math.ceil(_PILOT / batch_size))
        # penalties of steps and trajectories may take evaluations of their own, which are not the flow's
        self._apart = any(kind_of(each) != "rate" for each in getattr(flow, "regularizers", ()))
        self._kinds = range(len(measure.quantities))
        self._device = next(flow.parameters()).device
        self._progress, self._done = progress, 0
        self._total = len(self._kinds) * (len(self._batches) + self._pilot)
        remembers = isinstance(flow, BlockFlow)
        self._options: dict[str, Any] = {"memory": defaultdict(StepMemory)} if remembers else {}
        self._scores: dict[tuple[int, int, int], Tensor] = {}  # by quantity, draw and batch
        self._integrals: dict[tuple[int, int], dict[str, float]] = {}  # by draw and batch
        self.nfe: list[int] = []

    def choose_draws(self) -> int:
        """Draw the first samples twice; how many draws make the noise small enough."""
        if not self._measure.noisy and isinstance(getattr(self._flow, "estimator", None), Exact):
            return 1
        for draw in (0, 1):
            for kind in self._kinds:
                for index in range(self._pilot):
                    self._take(kind, draw, index)
        return max(_draws_needed(self._pilot_rows(kind)) for kind in self._kinds)

    def finish(self, draws: int) -> None:
        """Do whatever is left of ``draws`` draws of all samples."""
        todo = [
            key
            for draw in range(draws)
            for kind in self._kinds
            for index in range(len(self._batches))
            if (key := (kind, draw, index)) not in self._scores
        ]
        self._total = self._done + len(todo)
        for key in todo:
            self._take(*key)

    def mean(self, draws: int, kind: int) -> Mean:
        """Mean and errors of all samples."""
        rows = [
            torch.cat([self._scores[kind, draw, b] for b in range(len(self._batches))]) for draw in range(draws)
        ]
        scores = torch.stack(rows)
        count = scores.shape[1]
        several = scores if draws > 1 else self._pilot_rows(kind)
        noise = None if len(several) < 2 else math.sqrt(float(several.var(0).mean()) / (draws * count))
        of_samples = float(scores.mean(0).std() / count**0.5) if count > 1 else None
        return Mean(float(scores.mean()), of_samples, noise, tuple(scores.mean(0).tolist()))

    def penalties(self, draws: int) -> dict[str, float]:
        """Mean integral of each penalty over samples and draws of the first quantity, divided by the dimensions."""
        found: dict[str, float] = {}
        for draw in range(draws):
            for index in range(len(self._batches)):
                for name, integral in self._integrals[draw, index].items():
                    share = integral / (self._measure.dims * len(self._samples) * draws)
                    found[name] = found.get(name, 0.0) + share
        return found

    def gap(self, training_solver: Solver | None) -> float | None:
        """Mean score by the training solver less that of this evaluation, first batch, same noise."""
        if training_solver is None or training_solver.adaptive or training_solver.step == "auto":
            return None
        full = dataclasses.replace(training_solver, trace_quadrature="full")
        try:
            coarse = self._scores_of(self._encode(full, kind=0, draw=0, index=0, penalties=False))
        except SolverError:  # the gap informs; a training solver that fails is infinitely far off
            return math.inf
        return float((coarse - self._scores[0, 0, 0]).mean())

    def _pilot_rows(self, kind: int) -> Tensor:
        """Scores ``(draws, samples)`` of the first samples, as often as they were drawn."""
        draws = [draw for draw in (0, 1) if (kind, draw, 0) in self._scores]
        return torch.stack([torch.cat([self._scores[kind, d, b] for b in range(self._pilot)]) for d in draws])

    def _take(self, kind: int, draw: int, index: int) -> None:
        along = kind == 0 and not self._apart
        output = self._encode(self._solver, kind=kind, draw=draw, index=index, penalties=along)
        self._scores[kind, draw, index] = self._scores_of(output)
        self.nfe.append(output.nfe)
        if kind == 0:  # the penalties are those of the samples as training sees them
            if self._apart:
                output = self._encode(self._solver, kind=0, draw=draw, index=index, penalties=True)
            sums = {name: float(each.double().sum()) for name, each in output.regularization.items()}
            self._integrals[draw, index] = sums
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)

    def _encode(self, solver: Solver | None, *, kind: int, draw: int, index: int, penalties: bool) -> FlowOutput:
        with torch.no_grad(), seeded(self._seed, Stream.VALIDATE, draw, kind, index):
            batch = batch_of(self._samples, self._batches[index]).to(self._device)
            x, given = self._measure.inputs(batch, kind)
            return self._flow(x, **given, solver=solver, penalties=penalties, **self._options)

    def _scores_of(self, output: FlowOutput) -> Tensor:
        return self._measure.scores(output_log_prob(output)).double().cpu()


def _with_least_noise(flow: Any, measure: Measure[Any]) -> Any:
    """The same flow, the same parameters, with the trace estimator of an evaluation."""
    estimator = getattr(flow, "estimator", None)
    if estimator is None or isinstance(estimator, Exact):
        return flow
    quiet = copy.copy(flow)
    quiet.estimator = Exact() if flow.dims <= measure.exact_dims else Hutchinson("rademacher")
    return quiet


def _draws_needed(rows: Tensor) -> int:
    """How many draws make the noise small against the samples, from two draws of some: ``rows (2, samples)``."""
    if rows.shape[1] < _FEWEST_TO_JUDGE:
        return len(rows)
    noise = float(rows.var(0).mean())  # of one draw of one sample
    own = max(float(rows.mean(0).var()) - noise / 2, 0.0)  # of the samples, without what noise their means have
    if noise <= _NOISE_SHARE**2 * own:
        return 1
    return min(_MAX_DRAWS, math.ceil(noise / (_NOISE_SHARE**2 * own))) if own > 0 else _MAX_DRAWS


def evaluate(
    flow: MultiscaleFlow,
    images: Any,
    *,
    batch_size: int = 200,
    draws: int | None = None,
    solver: Solver | None = None,
    seed: int = 0,
    training_solver: Solver | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Measure ``flow`` on images.

    Args:
        flow: the model; it stays on its device and in its mode. Its own trace estimator is not used, see
            :mod:`~rnode_plugin.evaluation.likelihood`.
        images: uint8 ``(N, C, H, W)``, array or tensor, values in 0..levels-1.
        batch_size, draws, solver, seed, training_solver, progress: as for
            :func:`~rnode_plugin.evaluation.likelihood.evaluate_by`.

    Returns:
        Means over images: the last, smaller batch counts by its images.

    Raises:
        ConfigError: for counts below one, or no images.
        SolverError: if the integration fails.
    """
    return evaluate_by(
        ImageMeasure(flow.image_shape, flow.levels),
        flow,
        images,
        batch_size=batch_size,
        draws=draws,
        solver=solver,
        seed=seed,
        training_solver=training_solver,
        progress=progress,
    )
