"""diagnose: runs all checks of a density model on held-out data."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.tf32 import without_tf32
from ..errors import ConfigError, SolverError
from ..solvers import Solver
from . import checks
from .result import Check, Diagnosis
from .subject import HeldOut, Subject
from .texts import FAILED, GAUSSIAN, GRADIENT, INVERTIBILITY, NORMALIZATION, SAMPLES, SOLVER_GAP, TOLERANCE


def samples_for(dims: int) -> int:
    """Number of held-out samples for the solves in a diagnosis: 256, and fewer in more than 195 dimensions."""
    return max(8, min(256, 50_000 // dims))


def compared_for(dims: int) -> int:
    """Number of held-out samples to compare with the model's: 10,000, and fewer in more than 25 dimensions."""
    return max(samples_for(dims), min(10_000, 250_000 // dims))


@torch.no_grad()
@without_tf32()
def diagnose(
    model: Any,
    x: Tensor,
    *,
    context: Tensor | None = None,
    training_solver: Solver | None = None,
    samples: int | None = None,
    seed: int = 0,
    progress: Callable[[str], object] | None = None,
) -> Diagnosis:
    """Check whether the densities and samples of a model can be trusted, without the rounding of TF32.

    Args:
        model: a :class:`~rnode_plugin.RegularizedCNF`, a :class:`~rnode_plugin.MultiscaleFlow`, or another
            :class:`~rnode_plugin.DensityModel`. The checks run it in evaluation mode.
        x: held-out data ``(N, *event)`` as ``model.log_prob`` takes them; images are in [0, 1] and dequantized. The
            data must be in random order.
        context: contexts ``(N, *context_shape)`` for a conditional model, one for each sample.
        training_solver: the solver that the model was trained with; None for the model's solver.
        samples: number of samples of ``x`` to use. None: for solves 256, or fewer in many dimensions (50000 / dims,
            at least 8); for the comparisons with the model's samples and with a Gaussian all, but at most 10000
            (250000 / dims).
        seed: the seed of all noise.
        progress: called with the name of each check before the check runs.

    Returns:
        Diagnosis: solver gap, tolerance, invertibility, normalization, gradient, samples and gaussian. NLL and gaps
        are in nats per dimension. A check in which a solver fails has failed. The last two checks are statistical,
        and each fails a correct model about once in 1000 times.

    Raises:
        ConfigError: for another class of model, fewer than two samples, values that are not finite, and a context
            that does not fit.

    Example:
        >>> import torch
        >>> from rnode_plugin.fields import linear_field
        >>> model = RegularizedCNF(linear_field(2), event_shape=2)  # fresh: f = 0, a standard normal
        >>> diagnosis = diagnose(model, torch.randn(600, 2, generator=torch.Generator().manual_seed(0)))
        >>> [(check.name, check.verdict) for check in diagnosis.checks[:3]]
        [('solver gap', 'ok'), ('tolerance', 'ok'), ('invertibility', 'ok')]
        >>> diagnosis.failed
        False
    """
    start = time.monotonic()
    subject = Subject(model)
    if min(len(x), samples or 2) < 2:
        raise ConfigError("a diagnosis needs at least two held-out samples.")
    context = model.check_inputs(x, context=context)
    if not all(bool(each.isfinite().all()) for each in (x, context) if each is not None):
        raise ConfigError("the held-out data contain values that are not finite: leave those samples out.")
    everything = HeldOut(x, context, seed).first(samples or compared_for(subject.dims))
    data = everything.first(samples or samples_for(subject.dims))
    measurements: dict[str, Callable[[], Check]] = {
        SOLVER_GAP: lambda: checks.solver_gap(subject, data, training_solver),
        TOLERANCE: lambda: checks.tolerance(subject, data),
        INVERTIBILITY: lambda: checks.invertibility(subject, data),
        NORMALIZATION: lambda: checks.normalization(subject, data),
        GRADIENT: lambda: checks.gradient(subject, data),
        SAMPLES: lambda: checks.samples(subject, everything),
        GAUSSIAN: lambda: checks.gaussian(subject, data, everything),
    }
    results: list[Check] = []
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for name, measure in measurements.items():
            if progress is not None:
                progress(name)
            try:
                with data.noise():  # the same noise in each check, whichever checks ran before
                    results.append(measure())
            except SolverError as error:
                results.append(Check(name, "failed", FAILED.format(failure=error)))
    finally:
        for module, training in modes:
            module.training = training
    seconds = time.monotonic() - start
    return Diagnosis(tuple(results), len(data.x), subject.dims, subject.solver_text, seed, seconds)
