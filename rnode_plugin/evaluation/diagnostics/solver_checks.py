"""Checks of the solver: round trip, training solver, tolerance, and rates along the path."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.field_evaluation import FieldEvaluation
from ...errors import SolverError
from ...flows.base import BlockFlow
from ...solvers import Solver
from ...solvers.config import solver_text
from .result import Check, Verdict, worse_of
from .subject import HeldOut, Subject

TRAINING_SOLVER, TOLERANCE, ROUND_TRIP, PATH = "training solver", "tolerance", "round trip", "path"
_GAP_WARN, _GAP_FAIL = 0.005, 0.05  # nats per dimension
_BUDGET = 20_000  # evaluations of one solve


def accurate(dtype: torch.dtype, times: float = 1.0) -> Solver:
    """The reference solver: ``dopri5`` at ``times`` 1e-6, in double precision 1e-9."""
    return _at(times * (1e-9 if dtype is torch.float64 else 1e-6))


def training_solver_gap(subject: Subject, data: HeldOut, training: Solver | None) -> Check:
    """The NLL by the solver of the training (None: the model's own) less that by an accurate one."""
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
    numbers = {
        "gap": gap, "gap_error": error, "typical_gap": typical, "nll": coarse.mean, "nll_accurate": exact.mean,
        "nfe": coarse.nfe, "nfe_accurate": exact.nfe,
    }  # fmt: skip
    curves = {"nll": coarse.values.tolist(), "nll_accurate": exact.values.tolist()}
    verdict = worse_of(typical, warn=_GAP_WARN, fail=_GAP_FAIL)
    meaning = {
        "ok": "The steps are fine enough: both see the same density.",
        "warning": "Report densities by an accurate solver, and consider a smaller step in training.",
        "failed": "This solver is too coarse for the field: its numbers are not those of the density. Use a "
        "smaller step or an adaptive solver, and train again if the model was trained with it.",
    }[verdict]
    sentence = (
        f"By {text} the NLL is {gap:+.2g} ± {error:.1g} nats/dim off an accurate solver ({typical:.2g} for a "
        f"single sample), with {coarse.nfe:.0f} evaluations instead of {exact.nfe:.0f}. {meaning}"
    )
    return Check(TRAINING_SOLVER, verdict, sentence, numbers, curves)


def tolerance_curve(subject: Subject, data: HeldOut) -> Check:
    """The NLL and the evaluations of ``dopri5`` at several tolerances, and whether the NLL is converged."""
    own, tightest = subject.tolerance, accurate(data.x.dtype).atol
    levels = {float(f"1e-{k}") for k in range(2, 1 - round(math.log10(tightest)))}
    if own is not None:
        levels.add(min(max(own, tightest), 1.0))
    points: dict[float, _Nll] = {}
    for level in sorted(levels, reverse=True):
        try:
            points[level] = _nll(subject, data, _at(level))
        except SolverError as error:
            sentence = (
                f"The solver gives up at tolerance {level:g}: {error} The density cannot be computed to this "
                "accuracy. The field is stiff or not smooth: train it with penalties, or with a smaller learning "
                "rate."
            )
            unknown = dict.fromkeys(points, math.nan)
            return Check(TOLERANCE, "failed", sentence, {"failed_at": level}, _curves(points, unknown))
    best = points[tightest]
    distances = {level: float((nll.values - best.values).abs().mean()) for level, nll in points.items()}
    enough = next((level for level, distance in distances.items() if distance <= _GAP_WARN), tightest)
    last = list(points)[-2]
    numbers = {
        "nll": best.mean, "nll_error": _standard_error(best.values), "last_change": distances[last],
        "nfe_tightest": best.nfe, "enough_tolerance": enough, "enough_nfe": points[enough].nfe,
    }  # fmt: skip
    if own in distances:
        numbers["own_distance"] = distances[own]
    sentence = (
        f"The NLL is {best.mean:.4f} ± {numbers['nll_error']:.2g} nats/dim, and moves by {distances[last]:.2g} "
        f"between the tolerances {last:g} and {tightest:g}. "
    )
    verdict = worse_of(max(distances[last], numbers.get("own_distance", 0.0)), warn=_GAP_WARN, fail=_GAP_FAIL)
    if not distances[last] <= _GAP_WARN:
        sentence += (
            "It is not converged: the field is too rough for this precision. Penalise it more, or evaluate in "
            "double precision."
        )
    elif verdict != "ok":
        sentence += (
            f"It is converged, but not at the model's own tolerance {own:g}, which is "
            f"{numbers['own_distance']:.2g} nats/dim off: use {enough:g} or less."
        )
    else:
        sentence += (
            f"It is converged, and a tolerance of {enough:g} is enough for {_GAP_WARN:g} nats/dim: "
            f"{points[enough].nfe:.0f} evaluations instead of {best.nfe:.0f}."
        )
    return Check(TOLERANCE, verdict, sentence, numbers, _curves(points, distances))


def _curves(points: dict[float, _Nll], distances: dict[float, float]) -> dict[str, list[float]]:
    return {
        "tolerance": list(points),
        "nll": [nll.mean for nll in points.values()],
        "distance": list(distances.values()),
        "nfe": [nll.nfe for nll in points.values()],
    }


class _Nll(NamedTuple):
    """Negative log-likelihoods ``(N,)`` in nats per dimension, their mean, and the NFE."""

    values: Tensor
    mean: float
    nfe: float


def _nll(subject: Subject, data: HeldOut, solver: Solver | None) -> _Nll:
    with data.noise():
        encoded = subject.encode(data.x, data.context, solver=solver)
    values = -encoded.log_prob / subject.dims
    return _Nll(values, float(values.mean()), encoded.nfe)


def _at(tolerance: float) -> Solver:
    return Solver(method="dopri5", atol=tolerance, rtol=tolerance, max_nfe=_BUDGET)


def _standard_error(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.nan


_LOST_WARN, _LOST_FAIL = 1e-3, 1e-2  # of the data's spread
_TIMES_TOLERANCE = 1000.0  # a larger error has another cause than the tolerance,
_ROUNDING = 1e-4  # or single precision


def round_trip(subject: Subject, data: HeldOut) -> Check:
    """Whether the inverse undoes the forward direction, with the model's own solver and with the accurate one."""
    relative = _lost(subject, data, None)
    error, largest = float(relative.square().mean().sqrt()), float(relative.max())
    verdict, tolerance = worse_of(error, warn=_LOST_WARN, fail=_LOST_FAIL), subject.tolerance
    if verdict == "ok" and tolerance is not None and error > max(_TIMES_TOLERANCE * tolerance, _ROUNDING):
        verdict = "warning"
    exact = math.nan
    sentence = (
        f"Held-out data come back from the latent with an error of {error:.2g} of their spread (root mean square; "
        f"the worst sample {largest:.2g}), solver {subject.solver_text}. "
    )
    if verdict == "ok":
        sentence += "Forward and inverse belong together: samples are samples of the density that is reported."
    else:
        exact = float(_lost(subject, data, accurate(data.x.dtype)).square().mean().sqrt())
        if exact <= max(_LOST_WARN, error / 3):
            advice = "a smaller step" if tolerance is None else "a smaller tolerance"
            sentence += (
                f"With an accurate solver it is {exact:.2g}, so the solver is too coarse: densities and samples do "
                f"not belong together. Use {advice}."
            )
        else:
            sentence += (
                f"An accurate solver does not help ({exact:.2g}): the inverse does not undo the forward direction, "
                "and samples are not those of the density. Look for an error in the model's inverse."
            )
    numbers = {"error": error, "largest": largest, "error_accurate_solver": exact}
    if tolerance is not None:
        numbers["tolerance"] = tolerance
    shares = relative.sort().values
    curves = {"error": shares.tolist(), "share": [(k + 1) / len(shares) for k in range(len(shares))]}
    return Check(ROUND_TRIP, verdict, sentence, numbers, curves)


def _lost(subject: Subject, data: HeldOut, solver: Solver | None) -> Tensor:
    """The error of each sample after the round trip over the data's spread, root mean square, ``(N,)``."""
    with data.noise():
        z = subject.encode(data.x, data.context, solver=solver).z
    back = subject.decode(z, data.context, solver=solver)
    return ((back - data.x).cpu().double() / _spread(data.x)).flatten(1).square().mean(1).sqrt()


def _spread(x: Tensor) -> Tensor:
    """The standard deviation of each column, or of all pixels together."""
    variance = (x - x.mean(0)).cpu().double().square().mean(0)
    spread = (variance if x.ndim == 2 else variance.mean()).sqrt()
    return torch.where(spread > 0, spread, 1.0)


_PATH_SAMPLES = 64
_PATH_GRID = Solver(method="rk4_38", step=1 / 8)
_DETOUR = 2.0  # length over displacement
_PEAK = 10.0  # largest rate over its mean


class _Recorder:
    """The speed ``|f|`` as a rate, whose integral is the length of a path; it records all evaluations.

    Attributes:
        notes: of each evaluation its time, ``|f|^2`` and ``|df/dz|_F^2``, means over the batch.
        start: the first state, ``(B, D)``.
    """

    name = "path_length"
    needs = frozenset({"vjp"})

    def __init__(self) -> None:
        self.notes: list[tuple[float, float, float]] = []
        self.start: Tensor | None = None

    def __call__(self, evaluation: FieldEvaluation) -> Tensor:
        squares = evaluation.dz.flatten(1).square().sum(1)
        if self.start is None:
            self.start = evaluation.z.flatten(1).clone()
        jacobian = evaluation.squared_frobenius()
        self.notes.append((float(evaluation.t), float(squares.mean()), float(jacobian.mean())))
        return squares.sqrt()


def along_path(subject: Subject, data: HeldOut) -> Check:
    """Length and rates of the paths of some held-out samples on a fine grid."""
    few = data.first(min(_PATH_SAMPLES, subject.batch_size))  # one batch, one solve
    recorder = _Recorder()
    rate: Any = recorder
    with data.noise():
        encoded = subject.encode(few.x, few.context, solver=_PATH_GRID, rate=rate)
    curves = _by_time(recorder.notes, subject.dims)
    assert recorder.start is not None
    # a flow of blocks begins with a map to its first state
    start = subject.model.first_state(few.x) if isinstance(subject.model, BlockFlow) else recorder.start
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
    """Rates per dimension against the time since the start of the first block."""
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
