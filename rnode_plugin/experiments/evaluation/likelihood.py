"""``evaluate`` measures the likelihood of a flow on held-out samples, its NFE and its penalties."""

from __future__ import annotations

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...core.derivatives import Field
from ...core.objective import FlowOutput, per_dim
from ...core.trace_estimators import Exact, Hutchinson
from ...errors import ConfigError, check_count
from ...flows.density import DensityModel
from ..data.arrays import ImageArray
from ..precision import without_tf32
from ..random_streams import Stream, seeded
from ..recipes.images import settings_of
from ..recipes.kind import Kind
from ..recipes.recipe import KINDS
from .measures import Evaluation, Mean
from .solver_gap import measure_solver_gap

if TYPE_CHECKING:
    from ...solvers import Solver
    from ..recipes.recipe import Data, TableData

_PILOT = 32  # samples. At least this many are drawn twice to measure the noise
_FEWEST_TO_JUDGE = 8  # samples. With fewer, the variance over samples is too uncertain to compare the noise with
_MAX_DRAWS = 8
_NOISE_SHARE = 0.5  # largest standard error from the noise, as a share of the standard error from the samples
_NFE_BATCHES, _NFE_BATCH, _NFE_NUMBERS = 4, 100, 400_000  # number of batches, and samples and numbers in each


@torch.no_grad()
@without_tf32()
def evaluate(
    flow: DensityModel,
    samples: ImageArray | Tensor,
    *,
    settings: Data | TableData | None = None,
    batch_size: int = 200,
    draws: int | None = None,
    solver: Solver | None = None,
    seed: int = 0,
    training_solver: Solver | None = None,
    exact: bool = False,
    accurate_solver: Solver | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure the likelihood, NFE and penalties of ``flow`` on samples, without the rounding of TF32.

    Args:
        flow: the model, which stays on its device and in its mode. Its trace estimator is replaced. The trace is
            exact up to 16 dimensions of images and 64 columns of tables. Above that it is estimated with Rademacher
            probes, which have the smallest variance among probes with independent entries.
        samples: the raw data, array or tensor ``(N, ...)``: uint8 images ``(N, C, H, W)`` with values in
            0..levels-1, or rows of a table.
        settings: the data settings of a recipe, ``recipe.data``. None stands for images with the shape and levels
            of a :class:`~rnode_plugin.MultiscaleFlow`.
        batch_size: samples per solve. An adaptive solver chooses its steps for a whole batch, and begins with the
            longest safe step of the previous batch.
        draws: noise draws per sample. None chooses between one and eight, so that the error from the noise is at
            most half of the error from the samples. For this the first samples are drawn twice. Rows with an exact
            trace have no noise, and are drawn once in any case.
        solver: the integrator; None for the flow's own.
        seed: the seed of the noise.
        training_solver: a fixed grid to compare with ``solver``. An adaptive solver is not compared.
        exact: whether to take the exact trace in any number of dimensions, see :class:`~rnode_plugin.Exact`.
            Quantities whose inputs have no noise are then drawn once. The NFE of a fixed grid and the solver gap
            are measured with Rademacher probes.
        accurate_solver: compare ``solver`` with it, in place of ``training_solver`` with ``solver``.
        progress: called with the number of batches that are done and the number of all batches.

    Returns:
        Means over samples, in which each sample counts once, also in a smaller last batch. The NFE come from
        separate solves of the batches of :func:`nfe_batches`, which do not reuse the steps of another solve.

    Raises:
        ConfigError: there are no samples or no draws, or no ``settings`` for a model other than
            a ``MultiscaleFlow``.
        SolverError: the integration failed.
    """
    if not len(samples):
        raise ConfigError("an evaluation needs at least one row or image.")
    start = time.monotonic()
    if settings is None:
        settings = settings_of(flow)
    kind = KINDS[settings.kind]
    used: Solver = solver or flow.solver
    solves = _Solves(
        settings, flow, samples, batch_size=batch_size, solver=used, seed=seed, exact=exact, progress=progress
    )
    draws = solves.choose_draws(draws)
    solves.take(range(draws), len(solves.batches))
    # the NFE of an adaptive solve depend on the samples that share it and on its first step. Batches of a fixed
    # size, each solved from its own first step, make the NFE of two evaluations comparable
    batches = nfe_batches(len(samples), flow.dims)
    nfe = solves.nfe(batches)
    whole = flow.regularizers.undivided
    coarse = training_solver if accurate_solver is None else used
    # an adaptive solver has errors below those of other figures
    gap = None if coarse is None or coarse.adaptive else solves.gap(coarse, accurate_solver or used)
    return Evaluation(
        samples=len(samples),
        means={quantity.name: solves.mean(draws, index) for index, quantity in enumerate(kind.quantities)},
        draws=draws,
        nfe_mean=float(np.mean(nfe)),
        nfe_min=min(nfe),
        nfe_max=max(nfe),
        nfe_batches=len(batches),
        nfe_batch_size=batches[0].stop,
        penalties=per_dim(solves.integrals(draws), dims=flow.dims, undivided=whole),
        undivided=tuple(sorted(whole)),
        whole_jacobian=has_whole_jacobian(solves.flow),
        gap=gap,
        seconds=time.monotonic() - start,
    )


def nfe_batches(samples: int, dims: int) -> list[slice]:
    """Choose the batches for the NFE, at most four, with 100 samples each, or ``400,000 / dims`` if that is less.

    Args:
        samples: number of held-out samples.
        dims: dimensions of one sample.
    """
    size = min(samples, max(1, min(_NFE_BATCH, _NFE_NUMBERS // dims)))
    return [slice(k * size, (k + 1) * size) for k in range(min(_NFE_BATCHES, samples // size))]


class _Solves:
    """Runs the solves of an evaluation, once for each draw of noise, quantity and batch of samples.

    The noise of a solve depends on these three numbers and the seed alone, so it is the same whichever solves came
    before, and with any solver. The draws that :meth:`choose_draws` needs are kept, so :meth:`take` does not solve
    them again.

    Attributes:
        flow: the model with the trace estimator of the evaluation.
        batches: the samples of each batch, as a slice.
        scores: the scores ``(B,)`` in double precision, by draw, quantity and batch.
    """

    def __init__(
        self,
        settings: Data | TableData,
        flow: DensityModel,
        samples: ImageArray | Tensor,
        *,
        batch_size: int,
        solver: Solver,
        seed: int,
        exact: bool,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._settings, self._kind = settings, KINDS[settings.kind]
        self._samples, self._solver = samples, solver
        self._seed, self._progress = seed, progress
        self.flow = _with_least_noise(flow, self._kind, exact=exact, warm_start=True)
        # probes count the evaluations of a fixed grid and compare two solvers with the same noise, at a lower price
        self._probed = self.flow
        if exact:
            self._probed = _with_least_noise(flow, self._kind, exact=False, warm_start=False)
        self.batches = [slice(first, first + batch_size) for first in range(0, len(samples), batch_size)]
        self.scores: dict[tuple[int, int, int], Tensor] = {}
        self._integrals: dict[tuple[int, int], dict[str, float]] = {}  # by draw and batch
        self._pilot = min(len(self.batches), math.ceil(_PILOT / batch_size))
        # with an exact trace, a quantity whose inputs have no noise is the same in each draw
        self._is_redrawn = [not exact or each.noisy for each in self._kind.quantities]

    def choose_draws(self, asked: int | None) -> int:
        """Choose the number of draws: 1 without any noise, else as ``asked``.

        If none is asked for, it is one that makes the noise small enough, from two draws of the first samples.
        """
        if not self._kind.quantities[0].noisy and self.flow.estimator.is_exact:
            return 1
        if asked is not None:
            return check_count(asked, "the number of draws")
        # one draw of everything, and the second draw of the first samples
        total = len(self._is_redrawn) * len(self.batches) + sum(self._is_redrawn) * self._pilot
        self.take(range(2), self._pilot, total=total)
        return max(
            _draws_needed(self._rows(range(2), quantity, self._pilot))
            for quantity, is_redrawn in enumerate(self._is_redrawn)
            if is_redrawn
        )

    def take(self, draws: range, batches: int, *, total: int | None = None) -> None:
        """Solve these draws of the first batches, except where that was done before."""
        every = itertools.product(draws, range(len(self._is_redrawn)), range(batches))
        keys = [key for key in every if key not in self.scores and (key[0] == 0 or self._is_redrawn[key[1]])]
        total = total or len(self.scores) + len(keys)
        # scores come from a solve in which no penalty takes part, so some penalties take a separate solve
        separate_penalty_solve = self.flow.regularizers.adds_evaluations
        for draw, quantity, index in keys:
            solved = partial(self._encode, self.flow, self._solver, (draw, quantity, index), self.batches[index])
            # the penalties are measured where training applies them, with the first quantity's noise
            with_penalties = quantity == 0
            output = solved(penalties=with_penalties and not separate_penalty_solve)
            self.scores[draw, quantity, index] = self._scores_of(output)
            if with_penalties:
                if separate_penalty_solve:
                    output = solved(penalties=True)
                sums = {name: float(each.cpu().double().sum()) for name, each in output.regularization.items()}
                self._integrals[draw, index] = sums
            if self._progress is not None:
                self._progress(len(self.scores), total)

    def nfe(self, batches: Sequence[slice]) -> list[int]:
        """Count the evaluations of one solve of each of these batches, which begins with its own first step."""
        flow = self.flow if self._solver.adaptive else self._probed
        cold = flow.solved_with(trace_estimator=flow.estimator, regularizers=flow.regularizers, warm_start=False)
        return [self._encode(cold, self._solver, (0, 0, index), batch).nfe for index, batch in enumerate(batches)]

    def gap(self, coarse: Solver, accurate: Solver) -> float:
        """The mean score of the first batch by a coarse solver minus the one by an accurate solver.

        Without an exact trace the scores by the accurate solver are those that were measured.
        """
        first, batch = (0, 0, 0), self.batches[0]
        scores = self.scores[first]
        if self._probed is not self.flow:
            scores = self._scores_of(self._encode(self._probed, accurate, first, batch))
        gaps = measure_solver_gap(
            lambda solver: self._scores_of(self._encode(self._probed, solver, first, batch)), coarse, scores
        )
        return float(gaps.mean())

    def _encode(
        self,
        flow: DensityModel,
        solver: Solver,
        noise: tuple[int, int, int],
        batch: slice,
        *,
        penalties: bool = False,
    ) -> FlowOutput:
        """Solve a batch with the noise of a draw, a quantity and the index of a batch."""
        with seeded(self._seed, Stream.VALIDATE, *noise):
            samples = self._samples[batch]
            if not isinstance(samples, Tensor):
                # copied, because a slice of a mapped file is read-only, and torch warns about such memory
                samples = torch.from_numpy(np.array(samples))
            samples = samples.to(next(flow.parameters()).device)
            x, context = self._kind.inputs(self._settings, samples, self._kind.quantities[noise[1]].name)
            return flow.encode(x, context=context, solver=solver.full_quadrature, penalties=penalties)

    def _scores_of(self, output: FlowOutput) -> Tensor:
        """Return the scores ``(B,)`` of a solve, in double precision on the CPU, where they are averaged."""
        return self._kind.scores(self._settings, self.flow.log_prob_of(output)).cpu().double()

    def mean(self, draws: int, quantity: int) -> Mean:
        """Average the scores of all samples, with the standard errors of the mean."""
        draws = draws if self._is_redrawn[quantity] else 1
        scores = self._rows(range(draws), quantity, len(self.batches))
        count = scores.shape[1]
        several, noise = scores, None
        # with one draw only the pilot was drawn twice, and its variance stands for the variance of all samples
        if draws == 1 and (1, quantity, 0) in self.scores:
            several = self._rows(range(2), quantity, self._pilot)
        if len(several) > 1:
            noise = math.sqrt(float(several.var(0).mean()) / (draws * count))
        of_samples = float(scores.mean(0).std() / count**0.5) if count > 1 else None
        return Mean(float(scores.mean()), of_samples, noise, tuple(scores.mean(0).tolist()))

    def integrals(self, draws: int) -> dict[str, float]:
        """Average the integral of each penalty over samples and draws."""
        sums = defaultdict[str, list[float]](list)
        for solve in itertools.product(range(draws), range(len(self.batches))):
            for name, value in self._integrals[solve].items():
                sums[name].append(value)
        return {name: sum(each) / (len(self._samples) * draws) for name, each in sums.items()}

    def _rows(self, draws: range, quantity: int, batches: int) -> Tensor:
        """Return the scores of the first ``batches`` batches as ``(draws, samples)``."""
        scores = [self.scores[draw, quantity, index] for draw in draws for index in range(batches)]
        return torch.cat(scores).reshape(len(draws), -1)


def _with_least_noise(flow: DensityModel, kind: Kind, *, exact: bool, warm_start: bool) -> DensityModel:
    """Return a copy of the flow, which shares its parameters, with the trace estimator for an evaluation."""
    estimator = flow.estimator
    if not estimator.is_exact:
        many = Exact() if exact else Hutchinson()
        estimator = Exact(frobenius=True) if is_exact(flow, kind) else many
    return flow.solved_with(trace_estimator=estimator, regularizers=flow.regularizers, warm_start=warm_start)


def is_exact(flow: DensityModel, kind: Kind) -> bool:
    """Whether an evaluation takes the exact trace, and the penalty ``jacfrob`` the norm of the whole Jacobian."""
    return flow.estimator.is_exact or flow.dims <= kind.exact_dims


def has_whole_jacobian(flow: DensityModel) -> bool:
    """Whether ``flow`` measures ``jacfrob`` and penalties like it with the whole Jacobian, without noise.

    Exact traces of a field with a radius take fewer products than dimensions, which only estimate its norm.
    """
    estimator = flow.estimator
    radii = [estimator.radius, *(each.radius for each in flow.modules() if isinstance(each, Field))]
    whole = isinstance(estimator, Exact) and estimator.frobenius
    return estimator.is_exact and (whole or not any(radii))


def _draws_needed(rows: Tensor) -> int:
    """Choose the number of draws from two draws, ``rows (2, samples)``, so that the noise is small.

    With k draws the noise adds ``noise / k`` to the variance ``own`` of the samples. The smallest k with
    ``noise / k <= share^2 own`` keeps its standard error below the share of theirs.
    """
    if rows.shape[1] < _FEWEST_TO_JUDGE:
        return len(rows)
    noise = float(rows.var(0).mean())  # variance of one draw of one sample
    # the variance of the means over two draws contains half of that noise
    own = max(float(rows.mean(0).var()) - noise / 2, 0.0)
    if noise <= _NOISE_SHARE**2 * own:
        return 1
    return min(_MAX_DRAWS, math.ceil(noise / (_NOISE_SHARE**2 * own))) if own > 0 else _MAX_DRAWS
