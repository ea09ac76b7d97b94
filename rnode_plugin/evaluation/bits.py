"""Bits/dim of a flow on images, with uniform noise (dirty) and at the bins' centres (clean), and their errors.

Two things are random: which images there are, and the noise of the dequantisation and of the trace estimate. An
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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..core.objective import bits_per_dim, output_log_prob
from ..core.random_streams import Stream, seeded
from ..core.regularizers.base import kind_of
from ..core.trace_estimators import Exact, Hutchinson
from ..errors import ConfigError, SolverError
from ..flows.multiscale import MultiscaleFlow
from ..flows.transforms import dequantize
from ..solvers.steps.step_memory import StepMemory
from ..types import FlowOutput

if TYPE_CHECKING:
    from ..solvers import Solver

__all__ = ["BitsPerDim", "EvaluationResult", "evaluate", "image_batch"]

_EXACT_DIMS = 16  # the whole Jacobian takes a product per dimension: beyond this, draws cost less
_PILOT_IMAGES = 32  # at least so many are drawn twice to learn how large the noise is
_FEWEST_TO_JUDGE = 8  # images: the spread of fewer says too little
_MAX_DRAWS = 8
_NOISE_SHARE = 0.5  # of the images' error: so large the noise's may be


@dataclass(frozen=True)
class BitsPerDim:
    """A mean in bits/dim and how far it can be trusted.

    Attributes:
        mean: over images and noise draws.
        stderr_images: standard error from the choice of images: of each image's mean over draws, so what noise is
            left is in it; None for a single image.
        stderr_noise: the part of it that comes from the noise: what another evaluation of the same images would
            differ by. None if nothing was drawn twice.
        images: bits/dim of each image, its mean over draws. Two models are best compared image by image.
    """

    mean: float
    stderr_images: float | None
    stderr_noise: float | None
    images: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True)
class EvaluationResult:
    """What :func:`evaluate` measured.

    Attributes:
        images, draws: how many images, and noise draws of each.
        dirty: with uniform noise in each bin, an upper bound on the bits/dim of the discrete images (in
            expectation over the noise).
        clean: of the density at the bins' centres; not a bound on anything discrete.
        nfe_mean, nfe_min, nfe_max: evaluations of the vector fields per batch, all blocks together, without those
            that a penalty takes for itself.
        penalties: mean integral of each penalty by name, divided by the number of dimensions.
        seconds: wall-clock time.
        gap: mean bits/dim by the training solver, less those by the accurate one, of the dirty images of the first
            batch with the same noise; infinite if the training solver fails there, None if it is not a fixed grid
            with a known step.
    """

    images: int
    draws: int
    dirty: BitsPerDim
    clean: BitsPerDim
    nfe_mean: float
    nfe_min: int
    nfe_max: int
    penalties: dict[str, float]
    seconds: float
    gap: float | None = None


def image_batch(images: Any, part: slice) -> Tensor:
    """Some of the uint8 images of an array, in memory or on disk, as a tensor."""
    chosen = images[part]
    return chosen if isinstance(chosen, Tensor) else torch.from_numpy(np.ascontiguousarray(chosen))


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
        flow: the model; it stays on its device and in its mode. Its own trace estimator is not used, see above.
        images: uint8 ``(N, C, H, W)``, array or tensor, values in 0..levels-1.
        batch_size: images per solve. An adaptive solver chooses its steps for a whole batch, and begins with those
            that suited the batch before.
        draws: draws of dequantisation and trace noise per image. None for as many as make the error from the noise
            at most half of that from the images, one to eight: the first images are drawn twice to learn that.
        solver: the integrator; None for the flow's own.
        seed: of the noise.
        training_solver: a fixed grid to be compared with ``solver``; None, an adaptive one or one whose step is not
            known: no comparison.
        progress: called with batches done and batches in all.

    Returns:
        Means over images: the last, smaller batch counts by its images.

    Raises:
        ConfigError: for counts below one, or no images.
        SolverError: if the integration fails.
    """
    if (draws is not None and draws < 1) or batch_size < 1 or len(images) < 1:
        raise ConfigError("evaluation needs at least one image, one draw and a batch size of one.")
    start = time.monotonic()
    measuring = _Measuring(flow, images, batch_size, solver, seed, progress)
    if draws is None:
        draws = measuring.choose_draws()
    measuring.finish(draws)
    return EvaluationResult(
        images=len(images),
        draws=draws,
        dirty=measuring.summary(draws, clean=False),
        clean=measuring.summary(draws, clean=True),
        nfe_mean=float(np.mean(measuring.nfe)),
        nfe_min=min(measuring.nfe),
        nfe_max=max(measuring.nfe),
        penalties=measuring.penalties(draws),
        gap=measuring.gap(training_solver),
        seconds=time.monotonic() - start,
    )


class _Measuring:
    """The solves of an evaluation: each batch of images, draw of noise and kind (clean or dirty) once.

    Attributes:
        nfe: evaluations of each solve.
    """

    def __init__(
        self,
        flow: MultiscaleFlow,
        images: Any,
        batch_size: int,
        solver: Solver | None,
        seed: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._flow, self._images, self._solver, self._seed = _with_least_noise(flow), images, solver, seed
        self._batches = [slice(first, first + batch_size) for first in range(0, len(images), batch_size)]
        self._pilot = min(len(self._batches), math.ceil(_PILOT_IMAGES / batch_size))
        # penalties of steps and trajectories may take evaluations of their own, which are not the flow's
        self._apart = any(kind_of(each) != "rate" for each in getattr(flow, "regularizers", ()))
        self._dims, self._levels = math.prod(flow.image_shape), flow.levels
        self._device = next(flow.parameters()).device
        self._progress, self._done, self._total = progress, 0, 2 * (len(self._batches) + self._pilot)
        remembers = isinstance(flow, MultiscaleFlow)
        self._options: dict[str, Any] = {"memory": defaultdict(StepMemory)} if remembers else {}
        self._bits: dict[tuple[bool, int, int], Tensor] = {}  # by kind, draw and batch
        self._integrals: dict[tuple[int, int], dict[str, float]] = {}  # by draw and batch
        self.nfe: list[int] = []

    def choose_draws(self) -> int:
        """Draw the first images twice; how many draws make the noise small enough."""
        for draw in (0, 1):
            for clean in (False, True):
                for index in range(self._pilot):
                    self._measure(clean, draw, index)
        return max(_draws_needed(self._pilot_rows(clean=clean)) for clean in (False, True))

    def finish(self, draws: int) -> None:
        """Do whatever is left of ``draws`` draws of all images."""
        todo = [
            key
            for draw in range(draws)
            for clean in (False, True)
            for index in range(len(self._batches))
            if (key := (clean, draw, index)) not in self._bits
        ]
        self._total = self._done + len(todo)
        for key in todo:
            self._measure(*key)

    def summary(self, draws: int, *, clean: bool) -> BitsPerDim:
        """Mean and errors of all images."""
        rows = [torch.cat([self._bits[clean, draw, b] for b in range(len(self._batches))]) for draw in range(draws)]
        bits = torch.stack(rows)
        count = bits.shape[1]
        several = bits if draws > 1 else self._pilot_rows(clean=clean)
        noise = None if len(several) < 2 else math.sqrt(float(several.var(0).mean()) / (draws * count))
        of_images = float(bits.mean(0).std() / count**0.5) if count > 1 else None
        return BitsPerDim(float(bits.mean()), of_images, noise, tuple(bits.mean(0).tolist()))

    def penalties(self, draws: int) -> dict[str, float]:
        """Mean integral of each penalty over the dirty images and draws, divided by the dimensions."""
        found: dict[str, float] = {}
        for draw in range(draws):
            for index in range(len(self._batches)):
                for name, integral in self._integrals[draw, index].items():
                    share = integral / (self._dims * len(self._images) * draws)
                    found[name] = found.get(name, 0.0) + share
        return found

    def gap(self, training_solver: Solver | None) -> float | None:
        """Mean bits/dim by the training solver less those of this evaluation, first batch, same noise."""
        if training_solver is None or training_solver.adaptive or training_solver.step == "auto":
            return None
        full = dataclasses.replace(training_solver, trace_quadrature="full")
        try:
            coarse = self._bits_of(self._encode(full, clean=False, draw=0, index=0, penalties=False))
        except SolverError:  # the gap informs; a training solver that fails is infinitely far off
            return math.inf
        return float((coarse - self._bits[False, 0, 0]).mean())

    def _pilot_rows(self, *, clean: bool) -> Tensor:
        """Bits/dim ``(draws, images)`` of the first images, as often as they were drawn."""
        draws = [draw for draw in (0, 1) if (clean, draw, 0) in self._bits]
        return torch.stack([torch.cat([self._bits[clean, d, b] for b in range(self._pilot)]) for d in draws])

    def _measure(self, clean: bool, draw: int, index: int) -> None:
        along = not (clean or self._apart)
        output = self._encode(self._solver, clean=clean, draw=draw, index=index, penalties=along)
        self._bits[clean, draw, index] = self._bits_of(output)
        self.nfe.append(output.nfe)
        if not clean:  # the penalties are those of the dirty images, as in training
            if self._apart:
                output = self._encode(self._solver, clean=False, draw=draw, index=index, penalties=True)
            sums = {name: float(each.double().sum()) for name, each in output.regularization.items()}
            self._integrals[draw, index] = sums
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)

    def _encode(self, solver: Solver | None, *, clean: bool, draw: int, index: int, penalties: bool) -> FlowOutput:
        with torch.no_grad(), seeded(self._seed, Stream.VALIDATE, draw, int(clean), index):
            batch = image_batch(self._images, self._batches[index]).to(self._device)
            x = dequantize(batch, self._levels, clean=clean)
            return self._flow(x, solver=solver, penalties=penalties, **self._options)

    def _bits_of(self, output: FlowOutput) -> Tensor:
        return bits_per_dim(output_log_prob(output), dims=self._dims, levels=self._levels).double().cpu()


def _with_least_noise(flow: MultiscaleFlow) -> MultiscaleFlow:
    """The same flow, the same parameters, with the trace estimator of an evaluation."""
    estimator = getattr(flow, "estimator", None)
    if estimator is None or isinstance(estimator, Exact):
        return flow
    quiet = copy.copy(flow)
    quiet.estimator = Exact() if flow.dims <= _EXACT_DIMS else Hutchinson("rademacher")
    return quiet


def _draws_needed(rows: Tensor) -> int:
    """How many draws make the noise small against the images, from two draws of some: ``rows (2, images)``."""
    if rows.shape[1] < _FEWEST_TO_JUDGE:
        return len(rows)
    noise = float(rows.var(0).mean())  # of one draw of one image
    own = max(float(rows.mean(0).var()) - noise / 2, 0.0)  # of the images, without what noise their means have
    if noise <= _NOISE_SHARE**2 * own:
        return 1
    return min(_MAX_DRAWS, math.ceil(noise / (_NOISE_SHARE**2 * own))) if own > 0 else _MAX_DRAWS
