"""The six checks: each measures a model on held-out data, with a verdict; ``texts`` has the sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.trace_estimators import Exact
from ...data.tables import gaussian_scores
from ...errors import SolverError
from ...solvers import Solver
from ...solvers.config import solver_text
from ..solver_gap import measure_solver_gap, standard_error
from .result import Verdict
from .subject import Encoded, HeldOut, Subject

_GAP_WARN, _GAP_FAIL = 0.005, 0.05  # nats per dimension
_FALSE_ALARM = 1e-3  # of each check that is statistical
_VERDICTS: tuple[Verdict, Verdict, Verdict] = ("ok", "warning", "failed")


@dataclass(frozen=True)
class Finding:
    """The verdict and outcome of a check, the numbers and words of its sentence and the data of its figure."""

    verdict: Verdict
    outcome: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)


# ---- solver gap ----

_BUDGET = 20_000  # evaluations of one solve


def accurate(dtype: torch.dtype, times: float = 1.0) -> Solver:
    """The reference solver: ``dopri5`` at ``times`` 1e-6, in double precision 1e-9."""
    return _at(times * (1e-9 if dtype is torch.float64 else 1e-6))


def _at(tolerance: float) -> Solver:
    return Solver(method="dopri5", atol=tolerance, rtol=tolerance, max_nfe=_BUDGET)


def solver_gap(subject: Subject, data: HeldOut, training: Solver | None) -> Finding:
    """The NLL by the training solver (None: the solver of the model) minus the NLL by an accurate one."""
    coarse_solver = training or subject.model.solver
    text = solver_text(coarse_solver)
    exact = subject.encode(data, solver=accurate(data.x.dtype))
    found = measure_solver_gap(
        lambda solver: subject.encode(data, solver=solver), lambda encoded: encoded.nll, coarse_solver, exact.nll
    )
    numbers = {"nll_accurate": float(exact.nll.mean()), "nfe_accurate": exact.nfe}
    if found.output is None:
        return Finding("failed", "fails", numbers, {"solver": text, "failure": str(found.failure)})
    coarse = found.output
    numbers |= {
        "gap": found.mean, "gap_error": found.error, "typical_gap": found.typical, "nll": float(coarse.nll.mean()),
        "nfe": coarse.nfe,
    }  # fmt: skip
    curves = {"nll": coarse.nll.tolist(), "nll_accurate": exact.nll.tolist()}
    severity = _severity(found.typical, warn=_GAP_WARN, fail=_GAP_FAIL)
    return Finding(_VERDICTS[severity], ("small", "visible", "large")[severity], numbers, {"solver": text}, curves)


def _severity(value: float, *, warn: float, fail: float) -> int:
    """0, 1 or 2 for a number that should be small; 2 for one that is not a number."""
    return 2 if not value <= fail else int(value > warn)


# ---- tolerance ----


def tolerance(subject: Subject, data: HeldOut) -> Finding:
    """The NLL and the evaluations of ``dopri5`` at several tolerances, and whether the NLL has converged."""
    own, tightest = subject.tolerance, accurate(data.x.dtype).atol
    levels = {float(f"1e-{k}") for k in range(2, 1 - round(math.log10(tightest)))}
    if own is not None:
        own = min(max(own, tightest), 1.0)
        levels.add(own)
    points: dict[float, Encoded] = {}
    for level in sorted(levels, reverse=True):
        try:
            points[level] = subject.encode(data, solver=_at(level))
        except SolverError as error:
            return Finding("failed", "fails", {"failed_at": level}, {"failure": str(error)})
    best = points[tightest]
    distances = {level: float((each.nll - best.nll).abs().mean()) for level, each in points.items()}
    enough = next((level for level, distance in distances.items() if distance <= _GAP_WARN), tightest)
    last = list(points)[-2]
    numbers = {
        "nll": float(best.nll.mean()), "nll_error": standard_error(best.nll), "last": last, "tightest": tightest,
        "last_change": distances[last], "nfe_tightest": best.nfe, "enough_tolerance": enough,
        "enough_nfe": points[enough].nfe, "limit": _GAP_WARN,
    }  # fmt: skip
    curves = {
        "tolerance": list(points), "distance": list(distances.values()), "nfe": [p.nfe for p in points.values()],
    }  # fmt: skip
    rough = _severity(distances[last], warn=_GAP_WARN, fail=_GAP_FAIL)
    loose = 0
    if own is not None:
        numbers |= {"own_tolerance": own, "own_distance": distances[own]}
        loose = _severity(distances[own], warn=_GAP_WARN, fail=_GAP_FAIL)
    outcome = "rough" if rough else "loose" if loose else "converged"
    return Finding(_VERDICTS[max(rough, loose)], outcome, numbers, curves=curves)


# ---- invertibility ----

_LOST_WARN, _LOST_FAIL = 1e-3, 1e-2  # of the data's spread
_TIMES_TOLERANCE = 1000.0  # a larger error has another cause than the tolerance,
_ROUNDING = 1e-4  # or single precision


def invertibility(subject: Subject, data: HeldOut) -> Finding:
    """The error after a round trip through the latent, with the solver of the model and with the accurate one."""
    relative = _lost(subject, data, None)
    error = float(relative.square().mean().sqrt())
    severity = _severity(error, warn=_LOST_WARN, fail=_LOST_FAIL)
    if subject.tolerance is not None and error > max(_TIMES_TOLERANCE * subject.tolerance, _ROUNDING):
        severity = max(severity, 1)
    numbers = {"error": error, "largest": float(relative.max())}
    shares = relative.sort().values
    curves = {"error": shares.tolist(), "share": [(k + 1) / len(shares) for k in range(len(shares))]}
    words = {"solver": subject.solver_text, "what": "step" if subject.tolerance is None else "tolerance"}
    if severity == 0:
        return Finding("ok", "inverse", numbers, words, curves)
    exact = float(_lost(subject, data, accurate(data.x.dtype)).square().mean().sqrt())
    numbers["error_accurate"] = exact
    outcome = "coarse" if exact <= max(_LOST_WARN, error / 3) else "no inverse"
    return Finding(_VERDICTS[severity], outcome, numbers, words, curves)


def _lost(subject: Subject, data: HeldOut, solver: Solver | None) -> Tensor:
    """The error of each sample after the round trip over the data's spread, root mean square, ``(N,)``."""
    back = subject.decode(subject.encode(data, solver=solver).z, data, solver=solver)
    return ((back - data.x).cpu().double() / _spread(data.x)).flatten(1).square().mean(1).sqrt()


def _spread(x: Tensor) -> Tensor:
    """The standard deviation of each column, or of all pixels together."""
    variance = (x - x.mean(0)).cpu().double().square().mean(0)
    spread = (variance if x.ndim == 2 else variance.mean()).sqrt()
    return torch.where(spread > 0, spread, 1.0)


# ---- normalisation ----

_MAX_JACOBIAN = 256  # dimensions: the Jacobian of the map takes a backward pass through a whole solve for each
_UNEXPLAINED = 1e-3  # nats per dimension: more than rounding


def normalisation(subject: Subject, data: HeldOut) -> Finding:
    """The log-density of the model, with exact traces, against the change of variables along the inverse map.

    ``log p(x) = log q(z) - log |det dx/dz|``, with the Jacobian of the whole map from latent to sample by automatic
    differentiation.
    """
    if subject.dims > _MAX_JACOBIAN:
        return Finding("left out", "too large", {"dims": subject.dims, "limit": _MAX_JACOBIAN})
    few = data.first(16 if subject.dims <= 16 else 4 if subject.dims <= 64 else 1)
    fine, coarse = (accurate(few.x.dtype, times) for times in (1.0, 10.0))
    encoded, rougher = (subject.encode(few, solver=solver, estimator=Exact()) for solver in (fine, coarse))
    expected = _by_jacobian(subject, encoded.z, few.context, fine)
    differences = encoded.log_prob - expected
    worst = float(differences[differences.abs().argmax()])
    allowed = _UNEXPLAINED * subject.dims + 10 * float((rougher.log_prob - encoded.log_prob).abs().max())
    numbers = {"difference": worst, "allowed": allowed, "samples": len(few.x)}
    curves = {"reported": encoded.log_prob.tolist(), "by_jacobian": expected.tolist()}
    if abs(worst) <= allowed:
        return Finding("ok", "normalised", numbers, curves=curves)
    return Finding("failed", "not normalised", numbers, curves=curves)


def _by_jacobian(subject: Subject, z: Tensor, context: Tensor | None, solver: Solver) -> Tensor:
    """``log p (B,)`` in nats, double precision, of the samples of latents ``z (B, D)``."""
    base, model = subject.model.base, subject.model.solved_with(solver=solver)
    with torch.inference_mode(False), torch.enable_grad():
        z = z.detach().clone().requires_grad_()
        x = model.inverse(z.reshape(len(z), *base.event_shape), context=context).flatten(1)
        rows = [torch.autograd.grad(x[:, k].sum(), z, retain_graph=True)[0] for k in range(subject.dims)]
    logdet = torch.linalg.slogdet(torch.stack(rows, 1).cpu().double()).logabsdet
    return base.log_prob(z.detach().reshape(len(z), *base.event_shape)).cpu().double() - logdet


# ---- samples ----

_FOLDS = 5
_FEWEST, _MOST = 20, 2000  # samples
_COMPONENTS = 32  # of a principal component analysis, for more dimensions than twice that
_VISIBLE_ACCURACY, _SEPARATED = 0.6, 0.9


def samples(subject: Subject, data: HeldOut) -> Finding:
    """Cross-validated accuracy of a random forest that separates samples from held-out data."""
    data = data.first(_MOST)
    n = len(data.x)
    if n < _FEWEST:
        return Finding("left out", "left out", {"samples": n, "fewest": _FEWEST})
    with data.noise():
        drawn = subject.sample(n, data.context)
    if not bool(torch.isfinite(drawn).all()):
        return Finding("failed", "not finite", {"samples": n})
    # each sample with its context
    rows = [x.flatten(1).cpu().double() for x in (data.x, drawn)]
    if data.context is not None:
        rows = [torch.cat([x, data.context.reshape(n, -1).cpu().double()], 1) for x in rows]
    features = torch.cat(rows)
    if data.x.ndim == 2:  # columns have different units
        features = features / features.std(0).clamp(min=1e-30)
    probabilities = _classify(features, n, data.seed)
    # 1 if right, 0 if undecided
    sides = torch.sign(probabilities - 0.5) * torch.where(torch.arange(2 * n) < n, -1, 1)
    accuracy, high = float((sides + 1).mean() / 2), guessing_limit(n)
    numbers = {
        "percent": 100 * accuracy, "guess_low": 100 * (1 - high), "guess_high": 100 * high, "samples": n,
        "features": features.shape[1],
    }  # fmt: skip
    curves = {"held_out": probabilities[:n].tolist(), "samples": probabilities[n:].tolist()}
    if accuracy >= max(_SEPARATED, high):
        return Finding("failed", "separated", numbers, curves=curves)
    if accuracy > high:
        return Finding("warning", "different", numbers, curves=curves)
    if high > _VISIBLE_ACCURACY:
        return Finding("cannot tell", "too few", numbers, curves=curves)
    return Finding("ok", "same", numbers, curves=curves)


def guessing_limit(n: int) -> float:
    """The accuracy that guessing exceeds with a probability below 0.1 %, for ``n`` samples and ``n`` data.

    Folds share training data, so an accuracy varies more than the mean of ``2 n`` coins: its deviation is widened
    by the factor of Nadeau and Bengio (2003), which is conservative.
    """
    from scipy.stats import norm

    widened = math.sqrt((1 / _FOLDS + 1 / (_FOLDS - 1)) * _FOLDS)
    return 0.5 + float(norm.isf(_FALSE_ALARM)) * widened * 0.5 / math.sqrt(2 * n)


def _classify(features: Tensor, n: int, seed: int) -> Tensor:
    """For each row the probability of being a sample, by classifiers that were trained without it."""
    from sklearn.decomposition import PCA
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import KFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    forest: Any = RandomForestClassifier(100, min_samples_leaf=2, random_state=seed)
    if features.shape[1] > 2 * _COMPONENTS:
        fewest = len(features) * (_FOLDS - 1) // _FOLDS
        forest = make_pipeline(PCA(min(_COMPONENTS, fewest), random_state=seed), forest)
    # a sample and the data of its context stay in one fold, because one would reveal the label of the other
    halves = KFold(_FOLDS, shuffle=True, random_state=seed).split(np.arange(n))
    folds = [(np.concatenate([a, a + n]), np.concatenate([b, b + n])) for a, b in halves]
    labels = np.repeat([0, 1], n)
    found: Any = cross_val_predict(forest, features.numpy(), labels, cv=folds, method="predict_proba")
    return torch.from_numpy(found[:, 1])


# ---- Gaussian ----


def gaussian(subject: Subject, data: HeldOut, everything: HeldOut) -> Finding:
    """The NLL of the model minus the NLL of a Gaussian on the same samples.

    The Gaussian of a sample is fitted to ``everything``, which begins with ``data``, without the sample's fold. It
    has a full covariance if the data suffice, else independent dimensions. With a context it is conditional: its
    mean is linear in the context.
    """
    from scipy.stats import t

    n = len(data.x)
    if n < _FEWEST:
        return Finding("left out", "left out", {"samples": n, "fewest": _FEWEST})
    values = subject.encode(data).nll.numpy()
    rows = everything.x.flatten(1).cpu().double().numpy()
    given = np.zeros((len(rows), 0))
    if everything.context is not None:
        given = everything.context.flatten(1).cpu().double().numpy()
    full = len(rows) >= 2 * _FOLDS / (_FOLDS - 1) * (subject.dims + given.shape[1])
    columns = [slice(None)] if full else [slice(k, k + 1) for k in range(subject.dims)]
    fold, expected = np.arange(len(rows)) % _FOLDS, np.zeros(len(rows))
    try:
        with np.errstate(divide="ignore", invalid="ignore"):  # a constant column
            for number in range(_FOLDS):
                train, held_out = fold != number, fold == number
                for column in columns:
                    table = np.concatenate([rows[:, column], given], 1)
                    dims = table.shape[1] - given.shape[1]
                    expected[held_out] += gaussian_scores(table[train], table[held_out], dims)
    except np.linalg.LinAlgError:
        return Finding("left out", "singular")
    if not np.isfinite(expected).all():
        return Finding("left out", "singular")
    expected = expected[:n] / subject.dims
    differences = values - expected
    difference, error = float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(n))
    limit = float(t.isf(_FALSE_ALARM, n - 1)) * error
    numbers = {
        "nll": float(values.mean()), "nll_gaussian": float(expected.mean()), "difference": difference,
        "difference_error": error, "samples": n,
    }  # fmt: skip
    family = "a Gaussian" if full else "a Gaussian with independent dimensions"
    words, curves = {"family": family}, {"nll": values.tolist(), "nll_gaussian": expected.tolist()}
    if abs(difference) <= limit:
        return Finding("cannot tell", "equal", numbers, words, curves)
    if difference < 0:
        return Finding("ok", "better", numbers, words, curves)
    return Finding("failed", "worse", numbers, words, curves)
