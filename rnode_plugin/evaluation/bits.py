"""Bits/dim of a flow on images, with uniform noise (dirty) and at the bins' centres (clean), and their errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .likelihood import evaluate_by
from .measures.images import EvaluationResult, ImageMeasure

if TYPE_CHECKING:
    from ..flows.multiscale import MultiscaleFlow
    from ..solvers import Solver

__all__ = ["evaluate"]


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
