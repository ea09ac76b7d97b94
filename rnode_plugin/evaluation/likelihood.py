"""``evaluate``: the likelihood of a flow on held-out samples, its NFE and penalties."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..core.objective import FlowOutput, output_log_prob
from ..core.random_streams import Stream, seeded
from ..core.regularizers import undivided
from ..core.trace_estimators import Exact, Hutchinson
from ..errors import ConfigError
from ..flows.base import BlockFlow
from ..recipes.task import ImageTask, Task
from .measures import Evaluation, Mean, batch_of
from .solver_gap import measure_solver_gap

if TYPE_CHECKING:
    from ..solvers import Solver

_PILOT = 32  # samples: at least so many are drawn twice to measure the noise
_FEWEST_TO_JUDGE = 8  # samples: with fewer the noise is not compared with the samples' error
_MAX_DRAWS = 8
_NOISE_SHARE = 0.5  # of the samples' error: the noise may be that large
_NFE_BATCHES, _NFE_BATCH, _NFE_NUMBERS = 4, 100, 400_000  # batches, and samples and numbers of one


@torch.no_grad()
def evaluate(
    flow: Any,
    samples: Any,
    *,
    measure: Task | None = None,
    batch_size: int = 200,
    draws: int | None = None,
    solver: Solver | None = None,
    seed: int = 0,
    training_solver: Solver | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure ``flow`` on samples.

    Args:
        flow: the model; it stays on its device and in its mode. Its trace estimator is replaced: the trace is exact
            or, above 16 dimensions of images and 64 columns of tables, estimated with Rademacher probes, which have
            the smallest variance among independent ones.
        samples: as the data come, array or tensor ``(N, ...)``: images uint8 ``(N, C, H, W)`` with values in
            0..levels-1, or rows of a table.
        measure: the task of a recipe; None for images of the flow's shape and levels.
        batch_size: samples per solve. An adaptive solver chooses its steps for a whole batch, and begins with the
            last step of the batch before.
        draws: draws of noise per sample. None for as many as make the error from the noise at most half of the
            error from the samples, one to eight. To measure it the first samples are drawn twice.
        solver: the integrator; None for the flow's own.
        seed: of the noise.
        training_solver: a fixed grid of known step to be compared with ``solver``; others are not compared.
        progress: called with batches done and batches in all.

    Returns:
        Means over samples: the last, smaller batch counts by its samples. NFE is counted in separate solves, which
        begin with no step of another solve: of four batches of 100 samples, of large samples fewer, see
        :func:`nfe_batches`.

    Raises:
        ConfigError: for no samples.
        SolverError: if the integration fails.
    """
    if not len(samples):
        raise ConfigError("an evaluation needs at least one row or image.")
    measure = measure or ImageTask(flow.image_shape, flow.levels)
    start = time.monotonic()
    measuring = _Measuring(measure, flow, samples, batch_size, solver, seed, progress)
    if draws is None:
        draws = measuring.choose_draws()
    measuring.finish(draws)
    batches = nfe_batches(len(samples), measure.dims)
    nfe = [measuring.encode(solver, batch, index=index, alone=True).nfe for index, batch in enumerate(batches)]
    return Evaluation(
        means={quantity.name: measuring.mean(draws, k) for k, quantity in enumerate(measure.quantities)},
        draws=draws,
        nfe_mean=float(np.mean(nfe)),
        nfe_min=min(nfe),
        nfe_max=max(nfe),
        nfe_batches=len(batches),
        nfe_batch_size=batches[0].stop,
        penalties=measuring.penalties(draws),
        undivided=tuple(sorted(measuring.whole)),
        gap=measuring.gap(training_solver),
        seconds=time.monotonic() - start,
    )


def nfe_batches(samples: int, dims: int) -> list[slice]:
    """The batches for the NFE: four of 100 samples, of ``400,000 / dims`` where that is less; at least one each.

    Args:
        samples: number of held-out samples.
        dims: dimensions of one sample.
    """
    size = min(samples, max(1, min(_NFE_BATCH, _NFE_NUMBERS // dims)))
    return [slice(k * size, (k + 1) * size) for k in range(min(_NFE_BATCHES, samples // size))]


class _Measuring:
    """The solves of an evaluation: each batch of samples, draw of noise and quantity once.

    Attributes:
        whole: names of the penalties that the objective does not divide by the dimensions.
    """

    def __init__(
        self,
        measure: Task,
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
        # penalties of steps and trajectories may take evaluations of their own: they get a solve apart
        regularizers = getattr(flow, "regularizers", ())
        self._apart = any(each.kind != "rate" for each in regularizers)
        self.whole = undivided(regularizers)
        self._kinds = range(len(measure.quantities))
        self._device = next(flow.parameters()).device
        self._progress, self._done = progress, 0
        self._total = len(self._kinds) * (len(self._batches) + self._pilot)
        self._first_steps: tuple[float | None, ...] | None = () if isinstance(flow, BlockFlow) else None
        self._scores: dict[tuple[int, int, int], Tensor] = {}  # by quantity, draw and batch
        self._integrals: dict[tuple[int, int], dict[str, float]] = {}  # by draw and batch

    def choose_draws(self) -> int:
        """Draw the first samples twice; the number of draws that makes the noise small enough."""
        if not self._measure.noisy and isinstance(getattr(self._flow, "estimator", None), Exact):
            return 1
        for draw, kind, index in itertools.product((0, 1), self._kinds, range(self._pilot)):
            self._take(kind, draw, index)
        return max(_draws_needed(self._pilot_rows(kind)) for kind in self._kinds)

    def finish(self, draws: int) -> None:
        """Solve the rest of ``draws`` draws of all samples."""
        every = itertools.product(range(draws), self._kinds, range(len(self._batches)))
        todo = [key for draw, kind, index in every if (key := (kind, draw, index)) not in self._scores]
        self._total = self._done + len(todo)
        for key in todo:
            self._take(*key)

    def mean(self, draws: int, kind: int) -> Mean:
        """Mean and errors of all samples."""
        scores = self._rows(kind, range(draws), len(self._batches))
        count = scores.shape[1]
        several = scores if draws > 1 else self._pilot_rows(kind)
        noise = None if len(several) < 2 else math.sqrt(float(several.var(0).mean()) / (draws * count))
        of_samples = float(scores.mean(0).std() / count**0.5) if count > 1 else None
        return Mean(float(scores.mean()), of_samples, noise, tuple(scores.mean(0).tolist()))

    def penalties(self, draws: int) -> dict[str, float]:
        """Mean integral of each penalty, first quantity, divided by the dimensions where the objective is."""
        found: dict[str, float] = {}
        for each in itertools.product(range(draws), range(len(self._batches))):
            for name, integral in self._integrals[each].items():
                share = integral / (len(self._samples) * draws)
                share = share if name in self.whole else share / self._measure.dims
                found[name] = found.get(name, 0.0) + share
        return found

    def gap(self, training_solver: Solver | None) -> float | None:
        """Mean score by the training solver less the one of this evaluation, first batch, same noise."""
        if training_solver is None or training_solver.adaptive or training_solver.step == "auto":
            return None
        return measure_solver_gap(
            lambda solver: self.encode(solver, self._batches[0]),
            self._scores_of,
            training_solver,
            self._scores[0, 0, 0],
        ).mean

    def _pilot_rows(self, kind: int) -> Tensor:
        """Scores ``(draws, samples)`` of the first samples, drawn once or twice."""
        return self._rows(kind, [draw for draw in (0, 1) if (kind, draw, 0) in self._scores], self._pilot)

    def _rows(self, kind: int, draws: Iterable[int], batches: int) -> Tensor:
        return torch.stack([torch.cat([self._scores[kind, draw, b] for b in range(batches)]) for draw in draws])

    def _take(self, kind: int, draw: int, index: int) -> None:
        along = kind == 0 and not self._apart
        options: dict[str, Any] = {"kind": kind, "draw": draw, "index": index}
        output = self.encode(self._solver, self._batches[index], **options, penalties=along)
        self._scores[kind, draw, index] = self._scores_of(output)
        if kind == 0:  # the samples as training sees them
            if self._apart:
                output = self.encode(self._solver, self._batches[index], **options, penalties=True)
            sums = {name: float(each.cpu().double().sum()) for name, each in output.regularization.items()}
            self._integrals[draw, index] = sums
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)

    def encode(
        self,
        solver: Solver | None,
        batch: slice,
        *,
        kind: int = 0,
        draw: int = 0,
        index: int = 0,
        penalties: bool = False,
        alone: bool = False,
    ) -> FlowOutput:
        """Solve a batch with the noise of this quantity, draw and index; ``alone`` without another solve's step."""
        with seeded(self._seed, Stream.VALIDATE, draw, kind, index):
            x, given = self._measure.inputs(batch_of(self._samples, batch).to(self._device), kind)
            known = {} if alone or self._first_steps is None else {"first_steps": self._first_steps}
            output = self._flow(x, **given, solver=solver, penalties=penalties, **known)
        if known:
            self._first_steps = output.next_steps
        return output

    def _scores_of(self, output: FlowOutput) -> Tensor:
        return self._measure.scores(output_log_prob(output)).cpu().double()


def _with_least_noise(flow: Any, measure: Task) -> Any:
    """The same flow, the same parameters, with the trace estimator of an evaluation."""
    estimator = getattr(flow, "estimator", None)
    if estimator is None or isinstance(estimator, Exact):
        return flow
    quiet = copy.copy(flow)
    quiet.estimator = Exact() if flow.dims <= measure.exact_dims else Hutchinson("rademacher")
    return quiet


def _draws_needed(rows: Tensor) -> int:
    """The number of draws that makes the noise small against the samples, from two draws, ``rows (2, samples)``."""
    if rows.shape[1] < _FEWEST_TO_JUDGE:
        return len(rows)
    noise = float(rows.var(0).mean())  # of one draw of one sample
    own = max(float(rows.mean(0).var()) - noise / 2, 0.0)  # of the samples, without the noise of their means
    if noise <= _NOISE_SHARE**2 * own:
        return 1
    return min(_MAX_DRAWS, math.ceil(noise / (_NOISE_SHARE**2 * own))) if own > 0 else _MAX_DRAWS
