"""The seven checks. Each measures a model on held-out data and gives a verdict; ``texts`` has the sentences."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.objective import FlowOutput
from ..core.trace_estimators import Exact
from ..errors import ConfigError, SolverError
from ..solvers import Adaptive, FixedGrid, Solver
from .gaussian import gaussian_scores
from .map_jacobian import MOST_DIMS, jacobian_of, log_abs_det
from .result import Check, Verdict
from .solver_gap import measure_solver_gap, standard_error
from .subject import Encoded, HeldOut, Subject
from .texts import GAUSSIAN, GRADIENT, INVERTIBILITY, NORMALIZATION, SAMPLES, SOLVER_GAP, TOLERANCE, text_of

# thresholds; with two numbers, for a warning and for a failure
GAP = 0.005, 0.05  # nats per dimension
LOST = 1e-3, 1e-2  # as a fraction of the data's spread
UNEXPLAINED = 1e-3  # nats per dimension, larger than rounding errors
VISIBLE, SEPARATED = 0.6, 0.9  # accuracies of the classifier
# relative to the size of a gradient: the least difference that counts, and the most doubt about the quotients
WRONG, ROUGH = 0.02, 0.1
FALSE_ALARM = 1e-3  # probability that a statistical check fails a correct model
# sizes
BUDGET = 20_000  # most evaluations in one solve
LARGEST = 1024  # dimensions of a map whose Jacobian is taken, for minutes, where exact traces take fewer products
FEWEST, MOST = 20, 2000  # samples for the classifier; the fewest also for the Gaussian
COMPONENTS = 32  # principal components, taken if there are more than twice as many dimensions
FOLDS = 5


def _check(
    name: str, verdict: Verdict, outcome: str, words: dict[str, str], curves: Any, **numbers: float
) -> Check:
    return Check(name, verdict, text_of(name, outcome).format(**numbers, **words), numbers, curves)


def _severity(value: float, limits: tuple[float, float]) -> int:
    """0, 1 or 2 (ok, warning, failed) for a number that should be small; 2 for NaN."""
    return 2 if not value <= limits[1] else int(value > limits[0])


_VERDICTS: tuple[Verdict, Verdict, Verdict] = ("ok", "warning", "failed")


def accurate(dtype: torch.dtype, times: float = 1.0) -> Adaptive:
    """The reference solver: ``dopri5`` with tolerance ``times * 1e-6``, or ``times * 1e-9`` in double precision."""
    return _at(times * _tightest(dtype))


def _tightest(dtype: torch.dtype) -> float:
    return 1e-9 if dtype is torch.float64 else 1e-6


def _at(tolerance: float) -> Adaptive:
    return Adaptive("dopri5", atol=tolerance, rtol=tolerance, max_nfe=BUDGET)


def solver_gap(subject: Subject, data: HeldOut, training: Solver | None = None) -> Check:
    """Measure the NLL by the training solver (None: the model's) minus the NLL by an accurate solver."""
    coarse_solver = training or subject.model.solver
    exact = subject.encode(data, solver=accurate(data.x.dtype))
    gap = measure_solver_gap(
        lambda solver: subject.encode(data, solver=solver), lambda encoded: encoded.nll, coarse_solver, exact.nll
    )
    words = {"solver": coarse_solver.text, "failure": str(gap.failure)}
    if gap.output is None:
        return _check(SOLVER_GAP, "failed", "fails", words, {}, nfe_accurate=exact.nfe)
    coarse, severity = gap.output, _severity(gap.typical, GAP)
    return _check(
        SOLVER_GAP, _VERDICTS[severity], ("small", "visible", "large")[severity], words,
        {"nll": coarse.nll.tolist(), "nll_accurate": exact.nll.tolist()},
        gap=gap.mean, gap_error=gap.error, typical_gap=gap.typical, nfe=coarse.nfe, nfe_accurate=exact.nfe,
    )  # fmt: skip


def tolerance(subject: Subject, data: HeldOut) -> Check:
    """Measure NLL and evaluations with ``dopri5`` at several tolerances, and check that the NLL has converged."""
    tightest = _tightest(data.x.dtype)
    own = None if subject.tolerance is None else max(subject.tolerance, tightest)
    # powers of ten from 1e-2 down to the tightest, and the model's own
    levels = {float(f"1e-{k}") for k in range(2, 1 - round(math.log10(tightest)))} | {own or tightest}
    points: dict[float, Encoded] = {}
    for level in sorted(levels, reverse=True):
        try:
            points[level] = subject.encode(data, solver=_at(level))
        except SolverError as error:
            return _check(TOLERANCE, "failed", "fails", {"failure": str(error)}, {}, failed_at=level)
    best = points[tightest]
    distances = {level: float((each.nll - best.nll).abs().mean()) for level, each in points.items()}
    enough = next((level for level, distance in distances.items() if distance <= GAP[0]), tightest)
    last = list(points)[-2]  # the change from here to the tightest tolerance shows whether the NLL has converged
    own_distance = 0.0 if own is None else distances[own]
    rough, loose = _severity(distances[last], GAP), _severity(own_distance, GAP)
    return _check(
        TOLERANCE, _VERDICTS[max(rough, loose)], "rough" if rough else "loose" if loose else "converged", {},
        {"tolerance": list(points), "distance": list(distances.values()), "nfe": [p.nfe for p in points.values()]},
        nll=float(best.nll.mean()), nll_error=standard_error(best.nll), last=last, tightest=tightest, limit=GAP[0],
        last_change=distances[last], enough_tolerance=enough, enough_nfe=points[enough].nfe, nfe_tightest=best.nfe,
        own_tolerance=own or math.nan, own_distance=own_distance,
    )  # fmt: skip


def invertibility(subject: Subject, data: HeldOut) -> Check:
    """Measure the error after a round trip through the latent, with the model's solver and with an accurate one."""
    relative = _lost(subject, data, None)
    error, error_accurate = float(relative.square().mean().sqrt()), math.nan
    severity, outcome = _severity(error, LOST), "inverse"
    if severity:
        error_accurate = float(_lost(subject, data, accurate(data.x.dtype)).square().mean().sqrt())
        # if an accurate solver removes most of the error, its cause is the step and not the inverse
        outcome = "coarse" if error_accurate <= max(LOST[0], error / 3) else "no inverse"
    words = {"solver": subject.solver_text, "what": "step" if subject.tolerance is None else "tolerance"}
    return _check(
        INVERTIBILITY, _VERDICTS[severity], outcome, words, {"error": relative.sort().values.tolist()},
        error=error, largest=float(relative.max()), error_accurate=error_accurate,
    )  # fmt: skip


def _lost(subject: Subject, data: HeldOut, solver: Solver | None) -> Tensor:
    """The root mean square error of each sample after the round trip, divided by the data's spread, ``(N,)``."""
    back = subject.decode(subject.encode(data, solver=solver).z, data, solver=solver)
    variance = (data.x - data.x.mean(0)).cpu().double().square().mean(0)
    # of each column, or of all pixels together
    spread = (variance if data.x.ndim == 2 else variance.mean()).sqrt()
    return ((back - data.x).cpu().double() / spread.where(spread > 0, 1.0)).flatten(1).square().mean(1).sqrt()


def normalization(subject: Subject, data: HeldOut) -> Check:
    """Compare the model's log-density, with exact traces, with the change of variables along the inverse map.

    This is ``log p(x) = log q(z) - log |det dx/dz|``, where autograd computes the Jacobian of the map from latent
    to sample.
    """
    # in more dimensions, the Jacobian of the map is taken where the exact traces are affordable
    large = subject.dims > MOST_DIMS
    if large and (subject.dims > LARGEST or subject.model.exact_products == subject.dims):
        return _check(
            NORMALIZATION, "left out", "too large", {}, {}, dims=subject.dims, limit=MOST_DIMS, largest=LARGEST
        )
    few = data.first(16 if subject.dims <= 16 else 4 if subject.dims <= 64 else 1)
    fine, coarse = (
        FixedGrid("rk4_38", step=0.25 * times) if large else accurate(few.x.dtype, 10 ** (times - 1))
        for times in (1, 2)
    )
    exact = Exact(radius=subject.model.estimator.radius)
    encoded, rougher = (subject.encode(few, solver=solver, estimator=exact) for solver in (fine, coarse))
    expected = _by_jacobian(subject, encoded.z, few.context, fine)
    differences = encoded.log_prob - expected
    worst = float(differences[differences.abs().argmax()])
    # the change between two tolerances estimates the error of the solver, which must not count as a wrong density;
    # the change to half of a step of fourth order is 15 times the error
    change = float((rougher.log_prob - encoded.log_prob).abs().max())
    allowed = UNEXPLAINED * subject.dims + (1 if large else 10) * change
    right = abs(worst) <= allowed
    return _check(
        NORMALIZATION, "ok" if right else "failed", "normalized" if right else "not normalized", {},
        {"reported": encoded.log_prob.tolist(), "by_jacobian": expected.tolist()},
        difference=worst, allowed=allowed, samples=len(few.x),
    )  # fmt: skip


def _by_jacobian(subject: Subject, z: Tensor, context: Tensor | None, solver: Solver) -> Tensor:
    """``log p (B,)`` in nats, in double precision, for the samples of latents ``z (B, D)``."""
    model = copy.deepcopy(subject.model).requires_grad_(False)  # backward passes to the latents alone
    z = z.reshape(len(z), *model.base.event_shape)
    x, jacobian = jacobian_of(lambda z: model.inverse(z, context=context, solver=solver), z)
    logdet, _ = log_abs_det(jacobian)
    return model.log_prob_of(FlowOutput(x=x, z=z, logdet=-logdet)).cpu()


def gradient(subject: Subject, data: HeldOut) -> Check:
    """Compare the gradient of the log-density with difference quotients along random directions of the parameters.

    A fixed grid and fixed noise make the log-density a smooth function of the parameters. Quotients with two step
    lengths show how accurate they are.
    """
    few, directions = data.first(4), 4
    copied = copy.deepcopy(subject.model)  # its parameters are changed below
    model = copied.solved_with(solver=FixedGrid("rk4_38", step=0.25))
    parameters = [p for p in copied.parameters() if p.is_floating_point()]
    if not parameters:
        return _check(GRADIENT, "left out", "no parameters", {}, {})
    starts = [p.detach().clone() for p in parameters]

    def log_prob() -> Tensor:
        with few.noise():
            return model.log_prob_of(model.encode(few.x, context=few.context)).sum()

    def moved(ways: list[Tensor], length: float) -> float:
        for parameter, start, way in zip(parameters, starts, ways, strict=True):
            parameter.copy_(start + length * way)
        return float(log_prob())

    try:
        with torch.inference_mode(False), torch.enable_grad():
            copied.requires_grad_(True)
            gradients = torch.autograd.grad(log_prob(), parameters, allow_unused=True)
    except (ConfigError, RuntimeError) as error:
        return _check(GRADIENT, "failed", "refused", {"failure": str(error)}, {})
    generator = torch.Generator().manual_seed(data.seed)
    by_autograd, fine, coarse = [], [], []
    with torch.no_grad():
        for _ in range(directions):
            ways = [
                torch.randn(p.shape, generator=generator).to(p) * p.square().mean().sqrt().clamp(min=0.01)
                for p in starts
            ]
            slopes = [float((g * way).sum()) for g, way in zip(gradients, ways, strict=True) if g is not None]
            by_autograd.append(sum(slopes))
            for quotients, length in ((fine, 0.005), (coarse, 0.01)):
                quotients.append((moved(ways, length) - moved(ways, -length)) / (2 * length))
    exact, near, far = (np.array(each) for each in (by_autograd, fine, coarse))
    size = max(float(np.sqrt(np.square(near).mean())), 1e-6)
    difference, doubt = (float(np.abs(each - near).max() / size) for each in (exact, far))
    allowed = WRONG + 3 * doubt
    verdict, outcome = ("ok", "right") if difference <= allowed else ("failed", "wrong")
    if doubt > ROUGH:
        verdict, outcome = "cannot tell", "rough"
    return _check(
        GRADIENT, verdict, outcome, {}, {"by_autograd": by_autograd, "by_differences": fine},
        difference=difference, allowed=allowed, doubt=doubt, directions=directions,
    )  # fmt: skip


def samples(subject: Subject, data: HeldOut) -> Check:
    """Measure the cross-validated accuracy of a random forest that separates samples from held-out data."""
    data = data.first(MOST)
    n = len(data.x)
    if n < FEWEST:
        return _check(SAMPLES, "left out", "left out", {}, {}, samples=n, fewest=FEWEST)
    with data.noise():
        drawn = subject.sample(n, data.context)
    if not bool(torch.isfinite(drawn).all()):
        return _check(SAMPLES, "failed", "not finite", {}, {}, samples=n)
    # the classifier gets contexts too, so it notices samples that do not fit their contexts
    rows = [x.flatten(1).cpu().double() for x in (data.x, drawn)]
    if data.context is not None:
        rows = [torch.cat([x, data.context.reshape(n, -1).cpu().double()], 1) for x in rows]
    features = torch.cat(rows)
    if data.x.ndim == 2:  # columns have different units
        features = features / features.std(0).clamp(min=1e-30)
    probabilities = _classify(features, n, data.seed % 2**32)  # scikit-learn takes no larger ones
    # 1 for a right answer, -1 for a wrong one, 0 if undecided, which counts as half
    sides = torch.sign(probabilities - 0.5) * torch.where(torch.arange(2 * n) < n, -1, 1)
    accuracy, high = float((sides + 1).mean() / 2), guessing_limit(n)
    if accuracy > high:
        verdict, outcome = ("failed", "separated") if accuracy >= SEPARATED else ("warning", "different")
    else:
        verdict, outcome = ("cannot tell", "too few") if high > VISIBLE else ("ok", "same")
    return _check(
        SAMPLES, verdict, outcome, {},
        {"held_out": probabilities[:n].tolist(), "samples": probabilities[n:].tolist()},
        percent=100 * accuracy, guess_low=100 * (1 - high), guess_high=100 * high, samples=n,
    )  # fmt: skip


def guessing_limit(n: int) -> float:
    """The accuracy that guessing exceeds with a probability below 0.1 %, for ``n`` samples and ``n`` data.

    Folds share training data, so the accuracy varies more than the mean of ``2 n`` coin tosses. Its standard
    deviation is widened by the factor of Nadeau and Bengio (2003), which is conservative.
    """
    from scipy.stats import norm

    widened = math.sqrt((1 / FOLDS + 1 / (FOLDS - 1)) * FOLDS)
    return 0.5 + float(norm.isf(FALSE_ALARM)) * widened * 0.5 / math.sqrt(2 * n)


def _classify(features: Tensor, n: int, seed: int) -> Tensor:
    """The probability that each row is a sample, by classifiers that were trained without the row."""
    from sklearn.decomposition import PCA
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import KFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    forest: Any = RandomForestClassifier(100, min_samples_leaf=2, random_state=seed)
    if features.shape[1] > 2 * COMPONENTS:
        fewest = len(features) * (FOLDS - 1) // FOLDS
        forest = make_pipeline(PCA(min(COMPONENTS, fewest), random_state=seed), forest)
    # a sample and the data of its context stay in one fold, because one would reveal the label of the other
    halves = KFold(FOLDS, shuffle=True, random_state=seed).split(np.arange(n))
    folds = [(np.concatenate([a, a + n]), np.concatenate([b, b + n])) for a, b in halves]
    labels = np.repeat([0, 1], n)
    probabilities: Any = cross_val_predict(forest, features.numpy(), labels, cv=folds, method="predict_proba")
    return torch.from_numpy(probabilities[:, 1])


def gaussian(subject: Subject, data: HeldOut, everything: HeldOut) -> Check:
    """Measure the NLL of the model minus the NLL of a Gaussian on the same samples.

    The Gaussian for a sample is fitted to ``everything``, which begins with ``data``, without the sample's fold. It
    has a full covariance if there are enough data, and independent dimensions otherwise. With a context it is
    conditional, with a mean that is linear in the context.
    """
    from scipy.stats import t

    n = len(data.x)
    if n < FEWEST:
        return _check(GAUSSIAN, "left out", "left out", {}, {}, samples=n, fewest=FEWEST)
    values = subject.encode(data).nll.numpy()
    rows = everything.x.flatten(1).cpu().double().numpy()
    given = np.zeros((len(rows), 0))
    if everything.context is not None:
        given = everything.context.flatten(1).cpu().double().numpy()
    # a training set without one fold must have at least twice as many rows as columns
    full = len(rows) >= 2 * FOLDS / (FOLDS - 1) * (subject.dims + given.shape[1])
    columns = [slice(None)] if full else [slice(k, k + 1) for k in range(subject.dims)]
    fold, expected = np.arange(len(rows)) % FOLDS, np.zeros(len(rows))
    try:
        with np.errstate(divide="ignore", invalid="ignore"):  # a constant column
            for number in range(FOLDS):
                train, held_out = fold != number, fold == number
                for column in columns:
                    table = np.concatenate([rows[:, column], given], 1)
                    dims = table.shape[1] - given.shape[1]
                    expected[held_out] += gaussian_scores(table[train], table[held_out], dims)
    except np.linalg.LinAlgError:
        expected[:] = math.nan
    if not np.isfinite(expected).all():
        return _check(GAUSSIAN, "left out", "singular", {}, {})
    expected = expected[:n] / subject.dims
    differences = values - expected
    difference, error = float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(n))
    if abs(difference) <= float(t.isf(FALSE_ALARM, n - 1)) * error:
        verdict, outcome = "cannot tell", "equal"
    else:
        verdict, outcome = ("ok", "better") if difference < 0 else ("failed", "worse")
    return _check(
        GAUSSIAN, verdict, outcome, {"family": "a Gaussian" if full else "a Gaussian with independent dimensions"},
        {"nll": values.tolist(), "nll_gaussian": expected.tolist()},
        nll=float(values.mean()), nll_gaussian=float(expected.mean()), difference=difference,
        difference_error=error, samples=n,
    )  # fmt: skip
