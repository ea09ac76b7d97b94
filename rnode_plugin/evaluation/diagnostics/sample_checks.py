"""Checks of samples against held-out data: a classifier, each column, the latents, and posterior ranks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .result import Check, Verdict
from .subject import HeldOut, Subject

TWO_SAMPLE, COLUMNS, LATENTS, RANKS = "two samples", "columns", "latents", "posterior ranks"
_FALSE_ALARM = 1e-3  # of each check
_NOT_FINITE = "Some of the model's samples are not finite: it cannot be sampled. Use a more accurate solver."

_FOLDS = 5
_FEWEST, _MOST = 20, 2000  # samples
_COMPONENTS = 32  # of a principal component analysis, for more dimensions than twice that
_VISIBLE_ACCURACY, _TOLD_APART = 0.6, 0.9


def two_sample(subject: Subject, data: HeldOut) -> Check:
    """Cross-validated accuracy of a random forest that tells samples from held-out data."""
    data = data.first(_MOST)
    n = len(data.x)
    if n < _FEWEST:
        sentence = (
            f"Left out: {n} held-out samples are too few to train a classifier; use at least {_FEWEST} (samples)."
        )
        return Check(TWO_SAMPLE, "left out", sentence, {"samples": n})
    with data.noise():
        samples = subject.sample(n, data.context)
    if not bool(torch.isfinite(samples).all()):
        return Check(TWO_SAMPLE, "failed", _NOT_FINITE, {"samples": n})
    # each sample with its context
    rows = [x.flatten(1).cpu().double() for x in (data.x, samples)]
    if data.context is not None:
        rows = [torch.cat([x, data.context.reshape(n, -1).cpu().double()], 1) for x in rows]
    features = torch.cat(rows)
    if data.x.ndim == 2:  # columns have different units
        features = features / features.std(0).clamp(min=1e-30)
    scores = _scores(features, n, data.seed)
    sides = torch.sign(scores - 0.5) * torch.where(torch.arange(2 * n) < n, -1, 1)  # 1 if right, 0 if undecided
    accuracy, high = float((sides + 1).mean() / 2), null_limit(n)
    numbers = {
        "accuracy": accuracy, "null_low": 1 - high, "null_high": high, "samples": n, "dims": features.shape[1],
    }  # fmt: skip
    found = (
        f"A classifier tells samples from held-out data in {100 * accuracy:.0f} % of cases; 50 % is guessing, and "
        f"guessing alone gives {100 * (1 - high):.0f} to {100 * high:.0f} % with {n} of each."
    )
    verdict: Verdict
    if accuracy >= max(_TOLD_APART, high):
        verdict = "failed"
        meaning = "Samples are not like the data: do not use them in the data's place. Train longer."
    elif accuracy > high:
        verdict = "warning"
        meaning = "Samples differ from the data: compare them by eye, and train longer or with a larger field."
    elif high > _VISIBLE_ACCURACY:
        verdict = "cannot tell"
        meaning = (
            f"A difference that gives samples away in fewer than {100 * high:.0f} % of cases could not have been "
            "seen: take more held-out data."
        )
    else:
        verdict, meaning = "ok", "No difference is seen; more held-out data would show a smaller one."
    curves = {"held_out": scores[:n].tolist(), "samples": scores[n:].tolist()}
    return Check(TWO_SAMPLE, verdict, f"{found} {meaning}", numbers, curves)


def null_limit(n: int) -> float:
    """The accuracy that guessing exceeds with a probability below 0.1 %, for ``n`` samples and ``n`` data.

    Folds share training data, so an accuracy varies more than that of ``2 n`` coins: its deviation is widened by
    the factor of Nadeau and Bengio (2003), which is conservative.
    """
    from scipy.stats import norm

    widened = math.sqrt((1 / _FOLDS + 1 / (_FOLDS - 1)) * _FOLDS)
    return 0.5 + float(norm.isf(_FALSE_ALARM)) * widened * 0.5 / math.sqrt(2 * n)


def _scores(features: Tensor, n: int, seed: int) -> Tensor:
    """For each row the probability of being a sample, by classifiers that were trained without it."""
    import numpy as np
    from sklearn.decomposition import PCA
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import KFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    forest: Any = RandomForestClassifier(100, min_samples_leaf=2, random_state=seed)
    if features.shape[1] > 2 * _COMPONENTS:
        fewest = len(features) * (_FOLDS - 1) // _FOLDS
        forest = make_pipeline(PCA(min(_COMPONENTS, fewest), random_state=seed), forest)
    # a sample and the data of its context stay in one fold: apart, one would give the other's label away
    halves = KFold(_FOLDS, shuffle=True, random_state=seed).split(np.arange(n))
    folds = [(np.concatenate([a, a + n]), np.concatenate([b, b + n])) for a, b in halves]
    labels = np.repeat([0, 1], n)
    found: Any = cross_val_predict(forest, features.numpy(), labels, cv=folds, method="predict_proba")
    return torch.from_numpy(found[:, 1])


_DRAWS, _NUMBERS = 10_000, 4_000_000  # samples of the model, and numbers in them at most
_VISIBLE_DISTANCE, _FAR = 0.15, 0.2


def columns(subject: Subject, data: HeldOut) -> Check:
    """The distribution of each column of the held-out rows against that of many samples."""
    with data.noise():
        drawn = subject.sample(min(_DRAWS, _NUMBERS // subject.dims), None)
    if not bool(torch.isfinite(drawn).all()):
        return Check(COLUMNS, "failed", _NOT_FINITE)
    return _compared(COLUMNS, data.x, drawn, [data.column(k) for k in range(subject.dims)], "samples of the model")


def latents(subject: Subject, data: HeldOut) -> Check:
    """Held-out rows, pushed to the latent, against the base distribution: each dimension, and the base's density.

    If the density is that of the data, latents follow the base for every context. The density of the base at the
    latents is of all dimensions together: for a model that is too narrow, the data lie too far out.
    """
    base = subject.model.base
    with data.noise():
        z = subject.encode(data.x, data.context).z.reshape(len(data.x), *base.event_shape)
        drawn = base.sample(torch.Size([min(_DRAWS, _NUMBERS // subject.dims)]))
    real, expected = (torch.cat([each.flatten(1), base.log_prob(each)[:, None]], 1) for each in (z, drawn))
    names = [*(f"dimension {k}" for k in range(subject.dims)), "the latents' density"]
    return _compared(LATENTS, real, expected, names, "draws of the base distribution")


def distances(real: Tensor, drawn: Tensor) -> tuple[list[float], list[float], float]:
    """Kolmogorov-Smirnov distances of the columns of ``real (n, K)`` and ``drawn (m, K)``.

    Returns:
        The largest difference of the two distribution functions of each column; p-values of all columns together,
        by Holm's correction; and the smallest distance that would be noticed, at 0.1 % false alarms together.
    """
    from scipy.stats import ks_2samp, kstwo

    pairs = zip(real.cpu().double().T.numpy(), drawn.cpu().double().T.numpy(), strict=True)
    tests: list[Any] = [ks_2samp(one, other, method="asymp") for one, other in pairs]
    count, worst, adjusted = len(tests), 0.0, [1.0] * len(tests)
    for rank, k in enumerate(sorted(range(count), key=lambda k: tests[k].pvalue)):
        worst = max(worst, (count - rank) * float(tests[k].pvalue))
        adjusted[k] = min(1.0, worst)
    effective = max(1, round(len(real) * len(drawn) / (len(real) + len(drawn))))
    limit = float(kstwo.isf(_FALSE_ALARM / count, effective))
    return [float(test.statistic) for test in tests], adjusted, limit


def _compared(name: str, real: Tensor, drawn: Tensor, names: list[str], other: str) -> Check:
    from scipy.stats import norm

    found, p_values, limit = distances(real, drawn)
    differ = [k for k, p in enumerate(p_values) if p < _FALSE_ALARM]
    worst = max(range(len(names)), key=lambda k: (-p_values[k], found[k]))
    distance = found[worst]
    numbers = {
        "p_value": p_values[worst], "distance": distance, "worst": worst, "different": len(differ),
        "limit": limit, "samples": len(real), "draws": len(drawn),
    }  # fmt: skip
    sentence = (
        f"{len(real)} held-out samples against {len(drawn)} {other}: the distribution functions are at most "
        f"{distance:.2g} apart ({names[worst]}), p = {numbers['p_value']:.2g} (Kolmogorov-Smirnov, Holm's "
        "correction)."
    )
    verdict: Verdict
    if differ:
        verdict = "failed" if distance >= _FAR else "warning"
        more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
        listed = ", ".join(names[k] for k in differ[:5]) + more
        sentence += (
            f" The density is not that of the data in {listed}: compare them in the corner plot, and train longer "
            "or with a larger field."
        )
    else:
        shift = 2 * float(norm.isf((1 - limit) / 2))
        verdict = "ok" if limit <= _VISIBLE_DISTANCE else "cannot tell"
        more = "" if verdict == "ok" else " Take more held-out data."
        sentence += (
            f" Distances below {limit:.2g} could not have been seen, such as a normal distribution that is "
            f"shifted by {shift:.2g} deviations.{more}"
        )
    return Check(name, verdict, sentence, numbers, {"distance": found})


_POSTERIOR_DRAWS = 63  # posterior samples of each pair: the rank is one of 64
_PER_BIN = 10  # expected pairs in a bin of the histogram, at least
_MAX_BINS = 16
_FEWEST_PAIRS, _ENOUGH_PAIRS, _MOST_PAIRS = 40, 200, 1024
_RANKS_WARN, _RANKS_FAIL = 1e-2, 1e-3  # false alarm rates, all dimensions together


def ranks(subject: Subject, data: HeldOut) -> Check:
    """The rank of each held-out sample among samples of its posterior, a chi-square test for each dimension."""
    from scipy.stats import chisquare

    data = data.first(_MOST_PAIRS)
    n = len(data.x)
    assert data.context is not None
    if n < _FEWEST_PAIRS:
        sentence = f"Left out: {n} pairs are too few for a histogram of ranks; give at least {_FEWEST_PAIRS}."
        return Check(RANKS, "left out", sentence, {"pairs": n})
    with data.noise():
        drawn = subject.sample(n * _POSTERIOR_DRAWS, data.context.repeat_interleave(_POSTERIOR_DRAWS, 0))
    below = drawn.reshape(n, _POSTERIOR_DRAWS, -1) < data.x.flatten(1)[:, None]
    rank = below.sum(1).cpu().double()  # (N, D), 0 to 63
    bins = max(b for b in (2, 4, 8, _MAX_BINS) if n // b >= _PER_BIN)
    width = (_POSTERIOR_DRAWS + 1) // bins
    counts = torch.stack([torch.bincount((column // width).long(), minlength=bins) for column in rank.T])
    p_values = [float(chisquare(row.numpy()).pvalue) for row in counts]
    worst = min(range(len(p_values)), key=p_values.__getitem__)
    p_value = min(1.0, p_values[worst] * len(p_values))
    place = (rank[:, worst] + 0.5) / (_POSTERIOR_DRAWS + 1)
    numbers = {
        "p_value": p_value, "worst_dimension": worst, "mean_rank": float(place.mean()),
        "spread": float((place - 0.5).square().mean() * 12),
        "outer": float(counts[worst][0] + counts[worst][-1]) * bins / (2 * n),
        "pairs": n, "draws": _POSTERIOR_DRAWS, "bins": bins,
    }  # fmt: skip
    curves = {f"dimension {k}": row.tolist() for k, row in enumerate(counts.double()) if k < _MAX_BINS}
    sentence = (
        f"Ranks of {n} held-out samples among {_POSTERIOR_DRAWS} draws of their posteriors: p = {p_value:.2g} for "
        "uniform ranks (chi-square, all dimensions together)."
    )
    verdict: Verdict
    if not p_value >= _RANKS_WARN:
        verdict = "warning" if p_value >= _RANKS_FAIL else "failed"
        sentence += (
            f" In {data.column(worst)} the posterior {_what_is_wrong(numbers)}. Do not use its intervals as they "
            "are; train with more pairs, longer, or with a larger field."
        )
    elif n < _ENOUGH_PAIRS:
        verdict = "cannot tell"
        sentence += f" With fewer than {_ENOUGH_PAIRS} pairs a posterior 1.3 times too narrow often goes unseen."
    else:
        verdict = "ok"
        sentence += " Nothing speaks against the posterior's width and place."
    return Check(RANKS, verdict, sentence, numbers, curves)


def _what_is_wrong(numbers: dict[str, float]) -> str:
    pairs, off, spread = numbers["pairs"], numbers["mean_rank"] - 0.5, numbers["spread"]
    # of uniform ranks the mean has the deviation 1 / sqrt(12 N), the spread about sqrt(0.8 / N), and the share of
    # the two outermost bins about sqrt(bins / 2 N)
    shift = abs(off) * math.sqrt(12 * pairs)
    stretch = abs(spread - 1) * math.sqrt(pairs / 0.8)
    outer = (numbers["outer"] - 1) * math.sqrt(2 * pairs / numbers["bins"])
    if shift > max(stretch, abs(outer), 2):
        return f"is shifted: true values lie too {'high' if off > 0 else 'low'} in it"
    if spread > 1 and outer > 2:
        return "is too narrow: true values lie in its tails too often, so it is overconfident"
    if spread < 1 and outer < -2:
        return "is too wide: true values lie in its middle too often, so it is less informative than it could be"
    return "has not the shape of the true one, such as modes that run together: see the histogram of the ranks"
