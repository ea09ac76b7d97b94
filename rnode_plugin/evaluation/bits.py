"""Bits/dim of a flow on images, with uniform noise (dirty) and at the bins' centres (clean)."""

from __future__ import annotations

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
from ..errors import ConfigError, SolverError
from ..flows.multiscale import MultiscaleFlow
from ..flows.transforms import dequantize
from ..solvers.step_memory import StepMemory
from ..types import FlowOutput

if TYPE_CHECKING:
    from ..solvers import Solver

__all__ = ["BitsPerDim", "EvaluationResult", "evaluate", "image_batch"]


@dataclass(frozen=True)
class BitsPerDim:
    """A mean in bits/dim and how far it can be trusted.

    Attributes:
        mean: over images and noise draws.
        stderr_images: standard error from the choice of images: of each image's mean over draws;
            None for a single image.
        stderr_draws: standard error from the noise: of the means over all images; None with a single draw.
        images: bits/dim of each image, its mean over draws. Two models are best compared image by image.
    """

    mean: float
    stderr_images: float | None
    stderr_draws: float | None
    images: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True)
class EvaluationResult:
    """What :func:`evaluate` measured.

    Attributes:
        images, draws: how many images, and noise draws of each.
        dirty: with uniform noise in each bin, an upper bound on the bits/dim of the discrete images (in
            expectation over the noise).
        clean: of the density at the bins' centres; not a bound on anything discrete.
        nfe_mean, nfe_min, nfe_max: evaluations of the vector fields per batch, all blocks together.
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
    draws: int = 1,
    solver: Solver | None = None,
    seed: int = 0,
    training_solver: Solver | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Measure ``flow`` on images.

    Args:
        flow: the model; it stays on its device and in its mode.
        images: uint8 ``(N, C, H, W)``, array or tensor, values in 0..levels-1.
        batch_size: images per solve. An adaptive solver chooses its steps for a whole batch, and begins with those
            that suited the batch before.
        draws: draws of dequantisation and Hutchinson noise per image; two or more give ``stderr_draws``.
        solver: the integrator; None for the flow's own.
        seed: of the noise.
        training_solver: a fixed grid to be compared with ``solver``; None, an adaptive one or one whose step is not
            known: no comparison.
        progress: called with batches done and batches in all.

    Returns:
        Means over images: the last, smaller batch counts by its images.

    Raises:
        ConfigError: for counts below one, or no images.
        SolverError: where the integration fails.
    """
    if draws < 1 or batch_size < 1 or len(images) < 1:
        raise ConfigError("evaluation needs at least one image, one draw and a batch size of one.")
    start = time.monotonic()
    batches = [slice(first, first + batch_size) for first in range(0, len(images), batch_size)]
    total, done = 2 * draws * len(batches), 0
    bits: dict[bool, list[Tensor]] = {False: [], True: []}  # by cleanness, one (N,) for each draw
    penalties: dict[str, float] = {}
    nfe: list[int] = []
    device = next(flow.parameters()).device
    dims, levels = int(np.prod(flow.image_shape)), flow.levels
    memory: dict[str, Any] = {"memory": defaultdict(StepMemory)} if isinstance(flow, MultiscaleFlow) else {}

    def encode(index: int, solver: Solver | None, *, draw: int, clean: bool, penalties: bool) -> FlowOutput:
        with torch.no_grad(), seeded(seed, Stream.VALIDATE, draw, int(clean), index):
            x = dequantize(image_batch(images, batches[index]).to(device), levels, clean=clean)
            return flow(x, solver=solver, penalties=penalties, **memory)

    def bits_of(output: FlowOutput) -> Tensor:
        return bits_per_dim(output_log_prob(output), dims=dims, levels=levels).double().cpu()

    for draw in range(draws):
        for clean in (False, True):
            of_draw = []
            for index in range(len(batches)):
                # the penalties are of the dirty images, as in training
                output = encode(index, solver, draw=draw, clean=clean, penalties=not clean)
                of_draw.append(bits_of(output))
                nfe.append(output.nfe)
                for name, integral in output.regularization.items():
                    share = float(integral.double().sum()) / (dims * len(images) * draws)
                    penalties[name] = penalties.get(name, 0.0) + share
                done += 1
                if progress is not None:
                    progress(done, total)
            bits[clean].append(torch.cat(of_draw))
    gap = None
    if training_solver is not None and not training_solver.adaptive and training_solver.step != "auto":
        full = dataclasses.replace(training_solver, trace_quadrature="full")
        try:
            coarse = bits_of(encode(0, full, draw=0, clean=False, penalties=False))
            gap = float((coarse - bits[False][0][: len(coarse)]).mean())
        except SolverError:  # the gap informs; a training solver that fails is infinitely far off
            gap = math.inf
    return EvaluationResult(
        images=len(images),
        draws=draws,
        dirty=_summary(torch.stack(bits[False])),
        clean=_summary(torch.stack(bits[True])),
        nfe_mean=float(np.mean(nfe)),
        nfe_min=min(nfe),
        nfe_max=max(nfe),
        penalties=penalties,
        seconds=time.monotonic() - start,
        gap=gap,
    )


def _summary(bits: Tensor) -> BitsPerDim:
    """Mean and standard errors of ``bits (draws, N)``."""
    draws, count = bits.shape
    of_images = float(bits.mean(0).std(unbiased=True) / count**0.5) if count > 1 else None
    of_draws = float(bits.mean(1).std(unbiased=True) / draws**0.5) if draws > 1 else None
    return BitsPerDim(float(bits.mean()), of_images, of_draws, tuple(bits.mean(0).tolist()))
