"""Checks of samples: a classifier that tells them from data, and posterior ranks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .result import Check, Verdict
from .subject import HeldOut, Subject

__all__ = ["RANKS", "TWO_SAMPLE", "ranks", "two_sample"]


TWO_SAMPLE = "two samples"
_FOLDS = 5
_FEWEST = 20  # samples: fewer teach a classifier nothing
_COMPONENTS = 32  # of a principal component analysis, for more dimensions than twice that
_FALSE_ALARM = 1e-3
_TOLD_APART = 0.9  # accuracy


def two_sample(subject: Subject, data: HeldOut) -> Check:
    """Cross-validated accuracy of a random forest that tells samples from held-out data."""
    n = len(data.x)
    if n < _FEWEST:
        sentence = (
            f"Left out: {n} held-out samples are too few to train a classifier; use at least {_FEWEST} (samples)."
        )
        return Check(TWO_SAMPLE, "left out", sentence, {"samples": n})
    with data.noise():
        samples = subject.sample(n, data.context)
    real, drawn = _features(data.x, data.context), _features(samples, data.context)
    if not bool(torch.isfinite(drawn).all()):
        sentence = "Some of the model's samples are not finite: it cannot be sampled. Use a more accurate solver."
        return Check(TWO_SAMPLE, "failed", sentence, {"samples": n})
    features = torch.cat([real, drawn])
    if data.x.ndim == 2:  # columns have units of their own, of which no component must depend
        features = features / features.std(0).clamp(min=1e-30)
    scores = _scores(features, n, data.seed)
    sides = torch.sign(scores - 0.5) * torch.where(torch.arange(2 * n) < n, -1, 1)  # 1 if right, 0 if undecided
    accuracy = float((sides + 1).mean() / 2)
    high = null_limit(n)
    verdict: Verdict = "ok" if accuracy <= high else "failed" if accuracy >= _TOLD_APART else "warning"
    numbers = {"accuracy": accuracy, "null_low": 1 - high, "null_high": high, "samples": n, "dims": real.shape[1]}
    curves = {"held_out": scores[:n].tolist(), "samples": scores[n:].tolist()}
    return Check(TWO_SAMPLE, verdict, _two_sample_sentence(verdict, numbers), numbers, curves)


def null_limit(n: int) -> float:
    """The accuracy that guessing exceeds with a probability below 0.1 %, for ``n`` samples and ``n`` data.

    Folds share training data, so an accuracy varies more than that of ``2 n`` coins: its deviation is widened by
    the factor of Nadeau and Bengio (2003), which is conservative.
    """
    from scipy.stats import norm

    widened = math.sqrt((1 / _FOLDS + 1 / (_FOLDS - 1)) * _FOLDS)
    return 0.5 + float(norm.isf(_FALSE_ALARM)) * widened * 0.5 / math.sqrt(2 * n)


def _features(x: Tensor, context: Tensor | None) -> Tensor:
    """Flattened samples, and with them the contexts that they belong to: ``(N, features)`` on the CPU."""
    flat = x.flatten(1).cpu().double()
    return flat if context is None else torch.cat([flat, context.reshape(len(context), -1).cpu().double()], 1)


def _scores(features: Tensor, n: int, seed: int) -> Tensor:
    """For each row the probability of being a sample, by classifiers that were not shown it."""
    import numpy as np
    from sklearn.decomposition import PCA
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import KFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    forest: Any = RandomForestClassifier(100, min_samples_leaf=2, random_state=seed)
    if features.shape[1] > 2 * _COMPONENTS:
        fewest = len(features) * (_FOLDS - 1) // _FOLDS
        forest = make_pipeline(PCA(min(_COMPONENTS, fewest), random_state=seed), forest)
    # a sample and the data of its context stay together: apart, one would give the other's label away
    halves = KFold(_FOLDS, shuffle=True, random_state=seed).split(np.arange(n))
    folds = [(np.concatenate([a, a + n]), np.concatenate([b, b + n])) for a, b in halves]
    labels = np.repeat([0, 1], n)
    found: Any = cross_val_predict(forest, features.numpy(), labels, cv=folds, method="predict_proba")
    return torch.from_numpy(found[:, 1])


def _two_sample_sentence(verdict: Verdict, numbers: dict[str, float]) -> str:
    accuracy = 100 * numbers["accuracy"]
    low, high = (100 * numbers[name] for name in ("null_low", "null_high"))
    found = (
        f"A classifier tells samples from held-out data in {accuracy:.0f} % of cases; 50 % is guessing, and "
        f"guessing alone gives {low:.0f} to {high:.0f} % with {numbers['samples']:.0f} of each."
    )
    if verdict == "ok":
        return f"{found} No difference is seen; more samples would show a smaller one."
    if verdict == "warning":
        return (
            f"{found} Samples differ from the data: compare them by eye, and train longer or with a larger field."
        )
    return f"{found} Samples are not like the data: do not use them in the data's place. Train longer."


RANKS = "posterior ranks"
_POSTERIOR_DRAWS = 63  # posterior samples of each pair: the rank is one of 64
_PER_BIN = 10  # pairs that a bin of the histogram is expected to hold at least
_MAX_BINS = 16
_FEWEST_PAIRS = 40  # pairs
_RANKS_WARN, _RANKS_FAIL = 1e-2, 1e-3  # false alarm rates, all dimensions together


def ranks(subject: Subject, data: HeldOut) -> Check:
    """The rank of each held-out sample among samples of its posterior, a chi-square test for each dimension."""
    from scipy.stats import chisquare

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
    verdict: Verdict = "failed" if not p_value >= _RANKS_FAIL else "warning" if p_value < _RANKS_WARN else "ok"
    place = (rank + 0.5) / (_POSTERIOR_DRAWS + 1)
    mean = float(place[:, worst].mean())
    spread = float((place[:, worst] - 0.5).square().mean() * 12)
    outer = float(counts[worst][0] + counts[worst][-1]) * bins / (2 * n)
    numbers = {
        "p_value": p_value, "worst_dimension": worst, "mean_rank": mean, "spread": spread, "outer": outer,
        "pairs": n, "draws": _POSTERIOR_DRAWS, "bins": bins,
    }  # fmt: skip
    curves = {f"dimension {k}": row.tolist() for k, row in enumerate(counts.double()) if k < _MAX_BINS}
    return Check(RANKS, verdict, _ranks_sentence(verdict, numbers), numbers, curves)


def _ranks_sentence(verdict: Verdict, numbers: dict[str, float]) -> str:
    found = (
        f"Ranks of {numbers['pairs']:.0f} held-out samples among {numbers['draws']:.0f} draws of their posteriors: "
        f"p = {numbers['p_value']:.2g} for uniform ranks (chi-square, all dimensions together)."
    )
    if verdict == "ok":
        return f"{found} Nothing speaks against the posterior's width and place."
    return (
        f"{found} In dimension {numbers['worst_dimension']:.0f} the posterior {_what_is_wrong(numbers)}. Do not "
        "use its intervals as they are; train with more pairs, longer, or with a larger field."
    )


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
