"""Checks of the density: the trace against the exact one, the log-determinant against the Jacobian of the map."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...core.derivatives import VELOCITY, Ask, AutogradField, Velocity, unit_vectors
from ...core.trace_estimators import Exact, Linearize, Probes, TraceEstimator
from ...solvers import Solver
from .result import Check
from .solver_checks import accurate
from .subject import HeldOut, Subject

TRACE, LOG_DETERMINANT = "trace", "log-determinant"
_MAX_DIMS = 4096  # the exact trace takes a product per dimension and evaluation
_MAX_JACOBIAN = 256  # the Jacobian of the map takes a backward pass through a whole solve for each dimension
_UNEXPLAINED = 1e-3  # nats per dimension: more than the solver's error and rounding
_DRAWS = 32
_FALSE_ALARM = 1e-3
_ROUNDING = 1e-4  # nats per dimension: more than single precision loses


def _effort(dims: int) -> tuple[int, Solver]:
    """Number of samples, and the steps for both traces.

    An estimate that is unbiased at each evaluation is so on any grid, also one that is too coarse for a density.
    """
    if dims <= 256:
        return 16, Solver(method="rk4_38", step=0.5)
    return (4 if dims <= 1024 else 2), Solver(method="euler", step=1.0)


class AutogradRows(TraceEstimator):
    """The whole Jacobian by automatic differentiation, row by row, without the field's own products."""

    def draw(self, z: Tensor, *, generator: torch.Generator | None = None) -> None:
        return None

    def bind(self, field: Velocity, ask: Ask = VELOCITY) -> Linearize:
        rows = AutogradField(field).linearize  # it calls the field alone, and uses none of its products
        return lambda t, z, noise: rows(t, z, ask=ask._replace(products="rows"))

    def probes(self, products: Tensor, noise: Tensor | None) -> Probes:
        vectors = unit_vectors(products[0]).expand_as(products)
        return Probes((1.0,) * len(products), tuple(vectors), tuple(products))


def trace(subject: Subject, data: HeldOut) -> Check:
    """The bias of the model's estimate of the log-density: several draws of its noise, few samples."""
    if subject.dims > _MAX_DIMS:
        sentence = (
            f"Left out: the exact trace takes {subject.dims} products with the Jacobian at each evaluation, and "
            f"the limit is {_MAX_DIMS}. Check the estimator on a smaller model with the same layers."
        )
        return Check(TRACE, "left out", sentence, {"dims": subject.dims})
    samples, grid = _effort(subject.dims)
    few = data.first(samples)
    exact = subject.encode(few.x, few.context, solver=grid, estimator=AutogradRows()).log_prob
    draws = 1 if isinstance(subject.estimator, Exact) else _DRAWS
    estimates = []
    for draw in range(draws):
        with data.noise(draw):
            own = subject.encode(few.x, few.context, solver=grid, estimator=subject.estimator)
        estimates.append(own.log_prob)
    errors = torch.stack(estimates) - exact  # (draws, samples)
    bias = float(errors.mean())
    interval, noise = _interval(errors)
    allowed = interval + _ROUNDING * subject.dims
    verdict = "ok" if abs(bias) <= allowed else "failed"
    numbers = {
        "bias": bias, "interval": interval, "noise": noise, "rounding": _ROUNDING * subject.dims, "draws": draws,
        "samples": len(few.x),
    }  # fmt: skip
    curves = {"exact": exact.tolist(), "mean": torch.stack(estimates).mean(0).tolist()}
    curves["half_width"] = [interval * math.sqrt(len(few.x))] * len(few.x)
    return Check(TRACE, verdict, _sentence(verdict == "ok", subject, numbers), numbers, curves)


def _interval(errors: Tensor) -> tuple[float, float]:
    """Half the width of the 99.9 % interval (Student's t) of the mean, and the deviation of one estimate."""
    from scipy.stats import t

    draws, samples = errors.shape
    if draws == 1:
        return 0.0, 0.0
    noise = float(errors.var(0).mean().sqrt())
    quantile = float(t.ppf(1 - _FALSE_ALARM / 2, samples * (draws - 1)))
    return quantile * noise / math.sqrt(draws * samples), noise


def _sentence(right: bool, subject: Subject, numbers: dict[str, float]) -> str:
    if numbers["draws"] == 1:
        found = (
            f"The model's exact log-density is {numbers['bias']:+.2g} nats off that by automatic differentiation."
        )
        return found + (" They agree." if right else " The field's own products or divergence are wrong: fix them.")
    found = (
        f"The estimated log-density is {numbers['bias']:+.2g} ± {numbers['interval']:.2g} nats (99.9 % interval) "
        f"off the exact one, over {numbers['draws']:.0f} draws for {numbers['samples']:.0f} samples."
    )
    if not right:
        return (
            f"{found} It is biased: means over many samples are wrong too. Look for an error in the trace "
            f"estimator ({subject.estimator!r}), or in the products that the field brings."
        )
    return (
        f"{found} No bias is seen; a single estimate deviates by {numbers['noise']:.2g} nats "
        f"({numbers['noise'] / subject.dims:.2g} nats/dim), which an average over samples or draws makes small."
    )


def log_determinant(subject: Subject, data: HeldOut) -> Check:
    """The reported log-density against the change of variables along the inverse map.

    ``log p(x) = log q(z) - log |det dx/dz|``, with the Jacobian of the whole map from latent to sample by automatic
    differentiation.
    """
    if subject.dims > _MAX_JACOBIAN:
        sentence = (
            f"Left out: the Jacobian of the whole map takes {subject.dims} passes backward through a solve, and "
            f"the limit is {_MAX_JACOBIAN}. Check a smaller model with the same layers."
        )
        return Check(LOG_DETERMINANT, "left out", sentence, {"dims": subject.dims})
    few = data.first(16 if subject.dims <= 16 else 4 if subject.dims <= 64 else 1)
    fine, coarse = (accurate(few.x.dtype, times) for times in (1.0, 10.0))
    encoded, rougher = (
        subject.encode(few.x, few.context, solver=solver, estimator=AutogradRows()) for solver in (fine, coarse)
    )
    expected = _by_jacobian(subject, encoded.z, few.context, fine)
    differences = encoded.log_prob - expected
    worst = float(differences[differences.abs().argmax()])
    allowed = _UNEXPLAINED * subject.dims + 10 * float((rougher.log_prob - encoded.log_prob).abs().max())
    verdict = "ok" if abs(worst) <= allowed else "failed"
    numbers = {"difference": worst, "mean": float(differences.mean()), "allowed": allowed, "samples": len(few.x)}
    curves = {"reported": encoded.log_prob.tolist(), "by_jacobian": expected.tolist()}
    found = (
        f"The reported log-density is at most {worst:+.2g} nats off the change of variables by the Jacobian of the "
        f"whole map ({len(few.x)} samples, exact traces, an accurate solver)."
    )
    if verdict == "ok":
        return Check(LOG_DETERMINANT, verdict, f"{found} It is normalised.", numbers, curves)
    sentence = (
        f"{found} It is not the density of the samples: it does not integrate to one. Look for a missing or "
        "doubled term of the log-determinant, such as that of a scale or a logit, and for its sign."
    )
    return Check(LOG_DETERMINANT, verdict, sentence, numbers, curves)


def _by_jacobian(subject: Subject, z: Tensor, context: Tensor | None, solver: Solver) -> Tensor:
    """``log p (B,)`` in nats, double precision, of the samples of latents ``z (B, D)``."""
    base, model = subject.model.base, subject.model.solved_with(solver=solver)
    with torch.inference_mode(False), torch.enable_grad():
        z = z.detach().clone().requires_grad_()
        x = model.inverse(z.reshape(len(z), *base.event_shape), context=context).flatten(1)
        rows = [torch.autograd.grad(x[:, k].sum(), z, retain_graph=True)[0] for k in range(subject.dims)]
    logdet = torch.linalg.slogdet(torch.stack(rows, 1).cpu().double()).logabsdet
    return base.log_prob(z.detach().reshape(len(z), *base.event_shape)).cpu().double() - logdet
