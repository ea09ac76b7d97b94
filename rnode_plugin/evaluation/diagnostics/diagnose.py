"""diagnose: all checks of a density model on held-out data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError, SolverError
from ...solvers import Solver
from .density_checks import LOG_DETERMINANT, TRACE, log_determinant, trace
from .result import Check, Diagnosis
from .sample_checks import COLUMNS, LATENTS, RANKS, TWO_SAMPLE, latents, ranks, two_sample
from .sample_checks import columns as columns_check
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


def samples_for(dims: int) -> int:
    """Number of held-out samples for the solves of a diagnosis: 256, in more than 195 dimensions fewer."""
    return max(8, min(256, 50_000 // dims))


def compared_for(dims: int) -> int:
    """Number of held-out samples that are compared with the model's: 10,000, in more than 25 dimensions fewer."""
    return max(samples_for(dims), min(10_000, 250_000 // dims))


@torch.no_grad()
def diagnose(
    model: Any,
    x: Tensor,
    *,
    context: Tensor | None = None,
    training_solver: Solver | None = None,
    columns: Sequence[str] = (),
    validation: Mapping[int, float] | None = None,
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
        context: ``(N, *context_shape)`` of a conditional model, one for each sample.
        training_solver: of the model's training; None: its own solver.
        columns: names of the columns of ``x (N, D)``; None are needed.
        validation: NLL in nats per dimension of the validations of the training, by step.
        samples: number of samples of ``x``; None: for solves 256, in many dimensions fewer (50000 / dims, at least
            8); for the comparison with the model's samples all, at most 10000 (250000 / dims).
        seed: of all noise.
        progress: called with the name of each check before it is made.

    Returns:
        Diagnosis: round trip, trace, log-determinant, training solver, tolerance, path, two samples; for samples
        ``(D,)`` latents, and columns or, for a conditional model, posterior ranks; with ``validation`` training.
        NLL and gaps are in nats per dimension. A check in which a solver fails has failed. The checks that are
        statistical (trace, and those of samples) fail a right model about once in 1000 times each.

    Raises:
        ConfigError: for another class of model, fewer than two samples, values that are not finite, and a context
            that does not fit.

    Example:
        >>> import torch
        >>> from rnode_plugin.fields import linear_field
        >>> model = RegularizedCNF(linear_field(2), event_shape=2)  # fresh: f = 0, a standard normal
        >>> diagnosis = diagnose(model, torch.randn(400, 2, generator=torch.Generator().manual_seed(0)))
        >>> [check.name for check in diagnosis.checks if check.verdict != "ok"]
        ['path']
        >>> diagnosis.checks[5].sentence
        'The flow moves nothing (f = 0): it has not been trained.'
    """
    start = time.monotonic()
    subject = Subject(model)
    if min(len(x), samples or 2) < 2:
        raise ConfigError("a diagnosis needs at least two held-out samples.")
    context = model.context_rows(context, x)
    if not all(bool(each.isfinite().all()) for each in (x, context) if each is not None):
        raise ConfigError("the held-out data hold values that are not finite: leave those samples out.")
    everything = HeldOut(x, context, seed, columns).first(samples or compared_for(subject.dims))
    data = everything.first(samples or samples_for(subject.dims))
    vectors, given = x.ndim == 2, context is not None
    checks: list[Check] = []
    with _evaluation_mode(model):
        for name, wanted, make in (
            (ROUND_TRIP, True, lambda: round_trip(subject, data)),
            (TRACE, True, lambda: trace(subject, data)),
            (LOG_DETERMINANT, True, lambda: log_determinant(subject, data)),
            (TRAINING_SOLVER, True, lambda: training_solver_gap(subject, data, training_solver)),
            (TOLERANCE, True, lambda: tolerance_curve(subject, data)),
            (PATH, True, lambda: along_path(subject, data)),
            (TWO_SAMPLE, True, lambda: two_sample(subject, everything)),
            (COLUMNS, vectors and not given, lambda: columns_check(subject, everything)),
            (LATENTS, vectors, lambda: latents(subject, everything)),
            (RANKS, given, lambda: ranks(subject, everything)),
            (TRAINING, validation is not None, lambda: still_falling(validation or {})),
        ):
            if not wanted:
                continue
            if progress is not None:
                progress(name)
            try:
                with data.noise():
                    checks.append(make())
            except SolverError as error:
                sentence = f"A solver fails on held-out data: {error} Nothing can be said until it does not."
                checks.append(Check(name, "failed", sentence))
    seconds = time.monotonic() - start
    return Diagnosis(tuple(checks), len(data.x), subject.dims, subject.solver_text, seed, seconds)


TRAINING = "training"
_FALL = 0.005  # nats per dimension


def still_falling(validation: Mapping[int, float]) -> Check:
    """The fall of the validation NLL, nats per dimension by step, in the last quarter of a run."""
    steps = sorted(validation)
    early, late = (
        [validation[step] for step in steps if (step > 0.75 * steps[-1]) == last] for last in (False, True)
    )
    if not early:
        sentence = (
            "Left out: one validation does not tell whether training has come to its end; validate more often."
        )
        return Check(TRAINING, "left out", sentence)
    fall = min(early) - min(late)
    curves = {"step": steps, "nll": [validation[step] for step in steps]}
    numbers = {"fall": fall, "steps": steps[-1]}
    if fall > _FALL:
        sentence = (
            f"The validation NLL still fell by {fall:.2g} nats/dim in the last quarter of the {steps[-1]} steps: "
            "the model had not learnt what it can. Train longer."
        )
        return Check(TRAINING, "warning", sentence, numbers, curves)
    sentence = (
        f"The validation NLL fell by no more than {_FALL:g} nats/dim in the last quarter of {steps[-1]} steps."
    )
    return Check(TRAINING, "ok", sentence, numbers, curves)


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
