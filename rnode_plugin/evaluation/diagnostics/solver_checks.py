"""Checks of the solver: round trip, training solver, tolerance, and rates along the path."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...core.field_evaluation import FieldEvaluation
from ...errors import SolverError
from ...solvers import Solver
from ...solvers.config import solver_text
from .result import Check, Verdict, worse_of
from .subject import HeldOut, Subject

__all__ = [
    "PATH",
    "ROUND_TRIP",
    "TOLERANCE",
    "TRAINING_SOLVER",
    "accurate",
    "along_path",
    "round_trip",
    "tolerance_curve",
    "training_solver_gap",
]


TRAINING_SOLVER = "training solver"
TOLERANCE = "tolerance"
_GAP_WARN, _GAP_FAIL = 0.005, 0.05  # nats per dimension
_BUDGET = 20_000  # evaluations of one solve: a field that needs more cannot be used anyway


def accurate(dtype: torch.dtype, times: float = 1.0) -> Solver:
    """The solver that others are held against: ``dopri5`` at ``times`` 1e-6, in double precision 1e-9."""
    return _at(times * (1e-9 if dtype is torch.float64 else 1e-6))


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
    verdict = worse_of(typical, warn=_GAP_WARN, fail=_GAP_FAIL)
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
    verdict = worse_of(max([still_moving, *at_own]), warn=_GAP_WARN, fail=_GAP_FAIL)
    near = [point for point, d in zip(points, distances, strict=True) if d <= _GAP_WARN]
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
    if not numbers["last_change"] <= _GAP_WARN:
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
        f"{found} It is converged, and a tolerance of {numbers['enough_tolerance']:g} is enough for {_GAP_WARN:g} "
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


ROUND_TRIP = "round trip"
_LOST_WARN, _LOST_FAIL = 1e-3, 1e-2  # of the data's spread
_TIMES_TOLERANCE = 1000.0  # so much more than the tolerance is not explained by it,
_ROUNDING = 1e-4  # if it is more than single precision loses


def round_trip(subject: Subject, data: HeldOut) -> Check:
    """Whether the inverse undoes the forward direction, with the model's own solver and with the accurate one."""
    relative = _lost(subject, data, exactly=False)
    error = float(relative.square().mean().sqrt())
    largest = float(relative.max())
    verdict = worse_of(error, warn=_LOST_WARN, fail=_LOST_FAIL)
    tolerance = subject.tolerance
    if verdict == "ok" and tolerance is not None and error > max(_TIMES_TOLERANCE * tolerance, _ROUNDING):
        verdict = "warning"
    exact = math.nan
    if verdict != "ok":
        exact = float(_lost(subject, data, exactly=True).square().mean().sqrt())
    numbers = {"error": error, "largest": largest, "error_accurate_solver": exact}
    if tolerance is not None:
        numbers["tolerance"] = tolerance
    shares = relative.sort().values
    curves = {"error": shares.tolist(), "share": [(k + 1) / len(shares) for k in range(len(shares))]}
    return Check(
        ROUND_TRIP, verdict, _round_trip_sentence(verdict, error, largest, exact, subject), numbers, curves
    )


def _lost(subject: Subject, data: HeldOut, *, exactly: bool) -> Tensor:
    """What each sample is off after the round trip, over the data's spread, root mean square of it, ``(N,)``."""
    solver = accurate(data.x.dtype) if exactly else None
    with data.noise():
        z = subject.encode(data.x, data.context, solver=solver).z
    back = subject.decode(z, data.context, solver=solver)
    return ((back - data.x).cpu().double() / _spread(data.x)).flatten(1).square().mean(1).sqrt()


def _spread(x: Tensor) -> Tensor:
    """The standard deviation: of each column, which have units of their own; of all pixels together."""
    variance = (x - x.mean(0)).cpu().double().square().mean(0)
    spread = (variance if x.ndim == 2 else variance.mean()).sqrt()
    return torch.where(spread > 0, spread, 1.0)


def _round_trip_sentence(verdict: Verdict, error: float, largest: float, exact: float, subject: Subject) -> str:
    found = (
        f"Held-out data come back from the latent with an error of {error:.2g} of their spread (root mean square; "
        f"the worst sample {largest:.2g}), solver {subject.solver_text}."
    )
    if verdict == "ok":
        return f"{found} Forward and inverse belong together: samples are samples of the density that is reported."
    if not exact <= max(_LOST_WARN, error / 3):
        return (
            f"{found} An accurate solver does not help ({exact:.2g}): the inverse does not undo the forward "
            "direction, and samples are not those of the density. Look for an error in the model's inverse."
        )
    advice = "a smaller step" if subject.tolerance is None else "a smaller tolerance"
    return (
        f"{found} With an accurate solver it is {exact:.2g}, so the solver is too coarse: densities and samples do "
        f"not belong together. Use {advice}."
    )


PATH = "path"
_PATH_SAMPLES = 64
_PATH_GRID = Solver(method="rk4_38", step=1 / 8)
_DETOUR = 2.0  # length over displacement
_PEAK = 10.0  # largest rate over its mean


class _Recorder:
    """A rate that notes what it is shown: the speed ``|f|``, whose integral is the length of a path.

    Attributes:
        notes: of each evaluation its time, ``|f|^2`` and ``|df/dz|_F^2``, means over the batch.
        start: the first state that it saw, ``(B, D)``.
    """

    name = "path_length"
    needs = frozenset({"vjp"})

    def __init__(self) -> None:
        self.notes: list[tuple[float, float, float]] = []
        self.starts: list[Tensor] = []

    def __call__(self, evaluation: FieldEvaluation) -> Tensor:
        squares = evaluation.dz.flatten(1).square().sum(1)
        if not self.notes:
            self.starts.append(evaluation.z.flatten(1).clone())
        jacobian = evaluation.squared_frobenius()
        self.notes.append((float(evaluation.t), float(squares.mean()), float(jacobian.mean())))
        return squares.sqrt()


def along_path(subject: Subject, data: HeldOut) -> Check:
    """Follow the paths of some held-out samples on a fine grid."""
    few = data.first(min(_PATH_SAMPLES, subject.batch_size))  # one solve: the recorder sees one batch
    recorder = _Recorder()
    rate: Any = recorder
    with data.noise():
        encoded = subject.encode(few.x, few.context, solver=_PATH_GRID, rate=rate)
    curves = _by_time(recorder.notes, subject.dims)
    start = subject.start(few.x)
    start = recorder.starts[0] if start is None else start
    length = encoded.penalties[recorder.name].cpu().double()
    displacement = (encoded.z - start).cpu().double().norm(dim=1)
    moved = float(displacement.sum())
    numbers = {
        "length": float(length.mean()),
        "displacement": float(displacement.mean()),
        "detour": float(length.sum()) / moved if moved > 0 else math.nan,
    }
    time = torch.tensor(curves["time"])
    for name in ("kinetic", "jacobian"):
        rates = torch.tensor(curves[name])
        integral = float(torch.trapezoid(rates, time))
        mean = integral / float(time[-1] - time[0])
        numbers |= {name: integral, f"{name}_peak": float(rates.max()) / mean if mean > 0 else math.nan}
    return Check(PATH, *_path_verdict(numbers, curves), numbers, curves)


def _by_time(notes: list[tuple[float, float, float]], dims: int) -> dict[str, list[float]]:
    """Rates per dimension against the time since the start of the first block; blocks follow one another."""
    first, last = notes[0][0], 0.0
    offset, block = 0.0, 0
    gathered: dict[tuple[int, float], list[tuple[float, float]]] = {}
    for t, speed, jacobian in notes:
        elapsed = abs(t - first)
        if elapsed < last - 1e-6:  # time was set back: the next block
            offset, block = offset + last, block + 1
        last = elapsed
        gathered.setdefault((block, round(offset + elapsed, 6)), []).append((speed / dims, jacobian / dims))
    means = [torch.tensor(rates).mean(0).tolist() for rates in gathered.values()]
    return {
        "time": [time for _, time in gathered],
        "block": [float(block) for block, _ in gathered],
        "kinetic": [kinetic for kinetic, _ in means],
        "jacobian": [jacobian for _, jacobian in means],
    }


def _path_verdict(numbers: dict[str, float], curves: dict[str, list[float]]) -> tuple[Verdict, str]:
    """The verdict and its sentence."""
    if not all(map(math.isfinite, curves["kinetic"] + curves["jacobian"])):
        return "failed", (
            "The velocity or its Jacobian is not finite along the paths of held-out data: the flow cannot be "
            "trusted anywhere near. Train again with penalties or a smaller learning rate."
        )
    if numbers["length"] == 0:
        return "warning", "The flow moves nothing (f = 0): it has not been trained."
    found = (
        f"Paths are {numbers['detour']:.3g} times as long as their displacement; kinetic energy "
        f"{numbers['kinetic']:.3g} and squared Jacobian norm {numbers['jacobian']:.3g} per dimension."
    )
    peaks = {"the kinetic energy": numbers["kinetic_peak"], "the Jacobian norm": numbers["jacobian_peak"]}
    sharp = [f"{name} has a peak of {peak:.3g} times its mean" for name, peak in peaks.items() if peak > _PEAK]
    if not numbers["detour"] <= _DETOUR:
        sharp.insert(0, "the paths are far from straight")
    if sharp:
        return "warning", (
            f"{found} But {' and '.join(sharp)}: a solver needs many small steps there. A larger lambda of kinetic "
            "and jacfrob makes the flow cheaper."
        )
    return "ok", f"{found} The flow is smooth: nothing here asks for small steps."
