"""Solver checks: the training solver against an accurate one, and the NLL against the tolerance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...errors import SolverError
from ...solvers import Solver
from ...solvers.config import solver_text
from .result import Check, Verdict, worse_of
from .subject import HeldOut, Subject

__all__ = ["TOLERANCE", "TRAINING_SOLVER", "accurate", "tolerance_curve", "training_solver_gap"]

TRAINING_SOLVER = "training solver"
TOLERANCE = "tolerance"
_WARN, _FAIL = 0.005, 0.05  # nats per dimension
_BUDGET = 20_000  # evaluations of one solve: a field that needs more cannot be used anyway


def accurate(dtype: torch.dtype) -> Solver:
    """The solver that others are held against: ``dopri5`` at 1e-6, in double precision at 1e-9."""
    return _at(1e-9 if dtype is torch.float64 else 1e-6)


def training_solver_gap(subject: Subject, data: HeldOut, training: Solver | None) -> Check:
    """The NLL by the solver that the model was trained with (None: its own) less that by an accurate one."""
    text = subject.solver_text if training is None else solver_text(training)
    exact = _nll(subject, data, accurate(data.x.dtype))
    try:
        coarse = _nll(subject, data, training)
    except SolverError as error:
        sentence = (
            f"The solver {text} fails on held-out data: {error} Numbers that were measured with it mean nothing; "
            "train with a smaller step."
        )
        return Check(TRAINING_SOLVER, "failed", sentence, {"nll_accurate": exact.mean, "nfe_accurate": exact.nfe})
    gaps = coarse.values - exact.values
    gap, error = float(gaps.mean()), _standard_error(gaps)
    typical = float(gaps.abs().mean())
    verdict = worse_of(typical, warn=_WARN, fail=_FAIL)
    numbers = {
        "gap": gap, "gap_error": error, "typical_gap": typical, "nll": coarse.mean, "nll_accurate": exact.mean,
        "nfe": coarse.nfe, "nfe_accurate": exact.nfe,
    }  # fmt: skip
    curves = {"nll": coarse.values.tolist(), "nll_accurate": exact.values.tolist()}
    return Check(TRAINING_SOLVER, verdict, _gap_sentence(verdict, text, numbers), numbers, curves)


def _gap_sentence(verdict: Verdict, text: str, numbers: dict[str, float]) -> str:
    found = (
        f"By {text} the NLL is {numbers['gap']:+.2g} ± {numbers['gap_error']:.1g} nats/dim off an accurate solver "
        f"({numbers['typical_gap']:.2g} for a single sample), with {numbers['nfe']:.0f} evaluations instead of "
        f"{numbers['nfe_accurate']:.0f}."
    )
    if verdict == "ok":
        return f"{found} The steps are fine enough: both see the same density."
    if verdict == "warning":
        return f"{found} Report densities by an accurate solver, and consider a smaller step in training."
    return (
        f"{found} This solver is too coarse for the field: its numbers are not those of the density. Use a smaller "
        "step or an adaptive solver, and train again if the model was trained with it."
    )


def tolerance_curve(subject: Subject, data: HeldOut) -> Check:
    """The NLL and the evaluations of ``dopri5`` at several tolerances: whether the answer is converged."""
    tightest = accurate(data.x.dtype).atol
    levels = {float(f"1e-{k}") for k in range(2, 1 - round(math.log10(tightest)))}
    if subject.tolerance is not None:
        levels.add(min(max(subject.tolerance, tightest), 1.0))
    points: list[tuple[float, _Nll]] = []
    for level in sorted(levels, reverse=True):
        try:
            points.append((level, _nll(subject, data, _at(level))))
        except SolverError as error:
            return _gave_up(level, points, error)
    best = points[-1][1]
    distances = [float((nll.values - best.values).abs().mean()) for _, nll in points]
    at_own = [d for (level, _), d in zip(points, distances, strict=True) if level == subject.tolerance]
    still_moving = distances[-2]
    verdict = worse_of(max([still_moving, *at_own]), warn=_WARN, fail=_FAIL)
    near = [point for point, d in zip(points, distances, strict=True) if d <= _WARN]
    enough = (near or points[-1:])[0]
    numbers = {
        "nll": best.mean, "nll_error": _standard_error(best.values), "last_change": still_moving,
        "nfe_tightest": best.nfe, "enough_tolerance": enough[0], "enough_nfe": enough[1].nfe,
    }  # fmt: skip
    if at_own:
        numbers["own_distance"] = at_own[0]
    sentence = _curve_sentence(verdict, subject, points, numbers)
    return Check(TOLERANCE, verdict, sentence, numbers, _curves(points, distances))


def _curve_sentence(
    verdict: Verdict, subject: Subject, points: list[tuple[float, _Nll]], numbers: dict[str, float]
) -> str:
    found = (
        f"The NLL is {numbers['nll']:.4f} ± {numbers['nll_error']:.2g} nats/dim, and moves by "
        f"{numbers['last_change']:.2g} between the tolerances {points[-2][0]:g} and {points[-1][0]:g}."
    )
    if not numbers["last_change"] <= _WARN:
        return (
            f"{found} It is not converged: the field is too rough for this precision. Penalise it more, or "
            "evaluate in double precision."
        )
    if verdict != "ok":
        return (
            f"{found} It is converged, but not at the model's own tolerance {subject.tolerance:g}, which is "
            f"{numbers['own_distance']:.2g} nats/dim off: use {numbers['enough_tolerance']:g} or less."
        )
    return (
        f"{found} It is converged, and a tolerance of {numbers['enough_tolerance']:g} is enough for {_WARN:g} "
        f"nats/dim: {numbers['enough_nfe']:.0f} evaluations instead of {numbers['nfe_tightest']:.0f}."
    )


def _gave_up(level: float, points: list[tuple[float, _Nll]], error: SolverError) -> Check:
    sentence = (
        f"The solver gives up at tolerance {level:g}: {error} The density cannot be computed to this accuracy. The "
        "field is stiff or not smooth: train it with penalties, or with a smaller learning rate."
    )
    return Check(TOLERANCE, "failed", sentence, {"failed_at": level}, _curves(points, [math.nan] * len(points)))


def _curves(points: list[tuple[float, _Nll]], distances: list[float]) -> dict[str, list[float]]:
    return {
        "tolerance": [level for level, _ in points],
        "nll": [nll.mean for _, nll in points],
        "distance": distances,
        "nfe": [nll.nfe for _, nll in points],
    }


class _Nll:
    """Negative log-likelihoods ``(N,)`` in nats per dimension, and the evaluations that they took."""

    def __init__(self, values: Tensor, nfe: float) -> None:
        self.values, self.nfe = values, nfe
        self.mean = float(values.mean())


def _nll(subject: Subject, data: HeldOut, solver: Solver | None) -> _Nll:
    with data.noise():  # the same for all solvers
        encoded = subject.encode(data.x, data.context, solver=solver)
    return _Nll(-encoded.log_prob / subject.dims, encoded.nfe)


def _at(tolerance: float) -> Solver:
    return Solver(method="dopri5", atol=tolerance, rtol=tolerance, max_nfe=_BUDGET)


def _standard_error(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.nan
