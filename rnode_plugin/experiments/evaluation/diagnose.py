"""diagnose: whether the densities and samples of a model can be trusted, in four numbers."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...core.objective import FlowOutput
from ...core.trace_estimators import Exact, TraceEstimator
from ...errors import ConfigError, SolverError
from ...flows.density import DensityModel
from ...flows.map_jacobian import MOST_DIMS, jacobian_of, log_abs_det
from ...solvers import Adaptive, Solver
from ..precision import without_tf32
from ..random_streams import Stream, seeded
from .solver_gap import measure_solver_gap

Verdict = Literal["ok", "warning", "failed", "left out"]
_BY_SEVERITY: tuple[Verdict, ...] = ("ok", "warning", "failed")

MOST_PRODUCTS = 64
"""Most products of an exact trace that is compared with the random trace."""

_BATCH_NUMBERS, _MOST_SAMPLES = 400_000, 4096  # most numbers, and samples, in the state of one solve
_BUDGET = 20_000  # most evaluations of one accurate solve
_FLOOR = 1e-4  # nats per dimension: a bias of the trace that is below the rounding of a solve


@dataclass(frozen=True)
class Finding:
    """One number of a diagnosis, with its limits.

    Attributes:
        value: the number, which is small for a right model; infinite if it could not be computed, as by a solver
            that fails, and NaN if it was left out.
        warning: the largest value that is ok.
        failure: the largest value that has not failed.
    """

    value: float
    warning: float
    failure: float

    @property
    def verdict(self) -> Verdict:
        """``ok``, ``warning``, ``failed`` or ``left out``."""
        if math.isnan(self.value):
            return "left out"
        return _BY_SEVERITY[(self.value > self.warning) + (self.value > self.failure)]


@dataclass(frozen=True)
class Diagnosis:
    """The four findings on a density model.

    Attributes:
        round_trip: the error of held-out samples after the way to the latent and back by the model's solver, root
            mean square, as a fraction of the spread of the data.
        solver_gap: the NLL by the training solver minus the NLL by an accurate solver, as the mean of the absolute
            values of the samples, in nats per dimension.
        density: the log-density that the model reports, with exact traces, minus the log-density of the samples
            that it draws, by the Jacobian of the map that its solver computes, as the mean of the absolute values
            in nats per dimension. Of 16 samples, 4 above 16 dimensions, 1 above 64. It is left out above 256.
        trace: the mean difference between log-densities with the random and with the exact trace, in standard
            errors. It is left out for a model whose trace is exact, and where an exact trace takes more than 64
            products.
    """

    round_trip: Finding
    solver_gap: Finding
    density: Finding
    trace: Finding

    @property
    def failed(self) -> bool:
        """Whether a finding has failed."""
        return any(finding.verdict == "failed" for finding in vars(self).values())

    def to_plain(self) -> dict[str, dict[str, Any]]:
        """The value, limits and verdict of each finding, by name."""
        return {name: {**vars(finding), "verdict": finding.verdict} for name, finding in vars(self).items()}


@torch.no_grad()
@without_tf32()
def diagnose(
    model: Any,
    x: Tensor,
    *,
    context: Tensor | None = None,
    training_solver: Solver | None = None,
    seed: int = 0,
) -> Diagnosis:
    """Check whether the densities and samples of a model can be trusted, without the rounding of TF32.

    No finding compares samples with data, or a gradient with differences.

    Args:
        model: a :class:`~rnode_plugin.RegularizedCNF`, a :class:`~rnode_plugin.MultiscaleFlow`, or another
            :class:`~rnode_plugin.DensityModel`. It runs in evaluation mode.
        x: held-out data ``(N, *event)`` in random order, as ``model.log_prob`` takes them; images are in [0, 1] and
            dequantized. All are solved several times, and 256 are enough.
        context: contexts ``(N, *context_shape)`` for a conditional model, one for each sample.
        training_solver: the solver that the model was trained with; None for the model's solver.
        seed: the seed of all noise.

    Raises:
        ConfigError: for another class of model, fewer than two samples, values that are not finite, a context that
            does not fit, and a field that mixes samples.

    Example:
        >>> import torch
        >>> from rnode_plugin.fields import linear_field
        >>> model = RegularizedCNF(linear_field(2), event_shape=2)  # fresh: f = 0, a standard normal
        >>> diagnosis = diagnose(model, torch.randn(100, 2))
        >>> [finding["verdict"] for finding in diagnosis.to_plain().values()]
        ['ok', 'ok', 'ok', 'ok']
    """
    if not isinstance(model, DensityModel):
        raise ConfigError(
            f"{type(model).__name__} cannot be diagnosed: give a RegularizedCNF, a MultiscaleFlow, a TableFlow "
            "or a subclass of rnode_plugin.flows.density.DensityModel."
        )
    if len(x) < 2:
        raise ConfigError("a diagnosis needs at least two held-out samples.")
    context = model.check_inputs(x, context=context)
    if not all(bool(values.isfinite().all()) for values in (x, context) if values is not None):
        raise ConfigError("the held-out data contain values that are not finite: leave those samples out.")
    dims, solver, random = model.dims, model.solver, model.estimator.for_evaluation
    exact = Exact(radius=model.estimator.radius)
    size = max(1, min(_MOST_SAMPLES, _BATCH_NUMBERS // dims))

    def batches(x: Tensor, context: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        contexts = itertools.repeat(None) if context is None else context.split(size)
        return zip(x.split(size), contexts, strict=False)

    def encode(
        x: Tensor, context: Tensor | None, solver: Solver, estimator: TraceEstimator
    ) -> tuple[Tensor, Tensor]:
        """Latents and log-densities, with the same noise at each call."""
        estimated, solver = model.solved_with(trace_estimator=estimator), solver.full_quadrature
        with seeded(seed, Stream.DIAGNOSE):
            outputs = [
                estimated.encode(part, context=rows, penalties=False, solver=solver)
                for part, rows in batches(x, context)
            ]
        log_prob = torch.cat([estimated.log_prob_of(output) for output in outputs])
        return torch.cat([output.z for output in outputs]), log_prob.double()

    def log_prob(solver: Solver, estimator: TraceEstimator) -> Tensor:
        return encode(x, context, solver, estimator)[1]

    def round_trip() -> float:
        z, _ = encode(x, context, solver, random)
        back = torch.cat([model.inverse(part, context=rows, solver=solver) for part, rows in batches(z, context)])
        variance = (x - x.mean(0)).cpu().double().square().mean(0)
        # of each column, or of all pixels together
        spread = (variance if x.ndim == 2 else variance.mean()).sqrt()
        return float(((back - x).cpu().double() / spread.where(spread > 0, 1.0)).square().mean().sqrt())

    def solver_gap() -> float:
        tolerance = 1e-9 if x.dtype is torch.float64 else 1e-6
        accurate = log_prob(Adaptive("dopri5", atol=tolerance, rtol=tolerance, max_nfe=_BUDGET), random)
        gaps = measure_solver_gap(lambda solver: log_prob(solver, random), training_solver or solver, accurate)
        return float(gaps.abs().mean()) / dims

    def density() -> float:
        few = slice(16 if dims <= 16 else 4 if dims <= 64 else 1)
        rows = None if context is None else context[few]
        z, _ = encode(x[few], rows, solver, exact)
        # a continuous adjoint differentiates the exact flow, not the map that runs
        stepwise = dataclasses.replace(solver, gradient="autograd")
        drawn, jacobian = jacobian_of(lambda z: model.inverse(z, context=rows, solver=stepwise), z)
        logdet = log_abs_det(jacobian)[0]
        of_map = model.log_prob_of(FlowOutput(x=drawn, z=z, logdet=-logdet))
        reported = encode(drawn, rows, solver, exact)[1]
        return float((reported - of_map).abs().mean()) / dims

    def trace() -> float:
        differences = log_prob(solver, random) - log_prob(solver, exact)
        error = differences.std() / len(differences) ** 0.5
        return float(differences.mean().abs() / (error + _FLOOR * dims))

    def measure(value: Callable[[], float], warning: float, failure: float, *, affordable: bool = True) -> Finding:
        try:
            found = value() if affordable else math.nan
        except SolverError:
            found = math.inf
        return Finding(math.inf if affordable and math.isnan(found) else found, warning, failure)

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return Diagnosis(
            round_trip=measure(round_trip, 1e-3, 1e-2),
            solver_gap=measure(solver_gap, 0.005, 0.05),
            density=measure(density, 1e-3, 1e-2, affordable=dims <= MOST_DIMS),
            # a right model exceeds 3 standard errors in about one of 300 cases, and 5 hardly ever
            trace=measure(
                trace, 3.0, 5.0, affordable=not random.is_exact and model.exact_products <= MOST_PRODUCTS
            ),
        )
    finally:
        for module, training in modes:
            module.training = training
