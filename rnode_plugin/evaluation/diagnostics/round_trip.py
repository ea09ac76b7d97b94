"""Round trip: data to the latent and back; what is lost on the way against the data's spread and the tolerance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .result import Check, Verdict, worse_of
from .solver_checks import accurate
from .subject import HeldOut, Subject

__all__ = ["ROUND_TRIP", "round_trip"]

ROUND_TRIP = "round trip"
_WARN, _FAIL = 1e-3, 1e-2  # of the data's spread
_TIMES_TOLERANCE = 1000.0  # so much more than the tolerance is not explained by it,
_ROUNDING = 1e-4  # if it is more than single precision loses


def round_trip(subject: Subject, data: HeldOut) -> Check:
    """Whether the inverse undoes the forward direction, with the model's own solver and with the accurate one."""
    relative = _lost(subject, data, exactly=False)
    error = float(relative.square().mean().sqrt())
    largest = float(relative.max())
    verdict = worse_of(error, warn=_WARN, fail=_FAIL)
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
    return Check(ROUND_TRIP, verdict, _sentence(verdict, error, largest, exact, subject), numbers, curves)


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


def _sentence(verdict: Verdict, error: float, largest: float, exact: float, subject: Subject) -> str:
    found = (
        f"Held-out data come back from the latent with an error of {error:.2g} of their spread (root mean square; "
        f"the worst sample {largest:.2g}), solver {subject.solver_text}."
    )
    if verdict == "ok":
        return f"{found} Forward and inverse belong together: samples are samples of the density that is reported."
    if not exact <= max(_WARN, error / 3):
        return (
            f"{found} An accurate solver does not help ({exact:.2g}): the inverse does not undo the forward "
            "direction, and samples are not those of the density. Look for an error in the model's inverse."
        )
    advice = "a smaller step" if subject.tolerance is None else "a smaller tolerance"
    return (
        f"{found} With an accurate solver it is {exact:.2g}, so the solver is too coarse: densities and samples do "
        f"not belong together. Use {advice}."
    )
