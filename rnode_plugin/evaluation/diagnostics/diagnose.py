"""diagnose: all checks of a density model on held-out data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError, SolverError
from ...solvers import Solver
from .density_checks import LOG_DETERMINANT, TRACE, log_determinant, trace
from .result import Check, Diagnosis
from .sample_checks import RANKS, TWO_SAMPLE, ranks, two_sample
from .solver_checks import (
    PATH,
    ROUND_TRIP,
    TOLERANCE,
    TRAINING_SOLVER,
    along_path,
    round_trip,
    tolerance_curve,
    training_solver_gap,
)
from .subject import HeldOut, Subject

__all__ = ["diagnose", "samples_for"]

_MOST, _FEWEST, _NUMBERS = 256, 8, 50_000


def samples_for(dims: int) -> int:
    """How many held-out samples a diagnosis uses unless it is told: 256, in more than 195 dimensions fewer."""
    return max(_FEWEST, min(_MOST, _NUMBERS // dims))


@torch.no_grad()
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
    """Check whether the densities and samples of a model can be trusted.

    Args:
        model: a :class:`~rnode_plugin.RegularizedCNF`, a :class:`~rnode_plugin.MultiscaleFlow`, or another
            :class:`~rnode_plugin.core.distribution.DensityModel`. It is in evaluation mode meanwhile.
        x: held-out data as ``model.log_prob`` takes them, ``(N, *event)``: images in [0, 1], dequantised. They must
            be in no order.
        context: ``(N, *context_shape)`` of a conditional model: what each sample belongs to.
        training_solver: what the model was trained with; None: its own solver.
        samples: how many of ``x`` are used; None: 256, and fewer in many dimensions (50000 / dims, at least 8).
        seed: of all noise.
        progress: called with the name of each check before it is made.

    Returns:
        Diagnosis: round trip, trace, log-determinant, training solver, tolerance, path, two samples and, for a
        conditional model, posterior ranks. NLL and gaps are in nats per dimension. A check in which a solver
        fails has failed. The checks that are statistical (trace, two samples, posterior ranks) fail a right model
        about once in 1000 times each.

    Raises:
        ConfigError: for another class of model, fewer than two samples, values that are not finite, and shapes that
            do not fit.

    Example:
        >>> import torch
        >>> from rnode_plugin.fields import linear_field
        >>> model = RegularizedCNF(linear_field(2), event_shape=2)  # fresh: f = 0, a standard normal
        >>> diagnosis = diagnose(model, torch.randn(64, 2, generator=torch.Generator().manual_seed(0)))
        >>> [check.name for check in diagnosis.checks if check.verdict == "ok"]
        ['round trip', 'trace', 'log-determinant', 'training solver', 'tolerance', 'two samples']
        >>> diagnosis.checks[5].sentence
        'The flow moves nothing (f = 0): it has not been trained.'
    """
    start = time.monotonic()
    subject = Subject(model)
    data = _held_out(subject, x, context, samples, seed)
    checks: list[Check] = []
    with _evaluation_mode(model):
        for name, make in (
            (ROUND_TRIP, round_trip),
            (TRACE, trace),
            (LOG_DETERMINANT, log_determinant),
            (TRAINING_SOLVER, lambda s, d: training_solver_gap(s, d, training_solver)),
            (TOLERANCE, tolerance_curve),
            (PATH, along_path),
            (TWO_SAMPLE, two_sample),
            *([] if data.context is None else [(RANKS, ranks)]),
        ):
            if progress is not None:
                progress(name)
            try:
                with data.noise():  # what a check draws besides
                    checks.append(make(subject, data))
            except SolverError as error:
                sentence = f"A solver fails on held-out data: {error} Nothing can be said until it does not."
                checks.append(Check(name, "failed", sentence))
    seconds = time.monotonic() - start
    return Diagnosis(tuple(checks), len(data.x), subject.dims, subject.solver_text, seed, seconds)


def _held_out(subject: Subject, x: Tensor, context: Tensor | None, samples: int | None, seed: int) -> HeldOut:
    if samples is not None and samples < 2:
        raise ConfigError(f"a diagnosis needs at least two samples, not {samples}.")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ConfigError(f"x must be a floating-point tensor, as log_prob takes it, not {got}.")
    if len(x) < 2:
        raise ConfigError(f"a diagnosis needs at least two held-out samples, not {len(x)}.")
    given = [x] if context is None else [x, context]
    if not all(bool(torch.isfinite(each).all()) for each in given):
        raise ConfigError("the held-out data hold values that are not finite: leave those samples out.")
    shape = subject.model.context_shape
    if (context is None) != (shape is None):
        wanted = "takes no context" if shape is None else f"is conditional: give context=, (N, *{tuple(shape)})"
        raise ConfigError(f"this model {wanted}.")
    if context is not None and context.shape != (len(x), *(shape or ())):
        raise ConfigError(f"context= has the shape {tuple(context.shape)}, not {(len(x), *(shape or ()))}.")
    n = min(len(x), samples or samples_for(subject.dims))
    return HeldOut(x[:n], None if context is None else context[:n], seed)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and each of its modules in its own again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
